"""Compares methods for faster decoding of a model: the parameters, keys and values that each adds to an engine, its
possible speed, and the cost of tuning.

All figures follow from the model's shape by FORMULA. The only free variable is the share of cases in which an exit is
right, which `tune` (validation's `acceptance`) and `calibrate` measure.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ee_tuning.artifact.eagle3_engines import eagle3_engines
from ee_tuning.artifact.exit_names import exit_tensor_shapes
from ee_tuning.artifact.tried_engines import TRIED
from ee_tuning.checkpoint.model_size import cached_per_token, parameters_by_part, tensor_parts
from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.config import Architecture
from ee_tuning.export.plain_exit import plain_exit
from ee_tuning.model.draft_spec import FEWEST_LAYERS, can_draft, draft_spec
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.planning.advice_commands import ANSWERS, Commands
from ee_tuning.planning.fewest_gpus import Split

FORMULA = (
    "pass = parameters that a token reads: layers (of experts, those it is routed to), last norm, output matrix. At small batches "
    "the time of a GPU is the reading of weights; keys and values, launches and sampling are left out, and the experts that tokens "
    "which catch up read besides",
    "keys and values of a token, added to the model's own = 2 × layers of the drafter × key-value heads × head width: a `layer` exit's one layer, "
    "all layers of a draft model, an EAGLE-3 head's one; exits by threshold share the model's",
    "step c = parameters that one draft reads ÷ pass; without experts, c + f is the least share of right drafts that pays",
    "speed-up by drafts = (1 − a^(k+1)) ÷ (1 − a) ÷ (m + f + k·c) with the best k of 1 to 8, each draft right with probability a where "
    "those before it are; never below 1, for a draft is not made where it does not pay. m = what the check of k drafts, a pass of k + 1 "
    "tokens, reads ÷ pass: 1, or with experts more, for n tokens read E·(1 − (1 − top-k/E)^n) of E experts where each token's are drawn evenly. "
    "f = what a round reads once, before its first draft, ÷ pass: an EAGLE-3 head's fusing map, 3 × hidden size² parameters; 0 for other drafts",
    "step of a threshold = what asking all exits reads ÷ pass. Its speed-up = 1 ÷ (a × the mean over exits of what a token reads until "
    "it leaves there ÷ pass + (1 − a) × (1 + step)), where a share a of the tokens leaves, evenly over the exits",
    "operations of tuning a token = 2 × parameters that run + 6 × trained parameters (of experts, those it is routed to; × unrolled steps of "
    "a drafting head, whose fusing map runs once) + 4 × output matrix for each tied exit, which needs no gradient of that matrix; those that "
    "run: the layers up to the last exit, or the whole pass where the final head teaches (drafts). GPU-hours = operations × tokens ÷ "
    "(efficiency × peak operations/s) ÷ 3600",
)
"""The formula of the figures."""
SHARES = (0.5, 0.7, 0.9)
"""Acceptance probabilities, and shares of tokens that leave, for which speed-ups are computed."""
MAX_DRAFTS = 8
SHORTLIST = 16_384
"""Size of a shortlist, for vocabularies of more than twice as many tokens."""
DRAFT_VOCAB = 32_000
"""Size of an EAGLE-3 head's vocabulary where the model's is larger, as in published heads."""


_DRAFT_EXITS, _EAGLE3_EXITS = "runs/draft/exit_heads", "runs/eagle3/exit_heads"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A method for faster decoding."""

    name: str
    runs_in: str
    """The engines that support it."""
    trained: int
    """Number of tuned parameters."""
    added: int
    """Parameters that the engine holds besides the model's."""
    cached: int
    """Elements of keys and values that the engine holds for each token of context besides the model's."""
    step: float
    """See FORMULA."""
    fusing: float = 0.0
    """See FORMULA: f."""
    speed_ups: tuple[float, ...]
    """Speed-ups at each of SHARES."""
    operations: float
    """Operations per tuned token."""
    gpus: int
    """Fewest GPUs that hold the tuning run; 0 where none were found."""
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """Parameters that are read per token."""

    layers: tuple[int, ...]
    """Parameters of each layer."""
    output: int
    """Parameters of the output matrix."""
    experts: int = 0
    """Parameters of the experts, in all layers together, that a token is routed to."""
    routed_share: float = 1.0
    """Share of a layer's experts that a token is routed to."""

    @property
    def whole(self) -> int:
        """Parameters of a whole pass, without the last norm, which is small."""
        return sum(self.layers) + self.output

    def of_tokens(self, num_tokens: int) -> float:
        """Returns the parameters that a whole pass of several tokens reads, an expert of several of them once."""
        read = (1 - (1 - self.routed_share) ** num_tokens) / self.routed_share
        return self.whole + (read - 1) * self.experts

    @property
    def checks(self) -> tuple[float, ...]:
        """Length of the check of 1 to MAX_DRAFTS drafts, in passes of one token."""
        return tuple(self.of_tokens(num_drafts + 1) / self.whole for num_drafts in range(1, MAX_DRAFTS + 1))


