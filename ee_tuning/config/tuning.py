"""Section `tuning`: the tuner."""

from dataclasses import dataclass, field
from typing import Literal

from ee_tuning.config.depth_sampling import DepthSampling
from ee_tuning.config.paths import PATH
from ee_tuning.config.trainable import Trainable

WeightFormat = Literal["native", "int8", "nf4"]


@dataclass(frozen=True)
class TeacherPlan:
    """The final head as a teacher. The layers after the last exit are then built, too."""

    in_training: bool
    """Whether the loss needs its distribution. Validations always compare exits with it."""
    sends_hidden: bool
    """Whether its input states are sent, and not its likeliest tokens. Every stage with an exit then holds the output
    matrix.
    """


@dataclass(frozen=True, kw_only=True)
class TuningSection:
    """The tuner."""

    run_folder: str = field(default="runs/tune", metadata=PATH)
    """Folder for checkpoints, metrics and the tuned artifact."""
    train_iters: int = 1000
    """Total number of optimizer steps."""
    micro_batch_size: int = 4
    """Sequences per forward pass of one data-parallel replica."""
    global_batch_size: int = 16
    """Sequences per optimizer step over all replicas."""
    seq_length: int = 0
    """Tokens per sequence. 0: 2048, or the model's number of positions if it is smaller."""
    forward_chunk_length: int = 0
    """Tokens of each sequence that go through the frozen layers at a time; a divisor of seq_length. Later ones attend
    to the keys and values of earlier ones, and losses and gradients are the same up to rounding. 0: 4096 where
    seq_length is above 8192 and a multiple of 4096, else all.
    """
    lr: float = 1e-4
    """Largest learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine or linear decay."""
    lr_warmup_fraction: float = 0.01
    """Share of train_iters over which the learning rate rises from zero."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-5
    clip_grad: float = 1.0
    """Largest gradient norm of one exit head; 0 for no clipping."""
    skip_grad_norm: float = 0.0
    """An exit's step is skipped where its gradient norm, before clipping, is above this; 0: only where it is not
    finite.
    """
    loss: tuple[str, ...] = ("cross_entropy",)
    """Training objective of exits: cross_entropy, forward_kl, total_variation and lk, all but the first against the
    final head's distribution. Several are summed, with optional weights: cross_entropy=0.3,forward_kl=0.7. lk moves
    from forward_kl to total_variation as more of a token's probability agrees (arXiv 2602.23881).
    """
    teacher: Literal["auto", "hidden", "top_k"] = "auto"
    """Form in which the final head's distribution is sent to the stages: hidden (its input states; exact; every stage
    with exits then holds the output matrix), or its top_k likeliest tokens and the total mass of the others. auto:
    hidden where all exits are tied to the output matrix, else top_k.
    """
    teacher_top_k: int = 64
    """Number of tokens that the teacher top_k sends."""
    token_weights: Literal["uniform", "confidence"] = "uniform"
    """confidence: each token's loss is multiplied by the exit's largest probability, held constant (EE-Tuning's dynamic
    weights).
    """
    divide_by_token_weights: bool = False
    """Whether the loss is divided by the sum of the tokens' weights instead of their number."""
    loss_weights: tuple[float, ...] = ()
    """One per exit; default as loss_weight_preset. With separate heads, clipping and Adam they nearly cancel out;
    weight 0 freezes an exit.
    """
    loss_weight_preset: Literal["uniform", "depth"] = "uniform"
    """uniform: 1 for every exit. depth: its layer divided by the deepest exit's."""
    loss_weight_style: Literal["constant", "linear", "cosine"] = "constant"
    """Form of the weights' rise from zero over the first steps."""
    loss_weight_warmup_fraction: float = 0.1
    """Share of train_iters over which they rise."""
    compare_final: bool = False
    """Whether validations measure how often each exit agrees with the final head, and how many of its drafts that would
    accept.
    """
    fit_tokens: int = 0
    """Tokens that exits.init = fitted reads, at most all of the training data. 0: 100 × (hidden size + 1)."""
    ttt_steps: int = 3
    """Tokens that an `eagle3` head drafts after each token of a text while it is trained (training-time test)."""
    ttt_step_loss_decay: float = 1.0
    """Weight of a drafted token's loss relative to the previous one's."""
    loss_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time."""
    trainable: str = "heads"
    """What is trained. heads: the exits alone; the model is frozen and has no backward pass. lora: low-rank matrices
    beside the layers' linear maps, too (arXiv 2106.09685). mlp: the layers' MLPs, too. last:K: the last K layers and
    the final norm, too. backbone: all layers and the final norm, too. half: of these, half of the matrices of each
    kind, the others frozen (HFT, arXiv 2404.18466). all: the backbone, the embedding and the output matrix, too, which
    otherwise stay as they are.
    """
    half_steps: int = 0
    """Optimizer steps after which trainable = half chooses another half; 0: one half for the whole run."""
    lora_rank: int = 8
    """Rank of trainable = lora."""
    lora_alpha: float = 16.0
    """The low-rank product is multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ()
    """Linear maps beside which trainable = lora trains, by Hugging Face's names (q_proj, down_proj, …); default all of
    a layer's, or those of attention in a model with experts.
    """
    final_loss_weight: float = 1.0
    """Weight of the model's own loss, that of its final head, where trainable is more than heads. Exits' losses add to
    it by loss_weights.
    """
    teacher_model: str | None = field(default=None, metadata=PATH)
    """A second model, frozen, that the final head learns from where trainable is more than heads: for a pruned model,
    the one that it was pruned from. It runs beside the model, in the same layout, and needs the same vocabulary.
    """
    final_loss: tuple[str, ...] = ()
    """Objective of the final head, written like loss; all terms but cross_entropy are against teacher_model. Default:
    forward_kl with a teacher_model, else cross_entropy.
    """
    layer_dropout: float = 0.0
    """Largest probability, that of the last layer, with which a layer is left out of a training micro-batch, where
    trainable is more than heads: LayerSkip's (arXiv 2404.16710), whose first layer is never left out. Nor is one that
    an `mlp` exit reads.
    """
    depth_sampling: str = "all"
    """The depths that a micro-batch trains. all: every exit, and the end of the model where it is trained.
    rotate:N: each optimizer step trains every N-th exit, the next step the next ones (LayerSkip's rotating early-exit
    loss), and the end of the model. random: one depth, an exit's or the end, drawn for each micro-batch of a replica
    (SortedNet, arXiv 2309.00255); deeper layers are not run. It is for exits.output = shared.
    """
    recompute_activations: bool = False
    """Whether the backward pass computes a layer's activations anew instead of keeping them: one more forward pass, and
    memory for the layers' inputs alone.
    """
    backbone_weights: WeightFormat = "native"
    """Storage of the frozen layers' matrices while tuning. int8 takes half the memory of bfloat16 (torchao), nf4 0.28
    of it (4 bits, bitsandbytes); the exits then learn from slightly different states. Embedding, norms, output matrix
    and exits are not quantized.
    """
    seed: int = 1234
    """Seed of the order of the samples."""
    log_interval: int = 1
    """Steps between records in metrics.jsonl."""
    eval_interval: int = 100
    """Steps between validations; 0 for only one before the first step and one after the last."""
    eval_iters: int = 8
    """Micro-batches per replica in one validation; 0 for no validation."""
    wandb_project: str | None = None
    """Weights & Biases project that receives the metrics; needs the package wandb. TensorBoard receives them wherever
    it is installed.
    """
    save_interval: int = 500
    """Steps between checkpoints; the end of a run always saves. 0 for only the end."""
    save_minutes: float = 0.0
    """Minutes after which another checkpoint is written at the end of the step; 0 for none."""
    async_save: bool = True
    """Whether training continues while a checkpoint is written, from a copy in host memory: the heads' float32 master
    weights and Adam's moments, 12 bytes per parameter, shared by the replicas. Otherwise it waits for the disk.
    """
    keep_checkpoints: int = 2
    """Number of checkpoints to keep. Older ones are removed; later ones, too, where a run resumed from one before
    them.
    """
    resume: bool = True
    """Continue from the run folder's latest checkpoint if it has one, of the same job. Otherwise it must have none."""
    allow_config_change: bool = False
    """Continue even if the run folder's job had other values. The exits and the data must be the same."""
    stop_exit_code: int = 75
    """Exit code of a run that a signal stopped early, so that its caller can start it again."""

    @property
    def trained(self) -> Trainable:
        """`trainable`, parsed. Raises InputError on an unknown word."""
        return Trainable.of(self.trainable)

    @property
    def depths(self) -> DepthSampling:
        """`depth_sampling`, parsed. Raises InputError on an unknown word."""
        return DepthSampling.of(self.depth_sampling)

    @property
    def pass_length(self) -> int:
        """Tokens of each sequence that go through the frozen layers at a time, and from stage to stage in a message."""
        return self.forward_chunk_length or self.seq_length

    def teacher_plan(self, *, ties_output: bool, drafts: bool = False) -> TeacherPlan | None:
        """Returns the final head's part, or None where neither the loss nor validations need its distribution.

        `ties_output`: all exits are tied to the output matrix. `drafts`: the only exit is a drafting head, which is on
        the final head's stage.
        """
        in_training = any(item.partition("=")[0].strip() != "cross_entropy" for item in self.loss)
        if not in_training and not self.compare_final:
            return None
        is_hidden = self.teacher == "hidden" or (self.teacher == "auto" and ties_output)
        return TeacherPlan(in_training, sends_hidden=is_hidden or drafts)
