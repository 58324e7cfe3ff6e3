"""`ee-tuning regenerate`: the model's own answers, in a file of which `tune` learns them and nothing else."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer
from random_models import random_llama

from ee_tuning import EarlyExitLLM, SamplingParams, cli
from ee_tuning.config import load_config
from ee_tuning.data.documents import file_ranges
from ee_tuning.data.encoding import recipe_of, tokenize_range
from ee_tuning.data.tokenizer import load_tokenizer
from ee_tuning.demo.demo import CHECKOUT
from ee_tuning.errors import InputError
from ee_tuning.generation import delivery, dialogues, question_params
from ee_tuning.generation.llm import Job
from ee_tuning.generation.regenerate import Wish, regenerate

pytestmark = pytest.mark.slow

MODEL = CHECKOUT / "examples" / "tiny-python-llama"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
    "{{ '# ' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '# assistant\n' }}{% endif %}"
)
ASKED, STALE, AGAIN = (
    {"role": role, "content": text}
    for role, text in (("user", "import os"), ("assistant", "stale"), ("user", "def f("))
)
LINES: list[dict[str, Any]] = [
    {"id": "chat", "messages": [ASKED, STALE, AGAIN, STALE]},
    {"id": "system", "messages": [{"role": "system", "content": "x"}, ASKED]},
    {"prompt": "class A:\n    def ", "index": 5, "job": "teacher"},
    {"id": "long", "text": "word " * 4000},
    {"id": "given", "prompt": [ASKED, STALE, AGAIN], "completion": [STALE]},
]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    return (
        f"regenerate --model {MODEL} --data {tmp_path / 'prompts.jsonl'} --max-new-tokens 5 --max-batch-size 2 "
        f"--chat-template {tmp_path / 'template.jinja'}"
    ).split()


def records_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def said(record: dict[str, Any]) -> list[str]:
    if "messages" in record:
        return [message["content"] for message in record["messages"] if message["role"] == "assistant"]
    return [record["completion"] if isinstance(record["completion"], str) else record["completion"][0]["content"]]


def test_the_models_own_answers_are_what_tune_learns(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Answers of another depth, behind stale ones or of another line; a question that is learned; one bad line that
    ends the job.
    """
    output = tmp_path / "answers.jsonl"
    assert cli.main([*command, "--set", "generation.budget=0.5", "--output", str(output)]) == 0  # of a job with exits
    told = capsys.readouterr().err
    assert f"left out {tmp_path / 'prompts.jsonl'}:2: the chat template refuses the messages: no system, please" in told
    assert (
        f"left out {tmp_path / 'prompts.jsonl'}:4: a prompt must be shorter than" in told
        and "prompts left out: 2" in told
    )
    chat, text, given = records = records_of(output)
    assert (chat["id"], text["index"], text["job"], given["id"]) == ("chat", 5, "teacher", "given")
    assert [record["regenerated"]["prompt_index"] for record in records] == [0, 2, 4]
    assert chat["messages"][0] == ASKED and chat["finish_reason"] == "length" and "stale" not in said(chat)
    assert given["prompt"] == [ASKED, STALE, AGAIN] and text["prompt"] == LINES[2]["prompt"]
    llm = EarlyExitLLM.load(MODEL)
    begun = "# user\nimport os\n# assistant\n"
    prompts = [begun, LINES[2]["prompt"], f"{begun}stale\n# user\ndef f(\n# assistant\n"]
    wanted = [
        each.text
        for each in llm.generate(prompts, SamplingParams(max_tokens=5), policy="full", adds_special_tokens=False)
    ]
    assert [said(record)[0] for record in records] == wanted
    learned = learned_of(output, tmp_path / "template.jinja")
    assert learned == [text for record in records for text in said(record)], (
        "neither a question, nor the end of what is cut"
    )


def learned_of(path: Path, template: Path) -> list[str]:
    """The text of each run of tokens that `tune` takes for labels."""
    tokens = tokenize_range(file_ranges([path])[0], recipe_of(MODEL, "text", str(template)))
    assert tokens.counts is not None
    tokenizer, runs = load_tokenizer(MODEL), list[list[int]]()
    for place, (token, counts) in enumerate(zip(tokens.ids.tolist(), tokens.counts.tolist(), strict=True)):
        if counts and (place == 0 or not tokens.counts[place - 1]):
            runs.append([])
        if counts:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_whole_answers_are_learned_with_their_end(command: list[str], tmp_path: Path):
    """Heads that never stop talking; a second turn that is not asked."""
    output = tmp_path / "answers.jsonl"
    assert cli.main([*command, "--output", str(output), "--stop", "\n", "--max-new-tokens", "60", "--limit", "1"]) == 0
    (record,) = records_of(output)
    assert record["finish_reason"] == "stop" and len(said(record)) == 2
    first, second = learned_of(output, tmp_path / "template.jinja")
    assert (
        first == said(record)[0] + "\n"
        and second.startswith(said(record)[1] + "\n")
        and second.rstrip("\n") != said(record)[1]
    )


