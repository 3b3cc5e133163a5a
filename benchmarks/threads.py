"""Transfers from one thread and from several: how fast they are, and what they cost a model.

One, two and four threads that may submit, always, however fast the CPU is; and kvsig's own choice,
as it comes and of up to four. 4, 16 and 32 KiB pages of 32 layers of K and V layer by layer, and
batches of all layers at once, random, each way. Three things are measured, all in turn, in another
order each time:

- GB/s by themselves;
- beside matrix products that another thread launches one by one: how much longer these take, with
  an event behind each and with none between them;
- beside small kernels that another thread launches as fast as it can: how long a launch takes.
  Both threads are Python's, which hand the interpreter to each other, so some of it is that.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from common import Clock, Report, say

import kvsig
from kvsig import _threads, bench

KIB = 1 << 10
CASES = [
    (scope, size, way)
    for scope in ("layer", "all")
    for size in (4 * KIB, 16 * KIB, 32 * KIB)
    for way in ("load", "offload")
]
#: Name, threads, and whether these are used however fast the CPU is.
WAYS = (
    ("1", 1, True),
    ("2", 2, True),
    ("4", 4, True),
    ("default", None, False),
    ("up to 4", 4, False),
)


class Way:
    """The transfers of a cell with some threads."""

    def __init__(self, job: bench.Job, name: str, threads: int | None, always: bool) -> None:
        cell = job.cell
        self.name = name
        self.cell = cell
        self.pages = job.pages[cell.direction]
        team = _threads.most(threads)
        if always and threads != 1:
            team = _threads.AlwaysTeam(*team)
        self.path = "batch" if always or cell.scope == "all" else "auto"
        with mock.patch.object(_threads, "most", lambda _: team):
            self.cache = kvsig.PagedKVCache(
                device=tuple(job.near), host=tuple(job.far), page_size=1, model=job.cache.model
            )
        self.calls = 0
        self.gb_s: list[float] = []
        self.ms: list[float] = []
        self.unbroken: list[float] = []
        self.launches: list[float] = []
        self.meanwhile: list[float] = []

    def submit(self, stream: Any) -> bench.Outcome:
        """Make one transfer."""
        near, far = self.pages
        outcome = bench.Outcome()
        for layer in (None,) if self.cell.scope == "all" else range(self.cell.layers):
            if self.cell.direction == "load":
                report = self.cache.load(far, near, layers=layer, stream=stream, path=self.path)
            else:
                report = self.cache.offload(near, far, layers=layer, stream=stream, path=self.path)
            outcome.bytes += report.bytes
            outcome.calls += report.calls
        self.calls = outcome.calls
        return outcome


def launch_row(values: list[float]) -> dict[str, float]:
    """Microseconds of launches: what most take, and what the slow ones do."""
    found = np.percentile(values, (50, 90, 99, 99.9))
    names = ("median", "p90", "p99", "p99.9")
    row = {name: round(float(value), 2) for name, value in zip(names, found, strict=True)}
    return row | {"max": round(max(values), 2), "mean": round(statistics.fmean(values), 2)}


def measure(
    clock: Clock, product: bench.Product, ways: list[Way], seconds: float
) -> dict[str, Any]:
    """Measure a cell: rows by way."""
    shuffled = random.Random(0)
    begin = time.monotonic()
    ends = [begin + seconds * part for part in (0.25, 0.75, 1.0)]
    nbytes = ways[0].cell.bytes
    small = product.launches
    alone: list[float] = []
    alone_unbroken: list[float] = []
    alone_small: list[float] = []
    while len(ways[0].gb_s) < 5 or time.monotonic() < ends[0]:
        for way in shuffled.sample(ways, len(ways)):
            way.submit(clock.stream)
            took, _, _ = clock.once(lambda w=way: w.submit(clock.stream) and None)
            way.gb_s.append(nbytes / took / 1e3)
    while len(alone) < 45 or time.monotonic() < ends[1]:
        alone += product.alone()
        alone_unbroken += product.unbroken()
        for way in shuffled.sample(ways, len(ways)):
            found, rate = product.beside(lambda w=way: w.submit(product.moving))
            way.ms += found
            way.meanwhile.append(rate)
            way.unbroken += product.beside(
                lambda w=way: w.submit(product.moving), product.unbroken
            )[0]
    while len(alone_small) < 4000 or time.monotonic() < ends[2]:
        alone_small += small()
        for way in shuffled.sample(ways, len(ways)):
            way.launches += product.beside(lambda w=way: w.submit(product.moving), small)[0]
    rows: dict[str, Any] = {
        "alone": {
            "ms": bench.spread(alone),
            "unbroken_ms": bench.spread(alone_unbroken),
            "launch_us": launch_row(alone_small),
        }
    }
    for way in ways:
        rows[way.name] = {
            "gb_s": bench.spread(way.gb_s),
            "calls": way.calls,
            "ms": bench.spread(way.ms),
            "slowdown": round(statistics.median(way.ms) / statistics.median(alone), 4),
            "unbroken_ms": bench.spread(way.unbroken),
            "unbroken_slowdown": round(
                statistics.median(way.unbroken) / statistics.median(alone_unbroken), 4
            ),
            "gb_s_meanwhile": round(statistics.fmean(way.meanwhile), 2),
            "launch_us": launch_row(way.launches),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=90)
    args = parser.parse_args()
    clock = Clock()
    report = Report(args.json, "threads")
    product = bench.Product(clock.device, 0)
    product.launches(100)
    memory = bench.Memory(clock.device, 512 << 20, 0)
    deadline = time.monotonic() + args.seconds
    say(
        f"{'':<25}{'threads':>10}{'GB/s':>8}{'calls':>7}{'product, ms':>13}{'p90':>8}"
        f"{'unbroken':>10}{'launch, us':>12}{'p90':>8}{'p99':>9}{'max':>9}"
    )
    for done, (scope, size, direction) in enumerate(CASES):
        pages = min(bench.auto_pages(size, 64, emulated=False), (512 << 20) // (128 * size))
        cell = bench.Cell(size, pages, direction=direction, scope=scope)
        job = bench.Job(cell, memory, 0, bench.PYTHON_COPIES)
        ways = [Way(job, *way) for way in WAYS]
        share = (deadline - time.monotonic()) / (len(CASES) - done)
        rows = measure(clock, product, ways, share)
        for name, row in rows.items():
            ms, us = row["ms"], row["launch_us"]
            rate, calls = row.get("gb_s", {}).get("median", 0), row.get("calls", 0)
            say(
                f"{direction:>8} {size // KIB:>3} KiB, {scope:<9}{name:>10}{rate:>8.2f}{calls:>7}"
                f"{ms['median']:>13.3f}{ms['p90']:>8.3f}{row['unbroken_ms']['median']:>10.3f}"
                f"{us['median']:>12.1f}{us['p90']:>8.1f}{us['p99']:>9.1f}{us['max']:>9.0f}"
            )
        report.add(
            what="threads", scope=scope, direction=direction, page_bytes=size, pages=pages,
            rows=rows,
        )  # fmt: skip


if __name__ == "__main__":
    main()
