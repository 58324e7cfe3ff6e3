"""What records ask, their answers taken off, and dialogues that go on answer by answer."""

from typing import Any

import pytest

from ee_tuning.data.messages import Where
from ee_tuning.data.prompt_records import Prompt, PromptFormat, prompt_of
from ee_tuning.data.records import LeftOut
from ee_tuning.data.shipped_prompts import shipped_prompts
from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.dialogues import Dialogue, Dialogues

READING = PromptFormat(text_key="text", has_template=True)
SYSTEM, ASKED, SAID, AGAIN = (
    {"role": role, "content": text}
    for role, text in (("system", "Be brief."), ("user", "Hello?"), ("assistant", "Hi."), ("user", "And?"))
)
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def where() -> str:
    return "chats.jsonl:7"


def asked(record: Any, **changes: Any) -> Prompt:
    found = prompt_of(record, PromptFormat(**{**vars(READING), **changes}), where)
    assert isinstance(found, Prompt), found
    return found


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"messages": [SYSTEM, ASKED, SAID, AGAIN, SAID]}, ([SYSTEM, ASKED], [AGAIN])),
        ({"messages": [ASKED, SAID, AGAIN], "text": "rendered", "prompt": "Hello?"}, ([ASKED], [AGAIN])),
        ({"messages": [SAID, ASKED, AGAIN, SAID, SAID]}, ([ASKED, AGAIN],)),
        (
            {
                "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}],
                "system": "Be brief.",
            },
            ([SYSTEM, ASKED],),
        ),
        ({"instruction": "Hello?", "input": "", "output": None}, ([ASKED],)),
        ({"prompt": [SYSTEM, ASKED], "completion": [SAID]}, ([SYSTEM, ASKED],)),
        ({"messages": None, "prompt": "Hello?", "completion": "Hi."}, ()),
        ({"text": "Hello?"}, ()),
    ],
    ids=["chat", "before others", "begun by the assistant", "ShareGPT", "Alpaca", "prompt", "text prompt", "text"],
)
def test_answers_are_taken_off_every_form(record: dict[str, Any], turns: tuple[Any, ...]):
    """A stale answer that the model is shown or that stays in the data, and an id that is lost."""
    prompt = asked({**record, "id": 3, "tags": ["x"], "finish_reason": "length"})
    assert (prompt.turns, prompt.kept, prompt.is_given) == (turns, {"id": 3, "tags": ["x"]}, False)
    assert prompt.text == ("" if turns else "Hello?")


def test_a_text_is_continued_or_asked_as_it_is_wanted():
    """Instructions continued where the model could be asked; a text in a chat that nobody wanted."""
    alpaca = {"instruction": "Hello?", "input": "You!", "output": "Hi."}
    assert asked(alpaca, has_template=False).text == "Hello?\nYou!\n"
    assert asked({"prompt": "Hello?"}, as_chat=True).turns == ([ASKED],)
    assert asked({"question": "Hello?", "answer": "Hi."}, text_key="question").text == "Hello?"
    assert asked({"question": "Hello?", "answer": "Hi."}, text_key="question").kept == {"answer": "Hi."}


def test_the_last_turn_alone():
    """Earlier answers that are learned though another said them."""
    prompt = asked({"messages": [ASKED, SAID, AGAIN, SAID]}, last_turn=True)
    assert prompt.turns == ([ASKED, SAID, AGAIN],) and prompt.is_given
    given = asked({"prompt": [ASKED, SAID, AGAIN], "completion": [SAID]})
    assert given.turns == prompt.turns and given.is_given
    assert asked({"messages": [ASKED, CALLS, {"role": "tool", "content": "4"}, SAID]}, last_turn=True).num_answers == 1


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [ASKED, CALLS, {"role": "tool", "content": "4"}, SAID]}, "tools are called"),
        ({"messages": [SYSTEM]}, "without a user"),
        ({"prompt": [ASKED, SAID], "completion": [SAID]}, "ends with the assistant"),
        ({"prompt": None}, "null"),
        ({"prompt": ""}, "empty"),
        ({"messages": []}, "empty messages"),
        ({"text": ""}, "empty text"),
    ],
)
def test_what_asks_nothing_is_left_out(record: dict[str, Any], reason: str):
    """Tools whose results belong to other calls; one empty record that ends the job."""
    found = prompt_of(record, READING, where)
    assert isinstance(found, LeftOut) and reason in found.reason


@pytest.mark.parametrize(
    "record", [{"question": "x"}, {}, [1], {"messages": "x"}, {"messages": [{"content": "x"}]}, {"prompt": 3}]
)
def test_what_has_no_form_is_refused_by_its_line(record: Any):
    """A traceback, or a file that is silently none."""
    with pytest.raises(InputError, match=r"^chats\.jsonl:7: "):
        prompt_of(record, READING, where)