def test_the_same_command_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Hours of answers lost by Ctrl-C, others after going on, and two jobs' answers in one file."""
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    drawn = [*command, "--temperature", "0.9", "--n", "2"]
    assert cli.main([*drawn, "--output", str(whole)]) == 0
    assert [tuple(record["regenerated"].values())[:2] for record in records_of(whole)] == [
        (0, 0),
        (0, 1),
        (2, 0),
        (2, 1),
        (4, 0),
        (4, 1),
    ]
    assert len({text for record in records_of(whole)[2:4] for text in said(record)}) == 2
    stop_after(5, monkeypatch)
    assert cli.main([*drawn, "--output", str(stopped)]) == 130
    assert "completions are kept in" in capsys.readouterr().err and not stopped.exists()
    monkeypatch.undo()
    assert cli.main([*drawn, "--output", str(stopped), "--temperature", "0.8"]) == 2
    assert "differs in temperature (0.9 there, 0.8 here)" in capsys.readouterr().err
    assert cli.main([*drawn, "--output", str(stopped)]) == 0
    told_anew = capsys.readouterr().err
    assert re.search(r"[1-5] of 10 answers are in", told_anew) and told_anew.count("left out /") == 2
    assert stopped.read_bytes() == whole.read_bytes() and not Path(f"{stopped}.partial").exists()
    assert cli.main([*drawn, "--output", str(stopped)]) == 0 and "nothing is left to do" in capsys.readouterr().err
    assert (
        cli.main([*drawn, "--output", str(stopped), "--seed", "3"]) == 2 and "of another job" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "{}/out.txt"], "must end in .jsonl"),
        (["--output", "{}/out.jsonl.gz"], "must end in .jsonl"),
        (["--output", "{}/prompts.jsonl", "--overwrite"], "must not be"),
        (["--output", "{}/notes.jsonl"], "not what `ee-tuning regenerate"),
        (["--n", "2"], "would all be the same at temperature 0"),
        (["--data", "{}/broken.jsonl"], "broken.jsonl:2: a line must be one JSON"),
        (["--data", "{}/unknown.jsonl"], "unknown.jsonl:1: no messages, .*--text-key"),
        (["--limit", "0"], "at least 1"),
        (["--shipped-prompts", "-1"], "must be a number"),
        (["--own-prompts", "-1"], "must be a number"),
        (["--top-p", "7"], "top_p"),
        (["--data", "{}/system.jsonl"], "no prompt could be"),
        (["--data", "{}/empty.jsonl"], "holds no prompt"),
        (["--chat-template", "{}/no"], "can not be read"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
):
    """A traceback after hours; a file of prompts that its own answers replace; a file that stands there half."""
    for name, content in {
        "broken": '{"prompt": "x"}\n{',
        "unknown": '{"q": 1}',
        "notes": "mine",
        "empty": "",
        "system": json.dumps(LINES[1]),
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    given = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    if "--data" in given:
        command = [*command[:3], *command[5:]]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert (
        cli.main([*command, *([] if "--output" in given else ["--output", str(tmp_path / "out.jsonl")]), *given]) == 2
    )
    error = capsys.readouterr().err
    assert error.rstrip().split("\n")[-1].startswith("ee-tuning: error") and "Traceback" not in error
    assert re.search(words, error), error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_chat_is_answered_until_the_template_ends_the_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Answers that go on as the user's, where the model's config names another end than its template: what is learned
    is such talk.
    """
    random_llama(tmp_path, vocab_size=VOCABULARY + 2, eos_token_id=END, bos_token_id=END)
    write_byte_tokenizer(tmp_path, "<|im_start|>", "<|im_end|>")
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    prompts = tmp_path.with_name(f"{tmp_path.name}_prompts.jsonl")  # apart from the model, as all outputs have to be
    prompts.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "a"}]}\n')
    asked, run = list[Job](), EarlyExitLLM.run

    def spy(llm: EarlyExitLLM, jobs: list[Job], *arguments: Any, **options: Any) -> Any:
        asked.extend(jobs)
        return run(llm, jobs, *arguments, **options)

    monkeypatch.setattr(EarlyExitLLM, "run", spy)
    config = load_config(
        None, {"model.path": str(tmp_path), "data.paths": [str(prompts)], "generation.max_new_tokens": 3}
    )
    regenerate(config, Wish(output=prompts.with_suffix(".out.jsonl")))
    assert [(job.params.stop_token_ids, job.adds_special_tokens) for job in asked] == [
        ((), True),
        ((VOCABULARY + 1,), False),
    ]


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_own_prompts_are_what_the_model_says_for_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Prompts that are all one; prompts cut within a word; others after a kill; answers to another sample's prompt."""
    model, output = tmp_path / "model", tmp_path / "answers.jsonl"
    random_llama(model, vocab_size=VOCABULARY + 2, eos_token_id=END, bos_token_id=END)
    write_byte_tokenizer(model, "<|im_start|>", "<|im_end|>")
    (model / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "abc", "id": 7}\n')
    monkeypatch.setattr(dialogues, "MOST_OF_A_PROMPT", 40)
    monkeypatch.setattr(question_params, "MOST_OF_A_PROMPT", 40)
    drawn = (
        f"regenerate --model {model} --own-prompts 24 --data {tmp_path / 'mine.jsonl'} --as-chat --max-new-tokens 4 "
        f"--max-batch-size 4 --seed 3 --n 2 --temperature 1 --output {output}"
    ).split()
    assert cli.main(drawn) == 0
    told = capsys.readouterr().err
    assert re.search(r"left out own prompt \d+: the model's prompt has no end within 40 tokens and its context", told)
    records = records_of(output)
    by_prompt = {
        place: [each for each in records if prompt_place(each) == place] for place in map(prompt_place, records)
    }
    asked = {place: {each["messages"][0]["content"] for each in both} for place, both in by_prompt.items()}
    assert asked.pop(24) == {"abc"} and [each["id"] for each in by_prompt[24]] == [7, 7]
    assert 4 < len(asked) < 24 and all(len(both) == 2 for both in by_prompt.values())
    assert all(len(prompts) == 1 for prompts in asked.values()), "both answers are to the same prompt"
    assert len(set.union(*asked.values())) == len(asked), "each prompt has a seed of its own"
    llm = EarlyExitLLM.load(model)
    place, (prompt,) = next(iter(asked.items()))
    seed = int.from_bytes(hashlib.sha256(f"3/prompt {place}".encode()).digest()[:7])
    written = SamplingParams(max_tokens=40, temperature=1, top_p=0.95, seed=seed, stop=("<|im_end|>",))
    (completion,) = llm.generate(["<|im_start|>user\n"], written, policy="full", adds_special_tokens=False)
    assert completion.text.strip() == prompt and completion.finish_reason == "stop"
    whole, output_again = output.read_bytes(), tmp_path / "again.jsonl"
    stop_after(6, monkeypatch)
    assert cli.main([*drawn[:-1], str(output_again)]) == 130
    monkeypatch.undo()
    monkeypatch.setattr(dialogues, "MOST_OF_A_PROMPT", 40)
    monkeypatch.setattr(question_params, "MOST_OF_A_PROMPT", 40)
    assert cli.main([*drawn[:-1], str(output_again)]) == 0 and output_again.read_bytes() == whole


def prompt_place(record: dict[str, Any]) -> int:
    place: int = record["regenerated"]["prompt_index"]
    return place


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C behind the `count`th answer."""
    told, kept = delivery.CompletionProgress.completion, []

    def stop(progress: delivery.CompletionProgress) -> None:
        told(progress)
        kept.append(progress)
        if len(kept) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(delivery.CompletionProgress, "completion", stop)


def test_without_prompts_and_without_a_template(tmp_path: Path):
    """A model that is loaded before it is found that there is nothing to ask it, or no way to ask."""
    config = load_config(None, {"model.path": str(MODEL)})
    with pytest.raises(InputError, match=r"needs prompts.*--shipped-prompts"):
        regenerate(config, Wish(output=tmp_path / "out.jsonl"))
    for prompts in ({"num_shipped": 2}, {"num_own": 2}):
        with pytest.raises(InputError, match=r"has no chat template.*--chat-template"):
            regenerate(config, Wish(output=tmp_path / "out.jsonl", **prompts))
    assert os.listdir(tmp_path) == []
