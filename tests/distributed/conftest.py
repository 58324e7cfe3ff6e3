"""The model that the distributed tests of a pytest process tune."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from random_models import random_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of six layers. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("llama")
    random_llama(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_rubbish_between_tests() -> Iterator[None]:
    """As between modules: a test here makes many process groups."""
    yield
    gc.collect()
