"""The scheduler: admits sequences as there is memory, and chooses the tokens that each step computes.

A sequence takes memory as it grows. If none is left, the youngest sequence with the least urgent priority is preempted:
it goes to the front of the queue, and its tokens are computed again later; the tokens that follow are the same. It is
admitted again when all memory that it may ever need is free, so no sequence is preempted twice.
"""

import time
from collections import deque
from collections.abc import Set

from ee_tuning.decoding.eager_attention import BLOCK_SIZE
from ee_tuning.engine.kv_cache import KVCache, block_key, blocks_for
from ee_tuning.engine.sequence import Sequence


class Scheduler:
    """The sequences of an engine, up to `num_slots` of them running. Ranks with the same requests and tokens decide
    alike.
    """

    def __init__(self, cache: KVCache, *, num_slots: int, prefill_chunk: int, reuses_prefixes: bool = True):
        self.cache, self.pool = cache, cache.pool
        self.num_slots, self.prefill_chunk, self.reuses_prefixes = num_slots, prefill_chunk, reuses_prefixes
        self.running: list[Sequence] = []
        """The running sequences, in the order in which they lie in memory."""
        self.waiting: deque[Sequence] = deque()
        self._free_slots = list(range(num_slots - 1, -1, -1))

    def enqueue(self, sequence: Sequence) -> None:
        """Queues a sequence behind those that came before it, and before those of a higher number of priority."""
        place = len(self.waiting)
        # A preempted sequence keeps its place at the front.
        while place and self.waiting[place - 1].rank > sequence.rank and not self.waiting[place - 1].was_preempted:
            place -= 1
        self.waiting.insert(place, sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Removes a sequence and frees its memory; False where it is neither running nor waiting."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self._release(sequence)
        else:
            return False
        return True

    def admit(self, busy: Set[int] = frozenset()) -> None:
        """Admits waiting sequences in their order, while there is memory for the tokens that they have. Sequences whose
        numbers are in `busy` are already in a step: not all ranks know how much of them is computed.
        """
        for sequence in self.running:
            if sequence.number in busy:
                continue
            if sequence.num_scheduled >= (sequence.num_cached_blocks + 1) * BLOCK_SIZE:
                self._cache_blocks(sequence)
        while self.waiting and len(self.running) < self.num_slots:
            sequence = self.waiting[0]
            shared = self._cached_blocks(sequence)
            if self._is_being_computed(sequence, len(shared)) or not self._allocate(sequence, shared):
                return
            self.waiting.popleft()
            if not sequence.was_preempted:
                sequence.statistics.num_reused = sequence.num_scheduled
                sequence.statistics.seconds_waiting = time.perf_counter() - sequence.added_at
            else:
                sequence.statistics.num_read_again += sequence.num_to_prefill - sequence.num_scheduled
            sequence.slot = self._free_slots.pop()
            self.running.append(sequence)
            self.running.sort(key=lambda s: s.blocks[0])  # neighbours in memory form one view

    @property
    def is_short(self) -> bool:
        """Whether the next tokens of the running sequences take more memory than is free, so that one is preempted."""
        return sum([s.num_scheduled == len(s.blocks) * BLOCK_SIZE for s in self.running]) > self.pool.num_free

    def schedule(self, busy: Set[int] = frozenset()) -> list[Sequence]:
        """Returns the sequences of the next step, with their next tokens scheduled: the newest token, or a chunk of the
        prompt. Sequences whose numbers are in `busy` are already in a step.
        """
        self._grow()
        budget, scheduled = self.prefill_chunk, []
        for sequence in self.running:
            if sequence.number in busy:
                continue
            if sequence.num_scheduled > sequence.num_computed[0]:  # the previous step left it out
                scheduled.append(sequence)
                continue
            amount = len(sequence.tokens) - sequence.num_scheduled
            if sequence.is_prefilling:
                amount = min(budget, sequence.num_to_prefill - sequence.num_scheduled)
                budget -= amount
            if amount or sequence.is_all_scheduled:
                sequence.num_scheduled += amount
                scheduled.append(sequence)
        return scheduled

    def reserve(self, sequence: Sequence, num_tokens: int) -> None:
        """Allocates memory for this many tokens of a running sequence ahead of time, as far as there is free memory."""
        wanted = blocks_for(min(num_tokens, sequence.limit)) - len(sequence.blocks)
        more = self.pool.allocate(min(wanted, self.pool.num_free), after=sequence.blocks[-1]) if wanted > 0 else None
        if more:
            sequence.blocks += more
            sequence.slot_mapping = self.cache.slot_mapping(sequence.blocks)

    def _allocate(self, sequence: Sequence, shared: list[int]) -> bool:
        """Allocates memory for a sequence behind the `shared` blocks. Returns False where there is too little."""
        wanted = blocks_for(sequence.limit if sequence.was_preempted else len(sequence.tokens)) - len(shared)
        self.pool.incref(shared)
        # Running sequences must be able to grow; otherwise the next one would be preempted as soon as it is admitted.
        growing = sum(len(s.blocks) < blocks_for(s.limit) for s in self.running)
        own = (
            self.pool.allocate(wanted, after=shared[-1] if shared else None)
            if wanted + growing <= self.pool.num_free
            else None
        )
        if own is None:
            self.pool.free(shared)
            return False
        sequence.blocks = shared + own
        sequence.slot_mapping = self.cache.slot_mapping(sequence.blocks)
        sequence.reset(len(shared) * BLOCK_SIZE)
        sequence.num_cached_blocks = len(shared)
        return True

    def _grow(self) -> None:
        """Allocates memory for the next tokens of running sequences, those of lower rank first."""
        if not any([s.num_scheduled == len(s.blocks) * BLOCK_SIZE for s in self.running]):
            return
        for sequence in sorted(self.running, key=lambda s: s.rank):
            while sequence.blocks and sequence.num_scheduled == len(sequence.blocks) * BLOCK_SIZE:
                block = self.pool.allocate(1, after=sequence.blocks[-1])
                if block is None:
                    self._preempt(max((s for s in self.running if not s.was_preempted), key=lambda s: s.rank))
                else:
                    sequence.blocks += block
                    sequence.slot_mapping = self.cache.slot_mapping(sequence.blocks)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.reset(0)
        sequence.was_preempted = True
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._cache_blocks(sequence)
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self.pool.free(sequence.blocks)
        sequence.blocks, sequence.slot_mapping = [], None

    def _cache_blocks(self, sequence: Sequence) -> None:
        """Puts the blocks that a sequence has filled so far into the prefix cache."""
        if sequence.uses_prefix_cache and self.reuses_prefixes:
            for index in range(sequence.num_cached_blocks, sequence.num_filled // BLOCK_SIZE):
                self.pool.cache(sequence.blocks[index], self._key(sequence, index), sequence.cached_parts)
                sequence.num_cached_blocks = index + 1

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Returns blocks of the prefix cache that hold the beginning of a sequence. Its newest token is always
        computed.
        """
        blocks: list[int] = []
        for index in range(self._num_cacheable(sequence)):
            block = self.pool.find(self._key(sequence, index), sequence.cached_parts)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _is_being_computed(self, sequence: Sequence, index: int) -> bool:
        """Whether block `index` of a waiting sequence lies in the prompt of a running one that is being computed:
        waiting for it costs less than computing it twice.
        """
        return index < self._num_cacheable(sequence) and any(
            s.is_prefilling
            and s.cached_parts >= sequence.cached_parts
            and index < self._num_cacheable(s)
            and self._key(s, index) == self._key(sequence, index)
            for s in self.running
        )

    def _num_cacheable(self, sequence: Sequence) -> int:
        return (len(sequence.tokens) - 1) // BLOCK_SIZE if sequence.uses_prefix_cache and self.reuses_prefixes else 0

    def _key(self, sequence: Sequence, index: int) -> bytes:
        keys = sequence.block_keys
        while len(keys) <= index:
            first = len(keys) * BLOCK_SIZE
            # Heads with layers of their own fill blocks for requests that ask them: requests that ask the same heads
            # share blocks, and evict no others.
            before = keys[-1] if keys else repr(sequence.own_layers).encode()
            keys.append(block_key(before, sequence.tokens[first : first + BLOCK_SIZE]))
        return keys[index]
