"""The endpoints with information: models, exits, tokens, health, version, metrics."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Response

from ee_tuning import __version__
from ee_tuning.errors import InputError
from ee_tuning.openai_protocol.api_errors import ApiError
from ee_tuning.openai_protocol.responses import StrictJson
from ee_tuning.openai_protocol.schemas import DetokenizeBody, TokenizeBody
from ee_tuning.openai_protocol.strict_request import StrictRoute
from ee_tuning.serving.completions_api import CompletionsApi, in_tokenizer_thread
from ee_tuning.serving.engine_client import EngineClient
from ee_tuning.serving.joined_metrics import CONTENT_TYPE
from ee_tuning.serving.metrics import Metrics
from ee_tuning.serving.request_jobs import RequestJobs

Endpoint = Callable[..., Awaitable[Response]]


class InformationApi:
    """Endpoints beside completions."""

    def __init__(
        self,
        client: EngineClient,
        jobs: RequestJobs,
        metrics: Metrics,
        completions: CompletionsApi,
        model_names: tuple[str, ...],
    ):
        self._client, self._jobs, self._metrics, self._completions = client, jobs, metrics, completions
        self._names, self._created = model_names, int(time.time())
        self.router = APIRouter(route_class=StrictRoute)
        gets: dict[str, Endpoint] = {
            "/health": self.health,
            "/ping": self.health,
            "/ready": self.ready,
            "/version": self.version,
            "/metrics": self.show_metrics,
            "/v1/models": self.models,
            "/v1/models/{model:path}": self.model,
            "/v1/exits": self.exits,
        }
        for path, endpoint in gets.items():
            self.router.add_api_route(path, endpoint, methods=["GET"], response_class=StrictJson)
        posts: dict[str, Endpoint] = {
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
            "/v1/embeddings": self.embeddings,
        }
        for path, endpoint in posts.items():
            self.router.add_api_route(path, endpoint, methods=["POST"], response_class=StrictJson)

    async def health(self) -> Response:
        """Whether the engine is alive."""
        if not self._client.is_alive:
            raise ApiError(503, "the engine has failed; the server's log says why")
        return StrictJson({"status": "ok"})

    async def ready(self) -> Response:
        """Whether new requests are taken."""
        if self._client.is_draining:
            raise ApiError(503, "the server is shutting down and takes no new requests", retry_after=5)
        return await self.health()

    async def version(self) -> Response:
        """The version of ee_tuning."""
        return StrictJson({"version": __version__})

    async def show_metrics(self) -> Response:
        """Prometheus metrics."""
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(self) -> Response:
        """The model, by all its names."""
        return StrictJson({"object": "list", "data": [self._model(name) for name in self._names]})

    async def model(self, model: str) -> Response:
        """The model by one name."""
        return StrictJson(self._model(self._completions.model_name(model)))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "ee_tuning",
            "root": self._names[0],
            "max_model_len": self._jobs.max_model_len,
        }

    async def exits(self) -> Response:
        """The exits, and the policy of requests that name none."""
        llm, policy, defaults = self._jobs.llm, self._jobs.default_policy, self._jobs.defaults
        thresholds = policy.thresholds
        return StrictJson(
            {
                "object": "exits",
                "num_layers": llm.num_layers,
                "exit_layers": list(llm.exit_layers),
                "policies": ["full", "threshold", "fixed", "speculative"] if llm.exit_layers else ["full"],
                "measures": ["max_probability", "margin", "entropy"],
                "has_chat_template": self._jobs.has_chat_template,
                "default": {
                    "policy": defaults.policy,
                    "exit_thresholds": {str(layer): value for layer, value in thresholds.items()},
                    "exit_layer": policy.fixed_exit,
                    "exit_measure": policy.measure,
                    "is_calibrated": defaults.calibration is not None,
                },
            }
        )

    async def tokenize(self, body: TokenizeBody) -> Response:
        """The token ids of a prompt, or of messages."""
        self._completions.model_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InputError("tokenize takes a prompt or messages, got both or neither; give one of them")
        ids = await in_tokenizer_thread(self._token_ids, body)
        told = {"tokens": ids, "count": len(ids), "max_model_len": self._jobs.max_model_len}
        if body.return_token_strs:
            told["token_strs"] = self._jobs.llm.tokenizer.convert_ids_to_tokens(ids)
        return StrictJson(told)

    def _token_ids(self, body: TokenizeBody) -> list[int]:
        llm = self._jobs.llm
        if body.messages is None:
            assert body.prompt is not None
            return llm.token_ids(body.prompt, body.add_special_tokens)
        text = self._jobs.chat_prompt(
            body.messages,
            adds_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continues=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
        return llm.token_ids(text, False)

    async def detokenize(self, body: DetokenizeBody) -> Response:
        """The text of token ids."""
        self._completions.model_name(body.model)
        size = self._jobs.llm.model.config.vocab_size
        wrong = [token for token in body.tokens if not 0 <= token < size]
        if wrong:
            raise InputError(f"tokens must lie in 0..{size - 1}, the model's vocabulary, got {wrong[0]}")
        decode = self._jobs.llm.tokenizer.decode
        return StrictJson({"prompt": await in_tokenizer_thread(lambda: decode(body.tokens, skip_special_tokens=False))})

    async def embeddings(self) -> Response:
        """Refuses: this server has no embeddings."""
        raise ApiError(
            404,
            "this server has a model that continues texts, and no embeddings; ask a server with an embedding model",
            code="unsupported_endpoint",
        )
