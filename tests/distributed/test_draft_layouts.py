"""One exit as a plain model, written by several processes."""

from pathlib import Path

import pytest
from exits import write_exits
from world import World

from ee_tuning import config as job
from ee_tuning.config import Config
from ee_tuning.export.export_draft import PlainFormat, export_draft
from ee_tuning.parallel.topology import init_parallel

EXITS = {2: "norm", 3: "mlp", 4: "layer"}


def write(config: Config, folder: str) -> None:
    topology = init_parallel(config.parallel)
    for layer, architecture in EXITS.items():
        for kind in ("draft", "pruned"):
            export_draft(config, Path(folder) / f"{kind}_{architecture}", layer, topology, kind=kind)


@pytest.fixture(scope="module")
def written(model: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of each exit and format in alone/, by one process, and in four/, at TP 2 × PP 2."""
    folder = tmp_path_factory.mktemp("written")
    exits = write_exits(model, folder / "exits", exit_layers=list(EXITS), architecture=",".join(EXITS.values()))
    config = job.replace(Config(), model={"path": str(model)}, exits={"path": str(exits)})
    for name in ("alone", "four"):
        (folder / name).mkdir()
    write(config, str(folder / "alone"))
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    world.run(write, job.replace(config, parallel=layout), str(folder / "four"))
    return folder


@pytest.mark.parametrize("kind", ["draft", "pruned"])
@pytest.mark.parametrize("architecture", EXITS.values())
def test_four_processes_write_the_bytes_of_one(written: Path, architecture: str, kind: PlainFormat) -> None:
    """A tensor that a rank writes as its shard, twice or not at all; a card or manifest that depends on who wrote."""
    alone, four = (
        {path.name: path.read_bytes() for path in (written / name / f"{kind}_{architecture}").iterdir()}
        for name in ("alone", "four")
    )
    assert {"config.json", "manifest.json", "model.safetensors", "README.md"} <= alone.keys()
    assert alone == four
