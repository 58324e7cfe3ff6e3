"""Structured output as masks over the vocabulary: the tokens with which the completion keeps its form.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance). A state advances with the tokens of one
sequence, drafts included, and is rolled back where drafts are rejected.
"""

import re
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.sampling.structured_output import StructuredOutput

if TYPE_CHECKING:
    import llguidance

# v vocabulary

MOST_COMPILED = 128
"""Grammars that are kept compiled."""
_LISTING = re.compile(r"\n +\d+ \|")
"""Start of the grammar's lines within an error of the library."""
_MISSING = "structured output needs the package llguidance, which is not installed; pip install 'ee_tuning[structured]'"


class GrammarState:
    """The position of one sequence's completion in its grammar."""

    def __init__(
        self, matcher: "llguidance.LLMatcher", end_id: int, num_prompt_tokens: int, stop_ids: frozenset[int], size: int
    ):
        """`matcher` has consumed no token, and allows `end_id` where the text may end; the sequence's `stop_ids` are
        allowed there. `size` is v.
        """
        self._begin, self._matcher, self._end_id = matcher, matcher.deep_copy(), end_id
        self._num_prompt_tokens, self._stop_ids, self._size = num_prompt_tokens, sorted(stop_ids), size
        self._has_ended = False
        """Whether no token may follow. Some matchers detect it only after a mask was computed, which not every rank
        does.
        """
        self._taken: list[int] = []
        """The tokens of the completion that the matcher has consumed."""
        self._allowed: Tensor | None = None
        """The mask after these tokens, if it was computed."""
        self.error = ""
        """The error, if the completion ended without satisfying its form."""

    def allowed(self, tokens: list[int], length: int) -> Tensor | None:  # [v] bool
        """Returns the tokens that may follow the first `length` of `tokens`; None after a draft that is not allowed,
        and at the end.
        """
        if not self._move_to(tokens, length):
            return None
        if self._allowed is None:
            self._allowed = self._compute_mask()
        return self._allowed if bool(self._allowed.any()) else None

    def num_allowed(self, tokens: list[int]) -> int:
        """Returns the length of the longest beginning of `tokens` that the prompt and the grammar allow."""
        self._move_to(tokens, len(tokens))
        return self._num_prompt_tokens + len(self._taken)

    def forced(self, tokens: list[int]) -> list[int]:
        """Returns the only possible continuation of `tokens`, up to the first choice."""
        if not self._move_to(tokens, len(tokens)) or self._has_ended:
            return []
        return list(self._matcher.compute_ff_tokens())

    def is_forced(self, tokens: list[int]) -> bool:
        """Whether exactly one token may follow `tokens`."""
        allowed = self.allowed(tokens, len(tokens))
        return allowed is not None and int(allowed.sum()) == 1

    def ends_with(self, tokens: list[int]) -> bool:
        """Whether the completion ends with the newest of `tokens`: no token may follow it, or it is not allowed."""
        if self._move_to(tokens, len(tokens)):
            return self._has_ended
        if tokens[-1] not in self._stop_ids:
            self.error = (
                f"structured_output is too complex to follow behind {len(tokens) - 1 - self._num_prompt_tokens} tokens; "
                "simplify it"
            )
        return True

    def _move_to(self, tokens: list[int], length: int) -> bool:
        """Moves to the first `length` tokens. Returns False where one is not allowed, and stops before it."""
        wanted, kept = tokens[self._num_prompt_tokens : length], len(self._taken)
        while self._taken[:kept] != wanted[:kept] or kept > len(wanted):
            kept -= 1
        if kept < len(self._taken):
            self._matcher.rollback(len(self._taken) - kept)
            del self._taken[kept:]
            self._allowed, self._has_ended = None, False
        if kept < len(wanted):
            # A matcher is unusable after it has consumed a token that is not allowed.
            count = self._matcher.try_consume_tokens(wanted[kept:])
            self._taken += wanted[kept : kept + count]
            self._allowed, self._has_ended = None, self._matcher.is_stopped()
        return len(self._taken) == len(wanted)

    def _compute_mask(self) -> Tensor:  # [v] bool
        accepts = self._matcher.is_accepting()
        if self._has_ended:
            mask = torch.zeros(self._size, dtype=torch.bool)
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            mask = torch.from_numpy(np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_))
            if self._matcher.is_error():
                return self._start_again()
            if self._end_id < self._size:
                mask[self._end_id] = False
        if accepts:
            mask[self._stop_ids] = True
        return mask

    def _start_again(self) -> Tensor:  # [v] bool
        """Returns a mask of all tokens, since the library hit a limit, and resets the matcher."""
        self._matcher = self._begin.deep_copy()
        self._matcher.try_consume_tokens(self._taken)
        return torch.ones(self._size, dtype=torch.bool)


