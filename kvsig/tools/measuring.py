"""Measuring: every method of a cell in turn, compared byte by byte once, then timed.

In a cell all methods do the same job on the same data: page numbers in, bytes moved. They are
timed in turn, each turn in another order, on a stream that is not the default one, so that a
machine whose speed drifts does so for all of them. Submission (host time until the call has
returned) and completion (between two CUDA events around the call) are kept apart; ratios are
medians over turns, of runs that stood side by side.

On the emulated runtime there are no speeds: only host time, copies and calls.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import kvsig
from kvsig.tools.cells import LIMIT, PATHS, Cell, describe
from kvsig.tools.jobs import Job, Memory
from kvsig.tools.methods import METHODS, Runner, Unavailable
from kvsig.tools.report import Progress, count_text, provenance, spread
from kvsig.tools.runtimes import real_device

__all__ = [
    "SCHEMA",
    "Bench",
    "Series",
    "make_stream",
    "ratio",
    "summary",
    "target",
    "time_once",
]

#: Of results as JSON.
SCHEMA = 2
#: Turns that all methods take part in; later ones are for those less than `CLOSE` times as slow
#: as the fastest one.
FEW_RUNS, CLOSE = 3, 1.5


@dataclass(slots=True)
class Series:
    """Timed runs of one method in one cell, a run per turn; `ms` only on a GPU."""

    name: str
    submit: Callable[[], kvsig.Report]
    report: kvsig.Report = field(default_factory=kvsig.Report)
    verified: bool | None = None
    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)

    @property
    def ms_per_byte(self) -> float:
        """Median time of a byte."""
        return statistics.median(self.ms) / max(self.report.bytes, 1)


def ratio(mine: Series, other: Series) -> float:
    """How many times as fast one method was as another: the median over turns of both."""
    share = mine.report.bytes / max(other.report.bytes, 1)
    # Turns are counted from the first one on, and those of slow methods end earlier.
    return share * statistics.median(b / a for a, b in zip(mine.ms, other.ms, strict=False))


def target() -> torch.device:
    """Return the device to measure on; the CPU stands for the emulated runtime's."""
    if not real_device():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def make_stream(device: torch.device) -> Any:
    """Make a stream that is not the default one."""
    if device.type == "cuda":
        return torch.cuda.Stream(device)
    from kvsig import emulated

    return emulated.Stream()