def ways(model: ModelConfig, commands: Commands, ttt_steps: int) -> list[Way]:
    """Returns every method that suits a model of that shape.

    `ttt_steps` is the number of unrolled steps in a drafting head's training. Raises InputError where `tune` would
    refuse the batches of the commands.
    """
    sizes = read_sizes(model)
    outputs = ["tied", "untied", *(["shortlist"] if model.vocab_size > 2 * SHORTLIST else [])]
    found = [_threshold(model, sizes, commands, output) for output in outputs]
    found += [_own_drafts(model, sizes, commands), _draft_model(model, sizes, commands)]
    if can_draft(model) and model.num_layers >= FEWEST_LAYERS:
        found.append(_eagle3(model, sizes, ttt_steps, commands))
    return found


def read_sizes(model: ModelConfig) -> Sizes:
    """Returns the parameters that are read per token; of experts, those that the token is routed to."""
    shapes, layers, experts = backbone_tensor_shapes(model), [0.0] * model.num_layers, 0.0
    for tensor, (_, layer) in tensor_parts(model).items():
        if layer is not None:
            read = math.prod(shapes[tensor]) * _share_read(tensor, model)
            layers[layer - 1] += read
            experts += read * _is_expert(tensor)
    return Sizes(
        tuple(round(each) for each in layers),
        model.vocab_size * model.hidden_size,
        round(experts),
        _routed_share(model),
    )


def speed_up_by_drafts(
    right: float, step: float, checks: Sequence[float] = (1.0,) * MAX_DRAFTS, fusing: float = 0.0
) -> float:
    """Returns the speed-up of the best number of drafts, each right with probability `right` and `step` passes long.

    `checks` holds the passes that the check of 1, 2, … drafts is long, `fusing` those that precede the first draft.
    """
    rounds = (
        (1 - right ** (k + 1)) / (1 - right) / (check + fusing + k * step) for k, check in enumerate(checks, start=1)
    )
    return max(1.0, *rounds)


def speed_up_by_threshold(share: float, until: Sequence[float], step: float) -> float:
    """Returns the speed-up where `share` of the tokens leave, evenly over the exits.

    A token that leaves at an exit reads `until` passes, and any other token 1 + `step`.
    """
    return 1 / (share * sum(until) / len(until) + (1 - share) * (1 + step))


def gpu_hours(operations: float, tokens: float, tflops: float, efficiency: float) -> float:
    """Returns the GPU-hours of `tokens` tokens at `operations` each."""
    return operations * tokens / (efficiency * tflops * 1e12) / 3600


def _spec(layer: int, architecture: Architecture, output: str) -> ExitSpec:
    return ExitSpec(
        layer=layer,
        architecture=architecture,
        ties_output=output == "tied",
        adds_linear=output == "tied",  # by the fit that the commands ask for
        output_vocab=SHORTLIST if output == "shortlist" else 0,
    )


def _num_parameters(heads: Iterable[ExitSpec], model: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in exit_tensor_shapes(heads, model).values())


def _num_active(head: ExitSpec, model: ModelConfig) -> int:
    """Returns the head's own parameters that a token uses; of experts, those that it is routed to."""
    shapes = exit_tensor_shapes((head,), model)
    return round(sum(math.prod(shape) * _share_read(name, model) for name, shape in shapes.items()))


def _share_read(tensor: str, model: ModelConfig) -> float:
    return _routed_share(model) if _is_expert(tensor) else 1.0


def _is_expert(tensor: str) -> bool:
    return ".experts." in tensor


def _routed_share(model: ModelConfig) -> float:
    return model.moe_router_topk / model.num_experts if model.num_experts else 1.0


def _threshold(model: ModelConfig, sizes: Sizes, commands: Commands, output: str) -> Way:
    layers = sorted({max(1, round(model.num_layers * part / 4)) for part in (2, 3)})
    heads = [_spec(layer, "norm", output) for layer in layers]
    tied = sizes.output if output == "tied" else 0
    asked = _num_active(heads[0], model) + tied
    until = [(sum(sizes.layers[:layer]) + (index + 1) * asked) / sizes.whole for index, layer in enumerate(layers)]
    step, trained = len(layers) * asked / sizes.whole, _num_parameters(heads, model)
    told = ",".join(map(str, layers))
    job: dict[str, Any] = {"exits.exit_layers": told, "exits.architecture": "norm"}
    if output != "untied":
        job |= {"exits.output": "tied"} if output == "tied" else {"exits.output_vocab": SHORTLIST}
    job["exits.init"] = "fitted"
    split, exits = commands.split(job, layers[-1], trained), "runs/exits/exit_heads"
    return Way(
        name=f"threshold, norm exits after {told}, {output}",
        runs_in="here",
        trained=trained,
        added=trained,
        cached=0,
        step=step,
        speed_ups=tuple(speed_up_by_threshold(share, until, step) for share in SHARES),
        operations=2 * sum(sizes.layers[: layers[-1]]) + 6 * trained + 4 * tied * len(heads),
        gpus=split.num_gpus * split.fits,
        commands=(
            *commands.tune(job, split, "TEXTS", "runs/exits"),
            *commands.calibrate(exits, trained),
            *commands.generate(exits, "--calibration calibration.json", trained),
        ),
    )


