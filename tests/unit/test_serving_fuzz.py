"""A few of the requests from the server's own OpenAPI that `make stress` sends by the thousand."""

from pathlib import Path

import pytest
from exits import write_exits
from served import MODEL, config_of, served
from serving_fuzz import fuzz

pytest.importorskip("fastapi", reason="pip install 'ee_tuning[serve]'")
pytest.importorskip("schemathesis")

pytestmark = pytest.mark.slow


def test_no_request_of_the_openapi_breaks_the_server(tmp_path: Path) -> None:
    """An answer with status 5xx, a status or a type that the OpenAPI does not know, an error of another form."""
    exits = write_exits(MODEL, tmp_path / "heads", exit_layers=[4, 8], init="copy")
    with served(config_of(exits, tmp_path), max_model_len=32, max_queue=4, request_timeout=20.0) as server:
        fuzzed = fuzz(server.url, 60, seed=0)
    assert fuzzed.failures == []
    assert {status for _, status in fuzzed.statuses} >= {200, 400}
