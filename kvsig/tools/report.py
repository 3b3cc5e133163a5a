"""What every tool says and writes alike: sizes, times, tables, progress, provenance, files.

Standard library only, so that the command line can print its help without torch.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "Progress",
    "bytes_text",
    "columns",
    "count_text",
    "provenance",
    "source_text",
    "spread",
    "table",
    "time_text",
    "versions",
    "wrap",
    "write_json",
]

#: Sentences are not written wider than this, however wide the terminal is.
WIDEST = 100


# --- Numbers -----------------------------------------------------------------------------------


def bytes_text(count: int) -> str:
    """Write a number of bytes: ``"512 B"``, ``"1.5 MiB"``."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"


def count_text(count: int, noun: str) -> str:
    """Write a number of things: ``"1 page"``, ``"2,048 pages"``, ``"2 copies"``."""
    if count != 1:
        noun = noun.removesuffix("y") + "ies" if noun.endswith("py") else noun + "s"
    return f"{count:,} {noun}"


def time_text(microseconds: float) -> str:
    """Write a time: ``"3.2 µs"``, ``"1.25 ms"``."""
    if microseconds < 1000:
        return f"{microseconds:.3g} µs"
    return f"{microseconds / 1e3:.4g} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.4g} s"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes, and 10th and 90th percentile (nearest values that were measured)."""
    ordered = sorted(values)
    last = len(ordered) - 1
    found = {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
        "max": ordered[last],
    }
    return {name: round(value, 5) for name, value in found.items()}


# --- Lines -------------------------------------------------------------------------------------


def columns() -> int | None:
    """Columns to write for: ``$COLUMNS``, those of the terminal, or None where it is none."""
    return shutil.get_terminal_size((0, 0)).columns or None


def wrap(text: str, indent: str = "") -> str:
    """Wrap a sentence, every line but the first behind `indent`."""
    return textwrap.fill(
        text,
        max(min(columns() or WIDEST, WIDEST), len(indent) + 20),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(
    rows: Sequence[Sequence[str]],
    *,
    labels: int = 1,
    left: bool = False,
    rule: bool = False,
    indent: str = "",
) -> list[str]:
    """Write rows in aligned columns, the first row being the heads.

    Parameters
    ----------
    rows : sequence of sequence of str
        All of the same length.
    labels : int
        Columns that say what a row is about. Where a table is wider than the terminal, the
        other columns are written in several blocks, each behind these.
    left : bool
        Align to the left, else to the right.
    rule : bool
        Draw a line under the heads.
    indent : str
        In front of every line.

    Returns
    -------
    list of str
        Lines without spaces at their ends.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines: list[str] = []
    for block in _blocks(widths, labels, (columns() or 1 << 20) - len(indent)):
        if lines:
            lines.append("")
        for number, row in enumerate(rows):
            cells = [row[i].ljust(widths[i]) if left else row[i].rjust(widths[i]) for i in block]
            lines.append((indent + "  ".join(cells)).rstrip())
            if rule and number == 0:
                lines.append(indent + "-" * (sum(widths[i] + 2 for i in block) - 2))
    return lines


def _blocks(widths: list[int], labels: int, room: int) -> list[list[int]]:
    """Columns of each block of a table: as many as fit, and one at least."""
    first = list(range(labels))
    used = sum(widths[:labels]) + 2 * (labels - 1)
    blocks, taken = [list(first)], used
    for i in range(labels, len(widths)):
        if taken + 2 + widths[i] > room and len(blocks[-1]) > labels:
            blocks.append(list(first))
            taken = used
        blocks[-1].append(i)
        taken += 2 + widths[i]
    return blocks


class Progress:
    """Progress on stderr: one line that is rewritten on a terminal, else a line now and then."""

    #: Seconds between two updates, on a terminal and elsewhere.
    INTERVALS = (0.1, 10.0)
    BAR = 20

    def __init__(self, label: str) -> None:
        self.label = label  # what is running, in front of lines that are not rewritten
        self.terminal = sys.stderr.isatty()
        self.interval = self.INTERVALS[0 if self.terminal else 1]
        self.begin = time.monotonic()
        self.last = self.begin

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, done: int, total: int, text: str) -> None:
        """Tell that so many are done, and what is next."""
        now = time.monotonic()
        if now - self.last < self.interval:
            return
        self.last = now
        seconds = now - self.begin
        if self.terminal:
            # One column is left free: a line that fills the last one would move on.
            line = self.line(done, total, f"{seconds:.0f} s  {text}")
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            line = f"{self.label}: {done} of {total} after {seconds:.0f} s, {text}"
            print(line, file=sys.stderr, flush=True)

    def line(self, done: int, total: int, text: str) -> str:
        """Write the line for this terminal, cut where it would not fit."""
        width = shutil.get_terminal_size().columns - 1
        filled = self.BAR * done // max(total, 1)
        bar = f"[{'#' * filled}{'.' * (self.BAR - filled)}] " if width >= 3 * self.BAR else ""
        return f"{bar}{done}/{total}  {text}"[:width]


# --- Where a result is from, and files ---------------------------------------------------------


def versions() -> dict[str, Any]:
    """Say when and by which versions and commit a result was made."""
    import numpy as np
    import torch

    import kvsig

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("KVSIG_COMMIT"),
        "kvsig": kvsig.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "numpy": np.__version__,
    }


def provenance() -> dict[str, Any]:
    """Say where a result is from: `versions`, and device, driver and runtime."""
    import torch

    import kvsig

    info = kvsig.info()
    batch = next(row for row in info["functions"] if row["name"] == "cudaMemcpyBatchAsync")
    return versions() | {
        "emulated": info["emulated"],
        "device": None if info["emulated"] else torch.cuda.get_device_name(),
        "library": os.path.basename(info["library"]),
        "runtime_version": info["runtime_version"],
        "driver_version": info["driver_version"],
        "batch_variant": batch["variant"],
    }


def source_text(source: dict[str, Any]) -> list[str]:
    """Write a `provenance` as two lines."""
    from kvsig.registry import format_version

    where = f"CUDA {format_version(source['runtime_version'])}"
    if source["emulated"]:
        where += ", emulated: no speeds, only host time and operations"
    else:
        driver = format_version(source["driver_version"])
        where = f"{source['device']}, {where}, driver {driver}"
    words = [source["library"], f"torch {source['torch']}", source["date"]]
    words += [f"commit {source['commit'][:12]}"] if source["commit"] else []
    return [wrap(where), wrap(", ".join(words))]


def write_json(path: Path, data: Any) -> None:
    """Replace a file as a whole: a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(data, ensure_ascii=False, indent=1)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)