def _draft_layer(model: ModelConfig) -> int:
    """Returns the layer of a drafting exit: an eighth of the depth."""
    return max(1, model.num_layers // 8)


def _own_drafts(model: ModelConfig, sizes: Sizes, commands: Commands) -> Way:
    layer = _draft_layer(model)
    head = _spec(layer, "layer", "untied")
    trained = _num_parameters((head,), model)
    step = (sum(sizes.layers[:layer]) + sizes.layers[-1] + sizes.output) / sizes.whole
    split, tune = _tune_draft(model, commands, trained)
    return Way(
        name=f"speculative, layer exit after {layer}",
        runs_in="here",
        trained=trained,
        added=trained,
        cached=cached_per_token(model, 1),
        step=step,
        speed_ups=tuple(speed_up_by_drafts(share, step, sizes.checks) for share in SHARES),
        operations=2 * sizes.whole + 6 * _num_active(head, model),
        gpus=split.num_gpus * split.fits,
        commands=(*tune, *commands.generate(_DRAFT_EXITS, "--policy speculative", trained)),
    )


def _draft_model(model: ModelConfig, sizes: Sizes, commands: Commands) -> Way:
    own, layer = _own_drafts(model, sizes, commands), _draft_layer(model)
    plain = plain_exit(_spec(layer, "layer", "untied"), model)
    added = parameters_by_part(plain.config)["all"]
    return Way(
        name=f"draft model, the same exit as {plain.config.num_layers} plain layers",
        runs_in="vLLM, SGLang, TensorRT-LLM, llama.cpp, transformers",
        trained=own.trained,
        added=added,
        cached=cached_per_token(plain.config, plain.config.num_layers),
        step=own.step,
        speed_ups=own.speed_ups,
        operations=own.operations,
        gpus=own.gpus,
        commands=(*_tune_draft(model, commands, own.trained)[1], *commands.draft(_DRAFT_EXITS, layer, added)),
    )


def _tune_draft(model: ModelConfig, commands: Commands, trained: int) -> tuple[Split, tuple[str, ...]]:
    job = {"exits.exit_layers": _draft_layer(model), "exits.architecture": "layer", "tuning.loss": "forward_kl"}
    split = commands.split(job, model.num_layers, trained)
    return split, (*commands.answers(), *commands.tune(job, split, ANSWERS, "runs/draft"))


def _eagle3_vocab(model: ModelConfig) -> int:
    return DRAFT_VOCAB if model.vocab_size > DRAFT_VOCAB else 0


def _eagle3(model: ModelConfig, sizes: Sizes, ttt_steps: int, commands: Commands) -> Way:
    vocab = _eagle3_vocab(model)
    spec = draft_spec(model, ())
    head = ExitSpec(layer=model.num_layers, architecture="eagle3", ties_output=False, output_vocab=vocab, draft=spec)
    trained = _num_parameters((head,), model)
    fused = len(spec.aux_layers) * model.hidden_size**2
    unrolled = trained - fused  # states are fused once per round, for verified tokens, and once in training
    step, fusing = unrolled / sizes.whole, fused / sizes.whole
    job = {"exits.architecture": "eagle3", **({"exits.output_vocab": vocab} if vocab else {}), "tuning.loss": "lk"}
    split = commands.split(job, model.num_layers, trained)
    return Way(
        name=f"EAGLE-3 head, {vocab or model.vocab_size:,} tokens",
        runs_in=", ".join((*_engines_of_eagle3(model.family), "here")),
        trained=trained,
        added=trained,
        cached=cached_per_token(spec.layer_config(model), 1),
        step=step,
        fusing=fusing,
        speed_ups=tuple(speed_up_by_drafts(share, step, sizes.checks, fusing) for share in SHARES),
        operations=2 * sizes.whole + 6 * (fused + unrolled * ttt_steps),
        gpus=split.num_gpus * split.fits,
        commands=(
            *commands.answers(),
            *commands.tune(job, split, ANSWERS, "runs/eagle3"),
            *(
                commands.eagle3(_EAGLE3_EXITS, trained)
                if "vLLM" in eagle3_engines(model.family)
                else commands.generate(_EAGLE3_EXITS, "--policy speculative", trained)
            ),
        ),
    )


def _engines_of_eagle3(family: str) -> tuple[str, ...]:
    """Returns the engines that take the head; of llama.cpp only what was tried is known."""
    return (*eagle3_engines(family), *(engine for engine in ("llama.cpp",) if family in TRIED[engine].families))
