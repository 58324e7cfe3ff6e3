"""Many clients at once, some of which leave: nothing is lost, and each answer is what it is alone."""

import asyncio
import time
from collections.abc import Iterator

import pytest
from exits import write_exits
from served import MODEL, Served, config_of, served
from serving_load import alone, load, random_bodies

from ee_tuning.generation.completion import Completion, StreamedToken
from ee_tuning.generation.job import Job
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL

pytest.importorskip("fastapi", reason="pip install 'ee_tuning[serve]'")
pytestmark = pytest.mark.slow

CLIENTS, REQUESTS = 20, 80


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serving")
    exits = write_exits(MODEL, folder / "heads", exit_layers=[4, 8], init="copy")
    small = {"generation.max_batch_size": 8, "generation.cache_tokens": 4096}
    with served(config_of(exits, folder, **small)) as running:
        yield running


def test_under_load_each_answer_is_what_it_is_alone(server):
    """An answer that another client's leaving, or the mixture of policies, changes; memory that is not given back."""
    bodies = random_bodies(40, seed=0)
    asking = load(server.url, bodies, clients=CLIENTS, until=lambda begun: begun >= REQUESTS, seed=0)
    answers = asyncio.run(asyncio.wait_for(asking, 240))
    assert answers.failures == [] and len(answers.whole) + answers.num_left == REQUESTS
    assert len(answers.whole) > REQUESTS // 2 and answers.num_left > REQUESTS // 10
    wanted = {place: alone(server.reference, bodies[place]) for place in {place for place, *_ in answers.whole}}
    assert [(text, ids) for _, text, ids in answers.whole] == [wanted[place] for place, *_ in answers.whole]
    client, pool = server.service.client, server.service.jobs.engine.cache.pool
    until = time.monotonic() + 20
    while not server.service.jobs.engine.is_idle and time.monotonic() < until:  # the last clients may just have left
        time.sleep(0.01)
    assert client.num_unfinished == 0 and pool.num_free == pool.num_blocks


def test_an_answer_that_is_there_at_once_is_not_lost():
    """No choices where the engine was done before the event loop came to read the first token: a busy machine."""
    from ee_tuning.serving.engine_client import EngineClient
    from ee_tuning.serving.engine_loop import TokenEvent
    from ee_tuning.serving.metrics import Metrics

    class Engine:
        error = None

        def send(self, command: object) -> None:
            """Does nothing."""

    async def ask() -> list[str]:
        client = EngineClient(Metrics("model"), num_slots=1, max_queue=1)
        client.connect(Engine(), asyncio.get_running_loop())
        running = client.submit([Job("a", SamplingParams(max_tokens=1), FULL)])
        done = Completion(prompt="a", text="b", token_ids=[1], finish_reason="length")
        client.deliver([TokenEvent(0, StreamedToken(0, "b", 2, 0.5, True, token_id=1), done)])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert client.num_unfinished == 0
        return [event.completion.text async for events in running.events() for _, event in events]

    assert asyncio.run(asyncio.wait_for(ask(), 5)) == ["b"]
