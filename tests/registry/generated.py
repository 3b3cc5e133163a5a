"""Builds what the generator writes for registries of tests."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from kvsig import codegen
from kvsig.registry import Registry

CSRC = Path(codegen.__file__).parents[1] / "csrc/emulated"
BIND = """
def bind(int slot, size_t address, int variant):
    slots[slot].address = <void *>address
    slots[slot].variant = variant

"""


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "cc"))


def check_glue(table: Registry, version: int) -> None:
    """Let the compiler read the glue of an emulated runtime, with its warnings as errors."""
    done = subprocess.run(
        [*compiler(), "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only",
         "-I", str(CSRC), "-x", "c", "-"],
        input=codegen.emulated_glue(table, version), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def build(table: Registry, folder: Path, code: str = "", name: str = "generated_code") -> str:
    """Compile an extension of the generated Cython and some lines that use it; its name."""
    cython = pytest.importorskip("Cython.Build")
    del cython
    (folder / "generated.pxi").write_text(codegen.cython_text(table))
    source = folder / f"{name}.pyx"
    source.write_text(f'# cython: language_level=3\ninclude "generated.pxi"\n{BIND}{code}')
    subprocess.run(
        [sys.executable, "-m", "cython", source.name], cwd=folder, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    done = subprocess.run(
        [*compiler(), "-O0", "-w", "-shared", "-fPIC", "-I", sysconfig.get_path("include"),
         f"{name}.c", "-o", f"{name}.so"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return name


def load(folder: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
