"""Runs the command line as a user runs it, for the tests of several rooms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kvsig import registry
from kvsig.tools import runtimes

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = [
    (registry.format_version(variant.since), len(variant.params))
    for variant in registry.load().functions[runtimes.BATCH].variants
]
SMALL = ("--tokens", "64", "--page-size", "8")


def environment(cudart: str | None) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("KVSIG_")}
    if cudart is not None:
        env["KVSIG_CUDART"] = cudart
    return env | {"COLUMNS": "100"}


def kvsig_command(
    *args: str, cudart: str | None = "emulated:12.9"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvsig", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(cudart),
        timeout=300,
    )
