"""`ee-tuning serve`: an OpenAI-compatible server. Under torchrun rank 0 serves, and the other ranks decode with it."""

import asyncio
import logging
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from ee_tuning.config import Config, replace
from ee_tuning.data.chat_template import ChatTemplate, read_chat_template
from ee_tuning.engine.engine import Engine
from ee_tuning.errors import InputError
from ee_tuning.generation.completion_runner import CompletionRunner
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.parallel.topology import Topology, destroy_parallel, init_parallel
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.serving.app import build_app
from ee_tuning.serving.cache_size import cache_size
from ee_tuning.serving.engine_client import EngineClient
from ee_tuning.serving.engine_loop import EngineLoop
from ee_tuning.serving.metrics import Metrics
from ee_tuning.serving.request_jobs import RequestJobs
from ee_tuning.serving.server import DrainingServer, address_of, bind, make_server, set_up_logs
from ee_tuning.serving.settings import ServeSettings, model_names
from ee_tuning.serving.tracing import Tracing, open_tracing

log = logging.getLogger("ee_tuning.serving")


@dataclass(frozen=True)
class Service:
    """All parts of a server that has its model, on rank 0."""

    server: DrainingServer
    client: EngineClient
    engine_loop: EngineLoop
    jobs: RequestJobs
    tracing: Tracing | None = None

    async def run(self, listening: socket.socket) -> None:
        """Serves until a signal, or until the engine fails; its error is then in the engine loop."""
        self.client.connect(self.engine_loop, asyncio.get_running_loop())
        self.engine_loop.start()
        try:
            await self.server.serve(sockets=[listening])
        finally:
            self.engine_loop.stop()
            if self.tracing is not None:
                self.tracing.close()


def serve(config: Config, settings: ServeSettings) -> None:
    """Loads the model, and serves it until a signal."""
    settings.check()
    if settings.otlp_traces_endpoint is not None:
        open_tracing(settings.otlp_traces_endpoint, "").close()  # refused before the model is loaded
    topology = init_parallel(config.parallel)
    if topology.dp > 1:
        raise InputError(
            f"serve takes tensor × pipeline = {topology.tp} × {topology.pp} processes, got {topology.world_size}; launch "
            f"{topology.num_in_replica}, or, without torchrun, give --data-parallel-size {topology.dp}"
        )
    listening = bind(settings) if topology.rank == 0 else None
    set_up_logs()
    llm = EarlyExitLLM.from_config(config, topology)
    if listening is not None:
        service = make_service(llm, config, settings, topology)
        log.info("%s serves %s", address_of(listening, settings), model_names(config, settings)[0])
        try:
            asyncio.run(service.run(listening))
        finally:
            if settings.uds is not None:
                Path(settings.uds).unlink(missing_ok=True)
        if service.engine_loop.error is not None:
            raise service.engine_loop.error
    else:
        # torchrun signals all ranks: rank 0 drains, then stops the others.
        for ignored in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ignored, signal.SIG_IGN)
        EngineLoop(CompletionRunner(make_engine(llm, settings, topology), llm.decode, llm.special), topology).run()
    destroy_parallel()


def make_service(llm: EarlyExitLLM, config: Config, settings: ServeSettings, topology: Topology) -> Service:
    """Returns the server of a model, not started. Other ranks call `make_engine` meanwhile."""
    engine = make_engine(llm, settings, topology)
    names = model_names(config, settings)
    metrics = Metrics(names[0])
    metrics.watch(engine)
    template = ChatTemplate(llm.tokenizer, read_chat_template(config.data.chat_template))
    jobs = RequestJobs(llm, engine, template, settings.tool_call_parser)
    client = EngineClient(metrics, num_slots=engine.num_slots, max_queue=settings.max_queue)
    runner = CompletionRunner(engine, llm.decode, llm.special)
    engine_loop = EngineLoop(runner, topology, client.deliver, client.died)
    endpoint = settings.otlp_traces_endpoint
    tracing = None if endpoint is None else open_tracing(endpoint, names[0])
    server = make_server(build_app(client, jobs, metrics, names, settings, tracing), client, settings)
    return Service(server, client, engine_loop, jobs, tracing)


def make_engine(llm: EarlyExitLLM, settings: ServeSettings, topology: Topology) -> Engine:
    """Returns an engine with as many slots as its memory suffices for. All ranks call it."""
    tokens, longest = cache_size(llm, topology, settings.max_model_len, settings.data_parallel_size)
    options = replace(Config(generation=llm.defaults), generation={"cache_tokens": tokens}).generation
    engine = llm.new_engine(options, num_slots=llm.defaults.max_batch_size, max_length=longest)
    _warm_up(engine)
    return engine


def _warm_up(engine: Engine) -> None:
    """Runs two tokens through all layers, so that memory and kernels exist before the first request, or the start
    fails.
    """
    engine.add_request([0], SamplingParams(max_tokens=2, ignore_eos=True))
    while not engine.is_idle:
        engine.step()
