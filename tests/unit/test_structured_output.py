"""Answers have the form that was asked for, wherever their tokens leave, and are full depth's where they have to be."""

import math
import pickle
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("llguidance", reason="pip install 'ee_tuning[structured]'")
pytest.importorskip("jsonschema")

from byte_tokenizer import END, write_byte_tokenizer
from decoding import FixedDrafts, policy_for, run_all
from exits import write_exits
from formed import CHOICE, FORMS, SCHEMA, open_model, write_model

from ee_tuning import EarlyExitLLM, SamplingParams
from ee_tuning.engine.engine import Engine
from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.job import Job
from ee_tuning.generation.prompts import job_of
from ee_tuning.sampling.grammar import Grammars
from ee_tuning.sampling.policy import FULL
from ee_tuning.sampling.structured_output import StructuredOutput, structured_output_of

pytestmark = pytest.mark.slow

WAYS: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "threshold": {"policy": "threshold", "threshold": [0.05]},
    "fixed": {"policy": "fixed", "exit_layer": 2},
    "speculative": {"policy": "speculative"},
    "margin": {"policy": "threshold", "threshold": [0.02], "measure": "margin"},
}
LONG = 240
"""Tokens that every form ends within."""


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> EarlyExitLLM:
    return open_model(*write_model(tmp_path_factory.mktemp("formed")))


def grammars_of(llm: EarlyExitLLM) -> Grammars:
    return Grammars(llm.tokenizer, llm.model.config.vocab_size, llm.stop_token_ids)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", FORMS)
def test_answers_have_their_form(llm, kind, way):
    """An exit that says what the form forbids; a second answer that goes on where the first one was."""
    form, check = FORMS[kind]
    params = [
        SamplingParams(max_tokens=LONG, structured_output=form),
        SamplingParams(max_tokens=LONG, structured_output=form, n=2, temperature=1.5, seed=3, logprobs=2),
        SamplingParams(max_tokens=LONG, structured_output=form, temperature=0.8, top_k=3, presence_penalty=1.0),
    ]
    answers = llm.generate(["def f(", "x", "An answer: "], params, **WAYS[way])
    assert len(answers) == 4 and {answer.finish_reason for answer in answers} == {"stop"}
    for answer in answers:
        check(answer.text)
    if way == "threshold":
        assert min(layer for answer in answers for layer in answer.exit_layers) < llm.num_layers
    if way == "speculative":
        assert [a.token_ids for a in answers] == [
            a.token_ids for a in llm.generate(["def f(", "x", "An answer: "], params, policy="full")
        ]


def test_tokens_are_the_likeliest_of_those_allowed(llm):
    """A mask one place too far, or one that hides a token that may come: compared with a list of all that may."""
    prompt = "Is it? "
    (made,) = llm.generate(prompt, SamplingParams(max_tokens=20, structured_output={"choice": CHOICE}), policy="full")
    texts = [llm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in CHOICE]
    ids, said = llm.encode(prompt), list[int]()
    while END not in said:
        begun = [text for text in texts if text[: len(said)] == said]
        allowed = {text[len(said)] for text in begun if len(text) > len(said)} | ({END} if said in begun else set())
        if allowed == {END}:  # nothing may follow: the answer has ended
            break
        known = all_logprobs(llm, ids + said)
        said.append(max(allowed, key=lambda token: known[token]))
    assert made.token_ids == said


def all_logprobs(llm: EarlyExitLLM, ids: list[int]) -> dict[int, float]:
    """Token -> log-probability behind `ids`, by the full model."""
    made = list[Completion]()
    params = SamplingParams(max_tokens=1, logprobs=llm.model.config.vocab_size)
    for _ in llm.run([Job("", params, FULL, prompt_ids=tuple(ids))], made, llm.defaults):
        pass
    return made[0].top_logprobs[0]


