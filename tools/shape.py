"""Prints where the package has grown out of shape: long files, long functions, folders of many files.

    python tools/shape.py [FOLDER]

The limits are advice. The exit code is 0 unless FOLDER is missing.
"""

import ast
import sys
from collections import Counter
from pathlib import Path

FILE_LINES, FUNCTION_LINES, FOLDER_FILES = 350, 50, 20


def long_functions(path: Path) -> list[tuple[int, str]]:
    """Returns (lines, "FILE:LINE NAME") of each function of `path` that is longer than a screen."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [((node.end_lineno or node.lineno) - node.lineno + 1, node) for node in functions]
    return [(lines, f"{path}:{node.lineno} {node.name}") for lines, node in lengths if lines > FUNCTION_LINES]


def main(folder: Path) -> int:
    if not folder.is_dir():
        print(f"{folder} is not a folder", file=sys.stderr)
        return 2
    paths = sorted(folder.rglob("*.py"))
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in paths}
    print(f"{len(paths)} files, {sum(lengths.values()):,} lines")
    for path, lines in sorted(lengths.items(), key=lambda each: -each[1]):
        if lines > FILE_LINES:
            print(f"{lines:5} lines in {path}")
    for lines, place in sorted((each for path in paths for each in long_functions(path)), reverse=True):
        print(f"{lines:5} lines in the function {place}")
    for room, count in Counter(path.parent for path in paths).most_common():
        if count > FOLDER_FILES:
            print(f"{count:5} files in {room}/")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "ee_tuning")))
