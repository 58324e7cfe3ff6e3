"""Many clients at once, some of which leave: nothing is lost, and each answer is what it is alone."""

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from exits import write_exits
from served import MODEL, Served, config_of, served

from ee_tuning import SamplingParams
from ee_tuning.config.generation import GenerationSection
from ee_tuning.engine.policy import Policy

pytest.importorskip("fastapi", reason="pip install 'ee_tuning[serve]'")
pytestmark = pytest.mark.slow

CLIENTS, REQUESTS, LEAVING = 20, 4, 0.3
POLICIES: tuple[dict[str, Any], ...] = (
    {"policy": "full"},
    {"exit_threshold": 0.5},
    {"exit_threshold": [0.3, 0.9], "exit_measure": "margin"},
    {"exit_layer": 8},
    {"policy": "speculative"},
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serving")
    exits = write_exits(MODEL, folder / "heads", exit_layers=[4, 8], init="copy")
    small = {"generation.max_batch_size": 8, "generation.cache_tokens": 4096}
    with served(config_of(exits, folder, **small)) as running:
        yield running


async def _ask(url: str, body: dict[str, Any], leaves: bool) -> str | None:
    """The text of a stream; None where the client left in the middle of it."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    raw = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    text, num_seen, is_whole = "", 0, False
    try:
        async for line in reader:
            data = line.strip().removeprefix(b"data: ")
            is_whole = is_whole or data == b"[DONE]"
            if not data.startswith(b"{"):
                continue
            text += json.loads(data)["choices"][0]["text"]
            num_seen += 1
            if leaves and num_seen == 5:
                return None
    finally:
        writer.close()
    assert is_whole, "the stream broke off"
    return text


def test_under_load_each_answer_is_what_it_is_alone(server):
    """An answer that another client's leaving, or the mixture of policies, changes; memory that is not given back."""
    chance = random.Random(0)
    bodies = [
        {
            "prompt": chance.choice(("def main(", "import os\n\n\ndef ", "class A:\n    def __init__(", "x = "))
            + str(seed % 7),
            "max_tokens": chance.randrange(8, 40),
            "temperature": chance.choice((0.0, 0.8)),
            "seed": seed,
            **chance.choice(POLICIES),
        }
        for seed in range(CLIENTS * REQUESTS)
    ]
    leaves = [chance.random() < LEAVING and body["max_tokens"] > 10 for body in bodies]

    async def client(number: int) -> list[str | None]:
        mine = range(number, len(bodies), CLIENTS)
        return [await _ask(server.url, bodies[each], leaves[each]) for each in mine]

    async def all_clients() -> list[list[str | None]]:
        return await asyncio.gather(*map(client, range(CLIENTS)))

    answers = asyncio.run(asyncio.wait_for(all_clients(), 240))
    made = {number + CLIENTS * turn: text for number, texts in enumerate(answers) for turn, text in enumerate(texts)}
    whole = [place for place in made if made[place] is not None]
    assert len(whole) > len(bodies) // 2
    wanted = _alone(server, [bodies[place] for place in whole])
    assert [made[place] for place in whole] == wanted
    pool = server.service.jobs.engine.cache.pool
    assert server.service.client.num_unfinished == 0 and pool.num_free == pool.num_blocks


def _alone(server: Served, bodies: list[dict[str, Any]]) -> list[str]:
    llm, made = server.reference, []
    for body in bodies:
        params = SamplingParams(max_tokens=body["max_tokens"], temperature=body["temperature"], seed=body["seed"])
        made.append(llm.generate([body["prompt"]], params, policy=[_policy(server, body)])[0].text)
    return made


def _policy(server: Served, body: dict[str, Any]) -> Policy:
    if body.get("policy") == "full":
        return Policy()
    if "exit_layer" in body:
        return Policy(fixed_exit=body["exit_layer"])
    if body.get("policy") == "speculative":
        return Policy(drafts_at=(4, 8))
    given = body["exit_threshold"]
    low, high = given if isinstance(given, list) else (given, given)
    return Policy(thresholds={4: low, 8: high}, measure=body.get("exit_measure", GenerationSection().measure))
