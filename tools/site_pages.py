"""Hook of mkdocs: pages of the site that lie outside docs/, and links between files of the repository.

The same Markdown is read on a code host, where links lead to files, and on the site, where some of these files are
pages and the others are not there. A link to a page becomes a link to that page; a link to any other file of the
repository becomes the file's path. A link to nothing stays, and `mkdocs build --strict` refuses it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "examples/tasks/README.md": "facts.md",
}
"""Files of the repository outside docs/ that are pages -> their place on the site."""
_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)\s]+)\)")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Adds the pages outside docs/."""
    from mkdocs.structure.files import File

    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns the page with links of the site."""
    place = page.file.src_uri
    sources = {page: source for source, page in PAGES.items()}
    return with_links(markdown, sources.get(place, f"docs/{place}"))


def with_links(markdown: str, source: str) -> str:
    """Returns `markdown` of the repository's file `source`, with links of the site."""
    return _LINK.sub(lambda match: _link(match["text"], match["target"], source), markdown)


def _link(text: str, target: str, source: str) -> str:
    path, hash_sign, anchor = target.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return f"{text}({target})"
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if file in PAGES:
        return f"{text}({PAGES[file]}{hash_sign}{anchor})"
    if file.startswith("docs/"):
        return f"{text}({file.removeprefix('docs/')}{hash_sign}{anchor})"
    if (ROOT / file).exists():
        words = text[1:-1]
        return words if words.strip("`") == file else f"{words} (`{file}`)"
    return f"{text}({target})"