class Template:
    """Writes roles and contents, and refuses shouting."""

    def render(self, messages: list[dict[str, Any]], tools: Any = None, **_: Any) -> str:
        if any(message["content"].isupper() for message in messages):
            raise InputError("the chat template refuses the messages")
        return "".join(f"{message['role'][0]}:{message['content']} " for message in messages)


def dialogues_of(*prompts: Prompt, drops_cut: bool = False, at_a_time: int = 8) -> Dialogues:
    wheres: list[Where] = [lambda place=place: f"line {place}" for place in range(len(prompts))]  # type: ignore[misc]
    coming = [Dialogue(prompt, place, 0) for place, prompt in enumerate(prompts)]
    return Dialogues(coming, Template(), at_a_time=at_a_time, drops_cut=drops_cut, wheres=wheres)  # type: ignore[arg-type]


def chat(*questions: str) -> Prompt:
    return Prompt(turns=tuple([{"role": "user", "content": question}] for question in questions))


def test_each_answer_is_asked_behind_the_models_own(capsys: pytest.CaptureFixture[str]):
    """Turns behind stale answers, answers in other dialogues, a refusal that ends all, and records that say they are
    whole.
    """
    dialogues = dialogues_of(chat("a", "b"), chat("NO"), Prompt(text="t"), chat("c", "d"), at_a_time=3)
    assert [each.text for each in dialogues.next_round()] == ["u:a ", "t"]
    for number, text in enumerate(("a1", " t1")):
        dialogues.take(number, Completion(prompt="", text=text, finish_reason="stop"))
    records = dialogues.ended()
    assert records[0] is None and records[1] is not None and records[1]["completion"] == " t1"
    assert [each.text for each in dialogues.next_round()] == ["u:a a:a1 u:b "]
    dialogues.take(0, Completion(prompt="", text="b1", finish_reason="length"))
    assert [each.text for each in dialogues.next_round()] == ["u:c "]
    dialogues.take(0, Completion(prompt="", text="c1", finish_reason="stop"))
    dialogues.next_round()
    dialogues.take(0, Completion(prompt="", error="too long"))
    assert dialogues.next_round() == []
    first, last = (record for record in dialogues.ended() if record is not None)
    assert [message["content"] for message in first["messages"]] == ["a", "a1", "b", "b1"] and first[
        "finish_reason"
    ] == "length"
    assert [message["content"] for message in last["messages"]] == ["c", "c1"] and last["finish_reason"] == "stop"
    tally = dialogues.tally
    assert (tally.answered, tally.cut, tally.shortened, tally.left_out) == (3, 1, 1, 1)
    assert capsys.readouterr().err == "left out line 1: the chat template refuses the messages\n"


@pytest.mark.parametrize(
    ("answer", "drops_cut", "reason"),
    [
        (Completion(prompt="", text="x", finish_reason="length"), True, "cut at max_new_tokens"),
        (Completion(prompt="", text=" \n", finish_reason="stop"), False, "empty"),
        (Completion(prompt="", error="logits are NaN", finish_reason="error"), False, "NaN"),
        (Completion(prompt="", text="<think>\nHm", finish_reason="length"), False, "cut within its thought"),
    ],
)
def test_an_answer_that_teaches_nothing_good_is_left_out(answer: Completion, drops_cut: bool, reason: str):
    """Heads that learn to say nothing, or that a thought is followed by the end."""
    dialogues = dialogues_of(chat("a"), drops_cut=drops_cut)
    dialogues.next_round()
    dialogues.take(0, answer)
    dialogues.take(0, answer)
    assert dialogues.ended() == [None] and dialogues.tally.left_out == 1 and reason in dialogues.tally.first_reason


@pytest.mark.slow
def test_shipped_prompts_are_many_and_none_is_there_twice(monkeypatch: pytest.MonkeyPatch):
    """A user without data who tunes on one question a hundred times."""
    prompts = list(shipped_prompts(1200))
    assert (
        len(set(prompts)) == 1200
        and prompts[:40] == list(shipped_prompts(40))
        and not any("{}" in prompt for prompt in prompts[:300])
    )
    assert any("documentation" in prompt for prompt in prompts[:8])
    source = f'def f():\n    """{"x" * 200}"""\n'
    monkeypatch.setattr(
        "ee_tuning.data.shipped_prompts.sample_corpus", lambda: ({"a.py": source.encode(), "b.py": b"def"}, {})
    )
    with pytest.raises(InputError, match=r"must be at most \d+, .* got 100000"):
        list(shipped_prompts(10**5))
