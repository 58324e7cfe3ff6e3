"""The server's answers, asked by OpenAI's own client, are those of EarlyExitLLM."""

import asyncio
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from exits import write_exits
from served import MODEL, Served, config_of, served

from ee_tuning import SamplingParams
from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.sampling.exit_fusion import ExitFusion

pytest.importorskip("fastapi", reason="pip install 'ee_tuning[serve]'")

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serving")
    exits = write_exits(MODEL, folder / "heads", exit_layers=[4, 8], init="copy")
    with served(config_of(exits, folder), api_keys=("secret", "other")) as running:
        yield running


FUSED: dict[str, dict[str, Any]] = {
    "contrast": {"contrast_layers": (8, 4), "contrast_alpha": 0.2},
    "fuse": {"fuse_layer": 8, "fuse_weight": 0.7},
}


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


def reference(server: Served, prompt: str, params: dict[str, Any], **options: Any) -> list[Completion]:
    return server.reference.generate([prompt], SamplingParams(**params), **options)


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "full": ({"temperature": 0.0}, {"policy": "full"}, {"policy": "full"}),
    "threshold": ({"temperature": 0.0}, {"exit_threshold": 0.4}, {"policy": "threshold", "threshold": [0.4]}),
    "each its own": ({"temperature": 0.8}, {"exit_threshold": [0.9, 0.3]}, {"threshold": [0.9, 0.3]}),
    "measure": ({"temperature": 0.0}, {"exit_measure": "margin"}, {"measure": "margin"}),
    "fixed": ({"temperature": 0.0}, {"exit_layer": 8}, {"policy": "fixed", "exit_layer": 8}),
    "speculative": ({"temperature": 0.9, "seed": 3}, {"policy": "speculative"}, {"policy": "speculative"}),
    "several": ({"temperature": 1.2, "n": 3, "seed": 5, "top_p": 0.9}, {}, {}),
    "penalties": ({"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.5}, {}, {}),
    "stops": ({"temperature": 0.0, "stop": ("e", "(s")}, {"ignore_eos": True}, {}),
    "bias": ({"temperature": 0.0, "logit_bias": {66: 20.0}}, {}, {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_completions_are_those_of_the_library(server, client, way, streams):
    """A parameter that is read wrongly, a choice in another's place, text that a stream loses."""
    params, extra, options = WAYS[way]
    params = {"seed": 0, "max_tokens": 24, **params}
    ignore = {"ignore_eos": True} if "ignore_eos" in extra else {}
    wanted = reference(server, "def main(", {**params, **ignore}, **options)
    sent = {**params, "logit_bias": {str(k): v for k, v in params.get("logit_bias", {}).items()}}
    sent |= {"stop": list(params.get("stop", ())) or None}
    extra_body = {**extra, "return_exit_layers": True, "return_token_ids": True}
    answer = client.completions.create(
        model="tiny-python-llama", prompt="def main(", stream=streams, extra_body=extra_body, **sent
    )
    made = _of_stream(answer) if streams else [_told(choice) for choice in answer.choices]
    told = [
        {"text": c.text, "exit_layers": c.exit_layers, "token_ids": c.token_ids, "finish_reason": c.finish_reason}
        for c in wanted
    ]
    if way == "speculative":  # what is drafted depends on what each engine has learnt
        for one, other in zip(made, told, strict=True):
            assert len(one.pop("exit_layers")) == len(other.pop("exit_layers"))
    assert made == told


def _told(choice: Any) -> dict[str, Any]:
    own = choice.model_extra
    return {"text": choice.text, "exit_layers": own["exit_layers"], "token_ids": own["token_ids"]} | {
        "finish_reason": choice.finish_reason
    }


def _of_stream(chunks: Any) -> list[dict[str, Any]]:
    made: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            so_far = made.setdefault(choice.index, {"text": "", "exit_layers": [], "token_ids": []})
            assert "finish_reason" not in so_far, "a chunk behind the last one"
            so_far["text"] += choice.text
            for name in ("exit_layers", "token_ids"):
                so_far[name] += choice.model_extra.get(name, [])
            if choice.finish_reason:
                so_far["finish_reason"] = choice.finish_reason
    return [made[index] for index in sorted(made)]


@pytest.mark.parametrize("way", FUSED)
def test_both_heads_are_heard(server, client, way):
    """A parameter that is read and lost, or that changes the requests after it; scores of one head under the name of
    two.
    """
    with pytest.raises(InputError, match="by one head each"):
        server.reference.score([("a", "b")], policy="full", **FUSED[way])
    prompt = {"model": "tiny-python-llama", "prompt": "def main(", "max_tokens": 16, "temperature": 0.0}
    said = [
        client.completions.create(**prompt, extra_body={"policy": "full", **extra}).choices[0].text
        for extra in ({}, FUSED[way], {})
    ]
    fused = {"max_tokens": 16, "fusion": ExitFusion(**FUSED[way])}
    plain, wanted = (reference(server, "def main(", each, policy="full") for each in ({"max_tokens": 16}, fused))
    assert said == [plain[0].text, wanted[0].text, plain[0].text] and plain[0].text != wanted[0].text


def test_a_chat_is_rendered_by_the_template_and_streams_as_it_answers_whole(server, client):
    """A first chunk without the role, usage that comes too early, parts of text as something else than their text."""
    messages = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "import os"}]},
    ]
    prompt = "<|system|>x\n<|user|>import os\n<|assistant|>"
    wanted = _rendered(server, prompt, SamplingParams(max_tokens=20, temperature=0.7, seed=9, logprobs=2))
    asked = {"model": "tiny-python-llama", "messages": messages, "max_completion_tokens": 20, "temperature": 0.7}
    asked |= {"seed": 9, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == wanted.text
    assert whole.usage.prompt_tokens == len(prompt) and whole.usage.completion_tokens == len(wanted.token_ids)
    told = whole.choices[0].logprobs.content
    assert [each.logprob for each in told] == wanted.logprobs
    assert b"".join(bytes(each.bytes) for each in told).decode().startswith(wanted.text)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == wanted.text
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [c.usage for c in client.chat.completions.create(**asked, stream=True, stream_options=options)]
    assert {count.prompt_tokens for count in counts} == {len(prompt)}
    made = [count.completion_tokens for count in counts]
    assert made[0] == 0 and made == sorted(made) and made[-1] == whole.usage.completion_tokens


def test_memory_is_there_before_the_first_request(server):
    """A server that is ready, and whose first client waits until each layer has its memory."""
    engine = server.service.engine_loop._runner.engine
    cache, num_layers = engine.cache, server.reference.model.config.num_layers
    assert cache.num_bytes >= num_layers * cache.num_places * cache.bytes_per_token


def test_the_log_says_why_a_request_was_refused(server, client, caplog):
    """A load generator shows the status of refused requests alone, and the server's log had no more."""
    with caplog.at_level("INFO", logger="ee_tuning.serving"):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny-python-llama", prompt="x", temperature=-1.0)
        until = time.monotonic() + 20  # the line is written when the answer is out
        while not (lines := [r.message for r in caplog.records if '"status": 400' in r.message]):
            assert time.monotonic() < until, "no line in the log"
            time.sleep(0.01)
    assert len(lines) == 1 and json.loads(lines[0])["error"].startswith("temperature must be")


def _rendered(server: Served, prompt: str, params: SamplingParams) -> Completion:
    completions: list[Completion] = []
    for _ in server.reference.stream([prompt], completions, params, adds_special_tokens=False):
        pass
    return completions[0]


def test_many_prompts_token_ids_and_echo(server, client):
    """Prompts in another order, token ids that get a beginning, an echo that is missing from a stream."""
    texts = ["def a(", "class B", "x = "]
    ids = [server.reference.encode(text) for text in texts]
    params = {"model": "tiny-python-llama", "max_tokens": 6, "temperature": 0.0, "n": 2}
    by_text = client.completions.create(prompt=texts, **params)
    by_ids = client.completions.create(prompt=ids, echo=True, **params)
    assert [c.index for c in by_text.choices] == list(range(6))
    assert [c.text for c in by_ids.choices] == [texts[c.index // 2] + c.text for c in by_text.choices]
    one = client.completions.create(prompt=ids[0], echo=True, stream=True, **params)
    made: dict[int, str] = {}
    for chunk in one:
        for choice in chunk.choices:
            made[choice.index] = made.get(choice.index, "") + choice.text
    assert [made[0], made[1]] == [c.text for c in by_ids.choices[:2]]


def test_characters_are_whole_in_a_stream(server, client):
    """Each byte of a character is a token of the shipped model: a chunk that splits one shows a replacement."""
    first, second = server.reference.tokenizer("é", add_special_tokens=False)["input_ids"]
    params = {"max_tokens": 40, "temperature": 1.0, "seed": 1, "frequency_penalty": 0.5}
    bias = {first: 100.0, second: 100.0}  # nothing else is said
    (wanted,) = reference(server, "x = ", {**params, "logit_bias": bias})
    chunks = list(
        client.completions.create(
            model="tiny-python-llama",
            prompt="x = ",
            stream=True,
            logit_bias={str(token): value for token, value in bias.items()},
            **params,
        )
    )
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == wanted.text and "é" in wanted.text
    assert len([text for text in texts if text]) < 40  # some tokens waited for the next one


def test_the_async_client_is_answered_alike(server):
    """Requests at the same time that get each other's tokens."""

    async def ask() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0)
        prompts = [f"def f{place}(" for place in range(6)]
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model="tiny-python-llama", prompt=prompt, max_tokens=12, temperature=1.0, seed=place
                )
                for place, prompt in enumerate(prompts)
            )
        )
        await client.close()
        return [answer.choices[0].text for answer in answers]

    made = asyncio.run(ask())
    wanted = [
        reference(server, f"def f{place}(", {"max_tokens": 12, "temperature": 1.0, "seed": place})[0].text
        for place in range(6)
    ]
    assert made == wanted