def test_log_probabilities_are_of_what_may_come(llm):
    """A token that the form forbids among the likeliest; a share that is not of what was chosen from."""
    params = SamplingParams(max_tokens=3, logprobs=3, structured_output={"regex": "[ab]{3}"})
    (made,) = llm.generate("x", params, policy="full")
    a, b = llm.tokenizer("ab", add_special_tokens=False)["input_ids"]
    for token, value, top in zip(made.token_ids, made.logprobs, made.top_logprobs, strict=True):
        (other,) = {a, b} - {token}
        assert math.isclose(math.exp(value) + math.exp(top[other]), 1.0) and top[token] == value
        assert min(top.values()) == -math.inf


def test_a_form_ends_its_answer(llm):
    """An answer that waits for an end of text that no one says; a stop token or string, or a limit, that is not kept;
    an end before `min_tokens` that leaves nothing to say.
    """
    digits = {"regex": "[0-9]{4}"}
    cases: list[tuple[dict[str, Any], dict[str, Any], int, str]] = [
        ({}, digits, 4, "stop"),
        ({"ignore_eos": True}, digits, 4, "stop"),
        ({"max_tokens": 3}, digits, 3, "length"),
        ({"max_tokens": 4}, digits, 4, "stop"),
        ({"min_tokens": 9}, digits, 4, "stop"),
        ({"ignore_eos": True, "max_tokens": 9}, {"regex": "[0-9]+"}, 9, "length"),
        ({"stop": ("1", "2", "3", "4", "5", "6", "7", "8", "9", "0")}, digits, 1, "stop"),
        ({"min_tokens": 12, "max_tokens": 40}, {"regex": "[a-f]{3,30}"}, 12, ""),
    ]
    for way in ("full", "threshold", "speculative"):
        for changes, form, count, reason in cases:
            params = SamplingParams(**{"max_tokens": LONG, "structured_output": form, **changes})
            (made,) = llm.generate("x", params, **WAYS[way])
            assert len(made.token_ids) >= count if not reason else len(made.token_ids) == count, (changes, made)
            assert not reason or made.finish_reason == reason, (changes, made)
            assert len(made.text) == (0 if "stop" in changes else sum(token != END for token in made.token_ids))


def test_drafts_are_kept_where_the_form_allows_them(llm):
    """Drafts that are looked for outside of the form, so that none is right; a state that a rejected draft spoils."""
    form = {"json": SCHEMA}
    wanted = llm.generate("x = ", SamplingParams(max_tokens=LONG, structured_output=form), policy="full")[0]
    for threshold, most in ((0.0, 16), (0.0, 3), (0.2, 5)):
        engine = Engine(llm.model, llm.stages, num_slots=1, max_length=256, eos_ids=(END,), grammars=grammars_of(llm))
        engine.proposer.speculation = FixedDrafts(engine, {4: threshold}, most)
        params = SamplingParams(max_tokens=LONG, structured_output=form)
        (sequence,) = engine.add_request(llm.encode("x = "), params, policy_for(llm.model, policy="speculative"))
        run_all(engine)
        assert sequence.output == wanted.token_ids and sequence.finish_reason == "stop"
        assert 0 < sequence.statistics.num_accepted < sequence.statistics.num_drafted


def test_answers_are_the_same_after_a_preemption(llm):
    """A grammar that begins anew while the text goes on, or goes on while its tokens are read again."""
    params = [
        SamplingParams(max_tokens=60, temperature=1.0, seed=i, structured_output={"json": SCHEMA}) for i in range(4)
    ]
    prompts = [f"{i}" + "abcdefgh" * 3 for i in range(4)]
    for way in ("threshold", "speculative"):
        roomy = llm.generate(prompts, params, **WAYS[way])
        short = llm.generate(prompts, params, cache_tokens=128, **WAYS[way])
        assert [a.token_ids for a in short] == [a.token_ids for a in roomy]
        assert any(answer.statistics.num_read_again for answer in short)