def time_once(stream: torch.cuda.Stream, submit: Callable[[], Any]) -> tuple[float, float]:
    """Time one submission: ms until the work on the stream has ended, and until it returned."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    begin = time.perf_counter()
    submit()
    host_ms = (time.perf_counter() - begin) * 1e3
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end), host_ms


@dataclass
class Bench:
    """Measures cells, in the order given.

    Raises
    ------
    ValueError
        If the runtime is a real one and torch sees no GPU.
    """

    cells: Sequence[Cell]
    #: Of `METHODS`.
    methods: Sequence[str] = tuple(METHODS)
    #: Timed runs of the fastest methods in a cell; fewer where the time is short, and three of
    #: methods that are clearly slower.
    runs: int = 15
    #: Time for everything. Cells that it does not last for are left out, and named.
    seconds: float = 300.0
    #: Of page numbers and bytes.
    seed: int = 0
    #: Given the whole result after each cell, so that an interrupted run loses nothing.
    save: Callable[[dict[str, Any]], None] = lambda result: None

    def __post_init__(self) -> None:
        self.device = target()
        self.real = self.device.type == "cuda"
        #: One that is timed, and one for each way where both are measured at once.
        self.streams = [make_stream(self.device) for _ in range(3)]
        self.shuffled = random.Random(self.seed)
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "bench",
            "provenance": provenance(),
            "options": {
                name: getattr(self, name) for name in ("methods", "runs", "seconds", "seed")
            },
            "cells": [],
            "skipped": [],
        }

    def run(self) -> dict[str, Any]:
        """Measure every cell that there is time for; the result is what ``--json`` writes."""
        begin = time.monotonic()
        end = begin + self.seconds
        pool = max((cell.pool_bytes for cell in self.cells), default=0)
        memory = Memory(self.device, pool, self.seed)
        with Progress("kvsig bench") as progress:
            for done, cell in enumerate(self.cells):
                progress.show(done, len(self.cells), describe(cell))
                now = time.monotonic()
                if now >= end:
                    self.result["skipped"] = [asdict(cell) for cell in self.cells[done:]]
                    break
                deadline = now + (end - now) / (len(self.cells) - done)
                self.result["cells"].append(self.entry(cell, memory, deadline))
                self.result["seconds"] = round(time.monotonic() - begin, 1)
                self.save(self.result)
        self.result["summary"] = summary(self.result)
        self.save(self.result)
        return self.result

    def entry(self, cell: Cell, memory: Memory, deadline: float) -> dict[str, Any]:
        """Measure one cell; an error is a part of what is written down, and loses no other."""
        entry: dict[str, Any] = asdict(cell) | {"copies": cell.copies, "bytes": cell.bytes}
        entry |= {"methods": {}, "notes": {}}
        try:
            series = self.verified(Job(cell, memory, self.seed), entry["notes"])
            self.time_all(series, deadline)
            entry["methods"] = self.rows(cell, series)
        except Exception as error:
            self.synchronize()
            if self.real:
                torch.cuda.empty_cache()
            entry["error"] = f"{type(error).__name__}: {error}"
        return entry

    def verified(self, job: Job, notes: dict[str, str]) -> list[Series]:
        """Run every method once and compare its bytes; note why some cannot be used."""
        job.fill()
        for way in job.cell.ways:
            job.expect(way)
        ready = []
        for name in self.methods:
            try:
                one = Series(name, self.submission(METHODS[name](job), job.cell))
                self.first(job, one)
                ready.append(one)
            except (Unavailable, kvsig.BindError, kvsig.CudaError) as error:
                notes[name] = str(error)
            except Exception as error:
                # Another library's own exceptions; they must not lose the cell.
                if name in PATHS:
                    raise
                notes[name] = f"{type(error).__name__}: {error}"
        # The copies for verification are not needed any more; sources keep their bytes.
        job.restore()
        job.drop()
        return ready

    def submission(self, runner: Runner, cell: Cell) -> Callable[[], kvsig.Report]:
        """Make a call that submits a whole cell: one way, or both on streams of their own."""
        stream, *others = self.streams
        if cell.direction != "both":
            return lambda: runner(cell.direction, stream)

        def both() -> kvsig.Report:
            whole = kvsig.Report()
            for way, own in zip(cell.ways, others, strict=True):
                if self.real:
                    own.wait_stream(stream)
                whole += runner(way, own)
            if self.real:
                for own in others:
                    stream.wait_stream(own)
            return whole

        return both

    def first(self, job: Job, one: Series) -> None:
        """Run a method once: to warm it up, and to compare every byte where it moves them all."""
        if one.name != LIMIT:
            job.restore()
        self.synchronize()
        one.report = one.submit()
        self.synchronize()
        if one.name != LIMIT and one.report.bytes == job.cell.bytes:
            wrong = job.wrong()
            one.verified = not wrong
            if wrong:
                more = f" and {count_text(len(wrong) - 1, 'more page')}" if wrong[1:] else ""
                raise RuntimeError(f"{one.name}: {wrong[0]}{more}, in {describe(job.cell)}")

    def synchronize(self) -> None:
        """Wait for all work: memory that it works on must not go before it has ended."""
        if self.real:
            torch.cuda.synchronize()
        for stream in self.streams:
            stream.synchronize()

    def time_all(self, series: list[Series], deadline: float) -> None:
        """Time methods in turn, as often as asked for or as there is time."""
        racing = list(series)
        gc.collect()
        gc.disable()
        try:
            for turn in range(self.runs):
                if turn >= FEW_RUNS and time.monotonic() > deadline:
                    break
                if turn == FEW_RUNS and self.real:
                    racing = close(series)
                # In another order each time, then in that backwards, so that each comes as often
                # before every other one as behind it.
                if turn % 2 and turn != FEW_RUNS:
                    racing.reverse()
                else:
                    self.shuffled.shuffle(racing)
                for one in racing:
                    self.time_one(one)
        finally:
            gc.enable()

    def time_one(self, one: Series) -> None:
        """Time one submission."""
        self.synchronize()
        if self.real:
            ms, host_ms = time_once(self.streams[0], one.submit)
            one.ms.append(ms)
        else:
            begin = time.perf_counter()
            one.submit()
            host_ms = (time.perf_counter() - begin) * 1e3
            self.synchronize()
        one.host_ms.append(host_ms)

    def rows(self, cell: Cell, series: list[Series]) -> dict[str, Any]:
        """Write down what each method gave."""
        by_name = {one.name: one for one in series}
        auto, limit = by_name.get("auto"), by_name.get(LIMIT)
        found: dict[str, Any] = {}
        for one in series:
            report = one.report
            # Of the pages that were asked for; some methods move only a part of them.
            part = report.bytes != cell.bytes or one is limit
            copies = report.copies if part else cell.copies
            row = {
                "runs": len(one.host_ms),
                "path": report.path,
                "reason": report.reason,
                "calls": report.calls,
                "operations": report.copies,
                "bytes": report.bytes,
                "verified": one.verified,
                "host_ms": spread(one.host_ms),
                "host_ns_per_copy": round(statistics.median(one.host_ms) * 1e6 / copies, 1),
            }
            if self.real:
                row["ms"] = spread(one.ms)
                row["gb_s"] = round(1 / one.ms_per_byte / 1e6, 3)
                if auto is not None and one is not auto:
                    row["auto_ratio"] = round(ratio(auto, one), 4)
                if limit is not None:
                    row["share"] = round(ratio(one, limit), 4)
            found[one.name] = row
        return found


def close(series: list[Series]) -> list[Series]:
    """Choose what is worth another turn: auto, methods that come close, and the limit."""
    kept = ("auto", LIMIT)
    best = min((one.ms_per_byte for one in series if one.name != LIMIT), default=0.0)
    return [one for one in series if one.name in kept or one.ms_per_byte <= CLOSE * best]


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Compare auto with the fastest path that was forced, in every cell of a result.

    ``compared`` is the number of cells; ``worst`` the least ratio; ``behind`` the cells in which
    auto has less than 0.95 of the best; ``verified`` whether every method that was compared byte
    by byte was right; ``errors`` those of cells that failed.
    """
    behind: list[dict[str, Any]] = []
    ratios = []
    checked = []
    for cell in result["cells"]:
        rows = cell["methods"]
        # Condensed results leave out what is None.
        checked += [row["verified"] for row in rows.values() if row.get("verified") is not None]
        others = {
            name: float(row["auto_ratio"])
            for name, row in rows.items()
            if name in PATHS and "auto_ratio" in row
        }
        if not others:
            continue
        best = min(others, key=lambda name: others[name])
        ratios.append(others[best])
        if others[best] < 0.95:
            place = describe(Cell.of(cell))
            behind.append({"cell": place, "best": best, "ratio": others[best]})
    return {
        "compared": len(ratios),
        "worst": min(ratios, default=None),
        "behind": sorted(behind, key=lambda item: float(item["ratio"])),
        "verified": all(checked) if checked else None,
        "verifications": len(checked),
        "errors": [cell["error"] for cell in result["cells"] if "error" in cell],
    }
