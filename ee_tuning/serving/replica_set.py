"""The replicas behind a front: which are alive, their loads, and the choice of one for each request."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import aiohttp

from ee_tuning.openai_protocol.api_errors import ApiError
from ee_tuning.serving.joined_metrics import joined_metrics
from ee_tuning.serving.routing import Asked, Router

_LONGEST_HEADER = 1 << 16
_METRICS_SECONDS = 5.0


class Replica:
    """A server that takes requests on a Unix domain socket."""

    def __init__(self, index: int, path: str):
        self.index, self.path = index, path
        self.why_dead: str | None = None
        """Reason of its failure; None while it is alive."""
        self._session: aiohttp.ClientSession | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it takes requests."""
        return self.why_dead is None

    @property
    def session(self) -> aiohttp.ClientSession:
        """Connections to it, of the running event loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(self.path, limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                max_line_size=_LONGEST_HEADER,
                max_field_size=_LONGEST_HEADER,
            )
        return self._session

    async def metrics(self) -> str | None:
        """Returns its metrics, or None where it does not answer."""
        with suppress(aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(_METRICS_SECONDS), self.session.get("http://replica/metrics") as answer:
                return await answer.text()
        return None

    async def close(self) -> None:
        """Closes its connections."""
        if self._session is not None:
            await self._session.close()


class ReplicaSet:
    """The replicas of a server. All methods are called in the event loop's thread."""

    def __init__(self, replicas: Sequence[Replica]):
        self.replicas = replicas
        self.router = Router(len(replicas))
        self.num_unfinished = 0
        """Number of unfinished requests."""
        self.is_draining = False
        """Whether the server is about to end and refuses new requests."""

    @property
    def alive(self) -> list[Replica]:
        """Replicas that take requests."""
        return [replica for replica in self.replicas if replica.is_alive]

    @property
    def is_alive(self) -> bool:
        """Whether any replica takes requests."""
        return bool(self.alive)

    def lease(self, asked: Asked) -> "Lease":
        """Chooses a replica for a request. Raises ApiError where all have failed."""
        if not self.alive:
            raise ApiError(503, "all replicas have failed; the server's log says why, and it has to be started again")
        index = self.router.choose(asked.prompt, [replica.index for replica in self.alive])
        return Lease(self, self.replicas[index], asked)

    async def metrics(self) -> bytes:
        """The metrics of all replicas that answer, in Prometheus' text format."""
        asked = self.alive
        texts = await asyncio.gather(*(replica.metrics() for replica in asked))
        texts_by_index = {replica.index: text for replica, text in zip(asked, texts, strict=True) if text is not None}
        return joined_metrics(texts_by_index, {replica.index: replica.is_alive for replica in self.replicas})


class Lease:
    """A request's place in the load of its replica. `close` it in any case."""

    def __init__(self, replicas: ReplicaSet, replica: Replica, asked: Asked):
        self.replica = replica
        self._set, self._reading, self._making, self._is_open = replicas, asked.read, asked.made, True
        replicas.num_unfinished += 1
        replicas.router.loads[replica.index] += asked.read + asked.made

    def progress(self, num_tokens: int) -> None:
        """Reduces the load: the prompts are computed, and about `num_tokens` tokens are generated."""
        made = min(float(num_tokens), self._making)
        self._set.router.loads[self.replica.index] -= self._reading + made
        self._reading, self._making = 0.0, self._making - made

    def close(self) -> None:
        """Removes the rest of the request from the load."""
        if self._is_open:
            self._is_open = False
            self._set.num_unfinished -= 1
            self.progress(int(self._making) + 1)

    def failure(self) -> ApiError:
        """Returns the error for a client whose answer the replica did not finish."""
        if self._set.is_draining:
            return ApiError(503, "the server is shutting down, and the request was not done in time; ask another one")
        return ApiError(500, f"replica {self.replica.index} has failed; send the request again, another one takes it")
