"""The backward pass through this stage's layers, where the model is trained, too (tuning.trainable).

Stages take turns as in 1F1B (arXiv 2104.04473): a stage runs ahead by as many micro-batches as there are stages behind
it, then goes one backward for each one forward, and is drained at the end of a step. Exits lie on any stage, so the
gradient of a stage's hidden states is the sum of its exits' and of what the next stage sends (EE-LLM, arXiv
2312.04916, section 3).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ee_tuning.checkpoint.trained_names import (
    half_of,
    has_partial_gradient,
    lora_targets,
    trained_parameters,
    trained_shard,
)
from ee_tuning.config import TuningSection
from ee_tuning.errors import InputError
from ee_tuning.losses.drafting import Targets
from ee_tuning.losses.loss import ExitLoss, linear_loss
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.lora import Lora, add_lora
from ee_tuning.model.sequence_parallel import gather_sequence
from ee_tuning.parallel.gradient_relay import GradientRelay
from ee_tuning.parallel.stage_copies import find_stage_copies
from ee_tuning.parallel.time_parts import part
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog
from ee_tuning.tuning.backbone_optimizer import BackboneOptimizer, TrainedParameter
from ee_tuning.tuning.layer_skip import trained_depths
from ee_tuning.tuning.microbatch_schedule import Microbatch
from ee_tuning.tuning.settings import final_objective
from ee_tuning.tuning.stage_forward import StageOutput

Root = tuple[Tensor, Tensor]
"""A tensor from which the backward pass begins, and the loss's gradient with respect to it."""


class BackboneTrainer:
    """The trained weights of this stage's layers. Create it on all ranks together, after the weights are loaded."""

    def __init__(self, model: EarlyExitModel, tuning: TuningSection, topology: Topology, timeout_minutes: float):
        """Raises InputError where tuning.trainable can not be done with these exits."""
        _check_exits(model, tuning)
        self.layer = model.config.num_layers
        """Key of the final head's figures among those of exits: the number of layers."""
        self._model, self._tuning, self._topology = model, tuning, topology
        model.trains_backbone, model.recomputes = True, tuning.recompute_activations
        model.trains_embedding = tuning.trained.has_embedding and topology.is_first_stage
        self.optimizer = BackboneOptimizer(_trained(model, tuning, topology, timeout_minutes), tuning, topology)
        plan, first = model.plan, tuning.trained.first_layer(model.config.num_layers)
        self._receives = not topology.is_last_stage and first <= plan.last_layer
        self._sends = not topology.is_first_stage and first < plan.first_layer
        model.takes_gradient = self._sends
        shape = model.hidden_shape(tuning.seq_length, tuning.micro_batch_size)
        self.relay = GradientRelay(topology, shape, plan.dtype, minutes=timeout_minutes)
        self._choice: int | None = None
        self._num_tokens, self._objective = 0.0, final_objective(tuning)

    def begin(self, step: int) -> None:
        """Prepares optimizer step `step`, before its first forward pass: chooses the half that it trains."""
        tuning = self._tuning
        if tuning.trained.kind != "half":
            return
        choice = (step - 1) // tuning.half_steps if tuning.half_steps else 0
        if choice != self._choice:
            self._choice = choice
            self.optimizer.choose(half_of(self._model.config, tuning.seed, choice))

    def num_ahead(self, is_training: bool, is_last: bool) -> int:
        """Returns the number of micro-batches whose backward pass is put off behind this one's forward pass."""
        is_free = not is_training or is_last
        return 0 if is_free else self._topology.pp - 1 - self._topology.stage

    def depths(self, microbatch: Microbatch) -> frozenset[int]:
        """Returns the depths that a micro-batch trains: exits, and the number of layers for the final head."""
        exits, replica = self._model.plan.exit_layers, self._topology.dp_rank
        return trained_depths(self._tuning, self._model.config.num_layers, exits, replica, microbatch)

    @part("final head and loss")
    def final_loss(self, output: StageOutput, targets: Targets) -> ExitLoss | None:
        """Returns the loss of the model's own head behind the last layer, on the last stage."""
        if not self._topology.is_last_stage:
            return None
        model, cuts_sequence = self._model, self._model.plan.cuts_sequence
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._tuning.final_loss_weight > 0):
            assert output.ends is not None
            hidden = model.backbone.final_norm(output.ends.leaving)
            return linear_loss(
                gather_sequence(hidden, self._topology.tp_group) if cuts_sequence else hidden,
                model.backbone.output_layer.weight,
                targets.labels,
                targets.loss_mask,
                vocab=model.vocab,
                chunk_tokens=self._tuning.loss_chunk_tokens,
                objective=self._objective,
                teacher=output.final_teacher,
                sums_gradient=not cuts_sequence,
            )

    @part("layers, backward")
    def backward(self, output: StageOutput, loss: ExitLoss | None, exits: Sequence[Root]) -> None:
        """Runs the layers backward from the final head's `loss`, the `exits`' gradients, and the next stage's, which
        it receives; sends the gradient to the stage before.
        """
        assert output.ends is not None
        self._num_tokens += output.microbatch.chunk.loss_mask.sum(dtype=torch.float64).item()
        roots = list(exits)
        if loss is not None:
            roots.append((loss.loss, torch.full_like(loss.loss, self._tuning.final_loss_weight)))
        if self._receives:
            roots.append((output.ends.leaving, self.relay.receive()))
        roots = [root for root in roots if root[0].requires_grad]  # with layer_dropout, a root may have no graph
        with hang_watchdog(self._topology, "the backward pass of a micro-batch (its tensor-parallel ranks take part)"):
            if roots:
                torch.autograd.backward([x for x, _ in roots], [gradient for _, gradient in roots])
        if self._sends:
            entering = output.ends.entering
            self.relay.send(torch.zeros_like(entering) if entering.grad is None else entering.grad)

    @part("optimizer")
    def update(self, lr: float) -> tuple[float, bool]:
        """Takes one optimizer step. See BackboneOptimizer."""
        num_tokens, self._num_tokens = self._num_tokens, 0.0
        return self.optimizer.update(num_tokens, lr)


