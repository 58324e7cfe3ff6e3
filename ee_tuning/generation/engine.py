"""The decoding engine: a step gives every running sequence one token, and each leaves the network where its confidence lets it.

A token that leaves early lacks keys and values in the deeper pieces. Its hidden state waits at their entrance (it is *pending* there),
and runs with the next token that goes deeper, as a causal block: shallow layers never run twice, and the caches end up as a full pass
leaves them.
Every rank of TP × PP runs this same loop over the same tokens; only the stage that owns a piece computes it.
"""
import hashlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.generation.kv_cache import KVCache
from ee_tuning.generation.pieces import Policy, cut_pieces
from ee_tuning.generation.sampling import choose_token
from ee_tuning.model.attention import RaggedBatch, ragged_batch, rotation_tables
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.ragged_layer import RaggedHead, RaggedLayer
from ee_tuning.parallel.vocab import gather_logits, top1

# t tokens of a ragged batch · r rows · h hidden


@dataclass(frozen=True)
class TokenStep:
    """One token of one sequence."""

    sequence: "Sequence"
    token_id: int
    exit_layer: int
    """The layer it left at; the number of layers where it did not leave early."""
    confidence: float
    """Largest probability of the plain softmax there."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from logits; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(eq=False)
class Sequence:
    """A prompt and what was made of it."""

    slot: int
    tokens: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    watermarks: list[int]
    """Per piece, how many tokens have their keys and values there."""
    boundary: list[list[Tensor]] = field(repr=False)
    """Per piece, the hidden states [k, h] of its pending tokens, on the stage that made them."""

    @property
    def is_new(self) -> bool:
        """Whether its prompt has not been read yet."""
        return self.watermarks[0] == 0

    def num_arrived(self, piece: int) -> int:
        """Tokens that have reached the entrance of a piece."""
        return len(self.tokens) if piece == 0 else self.watermarks[piece - 1]

    def num_pending(self, piece: int) -> int:
        """Tokens that wait at the entrance of a piece."""
        return self.num_arrived(piece) - self.watermarks[piece]


class Engine:
    """Decodes up to `num_slots` sequences of up to `max_length` tokens with one stage of a model.

    stages[p] is stage p's (first, last) layer.
    """

    def __init__(self, model: EarlyExitModel, stages: list[tuple[int, int]], *, num_slots: int, max_length: int, max_pending: int = 16):
        self.model, self.topology, self.config = model, model.topology, model.config
        self.pieces = cut_pieces(stages, model.plan.exit_layers)
        own = range(model.plan.first_layer, model.plan.last_layer + 1)
        self.layers = {number: RaggedLayer(model.backbone.layer(number), self.config, self.topology) for number in own}
        self.heads = {spec.layer: RaggedHead(model.exit_head(spec.layer), self.topology) for spec in model.plan.own_exits}
        self.cache = KVCache(self.config, self.topology, num_slots=num_slots, max_length=max_length, dtype=model.plan.dtype)
        self.tables = rotation_tables(model.backbone.angles[:max_length], model.plan.dtype)
        self.max_pending = max_pending
        self.running: list[Sequence] = []
        self._batch: tuple[tuple[list[int], ...], RaggedBatch] | None = None
        self._generator = torch.Generator(device="cpu")

    def add(self, prompt: list[int], sampling: Sampling) -> Sequence:
        """Begins a sequence; its first token comes with the next step. The caller sees to it that a slot is free and the length fits."""
        assert prompt and len(prompt) < self.cache.max_length
        sequence = Sequence(slot=self.cache.free.pop(), tokens=list(prompt), num_prompt_tokens=len(prompt), sampling=sampling,
                            watermarks=[0] * len(self.pieces), boundary=[[] for _ in self.pieces])
        self.running.append(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence and frees its slot."""
        self.running.remove(sequence)
        self.cache.free.append(sequence.slot)

    @torch.inference_mode()
    def step(self, policy: Policy) -> list[TokenStep]:
        """One token for every running sequence. A prompt that is read fills every piece, so its first token is the final head's."""
        new = [s for s in self.running if s.is_new]
        old = [s for s in self.running if not s.is_new]
        steps = self._walk(new, policy, reads_prompt=True) + self._walk(old, policy, reads_prompt=False)
        for step in steps:
            step.sequence.tokens.append(step.token_id)
        if policy.fixed_exit is None:
            self._catch_up()
        return steps

    @torch.inference_mode()
    def full_model_tokens(self, tokens: list[int]) -> list[int]:
        """What the full model would say greedily after each prefix of `tokens`, from one pass over all of them."""
        sequence = self.add(tokens, Sampling())
        try:
            for piece in range(len(self.pieces)):
                output = self._run_piece(piece, [sequence])
            decided = self._decide(len(self.pieces) - 1, [sequence] * len(tokens), output, list(range(len(tokens))),
                                   head_layer=None, threshold=-1.0)
        finally:
            self.remove(sequence)
        return [int(token) for token, _ in decided]

    def _walk(self, going: list[Sequence], policy: Policy, *, reads_prompt: bool) -> list[TokenStep]:
        """Takes `going` through the pieces, each until it leaves."""
        steps: list[TokenStep] = []
        last = len(self.pieces) - 1
        for index, piece in enumerate(self.pieces):
            if not going:
                break
            # Rows that left wait here with their states: they ride along, for the weights are read anyway.
            rows = [s for s in (going if reads_prompt else self.running) if not s.is_new or reads_prompt]
            rows = [s for s in rows if s.num_pending(index)]
            must_leave = index == last or (policy.fixed_exit is not None and piece.exit_layer == policy.fixed_exit)
            output = self._run_piece(index, rows, keeps_states=not must_leave)
            if not must_leave and (reads_prompt or piece.exit_layer not in policy.consulted):
                continue
            head_layer = None if index == last and policy.fixed_exit is None else piece.exit_layer
            positions = [output.last_tokens[rows.index(s)] for s in going] if output is not None else []
            decided = self._decide(index, going, output, positions, head_layer, -1.0 if must_leave else policy.threshold)
            stays = []
            for sequence, (token, confidence) in zip(going, decided, strict=True):
                if must_leave or confidence >= policy.threshold:
                    steps.append(TokenStep(sequence, int(token), piece.last_layer, confidence))
                else:
                    stays.append(sequence)
            going = stays
        return steps

    def _catch_up(self) -> None:
        """Runs the deeper pieces for everybody once a sequence has `max_pending` tokens waiting."""
        for index in range(1, len(self.pieces)):
            if any(s.num_pending(index) >= self.max_pending for s in self.running):
                for deeper in range(index, len(self.pieces)):
                    self._run_piece(deeper, [s for s in self.running if s.num_pending(deeper)])
                return

    def _run_piece(self, index: int, rows: list[Sequence], *, keeps_states: bool = True) -> "_PieceOutput | None":
        """One pass of `rows`' pending tokens through a piece: its output on the stage that owns it, None elsewhere.

        The output waits for the next piece, unless there will be none.
        """
        piece, starts = self.pieces[index], [s.watermarks[index] for s in rows]
        lengths = [s.num_pending(index) for s in rows]
        for sequence in rows:
            sequence.watermarks[index] = sequence.num_arrived(index)
        hidden = self._entrance(index, rows, starts, lengths)
        if hidden is None:
            return None
        batch = self._describe([s.slot for s in rows], starts, lengths)
        for number in range(piece.first_layer, piece.last_layer + 1):
            hidden, exit_input = self.layers[number](hidden, self.cache.layer(number), batch)
        if (head := self.heads.get(piece.last_layer)) is not None:
            cache = self.cache.exit_head(piece.last_layer) if head.needs_cache else None
            exit_input = head.take(hidden, exit_input, cache, batch)
        if index + 1 < len(self.pieces) and keeps_states:
            for sequence, states in zip(rows, hidden.split(lengths), strict=True):
                sequence.boundary[index + 1].append(states)
        return _PieceOutput(hidden, exit_input, batch.last_tokens)

    def _entrance(self, index: int, rows: list[Sequence], starts: list[int], lengths: list[int]) -> Tensor | None:  # [t, h]
        """The pending tokens' states where the piece is computed: embedded, kept from before, or sent by the stage before."""
        here, stage = self.pieces[index].stage == self.topology.stage, self.topology.stage
        if index == 0:
            if not here:
                return None
            ids = [token for s, start, n in zip(rows, starts, lengths, strict=True) for token in s.tokens[start: start + n]]
            flat = torch.tensor([ids], device=self.topology.device)
            positions = None
            if self.config.position == "learned":
                positions = torch.tensor([[p for start, n in zip(starts, lengths, strict=True) for p in range(start, start + n)]],
                                         device=self.topology.device)
            return self.model.backbone.embed(flat, positions)[:, 0]
        before = self.pieces[index - 1].stage
        hidden = None
        if before == stage:
            parts = [states for s in rows for states in s.boundary[index]]
            hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
            for sequence in rows:
                sequence.boundary[index] = []
        if before == self.pieces[index].stage:
            return hidden
        if hidden is not None:
            dist.send(hidden.contiguous(), dst=self.topology.pp_ranks[stage + 1], group=self.topology.pp_group)
        elif here:
            hidden = torch.empty(sum(lengths), self.config.hidden_size, dtype=self.model.plan.dtype, device=self.topology.device)
            dist.recv(hidden, src=self.topology.pp_ranks[stage - 1], group=self.topology.pp_group)
            return hidden
        return None

    def _describe(self, slots: list[int], starts: list[int], lengths: list[int]) -> RaggedBatch:
        key = (slots, starts, lengths)
        if self._batch is None or self._batch[0] != key:  # the pieces of a step mostly see the same tokens
            per_group = self.config.num_attention_heads // self.config.num_query_groups
            self._batch = (key, ragged_batch(slots, starts, lengths, *self.tables, per_group))
        return self._batch[1]

    def _decide(self, index: int, rows: list[Sequence], output: "_PieceOutput | None", positions: list[int],
                head_layer: int | None, threshold: float) -> list[tuple[float, float]]:
        """(token id, confidence) of each row from the states at `positions` of the pass; decided once, the same on every rank."""
        decided = torch.empty(len(rows), 2, dtype=torch.float64)
        if output is not None:
            decided = self._judge(head_layer, rows, output, positions, threshold)
        if self.topology.num_in_replica > 1:
            source = self.topology.first_rank_of_stage(self.pieces[index].stage)
            dist.broadcast(decided, src=source, group=self.topology.replica_control)
        return decided.tolist()

    def _judge(self, head_layer: int | None, rows: list[Sequence], output: "_PieceOutput", positions: list[int],
               threshold: float) -> Tensor:  # [r, 2]
        """`head_layer` None asks the model's own final head. Tokens are drawn for rows that are at least as sure as `threshold`."""
        whole = positions == list(range(output.hidden.shape[0]))
        if head_layer is None:
            final = self.model.final_hidden(output.hidden if whole else output.hidden[positions])
            logits = F.linear(final, self.model.backbone.output_layer.weight)
        else:
            logits = self.heads[head_layer].logits(output.exit_input if whole else output.exit_input.rows(positions))
        ids, confidences = top1(logits, self.model.vocab)
        decided = torch.stack((ids.double(), confidences.double()), dim=-1).cpu()
        sampled = [i for i, s in enumerate(rows) if s.sampling.temperature > 0 and decided[i, 1] >= threshold]
        if sampled:
            full = gather_logits(logits[sampled], self.model.vocab).cpu()
            for i, row_logits in zip(sampled, full, strict=True):
                decided[i, 0] = self._draw(row_logits, rows[i])
        return decided

    def _draw(self, logits: Tensor, sequence: Sequence) -> int:
        # Seeded by the request's seed, its prompt and the position: the same token whatever the batch, the layout, or the exit that asks.
        sampling, prompt = sequence.sampling, sequence.tokens[: sequence.num_prompt_tokens]
        digest = hashlib.blake2b(f"{sampling.seed}:{prompt}:{len(sequence.tokens)}".encode(), digest_size=8).digest()
        self._generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        return int(choose_token(logits, sampling.temperature, sampling.top_k, sampling.top_p, self._generator))


@dataclass(frozen=True)
class _PieceOutput:
    hidden: Tensor       # [t, h]
    exit_input: ExitInput
    last_tokens: list[int]
