"""Load on a server: many clients at once with mixed policies, some of which leave in the middle of an answer."""

import asyncio
import json
import random
from dataclasses import dataclass, field
from typing import Any

from ee_tuning import EarlyExitLLM, SamplingParams
from ee_tuning.config.generation import GenerationSection
from ee_tuning.sampling.policy import Policy

LEAVING = 0.3
"""The share of requests whose client leaves early."""
POLICIES: tuple[dict[str, Any], ...] = (
    {"policy": "full"},
    {"exit_threshold": 0.5},
    {"exit_threshold": [0.3, 0.9], "exit_measure": "margin"},
    {"exit_layer": 8},
    {"policy": "speculative"},
)
_PROMPTS = ("def main(", "import os\n\n\ndef ", "class A:\n    def __init__(", "x = ")


def random_bodies(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests that differ in prompt, policy, length and sampling."""
    chance = random.Random(seed)
    return [
        {
            "prompt": chance.choice(_PROMPTS) + str(number % 7),
            "max_tokens": chance.randrange(8, 40),
            "temperature": chance.choice((0.0, 0.8)),
            "seed": number,
            **chance.choice(POLICIES),
        }
        for number in range(count)
    ]


def alone(llm: EarlyExitLLM, body: dict[str, Any]) -> tuple[str, list[int]]:
    """Text and token ids of a request that nothing runs beside."""
    params = SamplingParams(max_tokens=body["max_tokens"], temperature=body["temperature"], seed=body["seed"])
    (made,) = llm.generate([body["prompt"]], params, policy=[_policy(body)])
    return made.text, made.token_ids


def _policy(body: dict[str, Any]) -> Policy:
    if body.get("policy") == "full":
        return Policy()
    if "exit_layer" in body:
        return Policy(fixed_exit=body["exit_layer"])
    if body.get("policy") == "speculative":
        return Policy(drafts_at=(4, 8))
    given = body["exit_threshold"]
    low, high = given if isinstance(given, list) else (given, given)
    return Policy(thresholds={4: low, 8: high}, measure=body.get("exit_measure", GenerationSection().measure))


@dataclass
class Answers:
    """What clients got."""

    whole: list[tuple[int, str, list[int]]] = field(default_factory=list)
    """(number of the request's body, text, token ids) of each answer that a client read to its end."""
    num_left: int = 0
    failures: list[str] = field(default_factory=list)


async def ask(url: str, body: dict[str, Any], *, streams: bool, leaves: bool) -> tuple[str, list[int]] | None:
    """Text and token ids of one answer; None where the client left in the middle of it. Raises AssertionError where it
    breaks off, or is an error.
    """
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    raw = json.dumps({**body, "stream": streams, "return_token_ids": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    try:
        if not streams:
            if leaves:
                await asyncio.sleep(0.05)
                return None
            status, _, answer = (await reader.read()).partition(b"\r\n\r\n")
            assert status.split()[1] == b"200", status + answer
            (choice,) = json.loads(answer)["choices"]
            return choice["text"], choice["token_ids"]
        return await _read_stream(reader, leaves)
    finally:
        writer.close()


async def _read_stream(reader: asyncio.StreamReader, leaves: bool) -> tuple[str, list[int]] | None:
    text, ids, num_seen, is_whole, seen = "", list[int](), 0, False, b""
    async for line in reader:
        data = line.strip().removeprefix(b"data: ")
        is_whole, seen = is_whole or data == b"[DONE]", line
        if not data.startswith(b"{"):
            continue
        assert b'"choices"' in data, data
        (choice,) = json.loads(data)["choices"]
        text, ids, num_seen = text + choice["text"], ids + choice.get("token_ids", []), num_seen + 1
        if leaves and num_seen == 5:
            return None
    assert is_whole, f"the stream broke off behind {seen!r}"
    return text, ids


async def load(url: str, bodies: list[dict[str, Any]], *, clients: int, until: Any, seed: int) -> Answers:
    """`clients` clients that ask for random `bodies`, one after the other, until `until(requests begun)` says so."""
    answers, begun = Answers(), 0

    async def client(number: int) -> None:
        nonlocal begun
        chance = random.Random(f"{seed} {number}")
        while not until(begun):
            place, begun = chance.randrange(len(bodies)), begun + 1
            leaves, streams = chance.random() < LEAVING and bodies[place]["max_tokens"] > 10, chance.random() < 0.7
            try:
                made = await ask(url, bodies[place], streams=streams, leaves=leaves)
            except Exception as error:  # whatever it is, the others go on
                answers.failures.append(f"{bodies[place]}: {type(error).__name__}: {error}")
                continue
            if made is None:
                answers.num_left += 1
            else:
                answers.whole.append((place, *made))

    await asyncio.gather(*map(client, range(clients)))
    return answers
