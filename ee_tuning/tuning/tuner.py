"""Tuning: exit heads are trained on a frozen backbone, in a forward-only relay of micro-batches that drains at the end
alone.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from ee_tuning.checkpoint.aside import gathered, on_first_rank
from ee_tuning.checkpoint.exit_config import exit_config_tree
from ee_tuning.checkpoint.exit_heads import save_exit_heads
from ee_tuning.checkpoint.load import LoadedModel, tuning_costs
from ee_tuning.config import Config
from ee_tuning.data.loader import BatchSource, validation_batches
from ee_tuning.data.tokens import Splits
from ee_tuning.json_file import to_json
from ee_tuning.parallel.relay import NextAction, Relay
from ee_tuning.parallel.topology import Topology
from ee_tuning.tuning.departure import Departure
from ee_tuning.tuning.exit_work import ExitWork
from ee_tuning.tuning.itinerary import Itinerary, Leg
from ee_tuning.tuning.metrics import METRICS, MetricsBoard, holds_validation
from ee_tuning.tuning.optimizer import ExitOptimizer
from ee_tuning.tuning.pace import Pace
from ee_tuning.tuning.saving import Saver
from ee_tuning.tuning.settings import loss_weights, objective
from ee_tuning.tuning.state import Progress, latest_checkpoint, load_checkpoint, whole_tensors
from ee_tuning.tuning.step import Passed, StageWalk
from ee_tuning.tuning.stopping import StopRequest
from ee_tuning.tuning.tutor import Tutor
from ee_tuning.tuning.watching import watched


class Tuner:
    """One stage's part of a run."""

    def __init__(self, loaded: LoadedModel, samples: Splits, config: Config, topology: Topology) -> None:
        assert loaded.exits is not None
        self.config, self.tuning, self.topology, self.exits_config = config, config.tuning, topology, loaded.exits
        self.run_folder = Path(config.tuning.run_folder)
        self._model, self._loaded = loaded.model, loaded
        weights = loss_weights(self.tuning, loaded.exits.exit_layers)
        self._work = ExitWork(
            [
                ExitOptimizer(loaded.model.exit_head(spec.layer), weights[spec.layer], self.tuning, topology)
                for spec in loaded.model.plan.own_exits
            ],
            self.tuning,
            topology,
        )
        self._samples = samples
        self._source = BatchSource(samples.train, self.tuning, dp=topology.dp, dp_rank=topology.dp_rank)
        self._validation = validation_batches(samples.valid, self.tuning, dp=topology.dp, dp_rank=topology.dp_rank)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self._work.step

    @property
    def exits(self) -> list[ExitOptimizer]:
        """The exits of this stage."""
        return self._work.exits

    def resume(self) -> None:
        """Goes on from the run folder's latest checkpoint, if there is one. Raises InputError where it is of another
        run.
        """
        folder = on_first_rank(self.topology, lambda: latest_checkpoint(self.run_folder))
        if folder is None:
            return
        progress = load_checkpoint(folder, self._fixed(), self.exits, self._model.config, self.topology)
        self._work.step = progress.step
        self._source = BatchSource(
            self._samples.train,
            self.tuning,
            dp=self.topology.dp,
            dp_rank=self.topology.dp_rank,
            position=progress.position,
        )

    def run(self) -> bool:
        """Steps until train_iters or a signal, saves a checkpoint, and says whether train_iters was reached.

        Raises InputError, on all ranks, where a checkpoint can not be written; those before it stay as they are.
        """
        if self.step >= self.tuning.train_iters:
            return True
        relay, tutor = self._relay(), self.make_tutor()
        walk = StageWalk(
            self._model,
            relay,
            self.topology,
            self.tuning.loss_chunk_tokens,
            objective(self.tuning),
            tutor,
            teaches_validation=self.tuning.compare_final,
        )
        itinerary = Itinerary(self._source, self._validation, self.tuning)
        validates_first = self._validates_first(itinerary)
        waiting: deque[Passed] = deque()  # micro-batches that the backbone is ahead of the exits
        saver = Saver(self.exits, self._model.config, self.tuning, self.topology)
        with watched(self.config, self.topology, self._loaded, self.step) as metrics, StopRequest() as stop:
            departure = Departure(self.tuning, self.topology, stop, saver)
            flops_per_token = 2 * sum(tuning_costs(self.config, self._model.config, self.exits_config))
            pace = Pace(
                self.tuning.global_batch_size * self.tuning.seq_length,
                flops_per_token,
                lambda: relay.seconds_waited + (tutor.feedback.seconds_waited if tutor else 0.0),
            )
            for leg in itinerary.after(self.step, validates_first=validates_first):
                next_action = NextAction.NEXT
                for done, next_action in self._advance(walk, leg, departure.next_action(leg), waiting, metrics, pace):
                    if next_action is not NextAction.NEXT:
                        pace.lap(trained=leg.trains)
                        self._save(saver, done, metrics)
                        departure.saved()
                        pace.lap(trained=False)
                pace.lap(trained=leg.trains)
                metrics.poll()
                if next_action is NextAction.END:
                    break
            relay.finish()
            if tutor:
                tutor.feedback.finish()
            saver.settle()
            metrics.finish()
            saver.check()
        return self.step == self.tuning.train_iters

    def rehearse(self, walk: StageWalk) -> None:
        """One optimizer step and one validation, whose records go nowhere. For dry runs."""
        metrics, pace = MetricsBoard(self.topology, lambda record: None), Pace(1, 0.0, lambda: 0.0)
        itinerary, waiting = Itinerary(self._source, self._validation, self.tuning), deque[Passed]()
        for leg in (*itinerary.training(1), *itinerary.validation(1)):
            deque(self._advance(walk, leg, NextAction.NEXT, waiting, metrics, pace), maxlen=0)
        while waiting:
            self._work.do(waiting.popleft(), walk, metrics, pace)

    def never_updated(self) -> tuple[list[int], list[int]]:
        """Trained exits that no step has updated, and all trained ones, of every stage. All ranks call it."""
        own = [(each.layer, each.num_updates) for each in self.exits if each.trains and each.parameters]
        every = gathered(own, self.topology)
        return sorted({layer for layer, _ in every} - {layer for layer, count in every if count}), sorted(
            {layer for layer, _ in every}
        )

    def make_tutor(self) -> Tutor | None:
        """What hands on the final head's lessons; None where nobody asks for them."""
        if not self.tuning.wants_final_head:
            return None
        stages = [
            stage
            for stage, (first, last) in enumerate(self._loaded.stages)
            if any(first <= layer <= last for layer in self.exits_config.exit_layers)
        ]
        return Tutor(
            self._model,
            self.topology,
            self.tuning,
            stages,
            tells_hidden=self.tuning.tells_hidden(self.exits_config.ties_output),
        )

    def save_exit_heads(self, output: Path) -> None:
        """Writes the artifact of the tuned heads, in the backbone's dtype. All ranks call it."""
        settings = ("global_batch_size", "seq_length", "lr", "min_lr", "lr_decay_style", "backbone_weights", "seed")
        tuned = {
            "steps": self.step,
            "tokens": self._source.position * self.tuning.seq_length,
            **{key: getattr(self.tuning, key) for key in settings},
        }
        save_exit_heads(
            output,
            dataclasses.replace(self.exits_config, tuned=tuned),
            self._model.config,
            whole_tensors(self.exits, self._model.config, self.topology),
            self.topology,
            overwrite=True,
        )

    def _relay(self) -> Relay:
        return Relay(
            self.topology,
            self._model.hidden_shape(self.tuning.seq_length, self.tuning.micro_batch_size),
            self._model.plan.dtype,
        )

    def _advance(
        self,
        walk: StageWalk,
        leg: Leg,
        next_action: NextAction,
        waiting: deque[Passed],
        metrics: MetricsBoard,
        pace: Pace,
    ) -> Iterator[tuple[Leg, NextAction]]:
        """A micro-batch through the layers, and as many that wait through the exits as must not wait longer: each of
        these, when its exits are done, and what follows it.
        """
        waiting.append(walk.forward(leg, next_action))
        is_end = waiting[-1].next_action is NextAction.END
        while len(waiting) > (0 if is_end else walk.num_ahead):
            done, next_action = waiting[0].leg, waiting[0].next_action
            # Not kept in a variable here: it would lie beside the next micro-batch's.
            self._work.do(waiting.popleft(), walk, metrics, pace)
            yield done, next_action

    def _validates_first(self, itinerary: Itinerary) -> bool:
        """Whether a validation comes before the next step: of the heads as they began, or one that a stop left out. All
        ranks call it.
        """
        return itinerary.validates_after(self.step) and not on_first_rank(
            self.topology, lambda: bool(self.step) and holds_validation(self.run_folder / METRICS, self.step)
        )

    def _save(self, saver: Saver, done: Leg, metrics: MetricsBoard) -> None:
        progress = Progress(step=self.step, position=done.position, fixed=self._fixed())
        # So that a run that goes on from here has the records of all steps before it.
        saver.save(progress, before_latest=partial(metrics.finish, metrics.num_posted))

    def _fixed(self) -> dict[str, Any]:
        exits = self.exits_config
        return {
            "model_fingerprint": exits.model_fingerprint,
            "exit_layers": list(exits.exit_layers),
            "architecture": exit_config_tree(exits)["architecture"],
            "adapter_rank": exits.adapter_rank,
            "output": exits.output,
            "adds_linear": list(exits.adds_linear) or None,
            "output_vocab": sha256(to_json(exits.token_ids).encode()).hexdigest() if exits.token_ids else None,
            "seq_length": self.tuning.seq_length,
            "seed": self.tuning.seed,
            **self._samples.train.identity(),
        }
