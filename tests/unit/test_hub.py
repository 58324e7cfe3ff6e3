"""The hub's models and tokenizers: what is read is fetched, and nothing else. A server on this machine stands in for
the hub.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from byte_tokenizer import write_byte_tokenizer
from random_models import random_llama

from ee_tuning.checkpoint import hub as hub_module
from ee_tuning.checkpoint.formats import model_folder, open_model
from ee_tuning.checkpoint.hub import hub_name
from ee_tuning.config import ModelSection, load_config
from ee_tuning.data.tokenizer import load_tokenizer, tokenizer_of
from ee_tuning.errors import InputError
from ee_tuning.storage.manifest import write_manifest

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BALLAST = (
    "pytorch_model.bin",
    "model.fp16.safetensors",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "original/params.json",
    "onnx/model.onnx",
    "README.md",
    "training.json",
    "model-q4.gguf",
    "fp16/model.safetensors",
    "tf_model.h5",
    "own.py",
    "notes.txt",
)


class Hub:
    """Folders of `root` as repositories, each at one commit; `fetched` are the names of files that went out, `asked`
    all paths.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.fetched, self.asked = root, list[str](), list[str]()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        Thread(target=lambda: self.server.serve_forever(poll_interval=0.01), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name: str, *more: str) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in more:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(file)
        return folder

    def names(self) -> set[str]:
        found, self.fetched[:] = set(self.fetched), []
        return found

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                if found := re.fullmatch(r"/api/models/(.+)/(revision|tree)/([^/]+)", path):
                    self.tell(*found.groups())
                elif (found := re.fullmatch(rf"/(.+)/resolve/({COMMIT}|main)/(.+)", path)) and (
                    hub.root / found[1] / found[3]
                ).is_file():
                    if self.command == "GET":
                        hub.fetched.append(found[3])
                    self.send(200, (hub.root / found[1] / found[3]).read_bytes())
                else:
                    self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

            do_HEAD = do_GET

            def tell(self, name: str, kind: str, revision: str) -> None:
                folder = hub.root / name
                if not folder.is_dir():
                    return self.send(401, b"", {"X-Error-Code": "RepoNotFound"})
                if revision not in ("main", "v1", COMMIT):
                    return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                tree = [
                    {
                        "type": "file",
                        "path": path.relative_to(folder).as_posix(),
                        "size": path.stat().st_size,
                        "oid": "0" * 40,
                    }
                    for path in files
                ]
                told = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": each["path"]} for each in tree]}
                self.send(200, json.dumps(told if kind == "revision" else tree).encode())

            def send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(code)
                for key, value in {
                    "Content-Length": str(len(body)),
                    "X-Repo-Commit": COMMIT,
                    "Content-Type": "application/json",
                    "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
                    **(headers or {}),
                }.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *words: Any) -> None:
                pass

        return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub(tmp_path / "hub")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name, value in (
        ("ENDPOINT", made.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ("HF_HUB_OFFLINE", False),
    ):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("ee_tuning.checkpoint.hub._COMMITS", {})
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_llama(folder, vocab_size=257, eos_token_id=256)
    write_byte_tokenizer(folder).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    return folder


TOKENIZER = {
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
}


@pytest.mark.parametrize("name", ["org/tiny", "tiny", "org/tiny@v1", f"org/tiny@{COMMIT}"])
def test_only_what_is_read_is_fetched(hub: Hub, model: Path, name: str) -> None:
    """Up to four times the bytes, for formats and precisions that nobody reads; a chat template that is left behind."""
    folder = hub.add(name.partition("@")[0], *BALLAST)
    shutil.copytree(model, folder, dirs_exist_ok=True)
    assert model_folder(name, needs_weights=False).name == COMMIT and hub.names() == {"config.json"}
    opened = open_model(ModelSection(path=name))
    assert opened.source.weight_files() == {"model.safetensors"}
    assert hub.names() == {"model.safetensors", "generation_config.json", "own.py", *TOKENIZER}
    hub.asked.clear()
    model_folder(name)
    load_tokenizer(name)
    assert not hub.asked, "of one commit, though the branch be moved meanwhile"


def test_of_shards_those_that_the_index_names_are_fetched(hub: Hub, model: Path) -> None:
    """Shards of another precision beside them; or an index without its shards."""
    from huggingface_hub import constants

    folder = hub.add(
        "org/sharded", *BALLAST, "model-00001-of-00002.fp16.safetensors", "model-00009-of-00009.safetensors"
    )
    shutil.copytree(model, folder, dirs_exist_ok=True)
    shutil.move(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors", "x": "../../etc/passwd"}})
    )
    found = model_folder("org/sharded")
    assert (found / "model-00001-of-00001.safetensors").is_file()
    assert {name for name in hub.names() if "safetensors" in name} == {
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    }
    hub.server.shutdown()
    hub_module._COMMITS.clear()
    constants.HF_HUB_OFFLINE = True  # the fixture puts it back
    assert model_folder("org/sharded") == found, "what was fetched is there without a network"


def test_one_file_is_fetched_where_both_are_there(hub: Hub, model: Path) -> None:
    """Shards of a model beside the whole of it in one file, which is what is read: twice the bytes."""
    folder = hub.add("org/both", "model-00001-of-00001.safetensors")
    shutil.copytree(model, folder, dirs_exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}})
    )
    model_folder("org/both")
    assert {name for name in hub.names() if name.endswith(".safetensors")} == {"model.safetensors"}