def test_models_exits_and_tokens_are_told(server, client):
    """A client that lists models, or asks how long a prompt is, before it sends one."""
    assert [model.id for model in client.models.list()] == ["tiny-python-llama"]
    assert client.models.retrieve("tiny-python-llama").model_extra["max_model_len"] == 1024
    exits = client.get("/exits", cast_to=object)
    assert exits["exit_layers"] == [4, 8] and exits["num_layers"] == 12
    assert exits["default"]["exit_thresholds"] == {"4": 0.8, "8": 0.8}
    told = _post(server, "/tokenize", {"prompt": "def f():"})
    assert told["count"] == len(told["tokens"]) == 8
    assert _post(server, "/detokenize", {"tokens": told["tokens"]}) == {"prompt": "def f():"}
    chat = _post(server, "/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
    assert _post(server, "/detokenize", {"tokens": chat["tokens"]})["prompt"] == "<|user|>hi\n<|assistant|>"


def _post(server: Served, path: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown": ({"extra_body": {"max_token": 3}}, "did you mean max_tokens", "max_token"),
    "model": ({"model": "gpt-4"}, "model must be one of tiny-python-llama", "model"),
    "temperature": ({"temperature": -1.0}, "temperature must be in 0..100, got -1", ""),
    "type": ({"extra_body": {"n": "3"}}, "n can not be used", "n"),
    "too long": ({"prompt": "x" * 2000}, "shorter than", ""),
    "exit": ({"extra_body": {"exit_layer": 5}}, "one of the exits (4, 8)", ""),
    "threshold": ({"extra_body": {"exit_threshold": [0.1, 0.2, 0.3]}}, "exit_threshold must be one number", ""),
    "no such exit": (
        {"extra_body": {"policy": "full", "contrast_layers": [5]}},
        "contrast_layers must name exits (4, 8",
        "",
    ),
    "never asked": ({"extra_body": {"exit_layer": 4, "fuse_layer": 8}}, "the policy fixed never asks", ""),
    "threshold of no type": (
        {"extra_body": {"exit_threshold": "high"}},
        "exit_threshold can not be used: it must be a valid number or a valid list, got 'high'",
        "exit_threshold",
    ),
    "tools": ({"extra_body": {"tools": [{"type": "function"}]}}, "tools is not supported", "tools"),
    "bias": ({"logit_bias": {"x": 1}}, "logit_bias must have token ids", ""),
    "empty": ({"prompt": []}, "prompt must hold 1..", ""),
    "too many": ({"n": 900}, "prompts × n must be at most", "n"),
    "stream options": ({"stream_options": {"include_usage": True}}, "needs stream true", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_rule_and_the_value(client, case):
    """A mistake that is answered by 500, by an unexplained 422, or by a completion of something else."""
    changes, words, param = REFUSED[case]
    asked = {"model": "tiny-python-llama", "prompt": "a", "max_tokens": 2, **changes}
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**asked)
    assert caught.value.status_code == (404 if case == "model" else 400)
    assert words in caught.value.body["message"]
    assert caught.value.body["param"] == (param or None)


def test_a_key_is_needed(server):
    """A server that anyone can use, although it has keys; a probe that needs one."""
    with pytest.raises(openai.AuthenticationError, match="API keys"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="secre", max_retries=0).models.list()
    assert urllib.request.urlopen(f"{server.url}/health", timeout=30).status == 200


def test_the_page_needs_nothing_from_elsewhere(server):
    """A page without its script, an element that the script looks for in vain, code of another server."""
    parts = {name: urllib.request.urlopen(f"{server.url}/{name}", timeout=30) for name in ("", "page.js", "page.css")}
    assert [part.headers.get_content_type() for part in parts.values()] == ["text/html", "text/javascript", "text/css"]
    assert "default-src 'none'" in parts[""].headers["Content-Security-Policy"]
    html, script, style = (part.read().decode() for part in parts.values())
    for name in re.findall(r'\bat\("([\w-]+)"\)', script):
        assert f'id="{name}"' in html
    assert "//" not in html + style and "http" not in script


def test_the_openapi_is_true(server):
    """A document with errors that never come, or without a parameter that is taken."""
    request = urllib.request.Request(f"{server.url}/openapi.json", headers={"Authorization": "Bearer secret"})
    document = json.load(urllib.request.urlopen(request, timeout=30))
    answers = document["paths"]["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "401", "413", "429", "503"} <= set(answers) and "422" not in answers
    body = document["components"]["schemas"]["CompletionBody"]
    assert {"prompt", "exit_threshold", "policy", "logit_bias"} <= set(body["properties"])
    assert body["additionalProperties"] is False and "HTTPValidationError" not in json.dumps(document)


def test_embeddings_are_refused_plainly(client):
    """A client that waits for vectors of a model that has none."""
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.embeddings.create(model="tiny-python-llama", input="a")


def test_metrics_add_up(server, client):
    """Tokens that are counted twice or never."""
    before = _metrics(client)
    client.completions.create(
        model="tiny-python-llama",
        prompt="def main(",
        max_tokens=9,
        n=2,
        temperature=0.0,
        extra_body={"ignore_eos": True},
    )
    after = _metrics(client)
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    by_layer = {n: v for n, v in gained.items() if n.startswith("ee_tuning:exit_tokens_total")}
    label = '{model_name="tiny-python-llama"}'
    assert gained[f"ee_tuning:generation_tokens_total{label}"] == sum(by_layer.values()) == 18
    assert gained[f"ee_tuning:prompt_tokens_total{label}"] == 9
    assert gained[f"ee_tuning:time_to_first_token_seconds_count{label}"] == 2
    assert gained[f"ee_tuning:inter_token_latency_seconds_count{label}"] == 16
    assert after[f"ee_tuning:num_requests_running{label}"] == 0


def test_accepted_drafts_are_counted_by_position():
    """A position that is counted from another number than in vLLM, or not at all."""
    from ee_tuning.serving.metrics import Metrics

    metrics, done = Metrics("m"), Completion(prompt="a", token_ids=[1] * 6, finish_reason="stop")
    done.statistics.num_drafted = 7
    for num_kept in (3, 0, 1):
        done.statistics.count_check(num_kept)
    metrics.count_completion(done)
    told = metrics.text().decode()
    for name, value in (("num_drafts", 3), ("num_draft_tokens", 7), ("num_accepted_tokens", 4)):
        assert f'ee_tuning:spec_decode_{name}_total{{model_name="m"}} {value}.0' in told
    for position, value in (("0", 2), ("1", 1), ("2", 1)):
        name = "ee_tuning:spec_decode_num_accepted_tokens_per_pos_total"
        assert f'{name}{{model_name="m",position="{position}"}} {value}.0' in told


def test_a_request_may_have_a_priority(server, client):
    """A priority that is refused, or read as another number."""
    from ee_tuning.openai_protocol.schemas import CompletionBody

    made = server.service.jobs.completion_jobs(CompletionBody(prompt=["a", "b"], priority=-3))
    assert [job.priority for job in made] == [-3, -3]
    client.completions.create(model="tiny-python-llama", prompt="a", max_tokens=1, extra_body={"priority": 2})


def _metrics(client: Any) -> dict[str, float]:
    text = client.with_options(base_url=str(client.base_url).removesuffix("v1/")).get("/metrics", cast_to=str)
    lines = [line.rpartition(" ") for line in text.split("\n") if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}
