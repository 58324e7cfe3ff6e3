"""The manifest for Kubernetes and the recipe for Ray Serve do what their words say."""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from exits import write_exits
from served import MODEL

from ee_tuning import EarlyExitLLM, cli
from ee_tuning.demo.demo import CHECKOUT

MANIFEST = CHECKOUT / "examples" / "kubernetes" / "serve.yaml"


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")))


@pytest.mark.parametrize("document", documents(), ids=lambda document: document["kind"])
def test_the_manifest_is_one_that_kubernetes_takes(document: dict[str, Any]):
    """A misspelt field, which the API server drops or refuses on the day of the deployment."""
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    validator.validate(document, validator.latest_version(), strict=True)


def test_the_manifest_starts_the_server_and_lets_it_drain():
    """Flags that `serve` does not take; a probe of a path that does not exist; a pod that is killed while it drains."""
    deployment, service = documents()
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    args = cli.parse(container["args"])
    assert args.command.name == "serve" and args.host == "0.0.0.0"
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= before + args.drain_timeout + 10
    assert args.request_timeout is None or args.request_timeout >= args.drain_timeout
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/health",
        "liveness": "/health",
        "readiness": "/ready",
    }
    assert container["ports"] == [{"name": "http", "containerPort": args.port}]
    assert {probe["port"] for probe in probes.values()} == {"http"} == {service["spec"]["ports"][0]["targetPort"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(args.data_parallel_size)
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert str(args.api_key_file).startswith(mounted["keys"]) and args.overrides["model.path"].startswith(
        mounted["models"]
    )


@pytest.mark.slow
def test_ray_serve_has_replicas_that_answer_like_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A recipe that was true of an earlier Ray, or of an earlier server."""
    ray = pytest.importorskip("ray", reason="pip install 'ee_tuning[ray]'")
    serve = pytest.importorskip("ray.serve", reason="pip install 'ee_tuning[ray]'")
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_USAGE_STATS_ENABLED", "0")):
        monkeypatch.setenv(name, value)
    examples = str(CHECKOUT / "examples")
    monkeypatch.syspath_prepend(examples)
    monkeypatch.setenv("PYTHONPATH", ":".join([examples, *sys.path]))  # for Ray's own processes
    import ray_serve

    exits = write_exits(MODEL, tmp_path / "heads", exit_layers=[4, 8], init="copy")
    told = {"model": str(MODEL), "exits": str(exits), "policy": "full", "replicas": "2", "cpus": "0.5"}
    (wanted,) = EarlyExitLLM.load(MODEL, exits).generate("def main(", policy="full", max_new_tokens=12)
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
    try:
        serve.start(http_options={"port": 8767})
        serve.run(ray_serve.app(told), route_prefix="/")
        body = json.dumps({"prompt": "def main(", "max_tokens": 12, "temperature": 0}).encode()
        asked = urllib.request.Request(
            "http://127.0.0.1:8767/v1/completions", body, {"Content-Type": "application/json"}
        )
        for _ in range(4):
            with urllib.request.urlopen(asked, timeout=120) as answer:
                assert json.load(answer)["choices"][0]["text"] == wanted.text
        (deployment,) = serve.status().applications["default"].deployments.values()
        assert deployment.replica_states == {"RUNNING": 2}
    finally:
        serve.shutdown()
        ray.shutdown()
