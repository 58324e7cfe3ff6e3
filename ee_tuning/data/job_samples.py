"""The samples of a job: its data, cut and tokenized for its model."""

from ee_tuning.config import Config, DataSection
from ee_tuning.data.splits import load_samples
from ee_tuning.data.tokenizer import tokenizer_of
from ee_tuning.data.tokens import Splits
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.topology import Topology


def load_job_samples(
    config: Config,
    model: ModelConfig,
    topology: Topology | None = None,
    *,
    data: DataSection | None = None,
    shown_as: str | None = None,
    seq_length: int | None = None,
    needs_validation: bool | None = None,
    by_document: bool = False,
) -> Splits:
    """Loads the training and validation samples of a job, from its own data or from other `data`, with its tokenizer
    and for its `model`. All ranks of `topology` call it.

    Samples are as long as those of tuning, and a validation split is needed where tuning validates, unless given
    otherwise. With `by_document`, each sample is the beginning of one document. Raises InputError where the texts can
    not be used; `load_samples` lists the reasons.
    """
    return load_samples(
        data or config.data,
        tokenizer_of(config),
        seq_length=seq_length or config.tuning.seq_length,
        vocab_size=model.vocab_size,
        max_positions=model.max_position_embeddings,
        needs_validation=config.tuning.eval_iters > 0 if needs_validation is None else needs_validation,
        topology=topology,
        trusts_code=config.model.trust_remote_code,
        by_document=by_document,
        shown_as=shown_as,
    )
