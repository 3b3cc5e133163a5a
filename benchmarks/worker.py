"""Moves and times the pages of one cell after another, for `against.py`, by the public API alone.

Run with the checkout to be measured first in PYTHONPATH. Reads a line of JSON for each block of
runs, ``{"cell": {...}, "runs": 5}``, and answers with one: ``{"ms": [...], "host_ms": [...]}``;
without a GPU ``ms`` is missing. Works with every version of kvsig since 0.1.0, and imports nothing
of the checkout but ``kvsig``.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

import numpy as np
import torch

import kvsig

SEED = 0


class Memory:
    """Random bytes on both sides, allocated once and as large as the largest cell so far."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.near = self.far = torch.empty(0, dtype=torch.uint8)

    def sides(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Device and host memory of so many bytes, each filled with bytes of its own."""
        if self.near.numel() < count:
            self.near = self.far = torch.empty(0, dtype=torch.uint8)
            self.near = torch.empty(count, dtype=torch.uint8, device=self.device)
            pinned = self.device.type == "cuda"
            self.far = torch.empty(count, dtype=torch.uint8, pin_memory=pinned)
        words = torch.empty(-(-count // 8), dtype=torch.int64, device=self.device)
        for side in (self.near, self.far):
            side[:count].copy_(words.random_(-(2**63), None).view(torch.uint8)[:count])
        return self.near[:count], self.far[:count]


class Transfer:
    """One cell: a cache, the pages that move, and a call that moves them."""

    def __init__(self, cell: dict[str, Any], memory: Memory, stream: Any) -> None:
        kinds, layers = cell["kinds"], cell["layers"]
        pages, width = cell["pages"], cell["page_bytes"]
        near, far = memory.sides(kinds * layers * 2 * pages * width)
        self.near = near.view(kinds, layers, 2 * pages, width)
        if cell["layout"] == "page_first_direct":
            self.host = far.view(kinds, 2 * pages, layers, 1, width)
        else:
            self.host = far.view(self.near.shape)
        self.cell, self.stream = cell, stream
        groups = [list(kind.unbind(0)) for kind in self.near.unbind(0)]
        pools = list(self.host.unbind(0))
        self.cache = kvsig.PagedKVCache(
            device=tuple(groups) if kinds == 2 else groups[0],
            host=tuple(pools) if kinds == 2 else pools[0],
            layout=cell["layout"],
            page_size=1,
        )
        rng = np.random.default_rng(SEED)
        self.here, self.there = (rng.permutation(2 * pages)[:pages] for _ in range(2))
        self.calls = [None] if cell["scope"] == "all" else list(range(layers))

    def __call__(self) -> None:
        for layers in self.calls:
            if self.cell["direction"] == "offload":
                self.cache.offload(self.here, self.there, layers=layers, stream=self.stream)
            else:
                self.cache.load(self.there, self.here, layers=layers, stream=self.stream)

    def wrong(self) -> int:
        """Bytes of the pages that moved which are not alike on both sides."""
        host = self.host
        if self.cell["layout"] == "page_first_direct":
            host = host[:, :, :, 0].transpose(1, 2)
        near = self.near[:, :, torch.from_numpy(self.here).to(self.near.device)].cpu()
        return int((near != host[:, :, torch.from_numpy(self.there)]).sum())


def time_block(move: Transfer, runs: int, real: bool) -> dict[str, list[float]]:
    """Time runs, behind one that is not timed."""
    move()
    found: dict[str, list[float]] = {"host_ms": []} | ({"ms": []} if real else {})
    for _ in range(runs):
        if real:
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(move.stream)
        else:
            move.stream.synchronize()
        begin = time.perf_counter()
        move()
        found["host_ms"].append((time.perf_counter() - begin) * 1e3)
        if real:
            end.record(move.stream)
            end.synchronize()
            found["ms"].append(start.elapsed_time(end))
    move.stream.synchronize()
    return found


def main() -> None:
    real = not kvsig.info()["emulated"]
    device = torch.device("cuda" if real else "cpu")
    if real:
        stream: Any = torch.cuda.Stream()
    else:
        from kvsig import emulated

        stream = emulated.Stream()
    memory = Memory(device)
    shown, move = None, None
    for line in sys.stdin:
        asked = json.loads(line)
        wrong = 0
        if asked["cell"] != shown:
            move, shown = Transfer(asked["cell"], memory, stream), asked["cell"]
            if real:
                torch.cuda.synchronize()
            move()
            stream.synchronize()
            wrong = move.wrong()
        gc.disable()
        answer = time_block(move, asked["runs"], real)
        gc.enable()
        print(json.dumps(answer | {"wrong": wrong, "kvsig": kvsig.__file__}), flush=True)


if __name__ == "__main__":
    main()