def test_an_exit_is_not_asked_where_it_can_say_nothing_of_the_form(tmp_path):
    """A shortlist without the digits that have to come: a token that leaves there is no digit, or any one."""
    letters = small_letters(tmp_path)
    llm = open_model(*write_model(tmp_path, tuple(sorted(letters))))
    form = {"regex": "[a-z]{3}[0-9]{3}[a-z]{3}"}
    for way, changes in (("threshold", {}), ("speculative", {}), ("threshold", {"temperature": 1.0, "min_tokens": 4})):
        params = SamplingParams(max_tokens=20, structured_output=form, **changes)
        (made,) = llm.generate("x", params, **{**WAYS[way], "threshold": [0.0]})
        assert re.fullmatch(form["regex"], made.text)
        assert set(made.exit_layers[3:6]) == {llm.num_layers}
        assert way != "threshold" or min(made.exit_layers) < llm.num_layers
    (made,) = llm.generate("x", SamplingParams(max_tokens=20, structured_output=form), **WAYS["fixed"])
    assert re.fullmatch(form["regex"], made.text) and made.text[3:6] == "000"  # the exit can not tell digits apart
    drawn = llm.generate(
        "x", SamplingParams(max_tokens=20, structured_output=form, temperature=1.0, n=40), **WAYS["fixed"]
    )
    assert len({answer.text[3:6] for answer in drawn}) > 30


