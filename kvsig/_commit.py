"""The commit that results are of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["commit"]


def commit() -> str | None:
    """Name the commit that kvsig runs from, with ``-dirty`` behind a changed one.

    ``KVSIG_COMMIT`` says it where the code is a copy, and no checkout of its own.
    """
    said = os.environ.get("KVSIG_COMMIT")
    if said:
        return said
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