class Grammars:
    """The compiled grammars of one tokenizer. Any thread may use it."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: tuple[int, ...]):
        """`tokenizer` is one of transformers; `end_ids` are the model's own ends of text."""
        self._tokenizer, self._size, self._end_ids = tokenizer, vocab_size, end_ids
        self._lock = threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[StructuredOutput, llguidance.LLMatcher] = OrderedDict()

    def begin(self, form: StructuredOutput, num_prompt_tokens: int, stop_ids: frozenset[int]) -> GrammarState:
        """Returns the state of a completion before its first token. Raises InputError like `compile`."""
        matcher = self.compile(form)
        assert self._vocabulary is not None
        return GrammarState(matcher, self._vocabulary.eos_token, num_prompt_tokens, stop_ids, self._size)

    def compile(self, form: StructuredOutput) -> "llguidance.LLMatcher":
        """Returns the matcher of a form, at its beginning; copy it before use. Raises InputError where the form is
        invalid, or the library is missing.
        """
        with self._lock:
            known = self._compiled.get(form)
        made = known or self._compile(form)  # without the lock, because the decoding thread takes it, too
        with self._lock:
            self._compiled[form] = made
            self._compiled.move_to_end(form)
            if len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
        return made

    def _compile(self, form: StructuredOutput) -> "llguidance.LLMatcher":
        try:
            import llguidance
        except ImportError as error:
            raise InputError(_MISSING) from error
        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary()
        try:
            matcher = llguidance.LLMatcher(self._vocabulary, _as_grammar(form), log_level=0)
        except (ValueError, RuntimeError) as error:
            raise _refusal(form, str(error)) from error
        if matcher.is_error():
            raise _refusal(form, matcher.get_error())
        return matcher

    def _read_vocabulary(self) -> "llguidance.LLTokenizer":
        import llguidance

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        own = getattr(self._tokenizer, "eos_token_id", None)
        end = own if isinstance(own, int) else next(iter(self._end_ids), None)
        try:
            size = max(self._size, len(self._tokenizer))
            return llguidance.LLTokenizer(backend.to_str(), n_vocab=size, eos_token=end)  # type: ignore[union-attr]
        except (AttributeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"structured output needs a tokenizer with a tokenizer.json of bytes, and {self._tokenizer.name_or_path} has "
                f"none that llguidance can read: {_one_line(str(error))}; use --tokenizer with another"
            ) from error


def _as_grammar(form: StructuredOutput) -> str:
    """Returns a form as a grammar of llguidance. Raises ValueError where it is invalid."""
    from llguidance import LLMatcher, grammar_from

    if form.regex is not None:
        return LLMatcher.grammar_from_regex(form.regex)
    if form.choice is not None:
        return grammar_from("choice", to_json(form.choice))
    if form.grammar is not None:
        return grammar_from("grammar", form.grammar)
    return LLMatcher.grammar_from_json_schema(form.schema)


def _refusal(form: StructuredOutput, reason: str) -> InputError:
    return InputError(f"{form.name} of structured_output can not be used: {_one_line(reason)}; mend or simplify it")


def _one_line(text: str) -> str:
    reason = _LISTING.split(text, maxsplit=1)[0]
    return " ".join(reason.split())[:200].rstrip(" .;:")
