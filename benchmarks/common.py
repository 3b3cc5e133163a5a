"""What the scripts of this folder share: timing in turn, tables, and results as JSON."""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvsig import _core, bench

Run = Callable[[], int | None]
#: Microseconds of a run: until the end, of the host's, and inside CUDA's copying functions.
Times = tuple[float, float, float]


class Clock:
    """Times submissions on a stream of its own: events for completion, the host for the rest.

    `inside` tells the microseconds that CUDA's copying functions have taken so far, where there is
    something that counts them.
    """

    def __init__(
        self, streams: int = 1, inside: Callable[[], float] = lambda: 0.0
    ) -> None:
        if _core.is_emulated() or not torch.cuda.is_available():
            raise SystemExit("this benchmark needs a GPU, and a real CUDA runtime")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.streams = [torch.cuda.Stream(self.device) for _ in range(streams)]
        self.stream = self.streams[0]
        self.handles = [int(stream.cuda_stream) for stream in self.streams]
        self.inside = inside
        self.speed = bench.FullSpeed()

    def once(self, run: Run, others: int = 0) -> Times:
        """Time a run; `others` more streams are tied in.

        A run that returns nanoseconds has measured its host time itself.
        """
        torch.cuda.synchronize()
        bench.apart()
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record(self.stream)
        more = self.streams[1 : 1 + others]
        for stream in more:
            stream.wait_event(start)
        inside = self.inside()
        begin = time.perf_counter_ns()
        own = run()
        host = time.perf_counter_ns() - begin
        inside = self.inside() - inside
        for stream in more:
            self.stream.wait_stream(stream)
        end.record(self.stream)
        end.synchronize()
        return start.elapsed_time(end) * 1e3, (host if own is None else own) / 1e3, inside


def in_turn(
    clock: Clock, runs: dict[str, tuple[Run, int]], times: int, deadline: float
) -> tuple[dict[str, list[Times]], dict[str, str]]:
    """Time runs in turn; a run that fails is left out, with its error.

    The order is another each time, and each timed run comes behind one of the same kind that is
    not timed: what ran before would otherwise leave its own data in the CPU's caches.
    """
    shuffled = random.Random(0)
    found: dict[str, list[Times]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    gc.collect()
    gc.disable()
    try:
        for turn in range(times):
            if turn > 3 and time.monotonic() > deadline:
                break
            for name in shuffled.sample(list(runs), len(runs)):
                if name in failed:
                    continue
                try:
                    clock.speed.settle()
                    clock.speed.warm(lambda n=name: clock.once(*runs[n]))
                    found[name].append(clock.once(*runs[name]))
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {error}"
    finally:
        gc.enable()
    return {name: rows for name, rows in found.items() if rows}, failed


def row_of(rows: list[Times], nbytes: int) -> dict[str, Any]:
    """Medians and spread of timed runs."""
    total, host, _ = zip(*rows, strict=True)
    return {
        "runs": len(rows),
        "us": bench.spread(list(total)),
        "host_us": bench.spread(list(host)),
        "gb_s": round(nbytes / statistics.median(total) / 1e3, 3),
    }


class Report:
    """A result that is written after every step, so that an interrupted run loses nothing."""

    def __init__(self, path: Path | None, kind: str) -> None:
        self.path = path
        self.begin = time.monotonic()
        self.data: dict[str, Any] = {
            "schema": bench.SCHEMA,
            "kind": kind,
            "provenance": bench.provenance(),
            "cells": [],
        }

    def add(self, **cell: Any) -> None:
        """Add a cell and write."""
        self.data["cells"].append(cell)
        self.write()

    def write(self) -> None:
        """Write what there is."""
        self.data["seconds"] = round(time.monotonic() - self.begin, 1)
        if self.path is not None:
            bench.write_json(self.path, self.data)


def say(text: str = "") -> None:
    print(text, flush=True)


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
