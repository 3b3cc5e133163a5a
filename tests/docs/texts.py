"""The texts of errors and warnings in kvsig's sources, and those that troubleshooting.md has not.

    python tests/docs/texts.py     print those that have no entry

A text is what stands in the call of an exception or of ``warnings.warn``; what is formatted into it
is shown as ``...``.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
#: Rooms whose texts a user of the library or of the command line can meet.
SOURCES = sorted([*(ROOT / "kvsig").rglob("*.py"), *(ROOT / "kvsig").rglob("*.pyx")])
_CALLS = re.compile(
    r"\b(?:[A-Za-z]*(?:Error|Warning)|warnings\.(?:warn|append)|fail|_Bad|super\(\)\.__init__)\("
)


class Text(NamedTuple):
    """One text, and where it is."""

    place: str
    text: str


def text_of(node: ast.expr) -> str:
    """Return a text with ``...`` for what is formatted into it."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "..."
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return "..."


def call_at(source: str, start: int, opening: int) -> ast.Call | None:
    """Parse the call from its name to the end of the parenthesis; None where it is no Python."""
    reader = io.StringIO(source[start:]).readline
    depth, lines = 0, source[start:].splitlines(keepends=True)
    try:
        for token in tokenize.generate_tokens(reader):
            if token.type != tokenize.OP or token.start < (1, opening - start):
                continue
            depth += (token.string in "([{") - (token.string in ")]}")
            if depth == 0 and token.string == ")":
                row, column = token.end
                text = "".join(lines[: row - 1]) + lines[row - 1][:column]
                tree = ast.parse(text.strip(), mode="eval").body
                return tree if isinstance(tree, ast.Call) else None
    except (tokenize.TokenError, SyntaxError, IndentationError):
        return None
    return None


def texts() -> Iterator[Text]:
    """Return every text of the sources that says anything."""
    for path in SOURCES:
        source = path.read_text()
        for match in _CALLS.finditer(source):
            line = source.count("\n", 0, match.start()) + 1
            before = source[source.rfind("\n", 0, match.start()) + 1 : match.start()]
            if before.lstrip().startswith(("class ", "def ", "#", "except")):
                continue
            call = call_at(source, match.start(), match.end() - 1)
            for argument in call.args if call else []:
                text = re.sub(r"(\.\.\.)+", "...", " ".join(text_of(argument).split()))
                if len(re.findall(r"[a-z]{2,}", text)) >= 2:  # more than a formatted value
                    yield Text(f"{path.relative_to(ROOT)}:{line}", text)


def entries() -> list[str]:
    """Return the texts of the page: the code spans that its rows begin with."""
    rows = re.findall(r"^\| (`+ ?.+? ?`+(?:, `+ ?.+? ?`+)*) \|", PAGE.read_text(), re.MULTILINE)
    found = [span for row in rows for span in re.findall(r"(?:``|`) ?(.+?) ?(?:``|`)(?!`)", row)]
    return [entry.replace("\\|", "|") for entry in found]


def matches(entry: str, text: str) -> bool:
    """Whether an entry is about a text: its words are in it, ``...`` stands for anything."""
    parts = [re.escape(part.strip()) for part in entry.split("...") if part.strip()]
    return re.search(".*".join(parts), text) is not None


def without_entry() -> list[Text]:
    """Return the texts that no entry of the page is about."""
    known = entries()
    return [text for text in texts() if not any(matches(entry, text.text) for entry in known)]


def without_text() -> list[str]:
    """Return the entries that are about no text of the sources."""
    found = [text.text for text in texts()]
    return [entry for entry in entries() if not any(matches(entry, text) for text in found)]


if __name__ == "__main__":
    for text in without_entry():
        print(f"{text.place}: {text.text}")
    for entry in without_text():
        print(f"no such text any more: {entry}")
    sys.exit(bool(without_entry() or without_text()))
