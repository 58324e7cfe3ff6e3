"""Section `tuning`: the tuner."""

from dataclasses import dataclass, field
from typing import Literal

from ee_tuning.config.paths import PATH

WeightFormat = Literal["native", "int8", "nf4"]


@dataclass(frozen=True, kw_only=True)
class TuningSection:
    """The tuner."""

    run_folder: str = field(default="runs/tune", metadata=PATH)
    """Where checkpoints, metrics and the tuned artifact go."""
    train_iters: int = 1000
    """Optimizer steps in all."""
    micro_batch_size: int = 4
    """Sequences per forward pass of one data-parallel replica."""
    global_batch_size: int = 16
    """Sequences per optimizer step over all replicas."""
    seq_length: int = 0
    """Tokens per sequence. 0: 2048, or as many as the model has positions where those are fewer."""
    lr: float = 1e-4
    """Largest learning rate."""
    min_lr: float = 1e-5
    """The cosine or linear decay ends here."""
    lr_warmup_fraction: float = 0.01
    """Share of train_iters over which the learning rate rises from zero."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-5
    clip_grad: float = 1.0
    """Largest gradient norm of one exit head; 0 leaves gradients as they are."""
    skip_grad_norm: float = 0.0
    """An exit's step is left out where its gradient norm, before the clip, is above this; 0: only where it is not
    finite.
    """
    loss: tuple[str, ...] = ("cross_entropy",)
    """What exits are trained to: cross_entropy, forward_kl and total_variation, the latter two by the final head's
    distribution. Several are added up, with weights where given: cross_entropy=0.3,forward_kl=0.7.
    """
    teacher: Literal["auto", "hidden", "top_k"] = "auto"
    """How the final head reaches the stages: hidden (states; exact; the output matrix is then on every stage with
    exits), or its top_k likeliest tokens and the mass of the others. auto: hidden where all exits are tied to the
    output matrix, else top_k.
    """
    teacher_top_k: int = 64
    """Tokens that the teacher top_k tells of."""
    token_weights: Literal["uniform", "confidence"] = "uniform"
    """confidence: each token's loss is multiplied by the exit's largest probability, held constant (EE-Tuning's dynamic
    weights).
    """
    divide_by_token_weights: bool = False
    """Whether the loss is divided by the sum of the tokens' weights in place of their number."""
    loss_weights: tuple[float, ...] = ()
    """One per exit; default as loss_weight_preset. With separate heads, clip and Adam they nearly cancel; weight 0
    freezes that exit.
    """
    loss_weight_preset: Literal["uniform", "depth"] = "uniform"
    """uniform: 1 for every exit. depth: its layer divided by the deepest exit's."""
    loss_weight_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the weights rise from zero over the first steps."""
    loss_weight_warmup_fraction: float = 0.1
    """Share of train_iters over which they rise, where they do."""
    compare_final: bool = False
    """Whether validations tell how often each exit agrees with the final head, and how many of its drafts that would
    accept.
    """
    fit_tokens: int = 0
    """Tokens that exits.init = fitted reads; fewer where the training data hold no more. 0: 100 × (hidden size + 1)."""
    loss_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time."""
    backbone_weights: WeightFormat = "native"
    """How the frozen layers' matrices are held while tuning. int8 takes half the memory of bfloat16 (torchao), nf4 0.28
    of it (4 bits, bitsandbytes): what the exits learn from is then a little off. Embedding, norms, output matrix and
    exits stay as they are.
    """
    seed: int = 1234
    """Seed of the order of the samples."""
    log_interval: int = 1
    """Steps between records in metrics.jsonl."""
    eval_interval: int = 100
    """Steps between validations; 0 for none but those before the first step and after the last."""
    eval_iters: int = 8
    """Micro-batches per replica in one validation; 0 for no validation."""
    wandb_project: str | None = None
    """Weights & Biases project that gets the metrics, too; it wants the package wandb. TensorBoard gets them wherever
    it is installed.
    """
    save_interval: int = 500
    """Steps between checkpoints; the end of a run always saves. 0 for the end alone."""
    save_minutes: float = 0.0
    """Minutes after which a checkpoint is written at the end of the step, too; 0 for none."""
    async_save: bool = True
    """Whether training goes on while a checkpoint is written, from a copy in host memory: the heads' float32 masters
    and Adam's moments, 12 bytes a parameter, shared by the replicas. Otherwise it waits for the disk.
    """
    keep_checkpoints: int = 2
    """Older checkpoints than this many are removed; later ones too, where a run went on from one before them."""
    resume: bool = True
    """Continue from the run folder's latest checkpoint, where it has one of the same job; else it must have none."""
    allow_config_change: bool = False
    """Continue though the run folder's job had other values; what the exits are, and the data, must stay."""
    stop_exit_code: int = 75
    """Exit code of a run that a signal stopped before its end, for whoever started it to start it again."""

    @property
    def distils(self) -> bool:
        """Whether the loss asks for the final head's distribution."""
        return any(item.partition("=")[0].strip() != "cross_entropy" for item in self.loss)

    @property
    def wants_final_head(self) -> bool:
        """Whether the layers past the last exit, and the final head, are built."""
        return self.distils or self.compare_final

    def sends_hidden(self, ties_output: bool) -> bool:
        """Whether the teacher is told by hidden states, where exits are tied to the output matrix or not."""
        return self.wants_final_head and (self.teacher == "hidden" or (self.teacher == "auto" and ties_output))
