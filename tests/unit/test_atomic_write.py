"""What is written aside: whole or not at all, and no litter."""

import os
from pathlib import Path

import pytest

from ee_tuning.errors import InputError
from ee_tuning.storage import atomic_write
from ee_tuning.storage.atomic_write import atomic_file, atomic_folder, check_file, exchange, remove_leftovers
from ee_tuning.storage.owner import owned
from ee_tuning.training_log.metrics import MetricsFile


def test_a_writer_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    """Each killed save leaves its gigabytes for ever; or a name that only looks alike is taken for one of them."""
    strangers = [
        "out.partial-0123abcg",
        "out.partial-0123abcd0",
        "other.partial-0123abcd",
        "out.partial",
        "xout.partial-0123abcd",
        "o",
    ]
    for name in ("out.partial-0123abcd", "out.partial-89efabcd", *strangers):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    with atomic_folder(tmp_path / "out", None) as partial:
        (partial / "weights").touch()
        assert {path.name for path in tmp_path.iterdir()} == {*strangers, partial.name}
    assert {path.name for path in tmp_path.iterdir()} == {*strangers, "out"}


def test_what_another_process_still_writes_is_no_leftover(tmp_path: Path) -> None:
    """Two jobs that write one output: the second one's cleaning takes the first one's files from under its hands."""
    output = tmp_path / "out"
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with atomic_folder(output, None) as partial:
            (partial / "first").touch()
            os.write(ready[1], b"!")
            os.read(go[0], 1)
            (partial / "second").touch()
        os._exit(0)
    os.read(ready[0], 1)
    with atomic_folder(output, None) as partial:
        (partial / "other").touch()
    assert [path.name for path in output.iterdir()] == ["other"]
    os.write(go[1], b"!")
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(path.name for path in output.iterdir()) == ["first", "second"] and list(tmp_path.iterdir()) == [
        output
    ]


@pytest.mark.parametrize("is_atomic", [True, False])
def test_a_replaced_folder_is_there_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_atomic: bool
) -> None:
    """A job killed between two renames leaves no output at all; where there is no other way, the next writer brings it
    back.
    """
    old, new = tmp_path / "out", tmp_path / "out.partial-0123abcd"
    for folder in (old, new):
        folder.mkdir()
        (folder / folder.name).touch()
    if not is_atomic:
        monkeypatch.setattr(atomic_write, "_renameat2", lambda *_: False)
        real = Path.rename

        def killed(path: Path, target: Path) -> Path:
            if path == new:
                raise KeyboardInterrupt
            return real(path, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", killed)
            exchange(new, old)
        remove_leftovers(tmp_path / "another")
        assert not old.exists()
        remove_leftovers(old)
        assert [path.name for path in tmp_path.iterdir()] == ["out"] and (old / "out").exists()
        new.mkdir()
        (new / new.name).touch()
    exchange(new, old)
    assert (old / new.name).exists() and (new / old.name).exists() and len(list(tmp_path.iterdir())) == 2


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """A job that fails while it writes config.yaml leaves half of it in place of the good one."""
    file = tmp_path / "config.yaml"
    (tmp_path / "config.yaml.partial-0123abcd").touch()
    for content in ("first", "second"):
        with atomic_file(file) as partial:
            partial.write_text(content)
        assert file.read_text() == content
    with pytest.raises(RuntimeError), atomic_file(file) as partial:
        partial.write_text("thi")
        raise RuntimeError
    with pytest.raises(InputError, match=r"config\.yaml can not be written"), atomic_file(file):
        raise OSError(28, "No space left on device")
    assert file.read_text() == "second" and list(tmp_path.iterdir()) == [file]


def test_resuming_never_cuts_the_metrics_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed while it resumes loses the records of all its steps."""
    file = tmp_path / "metrics.jsonl"
    lines = [
        f'{{"kind": "{kind}", "step": {step}}}\n'
        for kind, step in (("train", 1), ("train", 2), ("validation", 2), ("train", 3))
    ]
    file.write_text("".join(lines) + '{"kind": "tra')

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        MetricsFile(file, resume_after=2)
    assert file.read_text().startswith("".join(lines))
    MetricsFile(file, resume_after=2).close()
    assert file.read_text() == "".join(lines[:3]) and list(tmp_path.iterdir()) == [file]


def test_a_file_behind_a_link_is_replaced_and_a_device_is_not(tmp_path):
    """A link that becomes a file of its own, while what others read through it stays as it was; /dev/null replaced by a
    picture.
    """
    (tmp_path / "disk").mkdir()
    file, link = tmp_path / "disk" / "file", tmp_path / "link"
    file.write_text("old")
    link.symlink_to(file)
    with atomic_file(link) as aside:
        aside.write_text("new")
        assert file.read_text() == "old"
    assert link.is_symlink() and file.read_text() == "new" and [path.name for path in file.parent.iterdir()] == ["file"]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with atomic_file(pipe) as aside:
        assert aside == pipe
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "pipe"]


def test_where_no_file_can_be_is_told_before_the_work(tmp_path):
    """Minutes of measuring whose result has no place."""
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "x"):
        with pytest.raises(InputError, match="--output must name a file"):
            check_file(path)
    check_file(tmp_path / "new" / "folder" / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("is_there", [True, False])
def test_an_output_that_is_a_link_stays_one(tmp_path: Path, is_there: bool) -> None:
    """A link to a large disk becomes a folder on the small one that it stands on."""
    disk, link = tmp_path / "disk" / "out", tmp_path / "home" / "out"
    for folder in (disk.parent, link.parent, *([disk] if is_there else [])):
        folder.mkdir()
    link.symlink_to(disk)
    with owned(link, None), atomic_folder(link, None) as partial:
        (partial / "weights").touch()
        assert partial.parent == disk.parent
    with atomic_file(link / "notes") as file:
        file.write_text("one")
    (link.parent / "notes").symlink_to(disk / "notes")
    with atomic_file(link.parent / "notes") as file:
        file.write_text("two")
    assert link.is_symlink() and (disk / "notes").read_text() == "two" and (link.parent / "notes").is_symlink()
    assert (
        sorted(path.name for path in disk.iterdir()) == ["notes", "weights"] and len(list(link.parent.iterdir())) == 2
    )


@pytest.mark.parametrize(
    ("output", "words"), [(".", "runs in"), ("..", "runs in"), ("/", "runs in"), ("/dev/null", "is a device")]
)
def test_what_can_not_be_replaced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, words: str
) -> None:
    """A traceback; a shell that is left in a folder which is gone, the export in another of its name; a device that
    becomes a file.
    """
    monkeypatch.chdir(tmp_path)
    for write in (lambda path: owned(path, None), lambda path: atomic_folder(path, None)):
        with pytest.raises(InputError, match=words), write(Path(output)):
            pass
    assert not list(tmp_path.iterdir())
