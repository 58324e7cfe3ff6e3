"""Log-probabilities of prompts (`echo` with `logprobs`): those of EarlyExitLLM.score, in OpenAI's form."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from exits import write_exits
from served import MODEL, Served, config_of, served

from ee_tuning.generation.prompt_scorer import PromptScorer
from ee_tuning.generation.scoring import score
from ee_tuning.openai_protocol.text_offsets import TextOffsets
from ee_tuning.sampling.policy import FULL, Policy

pytest.importorskip("fastapi", reason="pip install 'ee_tuning[serve]'")

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")

PROMPTS = ("def main(argv):", "class A", "x = é + 1  # sum", "\n")
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({"policy": "full"}, {"policy": "full"}),
    "threshold": ({"exit_threshold": [0.5, 0.3]}, {"policy": "threshold", "threshold": [0.5, 0.3]}),
    "measure": ({"exit_threshold": 0.2, "exit_measure": "margin"}, {"threshold": [0.2], "measure": "margin"}),
    "fixed": ({"exit_layer": 4}, {"policy": "fixed", "exit_layer": 4}),
    "speculative": ({"policy": "speculative"}, {"policy": "full"}),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serving")
    exits = write_exits(MODEL, folder / "heads", exit_layers=[4, 8], init="copy")
    with served(config_of(exits, folder, **{"generation.prefill_chunk": 32})) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: Any, prompt: Any, **changes: Any) -> Any:
    asked = {"model": "tiny-python-llama", "temperature": 0.0, "max_tokens": 3, "logprobs": 2, "echo": True}
    return client.completions.create(prompt=prompt, **{**asked, **changes})


@pytest.mark.parametrize("way", WAYS)
def test_each_place_has_the_distribution_of_its_exit(server, client, way):
    """A place that takes its neighbour's log-probability, an exit that is not asked, a prompt of one token."""
    extra, options = WAYS[way]
    ids = [server.reference.encode(text) for text in PROMPTS]
    answer = ask(client, ids, extra_body={**extra, "return_exit_layers": True})
    pairs = [(each[:1], each[1:]) for each in ids if len(each) > 1]
    wanted = iter(server.reference.score(pairs, **options))
    for choice, text, tokens in zip(answer.choices, PROMPTS, ids, strict=True):
        told = choice.logprobs
        assert choice.text.startswith(text) and len(told.tokens) == len(tokens) + 3
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        if len(tokens) > 1:
            own = next(wanted)
            assert told.token_logprobs[1 : len(tokens)] == pytest.approx(own.logprobs, abs=1e-9)
            assert choice.model_extra["prompt_exit_layers"] == [None, *own.exit_layers]
            is_best = [
                value == max(top.values())
                for value, top in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True)
            ]
            assert is_best[: len(tokens) - 1] == own.is_greedy
        assert all(2 <= len(top) <= 3 for top in told.top_logprobs[1 : len(tokens)] if "\ufffd" not in top)


def test_offsets_are_places_in_the_text(client):
    """Offsets that count bytes, or begin anew behind the prompt."""
    (choice,) = ask(client, PROMPTS[2]).choices
    told = choice.logprobs
    whole = [(at, token) for at, token in zip(told.text_offset, told.tokens, strict=True) if "\ufffd" not in token]
    assert len(whole) > 10
    assert [choice.text[at : at + len(token)] for at, token in whole] == [token for _, token in whole]


def test_tokens_that_a_text_leaves_out_take_no_room():
    """Offsets one beginning-of-text too far; a word whose space its token does not show."""
    offsets = TextOffsets("a  bé c")
    told = [offsets.next(token.encode()) for token in ("<s>", "a", " b")] + [
        offsets.next(b"\xc3"),
        offsets.next(b"\xa9"),
    ]
    assert [*told, *(offsets.next(token) for token in (b"c", b"new", b"er"))] == [0, 0, 2, 4, 5, 6, 7, 10]


def test_a_prompt_is_scored_alone(client):
    """`max_tokens` 0, which is refused elsewhere: an error, a token too many, a request that never ends."""
    with_more, alone = ask(client, PROMPTS[0], n=2), ask(client, PROMPTS[0], n=2, max_tokens=0)
    size = len(alone.choices[1].logprobs.tokens)
    assert alone.usage.completion_tokens == 0 and alone.choices[1].finish_reason == "length"
    assert alone.choices[1].text == PROMPTS[0] and with_more.choices[1].text.startswith(PROMPTS[0])
    assert alone.choices[0].logprobs.token_logprobs == with_more.choices[0].logprobs.token_logprobs[:size]
    assert ask(client, PROMPTS[0], max_tokens=0, logprobs=None).choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        ask(client, PROMPTS[0], max_tokens=0, echo=False)


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_a_stream_tells_what_a_whole_answer_tells(client, max_tokens):
    """A stream without the log-probabilities of its echo, or with them in another choice."""
    prompts = [*PROMPTS[:2]]
    whole = ask(client, prompts, max_tokens=max_tokens, n=2, temperature=0.9, seed=4)
    made: dict[int, dict[str, Any]] = {}
    for chunk in ask(client, prompts, max_tokens=max_tokens, n=2, temperature=0.9, seed=4, stream=True):
        for choice in chunk.choices:
            so_far = made.setdefault(choice.index, {"text": "", "token_logprobs": [], "text_offset": []})
            so_far["text"] += choice.text
            for name in ("token_logprobs", "text_offset") if choice.logprobs else ():
                so_far[name] += getattr(choice.logprobs, name)
    for choice in whole.choices:
        told = made[choice.index]
        assert told["text"] == choice.text
        assert told["token_logprobs"] == choice.logprobs.token_logprobs
        assert told["text_offset"] == choice.logprobs.text_offset


def test_prompts_are_scored_while_others_are_decoded(server):
    """Scores that another request's policy or tokens change, and the other way round."""

    async def ask_all() -> list[Any]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        ways = [({"exit_threshold": 0.4}, 0), ({"policy": "full"}, 0), ({"policy": "full"}, 12)]
        answers = await asyncio.gather(
            *(
                ask(client, f"{text}{turn}", max_tokens=tokens, echo=not tokens, extra_body=extra)
                for turn in range(2)
                for text in PROMPTS
                for extra, tokens in ways
            )
        )
        await client.close()
        return [(each.choices[0].text, each.choices[0].logprobs.token_logprobs) for each in answers]

    first, second = asyncio.run(ask_all()), asyncio.run(ask_all())
    for (text, logprobs), (same, others) in zip(first, second, strict=True):
        assert text == same and logprobs[1:] == pytest.approx(others[1:], abs=1e-9)


def test_passes_are_small_and_hold_what_asks_alike(server):
    """A pass as long as all prompts together, during which nothing is decoded; a prompt that was aborted."""
    model = server.reference.model
    scorer = PromptScorer(model, max_rows=3, max_tokens=24)
    policies = {0: FULL, 1: FULL, 2: Policy(fixed_exit=4), 3: FULL, 4: FULL, 5: FULL}
    prompts = {index: tuple(range(1, 1 + length)) for index, length in enumerate((8, 8, 4, 30, 8, 1))}
    for index, tokens in prompts.items():
        scorer.add(index, tokens, policies[index], 0)
    scorer.abort(4)
    order = []
    while not scorer.is_idle:
        for index, found in scorer.step():
            order.append(index)
            if len(prompts[index]) == 1:
                assert found.logprobs == []
            else:
                (wanted,) = score(model, [([1], [*prompts[index][1:]])], policies[index], 1)
                assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-9)
        order.append(None)
    assert order == [0, 1, 5, None, 2, None, 3, None]
