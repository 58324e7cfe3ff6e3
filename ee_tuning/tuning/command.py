"""`tune`: trains the exits of a job into a run folder with the tuned artifact.

Run `ee-tuning tune job.yaml` in one process, or `torchrun --nproc-per-node N -m ee_tuning tune job.yaml` in many.
"""

from pathlib import Path
from shlex import quote

from ee_tuning.artifact.convert import convert
from ee_tuning.artifact.eagle3_engines import eagle3_engines
from ee_tuning.artifact.load import load_for_tuning
from ee_tuning.artifact.shapes import as_tuned, with_seq_length
from ee_tuning.checkpoint.formats import is_huggingface, read_shape
from ee_tuning.config import Config, replace
from ee_tuning.data.frequent_tokens import list_tokens
from ee_tuning.data.job_samples import load_job_samples
from ee_tuning.data.loader import count_microbatches
from ee_tuning.data.tokens import Samples
from ee_tuning.errors import InputError
from ee_tuning.model.early_exit import layer_parts
from ee_tuning.model.exit_spec import ListedTokens
from ee_tuning.model.fit import Fit
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.notices import warn
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.time_report import check_profile_folder, time_report
from ee_tuning.parallel.topology import Topology, destroy_parallel, init_parallel
from ee_tuning.training_log.dashboards import check_dashboards
from ee_tuning.training_log.plots import write_plots
from ee_tuning.tuning.fitting import fit_exits, fit_record, fit_samples
from ee_tuning.tuning.run_folder import EXIT_HEADS, check_run_folder, open_run_folder, owned_run_folder
from ee_tuning.tuning.settings import check_settings, check_shared_head
from ee_tuning.tuning.state import latest_checkpoint
from ee_tuning.tuning.trained_weights import ADAPTER
from ee_tuning.tuning.tuner import Tuner


def tune(config: Config, profile: Path | None = None) -> int:
    """Tunes the exits of `config` into its run folder and returns the exit code.

    The code is 0, or tuning.stop_exit_code where a signal stopped the run early. Raises InputError where an input can
    not be used.

    With `profile` the training is measured, and a report of the time by part is written to this folder.
    """
    topology = init_parallel(config.parallel)
    if profile is not None:
        on_first_rank(topology, lambda: check_profile_folder(profile))
    is_finished = tune_within(config, topology, profile)
    destroy_parallel()
    return 0 if is_finished else config.tuning.stop_exit_code


def tune_within(config: Config, topology: Topology, profile: Path | None = None) -> bool:
    """Does the work of `tune` in a world that exists. Returns whether the run reached its end."""
    check_settings(config.tuning)
    check_shared_head(config.exits, config.tuning)
    if config.model.adapter and config.tuning.trained.has_backbone:
        raise InputError(
            f"tuning.trainable = {config.tuning.trainable} trains a model without model.adapter, got "
            f"{config.model.adapter}; merge both first (ee-tuning export --format hf), and give the merged folder"
        )
    count_microbatches(config.tuning, topology.dp)
    check_dashboards(config)
    model = read_shape(config.model)
    config = as_tuned(config, model)
    with owned_run_folder(config, topology):
        return _tune_within_folder(config, model, topology, profile)


def _tune_within_folder(config: Config, model: ModelConfig, topology: Topology, profile: Path | None) -> bool:
    check_run_folder(config, topology)
    samples = load_job_samples(config, model, topology)
    listed = None if config.exits.path else list_tokens(config, model, samples.train, topology)
    fit = _fit(config, samples.train, topology, model.hidden_size, listed)
    loaded = load_for_tuning(config, topology, fit, listed)
    tuner = Tuner(loaded, samples, config, topology)
    if config.tuning.resume:
        tuner.resume()
    # only now: a refused job leaves nothing behind, and a good run keeps its config.yaml
    open_run_folder(config, topology)
    with time_report(profile, topology, layer_parts(loaded.model)):
        is_finished = tuner.run()
    if is_finished:
        _check_updated(tuner, topology)
        _save(tuner, config, topology)
    return is_finished


def _save(tuner: Tuner, config: Config, topology: Topology) -> None:
    """Writes the weights that the finished run trained."""
    adapter, output, fingerprint = tuner.run_folder / ADAPTER, tuner.run_folder / EXIT_HEADS, None
    written = []
    if tuner.backbone is not None:
        fingerprint = tuner.save_trained_weights(adapter)
        written.append(adapter)
    if tuner.exits_config.exit_layers:
        tuner.save_exit_heads(output, fingerprint)
        written.append(output)
    if topology.is_logging_rank:
        print(f"wrote {' and '.join(map(str, written))}\nnext: {_next_command(config, tuner)}", flush=True)
        write_plots(tuner.run_folder, f"{tuner.run_folder}: exits of {config.model.path}")


