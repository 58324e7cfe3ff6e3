"""What drafts will be accepted, counted before any engine runs."""

from pathlib import Path

import pytest
import torch
from exits import loaded_with, write_exits
from random_models import random_llama

from ee_tuning import cli
from ee_tuning.evaluation.acceptance import acceptance, agreement

T, F = True, False


@pytest.mark.parametrize(
    ("answer", "rounds", "by_position"),
    [
        ([F, T, T, F, T], 2, (2, 1)),  # two accepted and the model's own third, then one
        ([T, F, F, F], 3, (0, 0)),
        ([T, T, T, T, T, T, T], 2, (2, 2)),
        ([T], 0, (0, 0)),
        ([], 0, (0, 0)),
    ],
)
def test_rounds_are_counted_as_vllm_counts_them(answer, rounds, by_position):
    """A first token that comes without a draft counted as one; a round that goes on behind a wrong draft."""
    found = acceptance([answer], 2)
    assert (found.num_rounds, found.by_position) == (rounds, by_position)
    assert found.length == 1 + sum(by_position) / max(rounds, 1)


def test_a_plain_draft_is_accepted_as_foretold(tmp_path: Path):
    """Agreement taken from states of another layer, or one token off."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    random_llama(tmp_path / "model")
    # Nearly the whole model, so that some drafts are right.
    exits = write_exits(tmp_path / "model", tmp_path / "exits", exit_layers=[5], architecture="norm", init="copy")
    words = ["--model", tmp_path / "model", "--exits", exits, "--exit", 5, "--output", tmp_path / "draft"]
    assert cli.main(["export", "--format", "draft", *map(str, words)]) == 0
    whole, draft = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64)
        for name in ("model", "draft")
    )
    prompt, num_tokens, num_drafts = [5, 17, 80, 3], 40, 3

    def following(model, ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].argmax().item()

    text = [*prompt, following(whole, prompt)]
    rounds, accepted = 0, [0] * num_drafts
    while len(text) < len(prompt) + num_tokens:
        rounds += 1
        drafts = list(text)
        for _ in range(num_drafts):
            drafts.append(following(draft, drafts))
        for place in range(num_drafts):
            if (said := following(whole, text)) != drafts[len(text)]:
                break
            text.append(said)
            accepted[place] += 1
        text.append(following(whole, text))
    loaded = loaded_with(tmp_path / "model", exits, dtype="float64")
    found = acceptance([agreement(loaded, 5, prompt, text[len(prompt) :])], num_drafts)
    assert (found.num_rounds, found.by_position) == (rounds, tuple(accepted)) and 5 < sum(
        accepted
    ) < rounds * num_drafts
