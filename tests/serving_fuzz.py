"""Requests drawn from the server's own OpenAPI by schemathesis, such as it allows and such as it does not."""

import json
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SECONDS = 60.0
"""No answer takes longer."""


@dataclass
class Fuzzed:
    """What came of it."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(method and path, status) -> requests."""
    failures: list[str] = field(default_factory=list)


def fuzz(url: str, count: int, seed: int) -> Fuzzed:
    """At least `count` requests to the server at `url`, if so many differ, most of them to endpoints with a body."""
    import schemathesis

    with urllib.request.urlopen(f"{url}/openapi.json", timeout=60) as answer:
        schema = schemathesis.openapi.from_dict(json.load(answer))
    operations, fuzzed = [found.ok() for found in schema.get_all_operations()], Fuzzed()
    # Where nothing can be varied, one request is all.
    varied = [operation for operation in operations if operation.body or operation.path_parameters]
    for place, operation in enumerate(operations):
        each = -(-count // len(varied)) if operation in varied else 1
        modes = list(schemathesis.GenerationMode) if operation.body else [schemathesis.GenerationMode.POSITIVE]
        for mode in modes:
            strategy = operation.as_strategy(generation_mode=mode)
            _draw(strategy, -(-each // len(modes)), seed * 1000 + place, url, fuzzed)
    return fuzzed


def _draw(strategy: Any, count: int, seed: int, url: str, fuzzed: Fuzzed) -> None:
    import hypothesis
    from schemathesis.checks import CHECKS

    (positive_data_acceptance,) = CHECKS.get_by_names(["positive_data_acceptance"])

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def ask(case: Any) -> None:
        name = f"{case.operation.method.upper()} {case.operation.path}"
        try:
            response = case.call(base_url=url, timeout=SECONDS)
            fuzzed.statuses[name, response.status_code] += 1
            case.validate_response(response, excluded_checks=[positive_data_acceptance])  # a rule may be no type
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}, response.text
        except Exception as error:  # whatever it is, the others are tried, too
            fuzzed.failures.append(_told(name, error))
        except BaseExceptionGroup as error:  # of the checks of one answer
            fuzzed.failures += [_told(name, each) for each in error.exceptions]

    ask()


def _told(name: str, error: BaseException) -> str:
    return f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
