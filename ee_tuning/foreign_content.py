"""Recognizes files whose content differs from what their name says, as an explanation for a broken header."""

from pathlib import Path

GIT_LFS = b"version https://git-lfs.github.com"
"""The beginning of a Git LFS pointer."""
_BEGINNINGS = (
    (GIT_LFS, "is a pointer of Git LFS and not the file itself; run `git lfs pull` in its folder"),
    (b"GGUF", "is a GGUF file (llama.cpp's) whatever its name; give it one that ends in .gguf"),
    (
        b"PK\x03\x04",
        "is a file of torch.save, and no safetensors file, whatever its name; load the model by transformers and save it "
        "(save_pretrained)",
    ),
    (b"\x89HDF", "is an HDF5 file, and no safetensors file; give the model as safetensors"),
    (
        b"<!doctype html",
        "is a web page and not the file itself; fetch it again, and log in first where it asks for that",
    ),
    (b"<html", "is a web page and not the file itself; fetch it again, and log in first where it asks for that"),
)


def describe_content(path: Path) -> str | None:
    """Returns a description of the content, with advice, if the first bytes identify something else; None otherwise."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            head = file.read(64).lstrip()
    except (OSError, ValueError):
        return None
    return next(
        (description for beginning, description in _BEGINNINGS if head[: len(beginning)].lower() == beginning.lower()),
        None,
    )
