"""Every code block of README.md and the pages does what it seems to."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import DOCS, PAGES, ROOT, blocks, name

import kvsig
from kvsig.cli import build_parser

PYTHON = [page for page in PAGES if blocks(page.read_text(), "python")]
#: What the code of these pages runs inside of.
ENGINES = {"sglang.md": {"sglang"}, "vllm.md": {"vllm"}, "lmcache.md": {"lmcache"}}
#: Which files have the quickstart, word for word; it is run as it stands, by itself.
QUICKSTART = [ROOT / "README.md", DOCS / "quickstart.md"]


def quickstart() -> str:
    text = (ROOT / "examples" / "quickstart.py").read_text()
    return text.partition('"""\n\n')[2]


@pytest.mark.parametrize("page", QUICKSTART, ids=name)
def test_quickstart_is_the_same_everywhere(page: Path) -> None:
    assert blocks(page.read_text(), "python")[0] == quickstart()


def test_quickstart_runs_as_it_stands(tmp_path: Path) -> None:
    """In a process of its own, without a variable of kvsig's, on whatever this machine has."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("KVSIG_")}
    clean["PYTHONPATH"] = str(Path(kvsig.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", quickstart()],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report(") == 2
    assert done.stdout.endswith("the same bytes\n")
    assert done.stderr == ""


def small_cache(names: dict[str, object]) -> None:
    """What examples of a few lines begin with: a cache, page numbers, and a stream."""
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    kv = torch.zeros(2, 4, 256, 2, 64, dtype=torch.bfloat16, device=device)
    pool = torch.zeros(2, 16, 4, 16, 2, 64, dtype=torch.bfloat16, pin_memory=gpu)
    names["kv"], names["pool"] = kv, pool
    names["cache"] = kvsig.PagedKVCache(device=(list(kv[0]), list(kv[1])), host=pool)
    names["device_pages"], names["host_pages"] = np.arange(8), np.arange(8)[::-1]
    names["stream"] = torch.cuda.Stream() if gpu else kvsig.emulated.Stream()


@pytest.mark.parametrize("page", PYTHON, ids=name)
def test_python_blocks_run(page: Path, emulated_runtime, capsys, monkeypatch, tmp_path) -> None:
    """In the order of the page, which may build on a cache, page numbers and a stream."""
    if not torch.cuda.is_available():
        emulated_runtime("13.0")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"kvsig": kvsig, "torch": torch, "np": np}
    small_cache(names)
    for code in blocks(page.read_text(), "python"):
        if code == quickstart():
            continue
        for module in imported(code) | ENGINES.get(page.name, set()):
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed")
        exec(compile(code, name(page), "exec"), names)
    names["stream"].synchronize()


def imported(code: str) -> set[str]:
    """Return the top names of the modules that some code imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def commands() -> list[tuple[str, list[str]]]:
    """Return every command of the pages' shell blocks, its variables and comments left out."""
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(), "(?:sh|bash|console)"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    found.append((name(page), words))
    return found


COMMANDS = commands()


def test_kvsig_commands_have_arguments_that_are_known() -> None:
    own = []
    for page, words in COMMANDS:
        if words[0].endswith("kvsig"):
            own.append((page, words[1:]))
        elif words[1:3] == ["-m", "kvsig"]:
            own.append((page, words[3:]))
    for page, words in own:
        try:
            build_parser().parse_args(words)
        except SystemExit as end:
            assert end.code in (0, None), f"{page}: kvsig {shlex.join(words)}"


def test_make_commands_are_targets() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page, words in COMMANDS:
        if words[0] == "make":
            asked = [word for word in words[1:] if "=" not in word]
            assert set(asked) <= set(targets), page
    listed = re.findall(r"^# make (\w+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(targets) - {"clean", "distclean"} <= set(listed)


def test_scripts_of_commands_are_there() -> None:
    scripts = [(p, w) for p, words in COMMANDS for w in words if re.fullmatch(r"[\w/.-]+\.py", w)]
    assert [pair for pair in scripts if not (ROOT / pair[1]).is_file()] == []
