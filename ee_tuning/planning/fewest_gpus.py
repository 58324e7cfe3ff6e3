"""The fewest GPUs of a kind that hold a tuning job, or a model that decodes.

Memory is that of a plan (`plan.py`), so a dry run is made for each number of GPUs that is tried; none where half of a
GPU is enough.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ee_tuning.checkpoint.model_size import cached_per_token, parameters_by_part
from ee_tuning.config import Config, TuningSection, load_config, replace
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.planning.gpus import GPUS_PER_NODE, Gpu, room

if TYPE_CHECKING:
    from ee_tuning.planning.plan import TuningPlan

MOST_NODES = 16
"""Most nodes of GPUS_PER_NODE GPUs that are tried."""
_COUNTS = (1, 2, 4, *(GPUS_PER_NODE * nodes for nodes in range(1, MOST_NODES + 1)))
"""Numbers of GPUs, of which the first that fits is found; those between it and the one before are tried then."""
_WEIGHT, _TRAINED = 2, 16
"""Bytes of a parameter in bfloat16, and of a trained one: a float32 master, two moments, a copy and its gradient."""
_ENGINE_SHARE = 0.9
"""Share of a GPU's memory that vLLM takes."""
BATCHES = ("micro_batch_size", "global_batch_size", "seq_length", "ttt_steps")
"""Keys of `tuning` that a way's job takes over from the user's."""
_USUAL_TOKENS = 4 * 2048
"""Tokens of a micro-batch, by default."""


@dataclass(frozen=True)
class Split:
    """A model in tensor × pipeline processes, one on each GPU."""

    tensor: int = 1
    pipeline: int = 1
    micro_batch_size: int | None = None
    """Sequences per forward pass, where they have to be fewer than the user's."""
    fits: bool = True
    """False where no number of GPUs was found; it is then that of one process."""

    @property
    def num_gpus(self) -> int:
        """Number of GPUs, and of processes."""
        return self.tensor * self.pipeline

    @property
    def program(self) -> str:
        """The words of a command before the name of the subcommand."""
        if self.num_gpus == 1:
            return "ee-tuning"
        nodes = self.num_gpus // GPUS_PER_NODE
        several = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29400 " if nodes > 1 else ""
        return f"torchrun {several}--nproc-per-node {min(self.num_gpus, GPUS_PER_NODE)} -m ee_tuning"

    @property
    def flags(self) -> str:
        """The flags of the layout, each with a space before it."""
        sizes = (("tensor", self.tensor), ("pipeline", self.pipeline))
        layout = "".join(f" --{kind}-model-parallel-size {size}" for kind, size in sizes if size > 1)
        return f"{layout} --micro-batch-size {self.micro_batch_size}" if self.micro_batch_size else layout


