"""The page of known failures, made from the tests: ``python tests/known_failures.py``.

``known_failures.toml`` has the words, and tests name the failures that they prove by
``@pytest.mark.known_failure("key")``. The page is ``docs/known-failures.md``; a test compares it.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs/known-failures.md"
WORDS = TESTS / "known_failures.toml"
COLUMNS = {"section", "failure", "threads", "engines", "kvsig"}

HEAD = """\
# Known failures

What went wrong with batched copies of KV pages and around them, in engines and in kvsig itself,
and the test that shows that it does not here. The page is made from the tests: each failure is
named by the tests that prove it (`pytest -m known_failure` runs them), on the emulated runtime or
on NVIDIA's libraries, without a GPU. *Engines* says what was read in the sources of SGLang, vLLM,
LMCache and others; a dash where nothing is known, or where the failure was kvsig's own.
"""


def rows() -> dict[str, dict[str, object]]:
    """The words of each failure, by its key."""
    with WORDS.open("rb") as file:
        found: dict[str, dict[str, object]] = tomllib.load(file)
    return found


def keys_of(node: ast.FunctionDef) -> list[str]:
    """Keys that a test is marked with."""
    keys = []
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith(
            ".known_failure"
        ):
            keys += [ast.literal_eval(argument) for argument in decorator.args]
    return keys


def proofs() -> dict[str, list[str]]:
    """The tests that prove each failure, by its key."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                for key in keys_of(node):
                    name = f"{path.relative_to(TESTS.parent).as_posix()}::{node.name}"
                    found.setdefault(key, []).append(name)
    return found


def thread(name: str) -> str:
    """A thread as a link."""
    where = re.fullmatch(r"([\w.-]+/([\w.-]+))/issues/(\d+)", name)
    if where is None:
        raise ValueError(f"{name} is no thread: owner/name/issues/number")
    return f"[{where[2]} {where[3]}](https://github.com/{name})"


def page() -> str:
    """The text of the page."""
    words, tests = rows(), proofs()
    lines, section = [HEAD], ""
    for key, row in words.items():
        if row["section"] != section:
            section = str(row["section"])
            lines += [f"## {section}\n", "| failure | threads | engines | kvsig | shown by |",
                      "|---|---|---|---|---|"]  # fmt: skip
        threads = row.get("threads", [])
        assert isinstance(threads, list)
        cells = [
            row["failure"],
            ", ".join(map(thread, threads)) or "–",
            row.get("engines", "–"),
            row["kvsig"],
            ", ".join(f"`{name}`" for name in tests.get(key, [])),
        ]
        lines.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |")
        if key == list(words)[-1] or words[after(words, key)]["section"] != section:
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def after(words: dict[str, dict[str, object]], key: str) -> str:
    """The key behind another."""
    keys = list(words)
    return keys[keys.index(key) + 1]


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(rows())} failures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
