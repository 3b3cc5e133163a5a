"""What ways to submit copies take, by how slow the CPU looks meanwhile.

Layer by layer, 4 and 16 pages of K and V, small enough that the queue takes them all: the host's
time of a transfer by batches, by strided copies and one by one, from one thread. A loop of Python
is timed before and behind each run, for that is all that kvsig's planner sees of the CPU; the
thread moves from CPU to CPU, some of which others slow down. Half a minute.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

from common import Clock, Report, say

from kvsig import _pack, bench

KIB = 1 << 10
SIZES = (256, 4 * KIB, 16 * KIB, 32 * KIB)
PAGES = (4, 16)
PATHS = ("batch", "strided", "loop")
#: How many times as long as at its best the loop takes, from one number to the next.
CLASSES = (0.0, 1.25, 1.45, 1.7, 2.3, 99.0)
#: The two looks of a run differ by no more than this, or the CPU changed its speed meanwhile.
ALIKE = 1.15
#: Runs of each way on one CPU, then comes another.
IN_A_ROW = 4


def run(job: bench.Job, way: str, path: str, stream: Any) -> float:
    """Host microseconds of one transfer of one layer."""
    # Not timed, so that what ran before leaves nothing behind in the caches.
    job.kvsig(way, path, stream)
    stream.synchronize()
    bench.apart()
    begin = time.perf_counter_ns()
    reports = job.kvsig(way, path, stream)
    took = (time.perf_counter_ns() - begin) / 1e3
    stream.synchronize()
    return took / len(reports)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=30)
    args = parser.parse_args()
    clock = Clock()
    report = Report(args.json, "looks")
    memory = bench.Memory(clock.device, 256 << 20, 0)
    cpus = sorted(os.sched_getaffinity(0))
    shuffled = random.Random(0)
    best = clock.speed.best
    cases = [(way, size, n) for way in ("load", "offload") for size in SIZES for n in PAGES]
    say(f"{'':<22}{'looks':<10}" + "".join(f"{path:>9} runs" for path in PATHS))
    for way, size, pages in cases:
        cell = bench.Cell(size, pages, direction=way, scope="layer")
        job = bench.Job(cell, memory, 0, bench.PYTHON_COPIES, threads=1)
        _pack.forget()
        found: list[tuple[str, float, float]] = []
        end = time.monotonic() + args.seconds / len(cases)
        while not found or time.monotonic() < end:
            os.sched_setaffinity(0, {shuffled.choice(cpus)})
            for path in IN_A_ROW * PATHS:
                before = clock.speed.look_ns()
                took = run(job, way, path, clock.stream)
                after = clock.speed.look_ns()
                best = min(best, before, after)
                if max(before, after) <= ALIKE * min(before, after):
                    found.append((path, (before + after) / 2, took))
        rows: list[dict[str, Any]] = []
        for low, high in zip(CLASSES[:-1], CLASSES[1:], strict=True):
            here = [(path, ns, took) for path, ns, took in found if low <= ns / best < high]
            if not here:
                continue
            looks = statistics.median(ns / best for _, ns, _ in here)
            row: dict[str, Any] = {"looks": round(looks, 3), "us": {}, "runs": {}}
            for name in PATHS:
                values = [took for path, _, took in here if path == name]
                row["runs"][name] = len(values)
                row["us"][name] = bench.spread(values) if values else None
            rows.append(row)
            say(
                f"{f'{way} {pages} x {size / KIB:g} KiB':<22}{looks:<10.2f}"
                + "".join(
                    f"{row['us'][name]['median'] if row['us'][name] else 0:>9.1f}"
                    f"{row['runs'][name]:>5}"
                    for name in PATHS
                )
            )
        report.add(what="looks", direction=way, page_bytes=size, pages=pages, classes=rows)


if __name__ == "__main__":
    main()
