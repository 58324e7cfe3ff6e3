"""The engines' environment is looked at before anything runs there."""

from pathlib import Path

import pytest
from engines import check_version
from vllm_processes import ENGINES

from ee_tuning.errors import InputError


@pytest.fixture(autouse=True, scope="session")
def _tried_version() -> None:
    """Ends the session with one line, and 2, where vLLM is not the tried one: the claims are of that one."""
    if not ENGINES:
        return
    remedy = (
        "remove .venv-engines, and `make test-engines` installs that one; to try another, write its version into "
        "ee_tuning/artifact/tried_engines.py"
    )
    try:
        check_version(Path(ENGINES), any_version=False, named="EE_TUNING_ENGINES", remedy=remedy)
    except InputError as error:
        pytest.exit(str(error), returncode=2)
