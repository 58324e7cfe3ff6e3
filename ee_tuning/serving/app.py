"""The web application: endpoints, the page."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse

from ee_tuning import __version__
from ee_tuning.openai_protocol.openapi import tell_true_answers
from ee_tuning.serving.access import add_access
from ee_tuning.serving.completions_api import CompletionsApi
from ee_tuning.serving.engine_client import EngineClient
from ee_tuning.serving.error_handlers import add_error_handlers
from ee_tuning.serving.information_api import InformationApi
from ee_tuning.serving.metrics import Metrics
from ee_tuning.serving.request_jobs import RequestJobs
from ee_tuning.serving.settings import ServeSettings
from ee_tuning.serving.tracing import Tracing

_PAGE = Path(__file__).parent / "page"
_TYPES = {"page.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
"""The page loads nothing from elsewhere, and runs no text as a script."""


def build_app(
    client: EngineClient,
    jobs: RequestJobs,
    metrics: Metrics,
    model_names: tuple[str, ...],
    settings: ServeSettings,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Builds the app for one model."""
    app = FastAPI(title="ee_tuning", version=__version__, root_path=settings.root_path)
    app.state.max_body_bytes = settings.max_body_bytes
    completions = CompletionsApi(client, jobs, metrics, model_names, settings.request_timeout, tracing)
    app.include_router(completions.router)
    app.include_router(InformationApi(client, jobs, metrics, completions, model_names).router)
    for path, name in (("/", "page.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        app.add_api_route(path, _file(name), methods=["GET"], include_in_schema=False)
    add_error_handlers(app)
    tell_true_answers(app)
    add_access(app, settings)
    return app


def _file(name: str) -> Any:
    async def show() -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return FileResponse(_PAGE / name, media_type=_TYPES[name], headers=headers)

    return show
