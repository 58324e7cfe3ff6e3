"""Who runs and who waits: sequences are let in as there is memory, and each step takes the next tokens of those that run."""
import time
from collections import deque

from ee_tuning.generation.kv_cache import KVCache, blocks_for
from ee_tuning.generation.sequence import Sequence


class Scheduler:
    """The sequences of an engine, up to `num_slots` of them running. Ranks that see the same requests and tokens decide alike."""

    def __init__(self, cache: KVCache, *, num_slots: int, prefill_chunk: int):
        self.cache, self.num_slots, self.prefill_chunk = cache, num_slots, prefill_chunk
        self.running: list[Sequence] = []
        """As they lie in memory."""
        self.waiting: deque[Sequence] = deque()

    def remove(self, sequence: Sequence) -> bool:
        """Takes a sequence out and frees its memory; False where it is not here."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self.cache.pool.give_back(sequence.blocks)
        else:
            return False
        sequence.boundary = []
        return True

    def admit(self) -> None:
        """Takes waiting sequences in, first come first served, as long as all the memory they may ever need is free."""
        while self.waiting and len(self.running) < self.num_slots:
            blocks = self.cache.pool.take(blocks_for(self.waiting[0].limit))
            if blocks is None:
                return
            sequence = self.waiting.popleft()
            sequence.blocks, sequence.places = blocks, self.cache.places(blocks)
            sequence.statistics.seconds_waiting = time.perf_counter() - sequence.added_at
            self.running.append(sequence)
            self.running.sort(key=lambda s: s.blocks[0])  # neighbours in memory are one view

    def feed(self) -> list[Sequence]:
        """The sequences that take part in a step, their next tokens at the entrance: the newest token, or a chunk of a prompt."""
        budget, going = self.prefill_chunk, []
        for sequence in self.running:
            amount = 1
            if sequence.is_reading:
                amount = min(budget, sequence.num_prompt_tokens - sequence.num_fed)
                budget -= amount
            if amount:
                sequence.num_fed += amount
                going.append(sequence)
        return going