class FewestGpus:
    """Finds numbers of GPUs of one kind for a model. Results are kept: several ways have the same job."""

    def __init__(
        self, config: Config, model: ModelConfig, gpu: Gpu, on_plan: Callable[[int], None] = lambda num_gpus: None
    ):
        """Takes the model and the batches of `config`, whose exits do not count; its sequence length is known.

        `on_plan` is called with the number of GPUs before each dry run, which takes seconds.
        """
        self._config, self._model, self._gpu, self._on_plan = config, model, gpu, on_plan
        self._size = parameters_by_part(model)
        self._cached = cached_per_token(model, model.num_layers)
        self._plans: dict[tuple[str, int], TuningPlan] = {}

    def to_tune(self, job: Mapping[str, Any], depth: int, trained: int) -> Split:
        """Returns the split of a tuning job.

        `job` {"section.key": value} are its exits and its loss, `depth` is the last layer that it needs, and `trained`
        its number of trained parameters. Raises InputError where `tune` would refuse the job.
        """
        tuning = self._config.tuning
        own = load_config(None, {**job, **{f"tuning.{key}": getattr(tuning, key) for key in BATCHES}})
        is_usual = tuning.micro_batch_size * tuning.seq_length <= _USUAL_TOKENS
        if is_usual and _WEIGHT * self._size["all"] + _TRAINED * trained <= room(self._gpu) / 2:
            return Split()
        run = self._size["all"] - self._size["embedding"] - self._size["output"]
        least = _WEIGHT * (self._size["embedding"] + run * depth / self._model.num_layers) + _TRAINED * trained
        return self._fewest(own, least)

    def to_decode(self, added: int, tokens: int) -> Split:
        """Returns the split of the model with exits of `added` parameters, and keys and values of `tokens` tokens.

        Stages wait for one another: only the numbers of GPUs that share each layer are tried, where layers can be cut.
        """
        besides = _WEIGHT * (added + tokens * self._cached)
        least = _WEIGHT * self._size["all"] + besides
        if least <= 0.8 * room(self._gpu):
            return Split()
        # A pass through all layers, and an exit that adds next to nothing.
        job = {"exits.exit_layers": [self._model.num_layers], "exits.architecture": "norm", "exits.output": "tied"}
        batches = {"tuning.micro_batch_size": 1, "tuning.global_batch_size": 1}
        own = load_config(None, {**job, "exits.init": "copy", **batches})
        for count in _COUNTS:
            plan = self._plan(own, count) if least / count <= room(self._gpu) else None
            if plan is not None and self._fits(plan, besides):
                return self._split(count)
        return Split(fits=False)

    def to_serve(self, added: int) -> int | None:
        """Returns the tensor-parallel size at which vLLM holds the model, a drafter of `added` parameters, and one
        request of the model's longest context; None where no size divides the heads.
        """
        tokens = self._model.max_position_embeddings
        least = _WEIGHT * (self._size["all"] + added + tokens * self._cached)
        for size in _COUNTS:
            if self._model.num_attention_heads % size == 0 and least / size <= _ENGINE_SHARE * self._gpu.memory * 1e9:
                return size
        return None

    def holds_in_float32(self, added: int) -> bool:
        """Whether one GPU has room for the weights of the model and of a drafter of `added` parameters in float32."""
        return 4 * (self._size["all"] + added) <= room(self._gpu)

    def _fewest(self, own: Config, least: float) -> Split:
        """Returns the split of a tuning job, with micro-batches of one sequence where the default ones need more GPUs.

        `least`: bytes below which no number of GPUs is tried.
        """
        single = replace(own, tuning={"micro_batch_size": 1})
        is_free = own.tuning.micro_batch_size == TuningSection().micro_batch_size
        before = 0
        for count in _COUNTS:
            fewer = range(count if count > GPUS_PER_NODE else before + 1, count)
            plan = self._plan(own, count) if least / count <= room(self._gpu) else None
            if plan is not None and self._fits(plan):
                return self._split(next((each for each in fewer if self._fewer_fit(own, plan, each, least)), count))
            if plan is not None and is_free and _kept(plan) <= room(self._gpu):
                plan = self._plan(single, count)
                if plan is not None and self._fits(plan):
                    found = next((each for each in fewer if self._fewer_fit(single, plan, each, least)), count)
                    return dataclasses.replace(self._split(found), micro_batch_size=1)
            before = count
        return Split(fits=False)

    def _fewer_fit(self, own: Config, plan: "TuningPlan", fewer: int, least: float) -> bool:
        # What is no weight takes no less room on fewer GPUs: spares dry runs whose end is foreseen.
        weights = max(each.memory["weights"] for each in plan.stages)
        more = weights * (plan.cluster.world_size / fewer - 1)
        if max(least / fewer, _peak(plan) + more) > room(self._gpu):
            return False
        found = self._plan(own, fewer)
        return found is not None and self._fits(found)

    def _fits(self, plan: "TuningPlan", besides: int = 0) -> bool:
        """`besides`: bytes that the plan does not count."""
        return _peak(plan) + besides / plan.cluster.world_size <= room(self._gpu)

    def _plan(self, own: Config, count: int) -> "TuningPlan | None":
        """Returns the plan on `count` GPUs, or None where the model can not be cut so often."""
        split = self._split(count)
        if split.pipeline > self._model.num_layers:
            return None
        from ee_tuning.planning.plan import EFFICIENCY, Cluster, make_plan  # loads all that tunes: where there is need

        key = (repr((own.exits, own.tuning)), count)
        if key not in self._plans:
            self._on_plan(count)
            sizes = {"tensor_model_parallel_size": split.tensor, "pipeline_model_parallel_size": split.pipeline}
            own = dataclasses.replace(own, model=dataclasses.replace(self._config.model, dtype=None))
            per_node = min(count, GPUS_PER_NODE)
            cluster = Cluster(gpu=self._gpu, nodes=count // per_node, gpus_per_node=per_node, efficiency=EFFICIENCY)
            self._plans[key] = make_plan(replace(own, parallel=sizes), cluster)
        return self._plans[key]

    def _split(self, count: int) -> Split:
        """Returns the split with the most tensor parallelism inside a node: it divides the heads' optimizer, too."""
        for tensor in range(min(count, GPUS_PER_NODE), 0, -1):
            if count % tensor == 0 and self._is_cut(tensor):
                return Split(tensor, count // tensor)
        raise AssertionError("one process holds each layer whole")

    def _is_cut(self, tensor: int) -> bool:
        try:
            self._model.check_layout(tensor, 1)
        except InputError:
            return False
        return True


def _kept(plan: "TuningPlan") -> int:
    """Returns the bytes that do not depend on the micro-batch."""
    kinds = ("weights", "optimizer", "heads", "gradients")
    return max(sum(each.memory[kind] for kind in kinds) for each in plan.stages)


def _peak(plan: "TuningPlan") -> int:
    return max(plan.fit_bytes, *(each.total_bytes for each in plan.stages))
