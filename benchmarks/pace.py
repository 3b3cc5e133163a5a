"""How long it takes this machine to submit a copy, layer by layer, from one thread and several.

Transfers of 512 copies of 1, 4 and 16 KiB and of 256 of 32 KiB, 32 of them one behind the other,
each way: by one call each, from 1, 2 and 4 threads whatever the CPU does, and as kvsig chooses.
Machines differ by a fifth in this, and a CPU by half from one moment to the next: each run begins
on a CPU at full speed. Says in half a minute what a longer benchmark is going to find here.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Clock, Report, say
from threads import Way

from kvsig import _pack, bench

KIB = 1 << 10
KIB_OF_PAGES = (1, 4, 16, 32)
#: Name, threads, and whether these are used however fast the CPU is.
WAYS = (("1", 1, True), ("2", 2, True), ("4", 4, True), ("default", None, False))


def counted(calls: list[int], run: Callable[[Any], bench.Outcome], stream: Any) -> None:
    """Make a transfer, and note the CUDA calls that it took."""
    calls.append(run(stream).calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=24)
    parser.add_argument("--kib", type=int, nargs="+", default=KIB_OF_PAGES, help="of a page")
    args = parser.parse_args()
    clock = Clock()
    report = Report(args.json, "pace")
    memory = bench.Memory(clock.device, 512 << 20, 0)
    shuffled = random.Random(0)
    say(f"{'':<15}{'threads':>9}{'us/copy':>9}{'p10':>7}{'p90':>7}{'GB/s':>7}{'calls':>7}{'runs':>6}")
    cases = [(way, kib * KIB) for way in ("load", "offload") for kib in args.kib]
    for direction, size in cases:
        pages = 256 if size < 32 * KIB else 128
        cell = bench.Cell(size, pages, direction=direction, scope="layer")
        job = bench.Job(cell, memory, 0, bench.PYTHON_COPIES)
        runs = {name: Way(job, name, threads, always).submit for name, threads, always in WAYS}
        runs["one call"] = lambda stream, job=job, way=direction: bench.run_one_call(
            job, way, stream
        )
        taken: dict[str, list[float]] = {name: [] for name in runs}
        calls: dict[str, list[int]] = {name: [] for name in runs}
        for run in runs.values():
            run(clock.stream)
        end = time.monotonic() + args.seconds / len(cases)
        while time.monotonic() < end or len(taken["1"]) < 5:
            for name in shuffled.sample(list(runs), len(runs)):
                clock.speed.settle()
                # What kvsig learned from the others' transfers is not what its own would teach it.
                _pack.forget()
                warm, run = (
                    partial(counted, where, runs[name], clock.stream) for where in ([], calls[name])
                )
                clock.speed.warm(partial(clock.once, warm))
                took, _, _ = clock.once(run)
                taken[name].append(took / cell.copies)
        rows = {}
        for name, values in taken.items():
            row = bench.spread(values) | {
                "gb_s": round(size / float(np.median(values)) / 1e3, 2),
                "calls": round(float(np.mean(calls[name])), 1),
                "runs": len(values),
            }
            rows[name] = row
            say(
                f"{direction:>8} {size // KIB:>2} KiB{name:>9}{row['median']:>9.3f}"
                f"{row['p10']:>7.3f}{row['p90']:>7.3f}{row['gb_s']:>7.1f}{row['calls']:>7.0f}"
                f"{row['runs']:>6}"
            )
        report.add(what="pace", direction=direction, page_bytes=size, pages=pages, us=rows)


if __name__ == "__main__":
    main()
