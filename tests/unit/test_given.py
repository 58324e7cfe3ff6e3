"""Metrics of given texts: choices and perplexity, teacher-forced."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer
from exits import write_exits
from random_models import random_llama

from ee_tuning import EarlyExitLLM
from ee_tuning.evaluation.evaluate import evaluate
from ee_tuning.evaluation.given import BY_LENGTH, likeliest
from ee_tuning.evaluation.points import PolicySweep, points_of
from ee_tuning.evaluation.task import Task, TaskItem
from ee_tuning.generation.scoring import Score, score_by

CHAT = ({"role": "user", "content": "a or b?"},)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ with a byte tokenizer and a chat template, exits/ after layers 2 and 4 of 6."""
    folder = tmp_path_factory.mktemp("given")
    random_llama(folder / "model", vocab_size=VOCABULARY, eos_token_id=END, bos_token_id=END)
    write_byte_tokenizer(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    write_exits(folder / "model", folder / "exits")
    return folder


def log_likelihood(plain: Any, tokenizer: Any, context: str, text: str) -> float:
    """By transformers."""
    before, after = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (context, text))
    with torch.no_grad():
        logprobs = plain(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(before) + at - 1, token]) for at, token in enumerate(after))


def test_choices_and_perplexity_are_those_of_transformers(folder: Path):
    """The likelihood of the prompt in the choice's; the next prompt's choices; a chat that is asked as a text; exits
    that are not asked.
    """
    llm = EarlyExitLLM.load(folder / "model", folder / "exits", dtype="float64")
    items = tuple(
        TaskItem(
            where="t",
            id=number,
            prompt=prompt,
            messages=messages,
            choices=choices,
            right=right,
            answers=(choices[right],),
        )
        for number, (prompt, messages, choices, right) in enumerate(
            [
                ("The sky", (), (" is blue", " green", "!"), 2),
                ("x", (), ("y", "zz"), 0),
                (None, CHAT, ("a", "bb", "ccc"), 1),
            ]
        )
    )
    points = points_of(llm, PolicySweep(thresholds=(0.0,), fixed=(4,), speculative=True))
    choose, perplexity = (
        evaluate(llm, [Task(name="t", metric=metric, items=items)], points) for metric in ("choice", "perplexity")
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    contexts, rights, nll = ["The sky", "x", "user: a or b?\n"], list[bool](), list[float]()
    for item, context in zip(items, contexts, strict=True):
        likelihoods = [log_likelihood(plain, llm.tokenizer, context, text) for text in item.choices]
        rights.append(likelihoods.index(max(likelihoods)) == item.right)
        nll.append(-likelihoods[item.right or 0])
    full = [each for each in choose.readings if each.point == "full depth"]
    assert [each.scores["choice"] for each in full] == rights and all(each.is_same for each in full)
    assert [each.scores["perplexity"] for each in perplexity.readings if each.point == "full depth"] == pytest.approx(
        nll
    )
    tokens = sum(len(item.answers[0]) for item in items)
    assert perplexity.tasks[0].full_depth.metric.value == pytest.approx(math.exp(sum(nll) / tokens))
    by_name = {point.name: point for point in choose.tasks[0].points}
    assert by_name["threshold 0"].mean_depth.value == 2 and by_name["exit 4"].mean_depth.value == 4
    assert by_name["speculative"].metric == by_name["full depth"].metric and by_name["full depth"].speedup is None
    assert set(by_name["full depth"].other_metrics) == {BY_LENGTH} and by_name["full depth"].agreement is None
    at_4 = llm.score([("The sky", text) for text in items[0].choices], policy="fixed", exit_layer=4)
    chosen = max(range(3), key=lambda at: at_4[at].logprob)
    assert next(each.text for each in choose.readings if each.point == "exit 4") == items[0].choices[chosen]


def test_all_ways_at_once_are_each_by_itself(folder: Path):
    """A position that left by one threshold, missing from another; the confidence of another measure; a fixed exit that
    ends the pass.
    """
    llm = EarlyExitLLM.load(folder / "model", folder / "exits", dtype="float64")
    pairs = [([1, 2, 3], [4, 5]), ([7], [8, 9, 10, 11]), ([7], [12])]
    sweep = PolicySweep(thresholds=tuple(each / 20 for each in range(21)), fixed=(2, 4))
    policies = [point.policy for point in points_of(llm, sweep)]
    policies += [
        point.policy
        for point in points_of(llm, PolicySweep(thresholds=(0.1, 0.3), speculative=True), measure="entropy")[1:]
    ]
    together = score_by(llm.model, pairs, policies, 8)
    assert len({tuple(layer for each in scores for layer in each.exit_layers) for scores in together}) > 4
    for policy, scores in zip(policies, together, strict=True):
        for alone, each in zip(llm.score(pairs, policy=policy), scores, strict=True):
            assert each.exit_layers == alone.exit_layers and each.is_greedy == alone.is_greedy
            assert each.logprobs == pytest.approx(alone.logprobs)


def test_a_long_choice_may_win_by_length():
    """The shortest choice, whatever it says; a mean over tokens, of which tokenizers have other numbers."""
    item = TaskItem(where="t", id=0, prompt="x", choices=("no", "certainly"), right=1)
    scores = [Score(token_ids=[1], logprobs=[logprob], is_greedy=[True], exit_layers=[1]) for logprob in (-3.0, -4.0)]
    assert likeliest(item, scores) == (0, 1)