def test_an_export_is_fetched_with_all_that_its_manifest_lists(hub: Hub, model: Path) -> None:
    """A manifest whose files are missing, so that the model is refused as damaged."""
    folder = hub.add("org/export")
    shutil.copytree(model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("additional*"))
    (folder / "exit_heads.safetensors").write_text("exits")
    write_manifest(folder)
    hub.add("org/export", "notes.md")
    model_folder("org/export")
    assert hub.names() == {path.name for path in folder.iterdir()} - {"notes.md"}


def test_a_tokenizer_is_fetched_by_its_name(hub: Hub, model: Path, tmp_path: Path) -> None:
    """A model of gigabytes for a tokenizer; code that is fetched unasked, or not where it was trusted."""
    folder = hub.add("org/tok", *BALLAST)
    shutil.copytree(model, folder, dirs_exist_ok=True)
    tokenizer = load_tokenizer("org/tok@main")
    assert hub.names() == {"config.json", *TOKENIZER} and set(tokenizer.chat_template) == {"default", "tool_use"}
    load_tokenizer("org/tok", trusts_code=True)
    assert hub.names() == {"own.py"}
    assert tokenizer_of(load_config(None, {"model.path": "org/tok"})) == "org/tok"
    assert tokenizer_of(load_config(None, {"model.path": str(model)})) == str(model)
    hub.add("org/none", "config.json")
    hub.add("org/empty", "README.md")
    with pytest.raises(InputError, match="org/empty on the hub holds no file of a tokenizer"):
        load_tokenizer("org/empty")
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer("org/none")


def test_what_the_hub_does_not_have_is_told_in_one_line(hub: Hub, model: Path) -> None:
    """A page of HTTP for a misspelled name; weights in another form taken for missing ones."""
    hub.add("org/bin", "config.json", "pytorch_model.bin")
    hub.add("org/gguf", "model.gguf")
    for name, words in (
        ("org/nosuch", "no such model on the Hugging Face hub"),
        ("nosuch", "there is no folder nosuch"),
        ("org/bin@v9", "org/bin on the hub has no revision 'v9'"),
        ("org/bin", r"and holds pytorch_model\.bin; give a"),
        ("org/gguf", r"must hold a config\.json, and holds model\.gguf"),
    ):
        with pytest.raises(InputError, match=words) as error:
            model_folder(name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("gpt2", ("gpt2", None)),
        ("org/na.me-1", ("org/na.me-1", None)),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("name@v1.0", ("name", "v1.0")),
        ("./name", None),
        ("/org/name", None),
        ("a/b/c", None),
        ("org/name@", None),
        ("~/name", None),
        ("org/..", None),
        ("org/name@../x", None),
        ("", None),
    ],
)
def test_names_are_told_from_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, wanted: tuple[str, str | None] | None
) -> None:
    """A path that is sent over the network; a folder that is there, and fetched all the same."""
    monkeypatch.chdir(tmp_path)
    assert hub_name(text) == wanted
    if wanted and wanted[1] is None:
        (tmp_path / text).mkdir(parents=True)
        assert hub_name(text) is None
