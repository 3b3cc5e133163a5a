"""The main job, checked byte by byte: what ``kvsig demo`` runs.

A KV cache of a real model's shape is filled with random bytes, offloaded from random device
pages to random host pages, clobbered on the device, and loaded to other device pages. Then
every page of both sides is compared: those that had to move, and those that had to stay.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kvsig
from kvsig import registry
from kvsig.tools.cells import LIMIT, WAYS, Cell, shape_of
from kvsig.tools.jobs import Job, Memory
from kvsig.tools.measuring import make_stream, target, time_once
from kvsig.tools.methods import METHODS
from kvsig.tools.models import Model
from kvsig.tools.report import Progress, bytes_text
from kvsig.tools.runtimes import BATCH, real_device

__all__ = ["Demo", "bound_runtime", "default_tokens"]

EMULATED_TOKENS = 512
GPU_TOKENS = 16384
GPU_BYTES = 1 << 30
#: Written over the device pages that were offloaded.
CLOBBER = 0x5A
#: Pools of a side that comparing takes on the device, beside the one that is transferred.
COMPARED = 6


def bound_runtime() -> dict[str, Any]:
    """Say what kvsig is bound to, as far as it matters to page copies.

    ``function`` is a sentence on the batch function: its prototype, or why it is not used;
    ``batches`` says whether copies can go out in batches.
    """
    real = real_device()
    info = kvsig.info()
    table = registry.load().functions
    name, version = BATCH, info["runtime_version"]
    if info["route"] == "driver":
        # Only what stands in for the batch function is called on this route.
        name = next(entry.name for entry in table.values() if entry.stands_in_for == BATCH)
        version = info["driver_version"]
    batch = next(row for row in info["functions"] if row["name"] == name)
    variant = table[name].select(version)
    parameters = len(variant.params) if variant else None
    if batch["status"] == "bound":
        function = f"{name}, prototype of {batch['variant']}: {parameters} parameters"
        if name != BATCH:
            function += ", the driver's own"
    else:
        function = f"{BATCH} is {batch['status']}: {batch['why']}"
        if info["route"] == "driver":
            function += f"; {info['batch']['why']}"
    known = ("library", "found", "emulated", "runtime_version", "driver_version")
    return {key: info[key] for key in known} | {
        "device": torch.cuda.get_device_name() if real else None,
        "function": function,
        "batches": info["batch"]["path"] == "batch",
        "variant": batch["variant"],
        "parameters": parameters,
    }


def default_tokens(model: Model, emulated: bool) -> int:
    """Choose the tokens where none are asked for."""
    if emulated:
        return EMULATED_TOKENS
    return max(GPU_TOKENS, -(-GPU_BYTES // model.token_bytes))


class Demo:
    """A KV cache on both sides, some pages of it that move, and some that have no part.

    Raises
    ------
    ValueError
        If there is too little memory, before anything is allocated.
    """

    def __init__(self, model: Model, tokens: int, page_size: int, layout: str, seed: int) -> None:
        self.seed = seed
        self.pages = -(-tokens // page_size)
        self.tokens = self.pages * page_size
        self.bytes = self.tokens * model.token_bytes
        # A cell has twice the pages that it moves on each side. It is made somewhat larger, so
        # that there are pages of no direction on the device too.
        ours = self.pages + max(1, self.pages // 16)
        shape = shape_of(model, page_size)
        self.cell = Cell(pages=ours, direction="both", layout=layout, **shape)
        #: Side -> pages that have no part.
        self.spare = {"device": 2 * (ours - self.pages), "host": 2 * ours - self.pages}
        self.device = target()
        self.check_memory()

    def check_memory(self) -> None:
        """Refuse a cache that does not fit."""
        host, device = self.cell.pool_bytes, (1 + COMPARED) * self.cell.pool_bytes
        if self.device.type == "cuda":
            self.require(device, torch.cuda.mem_get_info(self.device)[0], "GPU")
            host = 1 << (host - 1).bit_length()  # torch rounds pinned blocks up
        else:
            host += device
        self.require(host, available_memory(), "host")

    def require(self, needed: int, free: int | None, side: str) -> None:
        """Refuse a cache for which there is too little memory, where it is known how much."""
        if free is not None and needed > free:
            raise ValueError(
                f"a cache of {self.tokens:,} tokens needs {bytes_text(needed)} of {side} memory "
                f"and {bytes_text(free)} is free; ask for fewer --tokens"
            )

    def run(self, path: str, runs: int) -> dict[str, Any]:
        """Fill, offload, clobber, load, and compare; then time both ways where there is a GPU.

        Returns the report and times of each way, the times of one big copy, and what is wrong.
        """
        memory = Memory(self.device, self.cell.pool_bytes, self.seed)
        job = Job(self.cell, memory, self.seed)
        (near, far), (other, _) = job.pages["offload"], job.pages["load"]
        count = self.pages
        job.pages = {"offload": (near[:count], far[:count]), "load": (other[:count], far[:count])}
        job.fill()
        job.before = job.after  # nothing is undone: the memory of a second copy is free
        stream = make_stream(self.device)
        result: dict[str, Any] = {}
        wrong: list[str] = []
        with Progress("kvsig demo") as progress:
            for done, way in enumerate(WAYS):
                progress.show(done, len(WAYS), "moving and comparing")
                if way == "load":
                    job.clobber("offload", CLOBBER)
                job.expect(way)
                if memory.real:
                    torch.cuda.synchronize(self.device)
                result[way] = job.transfer(path, way, stream).to_dict()
                stream.synchronize()
                wrong += [text for text in job.wrong() if text not in wrong]
        job.drop()
        result["one_copy"] = {}
        if memory.real:
            # One big copy is the most that the link can give.
            limit = METHODS[LIMIT](job)
            for way in WAYS:
                result["one_copy"]["bytes"] = size = limit(way, stream).bytes
                result["one_copy"][way] = timed(partial(limit, way, stream), size, stream, runs)
                move = partial(job.transfer, path, way, stream)
                result[way] |= timed(move, self.bytes, stream, runs)
        return result | {"wrong": wrong}


def timed(submit: Callable[[], Any], moved: int, stream: Any, runs: int) -> dict[str, float]:
    """Time a call several times: medians of ms, of ms on the host, and the rate that it makes."""
    times = [time_once(stream, submit) for _ in range(runs)]
    ms, host_ms = (statistics.median(column) for column in zip(*times, strict=True))
    rate = round(moved / ms / 1e6, 2)
    return {"ms": round(ms, 4), "host_ms": round(host_ms, 4), "gb_per_s": rate}


def available_memory() -> int | None:
    """Bytes of host memory that can be taken without swapping, where Linux tells."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) << 10 if found else None