def small_letters(folder: Path) -> set[int]:
    """Ids of small letters."""
    tokenizer = write_byte_tokenizer(folder / "letters")
    return set(tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"])


def test_a_state_goes_back_and_forth(llm):
    """A state that is not that of the tokens, after rejected drafts, forbidden ones, and an end that was drafted."""
    grammars, rng, ids = grammars_of(llm), random.Random(5), llm.encode("ab")
    for form, _ in FORMS.values():
        option = structured_output_of(form)
        assert option is not None
        state = grammars.begin(option, len(ids), frozenset((END,)))
        tokens = list(ids)
        for _ in range(200):
            move = rng.random()
            if move < 0.3 and len(tokens) > len(ids):
                del tokens[rng.randrange(len(ids), len(tokens)) :]
            elif move < 0.4:
                tokens.append(rng.randrange(END))
            length = rng.randrange(len(ids), len(tokens) + 1)
            fresh = grammars.begin(option, len(ids), frozenset((END,)))
            one, other = state.allowed(tokens, length), fresh.allowed(tokens, length)
            assert (one is None) == (other is None) and (one is None or other is None or bool((one == other).all()))
            silent = grammars.begin(option, len(ids), frozenset((END,)))
            assert length == len(ids) or state.ends_with(tokens[:length]) == silent.ends_with(tokens[:length])
            if one is not None and length == len(tokens):
                tokens.append(int(rng.choice(one.nonzero()[:, 0].tolist())))


def test_a_form_that_is_too_much_for_its_library_is_an_error(llm, monkeypatch):
    """An answer without its form that looks as if it had it; ranks that computed no mask and go on."""

    class Limited:
        """A matcher whose masks fail behind three tokens."""

        def __init__(self, inner: Any):
            self._inner, self._has_failed = inner, False
            self._count = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def deep_copy(self) -> "Limited":
            return Limited(self._inner.deep_copy())

        def try_consume_tokens(self, tokens: list[int]) -> int:
            count: int = self._inner.try_consume_tokens(tokens)
            self._count += count
            return count

        def compute_bitmask(self) -> bytes:
            self._has_failed = self._count >= 3
            return bytes(self._inner.compute_bitmask())

        def is_error(self) -> bool:
            return self._has_failed

    form = StructuredOutput(regex="[0-9]{40}")
    compiled = llm.grammars.compile(form)
    monkeypatch.setattr(llm.grammars, "compile", lambda form: Limited(compiled))
    with pytest.raises(InputError, match=r"too complex to follow behind \d+ tokens; simplify it"):
        llm.generate("x", SamplingParams(max_tokens=40, structured_output=form), policy="full")


REFUSED: dict[str, tuple[Any, str]] = {
    "none": ({}, "must have one of json, json_object, regex, choice, grammar, got none"),
    "two": ({"regex": "a", "choice": ["b"]}, "got regex and choice; give one"),
    "unknown": ({"schema": {}}, "got 'schema'"),
    "no object": ("a+", "must be an object"),
    "keyword": (
        {"json": {"type": "object", "unevaluatedProperties": False}},
        "json of structured_output can not be used",
    ),
    "type": ({"json": {"type": "strin"}}, "json of structured_output can not be used"),
    "reference": ({"json": {"$ref": "https://example.com/a.json"}}, "json of structured_output can not be used"),
    "no JSON": ({"json": "{"}, "json must be a JSON schema"),
    "list": ({"json": [1]}, "json must be a JSON schema"),
    "regex": ({"regex": "a("}, "regex of structured_output can not be used"),
    "look-ahead": ({"regex": "a(?=b)b"}, "regex of structured_output can not be used"),
    "grammar": ({"grammar": "start: nothing"}, "grammar of structured_output can not be used"),
    "text": ({"choice": "yes"}, "choice must be a list"),
    "empty": ({"choice": []}, "choice must be a list"),
    "false": ({"json_object": False}, "got none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_form_that_is_none_is_refused(llm, case):
    """A schema that is taken for another one; an error in the middle of a batch, or over several lines."""
    form, words = REFUSED[case]
    with pytest.raises(InputError) as caught:
        llm.generate("a", structured_output=form)
    assert words in str(caught.value) and "\n" not in str(caught.value) and "; " in str(caught.value)


def test_a_missing_library_is_named(llm, monkeypatch):
    """A traceback instead of what to install."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install 'ee_tuning\[structured\]'"):
        grammars_of(llm).compile(StructuredOutput(json_object=True))


def test_a_line_has_a_form_of_its_own(llm):
    """A wish of one prompt that is kept in its record as if it were the user's own key, or that all prompts get."""
    job = job_of(llm, {"prompt": "x", "structured_output": {"choice": ["b", "a"]}, "max_new_tokens": 5})
    assert job.params.structured_output == StructuredOutput(choice=("b", "a")) and job.params.max_tokens == 5
    assert pickle.loads(pickle.dumps(job)) == job  # as a server's ranks get it
    assert job_of(llm, {"prompt": "x"}).params.structured_output is None
    with pytest.raises(InputError, match="give one"):
        job_of(llm, {"prompt": "x", "structured_output": {}})


def test_tokenizers_of_all_kinds_are_read(tmp_path):
    """Tokens of several letters, or of a part of a character, that are taken for others: by byte-level BPE as GPT-2's,
    and with bytes to fall back on as Llama's.
    """
    texts = ['yes yesterday no né \U0001f600 {"name": true}'] * 3
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer, byte_level.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    byte_level.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
        ),
    )
    letters = sorted(
        {letter for text in texts for letter in text if ord(letter) < 128 and letter != " "} | {"▁", "ye", "yes"}
    )
    vocab = {piece: i for i, piece in enumerate(["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters])}
    fallback = Tokenizer(models.BPE(vocab=vocab, merges=[("y", "e"), ("ye", "s")], byte_fallback=True))
    fallback.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    fallback.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    for inner in (byte_level, fallback):
        inner.add_special_tokens(["<s>", "</s>"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
        end, size = tokenizer.eos_token_id, len(tokenizer) + 3  # a model's vocabulary may have padding
        grammars = Grammars(tokenizer, size, (end,))
        for form, check in (FORMS["choice"], FORMS["json"], ({"regex": "\U0001f600|né"}, lambda text: None)):
            option = structured_output_of(form)
            assert option is not None
            for seed in range(5):
                rng, tokens, state = random.Random(seed), list[int](), grammars.begin(option, 0, frozenset((end,)))
                while not (tokens and (tokens[-1] == end or state.ends_with(tokens))):
                    allowed = state.allowed(tokens, len(tokens))
                    assert allowed is not None and not state.error and len(allowed) == size
                    assert not allowed[len(tokenizer) :].any() and not allowed[tokenizer.bos_token_id]
                    tokens.append(rng.choice(allowed.nonzero()[:, 0].tolist()))
                check(tokenizer.decode(tokens, skip_special_tokens=True))


def test_tokens_without_a_choice_leave_at_the_first_exit(llm):
    """A token that goes through all layers for nothing; one that leaves where the request asks no exit."""
    form = {"regex": "(yes|no), of course[.!]"}
    for way in ("full", "threshold"):
        params = SamplingParams(max_tokens=40, structured_output=form)
        (made,) = llm.generate("x", params, **{**WAYS[way], "threshold": [1.0]})
        first = len(made.text) - len(", of course.")
        assert set(made.exit_layers[first:-1]) == {2 if way == "threshold" else llm.num_layers}


def test_tokens_without_a_choice_are_drafted(llm):
    """Known tokens that are computed one after the other, and more of them than there is memory or a limit for."""
    form = {"regex": "(yes|no), of course, as was said before[.!]"}
    for count in (100, 20, 8):
        params = SamplingParams(max_tokens=count, structured_output=form)
        (full,) = llm.generate("x", params, policy="full")
        (made,) = llm.generate("x", params, policy="speculative", max_pending=7)
        assert (made.token_ids, made.finish_reason) == (full.token_ids, full.finish_reason)
        assert made.statistics.num_accepted == made.statistics.num_drafted >= min(count, 40) - 6 - count // 8


def test_repeated_text_is_drafted_within_the_form(llm):
    """Drafts that the form forbids are checked for nothing, or kept."""
    text = '{"name": "ab", "size": 5, "kind": "a", "parts": [true, true, true, true]} ' * 3
    for seed in range(4):
        params = SamplingParams(max_tokens=LONG, temperature=0.7, seed=seed, structured_output={"json": SCHEMA})
        (full,) = llm.generate(text, params, policy="full")
        (made,) = llm.generate(text, params, policy="speculative")
        assert made.token_ids == full.token_ids


def test_a_drafting_head_is_checked_within_the_form(tmp_path):
    """Drafts of a head that knows no form, which spoil the state or are checked for nothing."""
    model, _ = write_model(tmp_path)
    listed = sorted(write_byte_tokenizer(tmp_path / "ids")("12x", add_special_tokens=False)["input_ids"])
    keys: dict[str, Any] = {"exit_layers": [], "architecture": "eagle3", "aux_layers": [1, 3, 5]}
    llm = open_model(model, write_exits(model, tmp_path / "head", listed, **keys))
    params = SamplingParams(max_tokens=60, temperature=1.0, n=6, structured_output={"regex": "[12]{50}"})
    full, made = (llm.generate("x", params, policy=policy) for policy in ("full", "speculative"))
    assert [answer.token_ids for answer in made] == [answer.token_ids for answer in full]
    assert 5 < sum(a.statistics.num_accepted for a in made) < sum(a.statistics.num_drafted for a in made)


def test_drafts_of_both_kinds_end_at_the_limit(llm):
    """Repeated text that drafts up to the longest length, and tokens without a choice that are drafted behind it, at
    positions that the model has not.
    """
    form, prompt = {"regex": "(abcabcab){60}"}, "abcabcab" * 3
    policy = policy_for(llm.model, policy="speculative")
    for longest in range(61, 76, 4):
        made = {}
        for name, each in (("speculative", policy), ("full", FULL)):
            engine = Engine(llm.model, llm.stages, num_slots=1, max_length=longest, grammars=grammars_of(llm))
            params = SamplingParams(max_tokens=100, structured_output=form)
            (sequence,) = engine.add_request(llm.encode(prompt), params, each)
            while not sequence.finish_reason:
                engine.step()
                assert len(sequence.tokens) <= longest
            made[name] = sequence.output
        assert made["speculative"] == made["full"] and len(llm.encode(prompt)) + len(made["full"]) == longest
