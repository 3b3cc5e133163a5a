"""Files and functions that a reader can take in, and a tree without dead weight."""

from __future__ import annotations

import ast
import re

import pytest
from house.sources import CYTHON, ROOT, tracked

MOST_FUNCTION_LINES = 100
MOST_FILE_LINES = 1300
MOST_TREE_BYTES = 3_000_000
C = (".c", ".h", ".cu")
#: Lines that a room may have, for its reader's sake, and a tenth more; declarations (.pxd, .pyi) do
#: not count. Rooms that are above theirs are not here.
BUDGETS = {
    "_core.pyx": 1200,
    "call.py": 350,
    "check/": 1500,
    "integrations/vllm.py": 250,
    "kernel.py": 250,
    "tools/ cli/": 2500,
}


def python_functions(text: str) -> dict[str, int]:
    """Lines of each function of a Python file."""
    return {
        f"{node.name}, line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def cython_functions(text: str) -> dict[str, int]:
    """Lines of each function of a Cython file: up to the next line that is not deeper."""
    lines = text.splitlines()
    found = {}
    for start, line in enumerate(lines):
        head = re.match(r"(\s*)(?:def|cp?def)\s[^=]*?(\w+)\(", line)
        if head is None or "class" in line.split()[:2]:
            continue
        end = last = start + 1
        while end < len(lines):
            depth = len(lines[end]) - len(lines[end].lstrip())
            closing = lines[end].lstrip().startswith(")")
            if lines[end].strip() and depth <= len(head[1]) and not closing:
                break
            end += 1
            last = end if lines[end - 1].strip() else last
        found[f"{head[2]}, line {start + 1}"] = last - start
    return found


def c_functions(text: str) -> dict[str, int]:
    """Lines of each block of a C file that begins and ends in the first column."""
    found, start = {}, None
    for number, line in enumerate(text.splitlines(), 1):
        if start is None and (line == "{" or re.match(r"\w.*\)\s*\{$", line)):
            start = number
        elif start is not None and line.startswith("}"):
            found[f"line {start}"] = number - start + 1
            start = None
    return found


def test_no_function_is_long():
    long = []
    for file in tracked():
        if file.suffix in (".py", *CYTHON, *C):
            text = file.read_text(encoding="utf-8")
            read = python_functions if file.suffix == ".py" else cython_functions
            functions = c_functions(text) if file.suffix in C else read(text)
            long += [f"{file.name}: {name}: {count}" for name, count in functions.items()
                     if count > MOST_FUNCTION_LINES]  # fmt: skip
    assert long == []


def test_no_file_is_long():
    lengths = {
        file.name: len(file.read_text(encoding="utf-8").splitlines())
        for file in tracked()
        if file.suffix in (".py", *CYTHON, *C)
    }
    assert {name: n for name, n in lengths.items() if n > MOST_FILE_LINES} == {}


@pytest.mark.parametrize("room", BUDGETS)
def test_rooms_keep_to_their_budgets(room):
    package = ROOT / "kvsig"
    inside = {
        file.relative_to(package).as_posix(): file
        for file in tracked()
        if file.is_relative_to(package) and file.suffix in (".py", ".pyx")
    }
    lines = {
        name: len(file.read_text(encoding="utf-8").splitlines())
        for name, file in inside.items()
        if (name.startswith(tuple(room.split())) if room[-1] == "/" else name == room)
    }
    assert lines and sum(lines.values()) <= 1.1 * BUDGETS[room], lines


def test_the_tree_is_small():
    assert sum(file.stat().st_size for file in tracked()) < MOST_TREE_BYTES


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        (python_functions, "def f():\n{body}    return 1\n\n\nx = 1\n"),
        (cython_functions, "cdef int f(\n    int x,\n) except -1:\n{body}\ncdef int x\n"),
        (cython_functions, "cdef class A:\n    cpdef int f(self):\n{body}        return 1\n"),
        (c_functions, "static int f(void)\n{{\n{body}}}\n\nint x;\n"),
        (c_functions, "int f(void) {{\n{body}}}\n\nint x;\n"),
    ],
)
def test_lengths_are_measured(measure, text):
    """A function that is 40 lines longer is found to be so."""
    line = "        x = 1\n" if "class" in text else "    x = 1\n"
    (short,) = measure(text.format(body=line)).values()
    (long,) = measure(text.format(body=line * 41)).values()
    assert long == short + 40 and short < 8
