"""Two processes, each with a GPU of its own, move pages at the same time.

    PYTHONPATH=. torchrun --nproc-per-node 2 benchmarks/two_gpus.py --json FILE

Needs two GPUs. Each process moves pages of 64 KiB each way, first alone, then together with the
other; bytes are compared, and what both move together is held against two big copies at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import kvsig
from kvsig.tools.measuring import SCHEMA
from kvsig.tools.report import bytes_text, provenance, source_text, table, write_json

GIB = 1 << 30
LAYERS = 32
WIDTHS = (4 << 10, 64 << 10)
WAYS = ("load", "offload")
#: Of two big copies; asked for at the larger width, and counted as met when it is this near.
LEAST, TOLERANCE = 0.90, 0.03
SECONDS = 0.5


class Side:
    """One process: 1 GiB of a GPU and 1 GiB of page-locked memory."""

    def __init__(self, index: int) -> None:
        self.gpu = torch.device("cuda", index)
        torch.cuda.set_device(self.gpu)
        self.stream = torch.cuda.Stream(self.gpu)
        self.device = torch.empty(GIB, dtype=torch.uint8, device=self.gpu)
        self.host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
        self.device.view(torch.int64).random_()
        self.host.copy_(self.device)
        torch.cuda.synchronize()

    def big(self, way: str) -> Callable[[], int]:
        """One copy of everything."""
        to, source = (self.device, self.host) if way == "load" else (self.host, self.device)

        def submit() -> int:
            with torch.cuda.stream(self.stream):
                to.copy_(source, non_blocking=True)
            return GIB

        return submit

    def pages(self, way: str, width: int, path: str) -> Callable[[], int]:
        """Half of all pages, in random order; compared once before it is answered."""
        count = GIB // LAYERS // width
        near = self.device.view(LAYERS, count, width)
        far = self.host.view(count, LAYERS, 1, width)
        cache = kvsig.PagedKVCache(list(near), far, page_size=1)
        rng = np.random.default_rng(self.gpu.index)
        device, host = (rng.permutation(count)[: count // 2] for _ in range(2))

        def submit() -> int:
            if way == "load":
                return cache.load(host, device, stream=self.stream, path=path).bytes
            return cache.offload(device, host, stream=self.stream, path=path).bytes

        # Compared on the GPU: each of these processes has one thread for the CPU's part.
        here, there = near.clone(), far.to(self.gpu)
        mine, theirs = (torch.from_numpy(pages).to(self.gpu) for pages in (device, host))
        torch.cuda.synchronize()
        submit()
        self.stream.synchronize()
        if way == "load":
            here[:, mine] = there[theirs, :, 0].transpose(0, 1)
        else:
            there[theirs, :, 0] = here[:, mine].transpose(0, 1)
        if not (torch.equal(near, here) and torch.equal(far.to(self.gpu), there)):
            raise RuntimeError(f"{way} of {width} B pages by {path} on {self.gpu}: wrong bytes")
        return submit

    def rate(self, submit: Callable[[], int], active: bool) -> float:
        """GB/s over about a second; 0 for a process that stands by."""
        torch.cuda.synchronize()
        dist.barrier()
        if not active:
            return 0.0
        begin, moved, marks = time.perf_counter(), 0, []
        while time.perf_counter() - begin < SECONDS:
            moved += submit()
            marks.append(torch.cuda.Event())
            marks[-1].record(self.stream)
            if len(marks) > 2:
                marks[-3].synchronize()
        self.stream.synchronize()
        return moved / (time.perf_counter() - begin) / 1e9


def gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def measure(side: Side) -> list[dict[str, Any]]:
    """Rates of each process alone and of both together, by each way and method."""
    rows = []
    rank = dist.get_rank()
    for way in WAYS:
        jobs: list[tuple[str, int, Callable[[], int]]] = [("one copy", GIB, side.big(way))]
        jobs += [
            (path, width, side.pages(way, width, path))
            for width in WIDTHS
            for path in ("auto", "kernel", "batch")
        ]
        big = 0.0
        for path, width, submit in jobs:
            alone = [sum(gathered(side.rate(submit, rank == turn))) for turn in range(2)]
            both = statistics.median(sum(gathered(side.rate(submit, True))) for _ in range(3))
            big = big or both
            row = {"way": way, "width": width, "path": path, "share": round(both / big, 4)}
            row |= {"alone": [round(rate, 2) for rate in alone], "both": round(both, 2)}
            if path == "auto" and width == WIDTHS[-1]:
                row |= {"least": LEAST, "met": both / big >= LEAST * (1 - TOLERANCE)}
            rows.append(row)
    return rows


def text_of(result: dict[str, Any]) -> str:
    rows = [["way", "pages", "method", "GB/s alone", "both", "of two big copies", "met"]]
    rows += [
        [row["way"], bytes_text(row["width"]), row["path"],
         " ".join(f"{rate:.1f}" for rate in row["alone"]), f"{row['both']:.1f}",
         f"{row['share']:.3f}", {True: "yes", False: "NO", None: ""}[row.get("met")]]
        for row in result["rows"]
    ]  # fmt: skip
    return "\n".join([*source_text(result["provenance"]), "", *table(rows, labels=3)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if torch.cuda.device_count() < 2:
        print("torch sees fewer than two GPUs", file=sys.stderr)
        return 1
    dist.init_process_group("gloo")
    if dist.get_world_size() != 2:
        print("run it by torchrun --nproc-per-node 2", file=sys.stderr)
        return 1
    rows = measure(Side(dist.get_rank()))
    if dist.get_rank() == 0:
        result = {"schema": SCHEMA, "kind": "two gpus", "provenance": provenance(), "rows": rows}
        print(text_of(result))
        if args.json:
            write_json(args.json, result)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
