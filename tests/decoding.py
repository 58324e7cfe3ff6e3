"""Requests to answers with an engine of one's own, as several test modules need it."""

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.config import load_config
from ee_tuning.engine.cost_model import Costs
from ee_tuning.engine.engine import Engine, TokenStep
from ee_tuning.engine.sequence import Sequence
from ee_tuning.engine.speculation import Speculation
from ee_tuning.model.documents import PackedDocuments
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import Policy, policy_of


@dataclass
class Said:
    """What was decoded after a prompt, token by token."""

    tokens: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)


def full_logits(model: EarlyExitModel, tokens: Tensor, documents: PackedDocuments | None = None) -> Tensor:
    """The logits [b, s, v] of the final head at every position of `tokens` [b, s]."""
    hidden, _ = model.run_layers(model.embed(tokens, documents), documents)
    return F.linear(model.final_hidden(hidden), model.backbone.output_layer.weight).transpose(0, 1)


def policy_for(model: Any, **keys: Any) -> Policy:
    """The policy that keys of the `generation` section describe."""
    generation = load_config(None, {f"generation.{key}": value for key, value in keys.items()}).generation
    return policy_of(generation, model.plan.exit_layers, model.config.num_layers)


def decode(
    loaded: LoadedModel,
    prompts: list[list[int]],
    num_tokens: int,
    *,
    params: SamplingParams | None = None,
    engine: dict[str, Any] | None = None,
    **generation: Any,
) -> list[Said]:
    """Each prompt's answer of `num_tokens` tokens, all decoded as one batch; greedy without `params`."""
    params = params or SamplingParams(max_tokens=num_tokens)
    made = Engine(loaded.model, loaded.stages, **{"num_slots": len(prompts), "max_length": 64, **(engine or {})})
    policy = policy_for(loaded.model, **generation)
    sequences = [made.add_request(prompt, params, policy)[0] for prompt in prompts]
    answers = {s.number: Said() for s in sequences}
    for step in run_all(made):
        said = answers[step.sequence.number]
        said.tokens.append(step.token_id)
        said.exit_layers.append(step.exit_layer)
        said.confidences.append(step.confidence)
    return [answers[s.number] for s in sequences]


def run_all(engine: Engine) -> list[TokenStep]:
    """Steps until nobody runs or waits."""
    steps = []
    while not engine.is_idle:
        steps += engine.step()
    return steps


class FixedDrafts(Speculation):
    """A speculation that drafts by the same thresholds in every round, whatever they bring."""

    def __init__(self, engine: Engine, thresholds: dict[int, float], most: int = 16):
        exits = [segment.exit_layer for segment in engine.segments if segment.exit_layer is not None]
        one = (1.0, 1.0, 1.0)
        super().__init__(Costs((one,) * len(engine.segments), dict.fromkeys(exits, one), one), engine.segments)
        self._thresholds, self._most = thresholds, most

    def begin_round(self, sequence: Sequence, num_rows: int, most: int) -> None:
        self.num_rounds += 1
        sequence.drafts.begin(self._thresholds if most > 0 else {}, min(most, self._most))
