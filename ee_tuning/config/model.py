"""Sections `model`, `exits` and `parallel`: the backbone, its exit heads, and their layout."""

from dataclasses import dataclass, field
from typing import Literal

from ee_tuning.config.output_vocab import AutoVocab
from ee_tuning.config.paths import PATH
from ee_tuning.config.placement import AutoLayers, evenly_along
from ee_tuning.errors import InputError

Architecture = Literal["embedding", "norm", "linear", "mlp", "layer", "adapter", "eagle3"]
DType = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The backbone."""

    path: str = field(default="", metadata=PATH)
    """Folder of the model: Hugging Face's, a Megatron checkpoint, or a run's folder of checkpoints; or a GGUF file; or
    org/name or org/name@revision on the Hugging Face hub.
    """
    config: str | None = field(default=None, metadata=PATH)
    """Shape of a Megatron checkpoint whose saved arguments are missing or incomplete: a Hugging Face config.json, or
    YAML with Megatron's names.
    """
    adapter: str | None = field(default=None, metadata=PATH)
    """Folder of weights that were trained for the model: a LoRA adapter as peft saves it, whose products are added to
    the model's matrices, or what `tune` wrote with tuning.trainable = mlp, last:K, half, backbone or all.
    """
    trust_pickle: bool = False
    """Unpickle a Megatron checkpoint without restrictions. Its pickles may then run any code."""
    trust_remote_code: bool = False
    """Run the Python files in a tokenizer's folder, which may do anything. Otherwise a tokenizer that needs them is
    refused.
    """
    dtype: DType | None = None
    """Precision of the frozen weights and activations; default float32 on CPU, bfloat16 on CUDA. bfloat16 on a CPU
    takes half the memory and decodes faster; tuning and long prompts then need a processor with bfloat16 instructions
    (AVX512_BF16 or AMX).
    """


@dataclass(frozen=True, kw_only=True)
class ExitsSection:
    """The exit heads: an existing artifact, or the heads to make."""

    path: str | None = field(default=None, metadata=PATH)
    """Exit-heads artifact to start from. Without it, `tune` makes the heads that the other keys describe. It
    overrules the heads that a job file describes; flags beside it that ask for other heads are refused.
    """
    exit_layers: tuple[int, ...] | AutoLayers = ()
    """Backbone layers (1-based, increasing) followed by an exit head. auto:8: eight, evenly in depth. auto:8:profile:
    evenly by how far the hidden states of a text turn (`ee-tuning profile`).
    """
    profile_text: str | None = field(default=None, metadata=PATH)
    """Text file whose hidden states auto:N:profile measures; by default some Python source code."""
    architecture: tuple[Architecture, ...] = ()
    """One for all exits, or one per exit; default mlp, or norm for a model with experts, which can not have mlp.
    embedding: only an output matrix. norm: final norm and output matrix. linear: a linear map between these two (tuned
    lens). mlp: a trained copy of layer l's MLP before them. layer: a whole transformer layer before them. adapter: a
    low-rank MLP before them. eagle3: no exit but a drafting head at the end of the model, which must be alone: a layer
    of its own reads the states of aux_layers and the next token's embedding (EAGLE-3, arXiv 2503.01840).
    """
    aux_layers: tuple[int, ...] = ()
    """Layers (1-based, increasing) whose states an `eagle3` head reads; 0 is the word embedding. Default: 2, half of
    the layers, and all but three, as in vLLM and SGLang.
    """
    adapter_rank: int = 64
    """Inner width of `adapter` heads."""
    init: Literal["auto", "copy", "random", "fitted"] = "auto"
    """copy: from the backbone's own norm, MLP or last layer, and output matrix. random: like the model's
    initialization. fitted: copied, with a linear map before the output matrix, fitted by least squares to the final
    states of texts (data.paths); an exit with an output matrix of its own absorbs the map. auto: fitted where `tune`
    makes exits; copied where `convert` does, and for a drafting head.
    """
    output: Literal["untied", "tied", "shared"] = "untied"
    """untied: each exit trains its own output matrix. tied: the backbone's frozen one. shared: exits have nothing of
    their own; they apply the model's own norm and output matrix, which all of them train together with the layers, so
    that the first layers up to each exit become a model (SoFT, arXiv 2309.08968). It needs a tuning.trainable beyond
    heads; the artifact then holds copies of the norm, tied.
    """
    output_vocab: int | AutoVocab = 0
    """Size of the exits' vocabulary: the most frequent tokens of data.paths, special and stop tokens included. Any
    other token is one more class, and no token exits where that class is likeliest. Untied output matrices have as many
    rows. 0: the whole vocabulary. auto: chosen by the cost of asking exits and the share of tokens that are listed.
    """
    seed: int = 1234
    """Seed of random initialization."""
    verify: bool = True
    """Whether the files of an artifact, and of a model with a manifest, are verified by sha256 before use."""

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Returns `exit_layers` for a model with `num_layers` layers. Raises InputError where the layers depend on a
        run of the model.
        """
        if self.drafts and not self.exit_layers:
            return (num_layers,)
        if not isinstance(self.exit_layers, AutoLayers):
            return self.exit_layers
        if self.exit_layers.by_profile:
            raise InputError(
                f"exits.exit_layers = {self.exit_layers} asks for a model that runs; write the layers that `ee-tuning profile "
                f"--num-exits {self.exit_layers.num_exits}` prints"
            )
        return evenly_along(range(1, num_layers + 1), self.exit_layers.num_exits)

    @property
    def is_placed_by_profile(self) -> bool:
        """Whether new exits are asked for at layers that a run of the model chooses (auto:N:profile)."""
        return self.path is None and isinstance(self.exit_layers, AutoLayers) and self.exit_layers.by_profile

    @property
    def init_of_tune(self) -> Literal["copy", "random", "fitted"]:
        """`init` of heads that `tune` makes: auto is fitted for exits, because it always has texts."""
        if self.init == "auto":
            return "fitted" if self.exit_layers and not self.drafts and not self.shares_head else "copy"
        return self.init

    @property
    def init_of_convert(self) -> Literal["copy", "random", "fitted"]:
        """`init` of heads that `convert` makes: auto is copy, because it reads no texts unless asked to."""
        return "copy" if self.init == "auto" else self.init

    @property
    def shares_head(self) -> bool:
        """Whether `tune` trains exits that have no weights of their own: sub-models that share the final head."""
        return self.output == "shared" and self.path is None

    @property
    def drafts(self) -> bool:
        """Whether a drafting head is asked for, which sits behind the last layer."""
        return "eagle3" in self.architecture

    def __post_init__(self) -> None:
        if isinstance(self.architecture, str):  # set from Python: a single word would be split into letters
            object.__setattr__(self, "architecture", (self.architecture,))


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """The layout of the model. Data parallelism takes the rest of the world."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages among which the layers are divided."""
    pipeline_layout: tuple[int, ...] = ()
    """Layers of each stage, first to last; by default they are split by their modelled cost, exits included."""
    distributed_timeout_minutes: float = 30.0
    """Time after which a rank stops waiting for another one and reports what it waited for."""
    sequence_parallel: bool = False
    """Whether tuning cuts the hidden states between layers along the sequence, over the processes that share each
    layer. This saves memory and shortens messages between stages. Without effect where tensor_model_parallel_size is 1,
    and in decoding.
    """
