"""Numbers near the edge of their type are exact or refused, never garbage."""

import math
from typing import Any

import psutil
import pytest
import torch

from ee_tuning.config import TuningSection, load_config
from ee_tuning.config.generation import GenerationSection
from ee_tuning.engine.kv_cache import KVCache
from ee_tuning.errors import InputError
from ee_tuning.generation.prompts import job_of
from ee_tuning.model_config.config import ModelConfig, RopeConfig
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.sampling import draw, warped
from ee_tuning.tuning.settings import check_settings

HUGE = 10**400
LOGITS = torch.tensor([[-3.0, 8.5, 8.5, 8.4999, -torch.inf, 0.0], [700.0, -1e4, 699.0, 0.0, 1.0, 2.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-5, 1e-29, 1e-31, 1e-40, 1e-46, 5e-324])
def test_a_temperature_near_zero_draws_the_likeliest(temperature: float, dtype: torch.dtype):
    """Logits divided by it overflow, and the token drawn is 0 again and again. Those that tie share, as at any
    temperature.
    """
    found = warped(LOGITS.to(dtype), temperature).softmax(-1)
    assert found[1].tolist() == [1, 0, 0, 0, 0, 0]
    assert (
        found[0, [1, 2]].tolist() == pytest.approx([0.5, 0.5], abs=1e-4) and float(found[0, [0, 3, 4, 5]].sum()) < 1e-4
    )
    cut = warped(LOGITS.to(dtype), temperature, top_k=3, top_p=1e-40, min_p=1e-40).softmax(-1)
    assert torch.isfinite(cut).all() and cut[1].tolist() == [1, 0, 0, 0, 0, 0] and int(draw(cut, [1, 2])[1]) == 0


@pytest.mark.parametrize("cut", [{"top_p": 1e-40}, {"top_p": 5e-324}, {"min_p": 1.0}, {"top_k": 1}])
def test_the_tightest_cut_leaves_the_likeliest(cut: dict[str, Any]):
    """A cut below what float32 can tell from 0, which leaves no token at all."""
    assert warped(LOGITS[1:], 1.0, **cut).softmax(-1)[0].tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"temperature": HUGE}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"repetition_penalty": 1e-40}, r"in 0\.01\.\.100"),
        ({"repetition_penalty": 1e38}, "repetition_penalty"),
        ({"presence_penalty": 1e38}, "presence_penalty"),
        ({"frequency_penalty": -HUGE}, "frequency_penalty"),
        ({"logit_bias": {1: HUGE}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"seed": 2**63}, "seed"),
        ({"n": 2**63}, "n must"),
        ({"logprobs": 2**63}, "logprobs"),
        ({"stop_token_ids": (2**63,)}, "stop_token_ids"),
    ],
)
def test_what_a_request_can_not_use_is_refused(keys: dict[str, Any], words: str):
    """An OverflowError of Python's own, or logits that all are infinite."""
    with pytest.raises(InputError, match=words):
        SamplingParams(**keys).check(100)


@pytest.mark.parametrize(
    "name",
    [
        "generation.min_p",
        "generation.temperature",
        "tuning.lr",
        "tuning.weight_decay",
        "data.valid_fraction",
        "parallel.distributed_timeout_minutes",
    ],
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", math.nan, math.inf, HUGE])
def test_a_config_holds_finite_numbers(name: str, value: Any):
    """A learning rate of infinity, and a run whose first step makes NaN of all weights."""
    with pytest.raises(InputError, match="must be a number"):
        load_config(None, {name: value})


@pytest.mark.parametrize("num_tokens", [10**12, 2**63, HUGE])
def test_a_cache_that_no_memory_holds_is_refused(num_tokens: int):
    """A MemoryError, in hundreds of lines, for a number with three zeros too many."""
    with pytest.raises(InputError, match=r"does not fit the memory; lower generation\.cache_tokens"):
        _cache(num_tokens)


def test_a_cache_takes_memory_as_tokens_fill_it():
    """A server that wrote zeros over half of the machine's memory, 10 GB, within its first request: seven seconds."""
    before = psutil.Process().memory_info().rss
    layer = _cache(2**24).layer(1)
    layer.keys[12345], layer.values[-1] = 1.0, 2.0
    assert layer.keys.nbytes == 2**29 and psutil.Process().memory_info().rss < before + 2**26
    assert layer.keys[12344:12347, 0, 0].tolist() == [0, 1, 0] and layer.values[-1, 1, 3] == 2


def _cache(num_tokens: int) -> KVCache:
    config = ModelConfig(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=4,
        vocab_size=8,
        ties_embeddings=True,
        max_position_embeddings=64,
        norm_epsilon=1e-6,
        rope=RopeConfig(),
    )
    topology = init_parallel(load_config(None).parallel)
    cache = KVCache(config, topology, num_tokens=num_tokens, max_length=64, dtype=torch.float32)
    cache.layer(1)
    return cache


def test_a_bias_of_hundreds_of_digits_refuses_its_line_alone():
    """A whole file of prompts that ends in a traceback."""

    class Model:
        defaults = GenerationSection()

    with pytest.raises(InputError, match="logit_bias must be an object"):
        job_of(Model(), {"prompt": "x", "logit_bias": {"1": HUGE}})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 1e308),
        ("lr", 1e-320),
        ("lr", 0.0),
        ("adam_eps", 1e-320),
        ("adam_eps", 0.0),
        ("weight_decay", 1e308),
        ("weight_decay", -1.0),
    ],
)
def test_an_update_that_float32_can_not_hold_is_refused(name: str, value: float):
    """A run that ends well, and writes heads of NaN."""
    with pytest.raises(InputError, match=rf"tuning\.{name} must be in"):
        check_settings(TuningSection(**{name: value, "min_lr": 0.0}))  # type: ignore[arg-type]
