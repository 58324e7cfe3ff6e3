"""Who may import whom. The imports are read from the sources, those inside functions included."""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import nodes

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ee_tuning"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

LEVELS: tuple[tuple[str, ...], ...] = (
    ("foreign_content",),
    (
        "differences",
        "errors",
        "interrupts",
        "json_file",
        "line_file",
        "notices",
        "openmp",
        "questions",
        "standard_streams",
        "text_table",
        "utf8",
        "yaml_file",
        "cache_folder",
    ),
    ("kernel", "config", "progress", "command_steps"),
    ("parallel",),
    ("storage",),
    ("pictures", "model_config"),
    ("model",),
    ("decoding", "losses"),
    ("checkpoint",),
    ("artifact",),
    ("data",),
    ("sampling", "training_log"),
    ("engine",),
    ("tuning", "generation"),
    ("export",),
    ("evaluation", "planning"),
    ("calibration", "public_benchmarks", "demo", "pruning"),
    ("comparison",),
    ("openai_protocol",),
    ("serving",),
    ("flags",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""A room imports from the levels above its own line in this table, and from itself; never from a room on the same
level.
"""

MEGATRON = ("parallel/", "model/", "model_config/", "data/", "checkpoint/megatron", "tuning/state.py")
"""Where megatron.core may be imported: few places, for it changes."""

TORCH_ALONE = ("checkpoint/names.py", "losses/loss.py", "sampling/sampling.py")
"""Mathematics that is read, tested and reused without the rest."""


def sources() -> dict[str, Path]:
    """Module name -> file, for every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports. Relative imports are not used in this package."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} imports relatively"
            for alias in node.names:  # `from package import module` imports the module
                full = f"{node.module}.{alias.name}"
                yield full if full in SOURCES else node.module


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


@functools.cache
def graph() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports. The front door, `ee_tuning` itself, is left out: it resolves
    lazily.
    """
    return {
        module: {name for name in imports(path) if name in SOURCES and name != "ee_tuning"}
        for module, path in SOURCES.items()
        if module != "ee_tuning"
    }


def level(name: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if name in names)


def test_every_room_has_its_place():
    """A new room outside the table would be guarded by nothing."""
    unplaced = {room(module) for module in SOURCES} - {name for names in LEVELS for name in names} - {"__init__"}
    assert not unplaced, f"give {unplaced} a level in LEVELS"


def test_imports_go_one_way():
    """tuning that leans on generation, or a model that knows its checkpoints, can no longer be changed alone."""
    wrong = [
        f"{module} may not import {name}"
        for module, names in graph().items()
        for name in names
        if room(name) != room(module) and level(room(name)) >= level(room(module))
    ]
    assert not wrong, wrong


def test_there_are_no_circles():
    """Within a room the levels do not say who comes first; two modules that need each other are one."""
    edges, state = graph(), dict[str, str]()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert state.get(module) != "open", f"a circle: {' -> '.join((*way, module))}"
        if module not in state:
            state[module] = "open"
            for other in sorted(edges[module]):
                visit(other, (*way, module))
            state[module] = "done"

    for module in edges:
        visit(module, ())


def test_the_front_door_opens_lazily():
    """`import ee_tuning` that imports torch makes `ee-tuning --help` take seconds; only the version is for use
    inside.
    """
    tree = ast.parse(SOURCES["ee_tuning"].read_text())
    assert all(node.module == "typing" for node in tree.body if isinstance(node, ast.ImportFrom))
    for module, path in SOURCES.items():
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and node.module == "ee_tuning":
                names = {alias.name for alias in node.names if f"ee_tuning.{alias.name}" not in SOURCES}
                assert names <= {"__version__"}, f"{module} imports {names} through the front door"


def test_megatron_stays_in_its_places():
    """Each place that touches megatron.core is one more to mend when it changes."""
    for path in SOURCES.values():
        file = path.relative_to(PACKAGE).as_posix()
        if any(name.split(".")[0] == "megatron" for name in imports(path)):
            assert file.startswith(MEGATRON), f"{file} imports megatron.core; allowed in {MEGATRON}"


def test_megatron_s_import_compiles_nothing():
    """An import of Megatron-core outside `importing_megatron` makes every process wait for torch's compiler."""
    num_guarded = 0
    for path in SOURCES.values():
        guarded = {
            id(node)
            for block in nodes(path)
            if isinstance(block, ast.With) and "importing_megatron" in ast.dump(block.items[0])
            for node in ast.walk(block)
        }
        for node in nodes(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.split(".")[0] == "megatron" for name in names):
                assert id(node) in guarded, f"{path}:{node.lineno} imports megatron.core outside importing_megatron()"
                num_guarded += 1
    assert num_guarded > 5


@pytest.mark.parametrize("file", TORCH_ALONE)
def test_mathematics_needs_torch_alone(file: str):
    """A loss that pulls in Megatron through a helper can not be tested in a bare Python."""
    waiting, seen, foreign = [PACKAGE / file], set[Path](), set[str]()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for name in imports(path):
            if name in SOURCES:
                waiting += [SOURCES[name]] if SOURCES[name] not in seen else []
            elif name.split(".")[0] not in sys.stdlib_module_names:
                foreign.add(name.split(".")[0])
    allowed = {"torch", "yaml"}  # yaml is config.py's, which every module may name types of
    assert foreign <= allowed, f"{file} reaches {foreign - allowed}"


def test_the_page_names_what_there_is():
    """A page about files that were renamed, which sends its reader to nothing."""
    named = set(re.findall(r"`([^` ]+)`", PAGE))
    paths = {name for name in named if "/" in name or name.endswith((".py", ".h"))}
    assert len(paths) > 40
    engine = PACKAGE / "engine"
    gone = {name for name in paths if not any((folder / name).exists() for folder in (ROOT, PACKAGE, engine))}
    assert not gone, f"docs/architecture.md names {sorted(gone)}, which do not exist"
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES.values())
    words = {word for name in named - paths for word in re.findall(r"\w+", name)}
    unknown = {word for word in words if not re.search(rf"\b{word}\b", text)}
    assert not unknown, f"docs/architecture.md names {sorted(unknown)}, which no source has"


def test_the_page_prints_the_calls_of_a_step():
    """A step that is told by calls which the engine does not make."""
    told = re.findall(r"[\w.]+", PAGE.split("```")[1])
    (step,) = (
        node
        for node in nodes(SOURCES["ee_tuning.engine.engine"])
        if isinstance(node, ast.FunctionDef) and node.name == "step"
    )
    calls = sorted((node for node in ast.walk(step) if isinstance(node, ast.Call)), key=lambda node: node.lineno)
    last_line = {ast.unparse(call.func).removeprefix("self."): call.lineno for call in calls}
    assert len(told) > 3 and set(told) <= set(last_line)
    assert told == sorted(told, key=lambda name: last_line[name]), "in another order"


def test_the_page_lists_the_folders_in_the_order_of_imports():
    """A table without a folder, or one that says the opposite of the imports."""
    listed = re.findall(r"^\| `(\w+)/` \|", PAGE, re.MULTILINE)
    assert sorted(listed) == sorted({room(module) for module in SOURCES if (PACKAGE / room(module)).is_dir()})
    place = {name: index for index, name in enumerate(listed)}
    wrong = {
        f"{room(module)}/ imports {room(name)}/"
        for module, names in graph().items()
        for name in names
        if place.get(room(name), -1) > place.get(room(module), len(listed))
    }
    assert not wrong, wrong
