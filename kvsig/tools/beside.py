"""How much transfers slow a matrix product on another stream: ``kvsig bench --compute``."""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

import kvsig
from kvsig.tools.cells import PATHS, WAYS, Cell, make
from kvsig.tools.jobs import Job, Memory
from kvsig.tools.measuring import target
from kvsig.tools.methods import LIMIT, METHODS, Outcome, Runner, Unavailable
from kvsig.tools.report import spread

__all__ = ["Product", "compute"]

#: Rows and columns of the matrices, products timed together, turns at most.
ROWS, PRODUCTS, MOST_TURNS = 8192, 16, 40
#: Scope and page bytes of the transfers: 32 layers of K and V.
TRANSFERS = (("all", 4096), ("all", 32768), ("layer", 32768))


class Product:
    """Matrix products on a stream of their own, and transfers beside them.

    Parameters
    ----------
    device : torch.device
        A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.left, self.right = (
            torch.randn((ROWS, ROWS), device=device).to(torch.bfloat16) for _ in range(2)
        )
        self.out = torch.empty_like(self.left)
        self.working, self.moving = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.alone()

    def alone(self) -> list[float]:
        """Milliseconds of each product but the first one, which starts on an idle GPU."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(PRODUCTS + 1)]
        with torch.cuda.stream(self.working):
            events[0].record()
            for event in events[1:]:
                torch.mm(self.left, self.right, out=self.out)
                event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)][1:]

    def beside(self, submit: Callable[[], Outcome]) -> tuple[list[float], float]:
        """Times of products beside transfers that another thread submits, and their GB/s."""
        stop, going = threading.Event(), threading.Event()
        moved, failures = [0], []

        def move() -> None:
            # At most two transfers are in the queue; the products run in the middle of them.
            try:
                torch.cuda.set_device(self.device)
                queued: list[torch.cuda.Event] = []
                while not stop.is_set():
                    moved[0] += submit().bytes
                    queued.append(torch.cuda.Event())
                    queued[-1].record(self.moving)
                    if len(queued) > 1:
                        queued.pop(0).synchronize()
                        going.set()
                self.moving.synchronize()
            except Exception as error:
                failures.append(error)
                going.set()

        thread = threading.Thread(target=move)
        thread.start()
        try:
            if not going.wait(10):
                raise RuntimeError("no transfer has ended after 10 seconds")
            begin, before = time.perf_counter(), moved[0]
            times = self.alone()
            rate = (moved[0] - before) / (time.perf_counter() - begin) / 1e9
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]
        return times, rate


def compute(
    seconds: float = 40.0, methods: Sequence[str] = (LIMIT, *PATHS), seed: int = 0
) -> dict[str, Any]:
    """Measure by how much transfers slow a matrix product on another stream.

    Parameters
    ----------
    seconds : float
        Time for all.
    methods : sequence of str
        To be compared.
    seed : int
        Of page numbers and bytes.

    Returns
    -------
    dict
        Milliseconds of the product alone and beside each transfer, and the slowdowns.

    Raises
    ------
    ValueError
        On the emulated runtime.
    """
    device = target()
    if device.type != "cuda":
        raise ValueError("--compute needs a GPU: the runtime in use is the emulated one")
    cases = [
        make(False, page_bytes=page, scope=scope, direction=way)
        for scope, page in TRANSFERS
        for way in WAYS
    ]
    product = Product(device)
    memory = Memory(device, max(cell.pool_bytes for cell in cases), seed)
    result: dict[str, Any] = {"product": f"{ROWS}^3 bf16", "cells": []}
    deadline = time.monotonic() + seconds
    for done, cell in enumerate(cases):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        end = time.monotonic() + left / (len(cases) - done)
        result["cells"].append(_case(product, cell, memory, methods, seed, end))
    return result


def _case(
    product: Product, cell: Cell, memory: Memory, methods: Sequence[str], seed: int, end: float
) -> dict[str, Any]:
    """Time products alone and beside one transfer by each method, in turn."""
    job = Job(cell, memory, seed)
    runs: dict[str, Callable[[], tuple[list[float], float]]] = {
        "alone": lambda: (product.alone(), 0.0)
    }
    notes: dict[str, str] = {}
    for name in methods:
        try:
            runner = METHODS[name](job)
            submit = _submission(runner, job, product.moving)
            submit()
            torch.cuda.synchronize()
            runs[name] = _beside(product, submit)
        except (Unavailable, kvsig.BindError, kvsig.CudaError) as error:
            notes[name] = str(error)
    times: dict[str, list[float]] = {name: [] for name in runs}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    shuffled = random.Random(seed)
    for turn in range(MOST_TURNS):
        if turn >= 2 and time.monotonic() > end:
            break
        # In another order each time: a GPU that has just been idle runs at another speed.
        for name in shuffled.sample(list(runs), len(runs)):
            torch.cuda.synchronize()
            found, rate = runs[name]()
            times[name] += found
            rates[name].append(rate)
    alone = statistics.median(times["alone"])
    rows = {
        name: {
            "ms": spread(values),
            "slowdown": round(statistics.median(values) / alone, 4),
            # Whole transfers are counted: only many turns together say how fast they are.
            "gb_s_meanwhile": round(statistics.fmean(rates[name]), 2),
        }
        for name, values in times.items()
    }
    return asdict(cell) | {"methods": rows, "notes": notes}


def _submission(runner: Runner, job: Job, stream: Any) -> Callable[[], Outcome]:
    return lambda: runner(job, job.cell.direction, stream)


def _beside(
    product: Product, submit: Callable[[], Outcome]
) -> Callable[[], tuple[list[float], float]]:
    return lambda: product.beside(submit)
