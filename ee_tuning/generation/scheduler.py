"""Who runs and who waits: sequences are let in as there is memory, and each step takes the next tokens of those that
run.

A sequence takes memory as it grows. Where none is left the youngest is put back in front of those that wait, and later
reads its tokens again; its next ones are the same. It comes back when all that it may ever need is free: nobody is put
back twice.
"""

import time
from collections import deque
from collections.abc import Set

from ee_tuning.generation.block_pool import BLOCK_SIZE, block_key, blocks_for
from ee_tuning.generation.kv_cache import KVCache
from ee_tuning.generation.sequence import Sequence


class Scheduler:
    """The sequences of an engine, up to `num_slots` of them running. Ranks that see the same requests and tokens decide
    alike.
    """

    def __init__(self, cache: KVCache, *, num_slots: int, prefill_chunk: int, reuses_prefixes: bool = True):
        self.cache, self.pool = cache, cache.pool
        self.num_slots, self.prefill_chunk, self.reuses_prefixes = num_slots, prefill_chunk, reuses_prefixes
        self.running: list[Sequence] = []
        """The running sequences in the order in which they lie in memory."""
        self.waiting: deque[Sequence] = deque()

    def remove(self, sequence: Sequence) -> bool:
        """Takes a sequence out and frees its memory; False where it is not here."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self._leave(sequence)
        else:
            return False
        sequence.boundary, sequence.head_states = [], {}
        return True

    def admit(self) -> None:
        """Takes waiting sequences in, first come first served, while there is memory for what they have to read."""
        for sequence in self.running:
            if sequence.num_fed >= (sequence.num_known_blocks + 1) * BLOCK_SIZE:
                self._make_known(sequence)
        while self.waiting and len(self.running) < self.num_slots:
            sequence = self.waiting[0]
            shared = self._known_blocks(sequence)
            if self._is_being_read(sequence, len(shared)) or not self._place(sequence, shared):
                return
            self.waiting.popleft()
            if not sequence.was_put_back:
                sequence.statistics.num_reused = sequence.num_fed
                sequence.statistics.seconds_waiting = time.perf_counter() - sequence.added_at
            else:
                sequence.statistics.num_read_again += sequence.num_to_read - sequence.num_fed
            self.running.append(sequence)
            self.running.sort(key=lambda s: s.blocks[0])  # neighbours in memory are one view

    @property
    def is_short(self) -> bool:
        """Whether there is too little memory for the next tokens of those that run, so that somebody is put back."""
        return sum([s.num_fed == len(s.blocks) * BLOCK_SIZE for s in self.running]) > self.pool.num_free

    def feed(self, busy: Set[int] = frozenset()) -> list[Sequence]:
        """The sequences that take part in a step, their next tokens at the entrance: the newest token, or a chunk of a
        prompt. Those whose numbers are in `busy` are in the middle of one.
        """
        self._grow()
        budget, going = self.prefill_chunk, []
        for sequence in self.running:
            if sequence.number in busy:
                continue
            amount = 0 if sequence.has_all_fed else 1  # fed already where the step before left it out
            if sequence.is_reading:
                amount = min(budget, sequence.num_to_read - sequence.num_fed)
                budget -= amount
            if amount or sequence.has_all_fed:
                sequence.num_fed += amount
                going.append(sequence)
        return going

    def reserve(self, sequence: Sequence, num_tokens: int) -> None:
        """Room for so many tokens of a running sequence ahead of time, as far as there is memory that nobody holds."""
        wanted = blocks_for(min(num_tokens, sequence.limit)) - len(sequence.blocks)
        more = self.pool.take(min(wanted, self.pool.num_free), after=sequence.blocks[-1]) if wanted > 0 else None
        if more:
            sequence.blocks += more
            sequence.places = self.cache.places(sequence.blocks)

    def _place(self, sequence: Sequence, shared: list[int]) -> bool:
        """Gives a sequence memory, the `shared` blocks first; False where there is too little."""
        wanted = blocks_for(sequence.limit if sequence.was_put_back else len(sequence.tokens)) - len(shared)
        self.pool.hold(shared)
        # Whoever runs has to be able to grow: else the next one would be let in to be put back at once.
        growing = sum(len(s.blocks) < blocks_for(s.limit) for s in self.running)
        own = (
            self.pool.take(wanted, after=shared[-1] if shared else None)
            if wanted + growing <= self.pool.num_free
            else None
        )
        if own is None:
            self.pool.give_back(shared)
            return False
        sequence.blocks = shared + own
        sequence.places = self.cache.places(sequence.blocks)
        sequence.begin_at(len(shared) * BLOCK_SIZE)
        sequence.num_known_blocks = len(shared)
        return True

    def _grow(self) -> None:
        """Room for the tokens that sequences say next, older ones first."""
        if not any([s.num_fed == len(s.blocks) * BLOCK_SIZE for s in self.running]):
            return
        for sequence in sorted(self.running, key=lambda s: s.number):
            while sequence.blocks and sequence.num_fed == len(sequence.blocks) * BLOCK_SIZE:
                block = self.pool.take(1, after=sequence.blocks[-1])
                if block is None:
                    self._put_back(max((s for s in self.running if not s.was_put_back), key=lambda s: s.number))
                else:
                    sequence.blocks += block
                    sequence.places = self.cache.places(sequence.blocks)

    def _put_back(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.begin_at(0)
        sequence.was_put_back = True
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._make_known(sequence)
        self.running.remove(sequence)
        self.pool.give_back(sequence.blocks)
        sequence.blocks, sequence.places = [], None

    def _make_known(self, sequence: Sequence) -> None:
        """Lets others share the blocks that a sequence has filled by now."""
        if sequence.shares and self.reuses_prefixes:
            for index in range(sequence.num_known_blocks, sequence.num_filled // BLOCK_SIZE):
                self.pool.make_known(sequence.blocks[index], self._key(sequence, index), sequence.parts)
                sequence.num_known_blocks = index + 1

    def _known_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the beginning of a sequence already. Its newest token is always left to compute."""
        blocks: list[int] = []
        for index in range(self._num_shareable(sequence)):
            block = self.pool.find(self._key(sequence, index), sequence.parts)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _is_being_read(self, sequence: Sequence, index: int) -> bool:
        """Whether block `index` of a waiting sequence is in another's prompt that is being read: waiting for it costs
        less than doing it twice, and the chunk that a step reads is taken anyway.
        """
        return index < self._num_shareable(sequence) and any(
            s.is_reading
            and s.parts >= sequence.parts
            and index < self._num_shareable(s)
            and self._key(s, index) == self._key(sequence, index)
            for s in self.running
        )

    def _num_shareable(self, sequence: Sequence) -> int:
        return (len(sequence.tokens) - 1) // BLOCK_SIZE if sequence.shares and self.reuses_prefixes else 0

    def _key(self, sequence: Sequence, index: int) -> bytes:
        keys = sequence.block_keys
        while len(keys) <= index:
            first = len(keys) * BLOCK_SIZE
            # Heads with layers of their own fill them for those who ask: who asks the same ones shares blocks, and
            # pushes out no other's.
            before = keys[-1] if keys else repr(sorted(sequence.head_watermarks)).encode()
            keys.append(block_key(before, sequence.tokens[first : first + BLOCK_SIZE]))
        return keys[index]
