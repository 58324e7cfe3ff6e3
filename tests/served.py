"""A server of the shipped model in a thread of the test's own process."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ee_tuning import EarlyExitLLM
from ee_tuning.config import load_config
from ee_tuning.evaluation.demo import CHECKOUT
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.serving.settings import ServeSettings

MODEL = CHECKOUT / "examples" / "tiny-python-llama"
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    service: Any
    reference: EarlyExitLLM
    """The same model with an engine of its own, for use while the server is idle."""


@contextmanager
def served(exits: Path, folder: Path, settings: dict[str, Any] | None = None, **generation: Any) -> Iterator[Served]:
    """Serves until the end of the block."""
    from ee_tuning.serving.command import make_service  # needs the extra `serve`
    from ee_tuning.serving.server import address_of, bind

    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    keys = {f"generation.{name}": value for name, value in {"temperature": 1.0, **generation}.items()}
    config = load_config(
        None,
        {
            "model.path": str(MODEL),
            "exits.path": str(exits),
            "data.chat_template": str(folder / "template.jinja"),
            "generation.max_batch_size": 4,
            **keys,
        },
    )
    topology = init_parallel(config.parallel)
    llm = EarlyExitLLM.from_config(config, topology)
    reference = EarlyExitLLM(llm.model, llm.stages, llm.tokenizer, llm.defaults, llm.stop_token_ids)
    asked = ServeSettings(port=0, **{"drain_timeout": 5.0, **(settings or {})})
    listening = bind(asked)
    service = make_service(llm, config, asked, topology)
    thread = threading.Thread(target=lambda: asyncio.run(service.run(listening)))
    thread.start()
    try:
        yield Served(address_of(listening, asked), service, reference)
    finally:
        service.server.should_exit = True
        thread.join(30)
    assert not thread.is_alive() and service.engine_loop.error is None