def _next_command(config: Config, tuner: Tuner) -> str:
    adapter = str(tuner.run_folder / ADAPTER) if tuner.backbone is not None else config.model.adapter
    given = f"--model {quote(config.model.path)}" + (f" --adapter {quote(adapter)}" if adapter else "")
    if not tuner.exits_config.exit_layers:
        return f"ee-tuning export --format hf {given} --output FOLDER"
    given += f" --exits {quote(str(tuner.run_folder / EXIT_HEADS))}"
    exits = tuner.exits_config
    if exits.draft is not None and eagle3_engines(exits.model_shape["family"]):
        layout = "speculators" if is_huggingface(config.model.path) and not adapter else "eagle3"
        return f"ee-tuning export --format {layout} {given} --output FOLDER"
    policy = "--budget 0.5" if config.exits.shares_head else "--threshold 0.8 --show-exits"
    policy = policy if exits.draft is None else "--policy speculative"
    return f'ee-tuning generate {given} {policy} --prompt "…"'


def _check_updated(tuner: Tuner, topology: Topology) -> None:
    """Warns of trained exits that were never updated. Raises InputError, on all ranks, where no exit was updated."""
    never, trained = tuner.never_updated()
    if not never:
        return
    message = (
        f"not one step updated exit {', '.join(map(str, never))}: its loss or gradient was never finite (give --dtype float32 if the "
        "model overflows), its gradient norm was above tuning.skip_grad_norm, or no token of the data counts"
    )
    if never == trained:
        raise InputError(
            f"{message}; {tuner.run_folder / EXIT_HEADS} is not written, because it would equal the initial exits"
        )
    if topology.is_logging_rank:
        warn(message)


def _fit(config: Config, samples: Samples, topology: Topology, width: int, listed: ListedTokens | None) -> Fit | None:
    """Fits the exits, or returns None where `exits.init` does not ask for it.

    A run that continues from a checkpoint gets a Fit without maps, since the checkpoint holds the heads.
    """
    if config.exits.path is not None or config.exits.init != "fitted":
        return None
    if (
        config.tuning.resume
        and on_first_rank(topology, lambda: latest_checkpoint(Path(config.tuning.run_folder))) is not None
    ):
        return Fit({}, fit_record(fit_samples(samples, config.tuning, width)))
    return fit_exits(config, samples, topology, width, listed)


def convert_by_texts(config: Config, output: Path, *, overwrite: bool = False) -> None:
    """Does the work of `convert` for exits that need texts: fitted ones, or ones with a shortlist of frequent tokens.

    The texts are those that `tune` would train on. Raises InputError like both commands.
    """
    model = read_shape(config.model)
    config = with_seq_length(config, model)
    check_settings(config.tuning)
    is_fitted, has_list = config.exits.init == "fitted", bool(config.exits.output_vocab)
    if not config.data.paths:
        asks, remedy = (
            ("exits.init = fitted", "use exits.init = copy")
            if is_fitted
            else (f"exits.output_vocab = {config.exits.output_vocab}", "leave it out")
        )
        raise InputError(f"{asks} reads texts, and data.paths names none; give --data PATH, or {remedy}")
    if config.tuning.micro_batch_size < 1:
        raise InputError(f"tuning.micro_batch_size must be at least 1, got {config.tuning.micro_batch_size}")

    texts = _Texts(config, model)
    convert(
        config,
        output,
        overwrite=overwrite,
        make_fit=texts.fit if is_fitted else None,
        list_tokens=texts.list if has_list else None,
    )


class _Texts:
    """The texts of a job, for a conversion. The list comes first, because the fit needs it."""

    def __init__(self, config: Config, model: ModelConfig):
        self._config, self._model = config, model
        self._samples: Samples | None = None
        self._listed: ListedTokens | None = None

    def list(self, topology: Topology) -> ListedTokens | None:
        """See `list_tokens`."""
        self._listed = list_tokens(self._config, self._model, self._read(topology), topology)
        return self._listed

    def fit(self, topology: Topology) -> Fit:
        """See `fit_exits`."""
        width = self._model.hidden_size
        return fit_exits(self._config, self._read(topology), topology, width, self._listed)

    def _read(self, topology: Topology) -> Samples:
        if self._samples is None:
            config = replace(self._config, tuning={"eval_iters": 0})  # a conversion runs no validation
            self._samples = load_job_samples(config, self._model, topology).train
        return self._samples