def _check_exits(model: EarlyExitModel, tuning: TuningSection) -> None:
    last = model.config.num_layers
    if any(spec.draft is not None for spec in model.plan.exits):
        raise InputError(
            f"an eagle3 head is trained beside a frozen model, not with tuning.trainable = {tuning.trainable}"
        )
    if last in model.plan.exit_layers:
        raise InputError(
            f"with tuning.trainable = {tuning.trainable} the model's own head is trained behind layer {last}, so no exit "
            f"can be there, got exits {','.join(map(str, model.plan.exit_layers))}; leave it out"
        )
    if not model.plan.exits and not tuning.final_loss_weight:
        raise InputError("without exits tuning.final_loss_weight must be above 0, got 0: nothing would be trained")


def _trained(
    model: EarlyExitModel, tuning: TuningSection, topology: Topology, timeout_minutes: float
) -> dict[str, TrainedParameter]:
    """Returns the trained parameters of this stage, LoRA's added to it."""
    config, plan = model.config, model.plan
    if tuning.trained.kind == "lora":
        layers = {number: model.backbone.layer(number) for number in range(plan.first_layer, plan.last_layer + 1)}
        lora = Lora(
            targets=lora_targets(tuning, config),
            rank=tuning.lora_rank,
            alpha=tuning.lora_alpha,
            seed=tuning.seed,
            dtype=plan.dtype,
            cuts_sequence=plan.cuts_sequence,
        )
        add_lora(layers, lora, config, topology)
    names, own, trained = trained_parameters(tuning, config), dict(model.backbone.named_parameters()), {}
    copies = find_stage_copies({name: _holders(name, model) for name in names}, topology, minutes=timeout_minutes)
    for name in names:
        if name not in own:  # it belongs to another stage
            continue
        shard = partial(trained_shard, name, tuning, config, topology.tp)
        is_replicated = shard(0) == shard(topology.tp - 1)
        is_partial = has_partial_gradient(name, is_replicated=is_replicated, cuts_sequence=plan.cuts_sequence)
        trained[name] = TrainedParameter(own[name], shard, is_replicated, is_partial, copies.get(name))
    return trained


def _holders(name: str, model: EarlyExitModel) -> tuple[int, ...]:
    """Returns the stages that hold a copy of a trained parameter, where they may be several."""
    ends = model.plan.final_head_stages
    if model.config.ties_embeddings and name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return tuple(sorted({0, *ends}))
    return ends if name == "output_layer.weight" or name.startswith("decoder.final_layernorm.") else ()
