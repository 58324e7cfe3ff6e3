"""A server of the shipped model in a thread of the test's own process."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ee_tuning import EarlyExitLLM
from ee_tuning.config import Config, load_config
from ee_tuning.demo.demo import CHECKOUT
from ee_tuning.parallel.topology import Topology, init_parallel
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


def config_of(exits: Path, folder: Path, **keys: Any) -> Config:
    """A job with the shipped model; `keys` are "section.key". Its chat template goes into `folder`."""
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    own = {
        "model.path": str(MODEL),
        "model.dtype": "float64",
        "exits.path": str(exits),
        "data.chat_template": str(folder / "template.jinja"),
        "generation.max_batch_size": 4,
        "generation.temperature": 1.0,
    }
    return load_config(None, {**own, **keys})


@contextmanager
def served(config: Config, topology: Topology | None = None, **settings: Any) -> Iterator[Served]:
    """Serves until the end of the block. With a topology this is its rank 0."""
    from ee_tuning.serving.command import make_service  # needs the extra `serve`
    from ee_tuning.serving.server import address_of, bind

    topology = topology or init_parallel(config.parallel)
    llm = EarlyExitLLM.from_config(config, topology)
    reference = EarlyExitLLM(llm.model, llm.stages, llm.tokenizer, llm.defaults, llm.stop_token_ids)
    asked = ServeSettings(port=0, **{"drain_timeout": 5.0, **settings})
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
