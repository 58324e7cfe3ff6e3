"""Ray Serve starts replicas of a model on the machines of a Ray cluster, and balances requests among them.

    pip install 'ee_tuning[serve,ray]'
    cd examples
    serve run ray_serve:app model=tiny-python-llama exits=../runs/demo/exit_heads threshold=0.8 replicas=2

Each replica answers as `ee-tuning serve` does, at http://127.0.0.1:8000. `cpus` and `gpus` are those of one replica (1
and 0), `max_ongoing` are the requests that it has at a time, beyond which Ray's proxy lets them wait (64). On a cluster
the folders of model and exits must be the same on all machines, and this file be there, too (`--working-dir`).
"""

import asyncio
from typing import Any

from ray import serve

from ee_tuning import EarlyExitLLM
from ee_tuning.config import Config, load_config
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.serving.command import Service, make_service
from ee_tuning.serving.settings import ServeSettings

_OF_RAY = ("replicas", "cpus", "gpus", "max_ongoing")
_KEYS = {"model": "model.path", "exits": "exits.path", "dtype": "model.dtype", "tokenizer": "data.tokenizer"}
_services: list[Service] = []
"""The service of this process, once it has its model."""


def load_service(config: Config) -> None:
    """Loads the model, for `service_app`."""
    topology = init_parallel(config.parallel)
    _services.append(make_service(EarlyExitLLM.from_config(config, topology), config, ServeSettings(), topology))


def is_alive() -> bool:
    """Whether the engine decodes."""
    return _services[0].client.is_alive


def service_app() -> Any:
    """The ASGI app of this process's service. Its lifespan is the engine's."""
    service = _services[0]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await service.server.config.app(scope, receive, send)
            return
        assert (await receive())["type"] == "lifespan.startup"
        service.client.connect(service.engine_loop, asyncio.get_running_loop())
        service.engine_loop.start()
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        service.engine_loop.stop()
        await send({"type": "lifespan.shutdown.complete"})

    return app


@serve.deployment
@serve.ingress(service_app)
class EarlyExitServer:
    """One replica: an engine, and the server's endpoints around it."""

    def __init__(self, config: Config):
        load_service(config)

    def check_health(self) -> None:
        """Lets Ray start a replica again whose engine has failed."""
        if not is_alive():
            raise RuntimeError("the engine has failed")


def app(arguments: dict[str, str]) -> serve.Application:
    """What `serve run` starts.

    Arguments are those of Ray above, `model`, `exits`, `dtype`, `tokenizer`, and keys of the job's `generation`
    section.
    """
    job = {_KEYS.get(key, f"generation.{key}"): value for key, value in arguments.items() if key not in _OF_RAY}
    options = {"num_cpus": float(arguments.get("cpus", 1)), "num_gpus": float(arguments.get("gpus", 0))}
    return EarlyExitServer.options(
        num_replicas=int(arguments.get("replicas", 1)),
        max_ongoing_requests=int(arguments.get("max_ongoing", 64)),
        ray_actor_options=options,
    ).bind(load_config(None, job))
