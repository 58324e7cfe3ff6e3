"""Section `tuning`: the tuner."""
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TuningSection:
    """The tuner."""

    run_folder: str = "runs/tune"
    """Where checkpoints, metrics and the tuned artifact go."""
    train_iters: int = 1000
    """Optimizer steps in all."""
    micro_batch_size: int = 4
    """Sequences per forward pass of one data-parallel replica."""
    global_batch_size: int = 16
    """Sequences per optimizer step over all replicas."""
    seq_length: int = 2048
    """Tokens per sequence."""
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
    loss_weights: tuple[float, ...] = ()
    """One per exit; default 1 each. With separate heads, clip and Adam they nearly cancel; weight 0 freezes that exit."""
    loss_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time."""
    seed: int = 1234
    """Of the order of the samples."""
    log_interval: int = 1
    """Steps between records in metrics.jsonl."""
    eval_interval: int = 100
    """Steps between validations; 0 for none but those before the first step and after the last."""
    eval_iters: int = 8
    """Micro-batches per replica in one validation; 0 for no validation."""
    save_interval: int = 500
    """Steps between checkpoints; the end of a run always saves. 0 for the end alone."""
    keep_checkpoints: int = 2
    """Older checkpoints than this many are removed."""
    resume: bool = False
    """Continue from the run folder's latest checkpoint."""
