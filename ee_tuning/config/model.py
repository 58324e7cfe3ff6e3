"""Sections `model`, `exits` and `parallel`: the backbone, its exit heads, and their layout."""

from dataclasses import dataclass, field
from typing import Literal

from ee_tuning.config.output_vocab import AutoVocab
from ee_tuning.config.paths import PATH
from ee_tuning.config.placement import AutoLayers, evenly_along
from ee_tuning.errors import InputError

Architecture = Literal["embedding", "norm", "linear", "mlp", "layer", "adapter"]
DType = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The backbone."""

    path: str = field(default="", metadata=PATH)
    """Folder of the model: Hugging Face's, a Megatron checkpoint or a run's folder of them; or a GGUF file; or
    org/name, or org/name@revision, on the Hugging Face hub.
    """
    config: str | None = field(default=None, metadata=PATH)
    """Shape of a Megatron checkpoint whose saved arguments are missing or lack something: a Hugging Face config.json,
    or YAML with Megatron's names.
    """
    trust_pickle: bool = False
    """Unpickle a Megatron checkpoint whatever its pickles ask for: they may run anything."""
    trust_remote_code: bool = False
    """Run the Python files that a tokenizer's folder brings with it: they may do anything. Without it, a tokenizer that
    needs them is refused.
    """
    dtype: DType | None = None
    """Precision of the frozen weights and activations; default float32 on CPU, bfloat16 on CUDA. bfloat16 on a CPU
    takes half the memory, and decodes faster; for tuning and long prompts the processor needs instructions for it
    (AVX512_BF16 or AMX).
    """


@dataclass(frozen=True, kw_only=True)
class ExitsSection:
    """The exit heads: an artifact that exists, or what to make."""

    path: str | None = field(default=None, metadata=PATH)
    """Exit-heads artifact to start from. Without it, `tune` converts by itself from the other keys."""
    exit_layers: tuple[int, ...] | AutoLayers = ()
    """Backbone layers (1-based, increasing) that are followed by an exit head. auto:8: eight, evenly in depth.
    auto:8:profile: evenly by how far the hidden states of a text turn (`ee-tuning profile`).
    """
    profile_text: str | None = field(default=None, metadata=PATH)
    """Text file that the hidden states are looked at on for auto:N:profile; by default some Python source code."""
    architecture: tuple[Architecture, ...] = ()
    """One for all exits, or one per exit; default mlp, or norm for a model with experts, which takes no mlp. embedding:
    an output matrix alone. norm: final norm and output matrix. linear: a linear map between these two (tuned lens).
    mlp: layer l's MLP, trained anew, before them. layer: a whole transformer layer before them. adapter: a low-rank MLP
        before them.
    """
    adapter_rank: int = 64
    """Inner width of `adapter` heads."""
    init: Literal["copy", "random", "fitted"] = "copy"
    """copy: from the backbone's own norm, MLP or last layer, and output matrix. random: as the model was initialized.
    fitted: copied, and a linear map before the output matrix fitted by least squares to the final states of texts
        (data.paths); where the exit has an output
    matrix of its own, the map becomes part of it.
    """
    output: Literal["untied", "tied"] = "untied"
    """untied: each exit trains its own output matrix. tied: the backbone's frozen one."""
    output_vocab: int | AutoVocab = 0
    """Tokens that exits say: the most frequent ones of data.paths, special and stop tokens among them; any other token
    is one class more, and none leaves where that is likeliest. The output matrices, untied, have so many rows. 0: the
    whole vocabulary. auto: by what asking costs and how many tokens of the texts are listed.
    """
    seed: int = 1234
    """Seed of random initialization."""
    verify: bool = True
    """Whether every file of an artifact, and of a model that has a manifest, is checked against its sha256 before it is
    used.
    """

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """`exit_layers` of a model with so many layers. Raises InputError where it would have to be run to know
        them.
        """
        if not isinstance(self.exit_layers, AutoLayers):
            return self.exit_layers
        if self.exit_layers.by_profile:
            raise InputError(
                f"exits.exit_layers = {self.exit_layers} asks for a model that runs; write the layers that `ee-tuning profile "
                f"--num-exits {self.exit_layers.num_exits}` prints"
            )
        return evenly_along(range(1, num_layers + 1), self.exit_layers.num_exits)

    def __post_init__(self) -> None:
        if isinstance(self.architecture, str):  # from Python, where a lone word would be taken for its letters
            object.__setattr__(self, "architecture", (self.architecture,))


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """How the model is laid out. Data parallelism is what remains of the world."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Stages, one after the other, that the layers are divided into."""
    pipeline_layout: tuple[int, ...] = ()
    """Layers of each stage, first to last; by default they are split by their modelled cost, exits included."""
    distributed_timeout_minutes: float = 30.0
    """A rank that has waited so long for another one gives up, and says what it waited for."""
    sequence_parallel: bool = False
    """Whether tuning cuts the hidden states between layers along the sequence over the processes that share each layer:
    less memory, and shorter messages between stages. Without effect where tensor_model_parallel_size is 1, and in
    decoding.
    """
