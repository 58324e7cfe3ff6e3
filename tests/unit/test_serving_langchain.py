"""LangChain's ChatOpenAI as a client."""

from collections.abc import Iterator
from typing import Any

import pytest
from exits import write_exits
from served import MODEL, Served, config_of, served

from ee_tuning import SamplingParams
from ee_tuning.generation.completion import Completion

pytest.importorskip("fastapi", reason="pip install 'ee_tuning[serve]'")
langchain_openai = pytest.importorskip("langchain_openai")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serving")
    exits = write_exits(MODEL, folder / "heads", exit_layers=[4, 8], init="copy")
    with served(config_of(exits, folder)) as running:
        yield running


def test_a_chat_is_invoked_and_streamed(server):
    """A parameter that LangChain adds by itself and the server refuses; chunks that it can not put together."""
    keys: dict[str, Any] = {"model": "tiny-python-llama", "temperature": 0.7, "max_tokens": 20, "seed": 3}
    extra = {"exit_threshold": 0.4, "return_exit_layers": True}
    chat = langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", stream_usage=True, max_retries=0, extra_body=extra, **keys
    )
    messages = [("system", "x"), ("human", "import os"), ("ai", "y"), ("human", "def f(")]
    wanted: list[Completion] = []
    prompt = "<|system|>x\n<|user|>import os\n<|assistant|>y\n<|user|>def f(\n<|assistant|>"
    params = SamplingParams(max_tokens=20, temperature=0.7, seed=3)
    for _ in server.reference.stream([prompt], wanted, params, adds_special_tokens=False, threshold=[0.4]):
        pass
    whole, chunks = chat.invoke(messages), list(chat.stream(messages))
    assert whole.content == "".join(chunk.content for chunk in chunks) == wanted[0].text
    assert whole.usage_metadata["output_tokens"] == len(wanted[0].token_ids)
    last = sum(chunks[1:], chunks[0])
    assert last.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]
    assert last.response_metadata["finish_reason"] == whole.response_metadata["finish_reason"]
