"""How much transfers slow a matrix product on another stream.

    PYTHONPATH=. python benchmarks/beside.py --json FILE

Needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kvsig
from kvsig import _core
from kvsig.tools.cells import LIMIT, PATHS, Cell, product
from kvsig.tools.jobs import Job, Memory
from kvsig.tools.measuring import SCHEMA
from kvsig.tools.methods import METHODS, Unavailable
from kvsig.tools.report import bytes_text, provenance, source_text, spread, table, write_json

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

    def beside(self, submit: Callable[[], kvsig.Report]) -> tuple[list[float], float]:
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
    """
    device = torch.device("cuda", torch.cuda.current_device())
    cases = [
        cell
        for scope, page in TRANSFERS
        for cell in product(False, page_bytes=(page,), scope=(scope,))
    ]
    products = Product(device)
    memory = Memory(device, max(cell.pool_bytes for cell in cases), seed)
    result: dict[str, Any] = {"product": f"{ROWS}^3 bf16", "cells": []}
    deadline = time.monotonic() + seconds
    for done, cell in enumerate(cases):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        end = time.monotonic() + left / (len(cases) - done)
        result["cells"].append(_case(products, cell, memory, methods, seed, end))
    return result


def _case(
    products: Product, cell: Cell, memory: Memory, methods: Sequence[str], seed: int, end: float
) -> dict[str, Any]:
    """Time products alone and beside one transfer by each method, in turn."""
    job = Job(cell, memory, seed)
    runs: dict[str, Callable[[], tuple[list[float], float]]] = {
        "alone": lambda: (products.alone(), 0.0)
    }
    notes: dict[str, str] = {}
    for name in methods:
        try:
            submit = partial(METHODS[name](job), cell.direction, products.moving)
            submit()
            torch.cuda.synchronize()
            runs[name] = partial(products.beside, submit)
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


def text_of(result: dict[str, Any]) -> str:
    """Write the slowdowns as a table."""
    lines = [*source_text(result["provenance"]), "", f"{result['product']} beside transfers"]
    rows = [["page", "direction", "scope", "transfer", "ms", "slower", "GB/s meanwhile"]]
    for cell in result["cells"]:
        place = [bytes_text(cell["page_bytes"]), cell["direction"], cell["scope"]]
        rows += [
            [*place, name, f"{row['ms']['median']:.3f}", f"{row['slowdown'] - 1:+.1%}",
             f"{row['gb_s_meanwhile']:.1f}"]
            for name, row in cell["methods"].items()
        ]  # fmt: skip
    return "\n".join(lines + table(rows, labels=4))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=40)
    args = parser.parse_args()
    if _core.is_emulated() or not torch.cuda.is_available():
        print("computing beside transfers needs a GPU, and a real CUDA runtime", file=sys.stderr)
        return 1
    result = {"schema": SCHEMA, "kind": "compute", "provenance": provenance()}
    result |= compute(args.seconds)
    print(text_of(result))
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
