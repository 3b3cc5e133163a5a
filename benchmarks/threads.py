"""Layer by layer from one thread and from several: how fast it is, and what it costs a model.

Each number of threads, used but for every 64th call, and kvsig's own choice of up to four; 4, 16
and 32 KiB pages of 32 layers of K and V, random, each way. GB/s by themselves, then beside matrix
products that another thread launches one by one: how much longer these take, and how fast the pages
are meanwhile. All in turn, in another order each time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

from common import Clock, Report, say

import kvsig
from kvsig import _threads, bench

KIB = 1 << 10
PAGES = (4 * KIB, 16 * KIB, 32 * KIB)
#: Name, threads, and whether these are used however long submitting takes.
WAYS = (("1", 1, True), ("2", 2, True), ("4", 4, True), ("up to 4", 4, False))


class Way:
    """The transfers of a cell with some threads."""

    def __init__(self, job: bench.Job, name: str, threads: int, always: bool) -> None:
        cell = job.cell
        self.name = name
        self.cell = cell
        self.pages = job.pages[cell.direction]
        self.cache = kvsig.PagedKVCache(
            device=tuple(job.near), host=tuple(job.far), page_size=1, threads=threads
        )
        self.worth = (-1.0, -1.0) if always else (_threads.WORTH, _threads.WORTH_MORE)
        self.calls = 0
        self.gb_s: list[float] = []
        self.ms: list[float] = []
        self.meanwhile: list[float] = []

    def submit(self, stream: Any) -> bench.Outcome:
        """Make one transfer, layer by layer."""
        near, far = self.pages
        _threads.WORTH, _threads.WORTH_MORE = self.worth
        outcome = bench.Outcome()
        for layer in range(self.cell.layers):
            if self.cell.direction == "load":
                report = self.cache.load(far, near, layers=layer, stream=stream)
            else:
                report = self.cache.offload(near, far, layers=layer, stream=stream)
            outcome.bytes += report.bytes
            outcome.calls += report.calls
        self.calls = outcome.calls
        return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    clock = Clock()
    report = Report(args.json, "threads")
    product = bench.Product(clock.device, 0)
    memory = bench.Memory(clock.device, 512 << 20, 0)
    shuffled = random.Random(0)
    deadline = time.monotonic() + args.seconds
    cases = [(size, way) for size in PAGES for way in ("load", "offload")]
    say("                threads    GB/s  calls   product, ms  slower  GB/s meanwhile")
    for done, (size, direction) in enumerate(cases):
        pages = min(bench.auto_pages(size, 64, emulated=False), (512 << 20) // (128 * size))
        cell = bench.Cell(size, pages, direction=direction, scope="layer")
        job = bench.Job(cell, memory, 0, bench.PYTHON_COPIES)
        ways = [Way(job, *way) for way in WAYS]
        alone: list[float] = []
        share = (deadline - time.monotonic()) / (len(cases) - done)
        half, end = time.monotonic() + share / 2, time.monotonic() + share
        while len(ways[0].gb_s) < 5 or time.monotonic() < half:
            for way in shuffled.sample(ways, len(ways)):
                way.submit(clock.stream)
                took = clock.once(lambda w=way: w.submit(clock.stream) and None)[0]
                way.gb_s.append(cell.bytes / took / 1e3)
        while len(alone) < 60 or time.monotonic() < end:
            alone += product.alone()
            for way in shuffled.sample(ways, len(ways)):
                found, rate = product.beside(lambda w=way: w.submit(product.moving))
                way.ms += found
                way.meanwhile.append(rate)
        rows: dict[str, Any] = {"alone": {"ms": bench.spread(alone)}}
        for way in ways:
            slower = statistics.median(way.ms) / statistics.median(alone)
            rows[way.name] = {
                "gb_s": bench.spread(way.gb_s),
                "calls": way.calls,
                "ms": bench.spread(way.ms),
                "slowdown": round(slower, 4),
                "gb_s_meanwhile": round(statistics.fmean(way.meanwhile), 2),
            }
            say(
                f"{direction:>8} {size // KIB:>3} KiB {way.name:>8}"
                f" {statistics.median(way.gb_s):>7.2f} {way.calls:>6}"
                f" {statistics.median(way.ms):>12.3f} {slower - 1:>+7.1%}"
                f" {statistics.fmean(way.meanwhile):>9.2f}"
            )
        report.add(what="threads", direction=direction, page_bytes=size, pages=pages, rows=rows)


if __name__ == "__main__":
    main()
