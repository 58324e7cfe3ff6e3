"""Compares methods for faster decoding of a model: the parameters, keys and values that each adds to an engine, its
possible speed, and the cost of tuning.

All figures follow from the model's shape by FORMULA. The only free variable is the share of cases in which an exit is
right, which `tune` (validation's `acceptance`) and `calibrate` measure.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ee_tuning.artifact.exit_names import exit_tensor_shapes
from ee_tuning.checkpoint.model_card import MODEL_FOLDER
from ee_tuning.checkpoint.model_size import parameters_by_part, tensor_parts
from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.config import Architecture
from ee_tuning.export.plain_exit import plain_exit
from ee_tuning.model.draft_spec import FEWEST_LAYERS, can_draft, draft_spec
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model_config.config import ModelConfig

FORMULA = (
    "pass = parameters that a token reads: layers (of experts, those it is routed to), last norm, output matrix. At small batches "
    "the time of a GPU is the reading of weights; keys and values, launches and sampling are left out, and the experts that tokens "
    "which catch up read besides",
    "keys and values of a token, added to the model's own = 2 × layers of the drafter × key-value heads × head width: a `layer` exit's one layer, "
    "all layers of a draft model, an EAGLE-3 head's one; exits by threshold share the model's",
    "step c = parameters that one draft reads ÷ pass; without experts, the least share of right drafts that pays",
    "speed-up by drafts = (1 − a^(k+1)) ÷ (1 − a) ÷ (m + k·c) with the best k of 1 to 8, each draft right with probability a where "
    "those before it are; never below 1, for a draft is not made where it does not pay. m = what the check of k drafts, a pass of k + 1 "
    "tokens, reads ÷ pass: 1, or with experts more, for n tokens read E·(1 − (1 − top-k/E)^n) of E experts where each token's are drawn evenly",
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
    speed_ups: tuple[float, ...]
    """Speed-ups at each of SHARES."""
    operations: float
    """Operations per tuned token."""
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


def ways(model: ModelConfig, name: str, ttt_steps: int, *, loads_in_engines: bool = True) -> list[Way]:
    """Returns every method that suits a model of that shape.

    `name` stands for the model in commands; `ttt_steps` is the number of unrolled steps in a drafting head's training.
    Engines load Hugging Face folders alone: for another model the commands write one (`loads_in_engines`).
    """
    served = name if loads_in_engines else MODEL_FOLDER
    written = () if loads_in_engines else (f"ee-tuning export --format hf --model {name} --output {MODEL_FOLDER}",)
    sizes = read_sizes(model)
    outputs = ["tied", "untied", *(["shortlist"] if model.vocab_size > 2 * SHORTLIST else [])]
    found = [_threshold(model, sizes, name, output) for output in outputs]
    found += [_own_drafts(model, sizes, name), _draft_model(model, sizes, name, (*written, f"vllm serve {served}"))]
    if can_draft(model) and model.num_layers >= FEWEST_LAYERS:
        tune, *engine = _eagle3_commands(model, name, served)
        found.append(_eagle3(model, sizes, ttt_steps, (tune, *written, *engine)))
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


def speed_up_by_drafts(right: float, step: float, checks: Sequence[float] = (1.0,) * MAX_DRAFTS) -> float:
    """Returns the speed-up of the best number of drafts, each right with probability `right` and `step` passes long.

    `checks` holds the passes that the check of 1, 2, … drafts is long.
    """
    return max(
        1.0,
        *((1 - right ** (k + 1)) / (1 - right) / (check + k * step) for k, check in enumerate(checks, start=1)),
    )


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


def cached_per_token(model: ModelConfig, num_layers: int) -> int:
    """Returns the elements of keys and values that `num_layers` layers of that shape hold for each token of context."""
    return 2 * num_layers * model.num_query_groups * model.kv_channels


def _threshold(model: ModelConfig, sizes: Sizes, name: str, output: str) -> Way:
    layers = sorted({max(1, round(model.num_layers * part / 4)) for part in (2, 3)})
    heads = [_spec(layer, "norm", output) for layer in layers]
    tied = sizes.output if output == "tied" else 0
    asked = _num_active(heads[0], model) + tied
    until = [(sum(sizes.layers[:layer]) + (index + 1) * asked) / sizes.whole for index, layer in enumerate(layers)]
    step, trained = len(layers) * asked / sizes.whole, _num_parameters(heads, model)
    flags = {"tied": " --exit-output tied", "untied": "", "shortlist": f" --output-vocab {SHORTLIST}"}[output]
    told = ",".join(map(str, layers))
    return Way(
        name=f"threshold, norm exits after {told}, {output}",
        runs_in="here",
        trained=trained,
        added=trained,
        cached=0,
        step=step,
        speed_ups=tuple(speed_up_by_threshold(share, until, step) for share in SHARES),
        operations=2 * sum(sizes.layers[: layers[-1]]) + 6 * trained + 4 * tied * len(heads),
        commands=(
            f"ee-tuning tune --model {name} --exit-layers {told} --architecture norm{flags} --init fitted --data TEXTS --output runs/exits",
            f"ee-tuning calibrate --model {name} --exits runs/exits/exit_heads --data HELD_OUT --output calibration.json",
            f'ee-tuning generate --model {name} --exits runs/exits/exit_heads --calibration calibration.json --prompt "…"',
        ),
    )


def _draft_layer(model: ModelConfig) -> int:
    """Returns the layer of a drafting exit: an eighth of the depth."""
    return max(1, model.num_layers // 8)


def _own_drafts(model: ModelConfig, sizes: Sizes, name: str) -> Way:
    layer = _draft_layer(model)
    head = _spec(layer, "layer", "untied")
    trained = _num_parameters((head,), model)
    step = (sum(sizes.layers[:layer]) + sizes.layers[-1] + sizes.output) / sizes.whole
    return Way(
        name=f"speculative, layer exit after {layer}",
        runs_in="here",
        trained=trained,
        added=trained,
        cached=cached_per_token(model, 1),
        step=step,
        speed_ups=tuple(speed_up_by_drafts(share, step, sizes.checks) for share in SHARES),
        operations=2 * sizes.whole + 6 * _num_active(head, model),
        commands=(
            _tune_draft(name, layer),
            f'ee-tuning generate --model {name} --exits runs/draft/exit_heads --policy speculative --prompt "…"',
        ),
    )


def _draft_model(model: ModelConfig, sizes: Sizes, name: str, serve: tuple[str, ...]) -> Way:
    own, layer = _own_drafts(model, sizes, name), _draft_layer(model)
    plain = plain_exit(_spec(layer, "layer", "untied"), model)
    speculative = '{"method": "draft_model", "model": "draft", "num_speculative_tokens": 4}'
    return Way(
        name=f"draft model, the same exit as {plain.config.num_layers} plain layers",
        runs_in="vLLM, SGLang, TensorRT-LLM",
        trained=own.trained,
        added=parameters_by_part(plain.config)["all"],
        cached=cached_per_token(plain.config, plain.config.num_layers),
        step=own.step,
        speed_ups=own.speed_ups,
        operations=own.operations,
        commands=(
            _tune_draft(name, layer),
            f"ee-tuning export --format draft --model {name} --exits runs/draft/exit_heads --exit {layer} --output draft --check",
            *serve[:-1],
            f"{serve[-1]} --speculative-config '{speculative}'",
        ),
    )


def _tune_draft(name: str, layer: int) -> str:
    return f"ee-tuning tune --model {name} --exit-layers {layer} --architecture layer --loss forward_kl --data ANSWERS --output runs/draft"


def _eagle3_vocab(model: ModelConfig) -> int:
    return DRAFT_VOCAB if model.vocab_size > DRAFT_VOCAB else 0


def _eagle3_commands(model: ModelConfig, name: str, served: str) -> tuple[str, ...]:
    vocab = _eagle3_vocab(model)
    flags = f" --output-vocab {vocab}" if vocab else ""
    return (
        f"ee-tuning tune --model {name} --architecture eagle3{flags} --loss lk --data ANSWERS --output runs/eagle3",
        f"ee-tuning export --format speculators --model {served} --exits runs/eagle3/exit_heads --output eagle3",
        "vllm serve eagle3",
    )


def _eagle3(model: ModelConfig, sizes: Sizes, ttt_steps: int, commands: tuple[str, ...]) -> Way:
    vocab = _eagle3_vocab(model)
    spec = draft_spec(model, ())
    head = ExitSpec(layer=model.num_layers, architecture="eagle3", ties_output=False, output_vocab=vocab, draft=spec)
    trained = _num_parameters((head,), model)
    fused = len(spec.aux_layers) * model.hidden_size**2
    unrolled = trained - fused  # states are fused once per round, for verified tokens, and once in training
    step = unrolled / sizes.whole
    return Way(
        name=f"EAGLE-3 head, {vocab or model.vocab_size:,} tokens",
        runs_in="vLLM, SGLang, here",
        trained=trained,
        added=trained,
        cached=cached_per_token(spec.layer_config(model), 1),
        step=step,
        speed_ups=tuple(speed_up_by_drafts(share, step, sizes.checks) for share in SHARES),
        operations=2 * sizes.whole + 6 * (fused + unrolled * ttt_steps),
        commands=commands,
    )
