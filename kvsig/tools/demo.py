"""The main job, checked byte by byte: what ``kvsig demo`` runs.

A KV cache of a real model's shape is filled with random bytes, offloaded from random device
pages to random host pages, clobbered on the device, and loaded to other device pages. Then
every page of both sides is compared: those that had to move, and those that had to stay.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

import kvsig
from kvsig import registry
from kvsig.tools.measuring import make_stream
from kvsig.tools.models import Model
from kvsig.tools.report import Progress, bytes_text
from kvsig.tools.runtimes import BATCH, real_device

__all__ = ["Cache", "Job", "bound_runtime", "default_tokens"]

EMULATED_TOKENS = 512
GPU_TOKENS = 16384
GPU_BYTES = 1 << 30
#: Written over the offloaded device pages, and found in host pages before anything moves.
CLOBBER, VACANT = 0x5A, 0xA5
#: At most so many bytes are moved by the single copy that speeds are compared with.
ONE_COPY_BYTES = 1 << 30

T = TypeVar("T")
Stream = Any  # torch.cuda.Stream or kvsig.emulated.Stream


def bound_runtime(spec: str | None = None) -> dict[str, Any]:
    """Say what kvsig is bound to, as far as it matters to page copies.

    Parameters
    ----------
    spec : str, optional
        The runtime that was asked for, where it was not KVSIG_CUDART.

    Returns
    -------
    dict
        ``function`` is a sentence on the batch function: its prototype, or why it is not used;
        ``batches`` says whether copies can go out in batches.

    Raises
    ------
    ValueError
        If the runtime is a real one and torch sees no GPU.
    """
    real = real_device()
    info = kvsig.info()
    rows = {entry["name"]: entry for entry in info["functions"]}
    table = registry.load().functions
    name, version = BATCH, info["runtime_version"]
    if info["route"] == "driver":
        # Only what stands in for the batch function is called on this route.
        name = next(entry.name for entry in table.values() if entry.stands_in_for == BATCH)
        version = info["driver_version"]
    batch = rows[name]
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
    return {
        "spec": spec or os.environ.get("KVSIG_CUDART"),
        "library": info["library"],
        "found": info["found"],
        "emulated": info["emulated"],
        "device": torch.cuda.get_device_name() if real else None,
        "runtime_version": info["runtime_version"],
        "driver_version": info["driver_version"],
        "function": function,
        "batches": info["batch"]["path"] == "batch",
        "variant": batch["variant"],
        "parameters": parameters,
    }


def default_tokens(model: Model, emulated: bool) -> int:
    """Choose the tokens where none are asked for."""
    if emulated:
        return EMULATED_TOKENS
    tokens = GPU_TOKENS
    while tokens * model.token_bytes < GPU_BYTES:
        tokens *= 2
    return tokens


class Cache:
    """A KV cache on both sides, and the pages that will move.

    Parameters
    ----------
    model : Model
        Shape of the cache.
    tokens : int
        Tokens that move, rounded up to whole pages.
    page_size : int
        Tokens per page.
    layout : {"page_first_direct", "layer_first"}
        Layout of the host pool.
    seed : int
        Of the choice of pages, and of the bytes.
    emulated : bool
        Whether the "device" is host memory.

    Attributes
    ----------
    device : list of list of Tensor
        The layers' tensors on the device, for each of K and V, or for the latent.
    host : list of Tensor
        The pools on the host, likewise.
    sources, destinations : ndarray
        Device pages that are offloaded, and those that are loaded to; disjoint.
    host_pages, host_spare : ndarray
        Host pages in between, and those that have no part.
    """

    def __init__(
        self, model: Model, tokens: int, page_size: int, layout: str, seed: int, emulated: bool
    ) -> None:
        self.model = model
        self.page_size = page_size
        self.layout = layout
        self.seed = seed
        self.emulated = emulated
        self.target = torch.device("cpu" if emulated else f"cuda:{torch.cuda.current_device()}")
        self.device: list[list[torch.Tensor]] = []
        self.host: list[torch.Tensor] = []

        self.pages = -(-tokens // page_size)
        self.tokens = self.pages * page_size
        spare = max(1, self.pages // 16)
        self.device_count = 2 * self.pages + spare
        self.device_spare = spare
        self.host_count = self.pages + spare
        self.check_memory()
        rng = np.random.default_rng(seed)
        order = rng.permutation(self.device_count)
        self.sources: npt.NDArray[np.int64] = order[: self.pages]
        self.destinations: npt.NDArray[np.int64] = order[self.pages : 2 * self.pages]
        order = rng.permutation(self.host_count)
        self.host_pages: npt.NDArray[np.int64] = order[: self.pages]
        self.host_spare: npt.NDArray[np.int64] = order[self.pages :]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in one tensor of one layer."""
        return self.page_size * self.model.plane_token_bytes

    @property
    def bytes(self) -> int:
        """Bytes that move, each way."""
        return self.tokens * self.model.token_bytes

    def check_memory(self) -> None:
        """Refuse a cache that does not fit, before anything is allocated."""
        plane = self.device_count * self.page_bytes
        device = plane * self.model.layers * self.model.tensors + 3 * plane
        pool = self.host_count * self.page_bytes * self.model.layers
        if self.target.type == "cuda":
            # torch rounds pinned blocks up to a power of two.
            host = (1 << (pool - 1).bit_length()) * self.model.tensors
            device += min(self.bytes, ONE_COPY_BYTES)
            self.require(device, torch.cuda.mem_get_info(self.target)[0], "GPU")
        else:
            host = pool * self.model.tensors + device
        free = available_memory()
        if free is not None:
            self.require(host, free, "host")

    def require(self, needed: int, free: int, kind: str) -> None:
        """Refuse a cache for which there is too little memory."""
        if needed > free:
            raise ValueError(
                f"a cache of {self.tokens:,} tokens needs {bytes_text(needed)} of {kind} memory "
                f"and {bytes_text(free)} is free; ask for fewer --tokens"
            )

    def allocate(self, progress: Progress) -> None:
        """Make the tensors: random bytes on the device, a fixed byte on the host."""
        model, slots = self.model, self.device_count * self.page_size
        pinned = self.target.type == "cuda"
        shape: tuple[int, ...] = (model.layers, self.host_count * self.page_size)
        if self.layout == "page_first_direct":
            shape = (self.host_count, model.layers, self.page_size)
        shape += (model.heads, model.width)
        for _ in progress.through(range(model.tensors), "allocating host memory"):
            pool = torch.empty(shape, dtype=torch.bfloat16, pin_memory=pinned)
            pool.view(torch.uint8).fill_(VACANT)
            self.host.append(pool)
        self.device = [
            [
                torch.empty(
                    (slots, model.heads, model.width), dtype=torch.bfloat16, device=self.target
                )
                for _ in range(model.layers)
            ]
            for _ in range(model.tensors)
        ]
        for number, _, tensor in progress.through(self.planes(), "filling the cache"):
            self.words(tensor).copy_(self.reference(number))

    def planes(self) -> list[tuple[int, str, torch.Tensor]]:
        """List number, name and device tensor of each plane: each layer's K, V or latent."""
        kinds = ("latent",) if self.model.latent else ("K", "V")
        return [
            (kind * self.model.layers + layer, f"layer {layer} {kinds[kind]}", tensor)
            for kind, tensors in enumerate(self.device)
            for layer, tensor in enumerate(tensors)
        ]

    def words(self, tensor: torch.Tensor) -> torch.Tensor:
        """View a plane as 8-byte words, one row per page."""
        return tensor.view(torch.int64).view(-1, self.page_bytes // 8)

    def host_words(self, number: int) -> torch.Tensor:
        """View a plane of the host pool as 8-byte words, one row per page."""
        kind, layer = divmod(number, self.model.layers)
        words = self.host[kind].view(torch.int64)
        if self.layout == "page_first_direct":
            return words.view(self.host_count, self.model.layers, -1)[:, layer]
        return words.view(self.model.layers, self.host_count, -1)[layer]

    def reference(self, number: int) -> torch.Tensor:
        """Make the random bytes of a plane, the same at each call, as :meth:`words` has them."""
        generator = torch.Generator(self.target).manual_seed(self.seed * 1_000_003 + number)
        words = torch.empty(
            (self.device_count, self.page_bytes // 8), dtype=torch.int64, device=self.target
        )
        return words.random_(-(2**63), None, generator=generator)

    def index(self, pages: npt.NDArray[np.int64]) -> torch.Tensor:
        """Put page numbers where the device's tensors are."""
        return torch.from_numpy(pages).to(self.target)

    def clobber(self) -> None:
        """Overwrite the device pages that were offloaded."""
        sources = self.index(self.sources)
        for _, _, tensor in self.planes():
            self.words(tensor).index_fill_(0, sources, repeated(CLOBBER))

    def check_host(self, progress: Progress) -> list[str]:
        """Compare every host page with what an offload must leave there.

        Returns
        -------
        list of str
            What is wrong.
        """
        sources = self.index(self.sources)
        taken, spare = torch.from_numpy(self.host_pages), torch.from_numpy(self.host_spare)
        wrong = []
        for number, name, _ in progress.through(self.planes(), "comparing host pages"):
            expected = self.reference(number)[sources]
            words = self.host_words(number)
            arrived = words.index_select(0, taken).to(self.target)
            for row in differing(arrived, expected):
                wrong.append(
                    f"{name}: host page {self.host_pages[row]} does not hold "
                    f"device page {self.sources[row]}"
                )
            untouched = words.index_select(0, spare)
            for row in differing(untouched, torch.full_like(untouched, repeated(VACANT))):
                wrong.append(f"{name}: host page {self.host_spare[row]} was written")
        return wrong

    def check_device(self, progress: Progress) -> list[str]:
        """Compare every device page with what offload, clobbering and load must leave there.

        Returns
        -------
        list of str
            What is wrong.
        """
        sources, destinations = self.index(self.sources), self.index(self.destinations)
        came_from = dict(zip(self.destinations.tolist(), self.sources.tolist(), strict=True))
        wrong = []
        for number, name, tensor in progress.through(self.planes(), "comparing device pages"):
            expected = self.reference(number)
            moved = expected[sources]
            expected[destinations] = moved
            expected.index_fill_(0, sources, repeated(CLOBBER))
            for page in differing(self.words(tensor), expected):
                if page in came_from:
                    wrong.append(
                        f"{name}: device page {page} does not hold what page {came_from[page]} held"
                    )
                else:
                    wrong.append(f"{name}: device page {page} was written")
        return wrong


def repeated(byte: int) -> int:
    """Repeat a byte over a signed 8-byte word."""
    return int.from_bytes(bytes([byte]) * 8, "little", signed=True)


def differing(actual: torch.Tensor, expected: torch.Tensor) -> list[int]:
    """Rows in which two tensors differ."""
    if torch.equal(actual, expected):
        return []
    rows: list[int] = (actual != expected).any(dim=1).nonzero().flatten().tolist()
    return rows


class Job:
    """One offload and load of one cache, timed where there is a GPU."""

    def __init__(self, cache: Cache, path: str, runs: int, progress: Progress) -> None:
        self.cache = cache
        self.path = path
        self.runs = runs
        self.progress = progress

    def run(self) -> dict[str, Any]:
        """Fill, offload, clobber, load, and compare.

        Returns
        -------
        dict
            ``offload`` and ``load``, each with the report and the timings; ``wrong``, a list
            of texts.
        """
        cache = self.cache
        cache.allocate(self.progress)
        single = cache.model.latent
        paged = kvsig.PagedKVCache(
            device=cache.device[0] if single else tuple(cache.device),
            host=cache.host[0] if single else tuple(cache.host),
            layout=cache.layout,
            page_size=cache.page_size,
        )
        stream = make_stream(cache.target)
        one_copy = {} if cache.emulated else self.one_copy(stream)
        options = {"stream": stream, "path": self.path}
        offload = self.transfer(
            "offload", stream, lambda: paged.offload(cache.sources, cache.host_pages, **options)
        )
        wrong = cache.check_host(self.progress)
        cache.clobber()
        load = self.transfer(
            "load", stream, lambda: paged.load(cache.host_pages, cache.destinations, **options)
        )
        wrong += cache.check_device(self.progress)
        return {"offload": offload, "load": load, "one_copy": one_copy, "wrong": wrong}

    def transfer(self, name: str, stream: Stream, call: Callable[[], Any]) -> dict[str, Any]:
        """Run a transfer, once where it is not timed, and wait for it."""
        if self.cache.emulated:
            report = call()
            stream.synchronize()
            return report_dict(report)
        report, timing = self.time(name, stream, call)
        return report_dict(report) | timing | {"gb_per_s": rate(report.bytes, timing["ms"])}

    def time(
        self, name: str, stream: torch.cuda.Stream, call: Callable[[], T]
    ) -> tuple[T, dict[str, float]]:
        """Call once to warm up, then several times, and take medians.

        Returns
        -------
        result
            Of the last call.
        timing : dict
            ``ms`` from the first to the last work on the stream, and ``host_ms`` until the call
            had returned.
        """
        torch.cuda.synchronize(self.cache.target)
        result = call()
        stream.synchronize()
        elapsed, submitted = [], []
        for _ in self.progress.through(range(self.runs), name):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record(stream)
            begin = time.perf_counter()
            result = call()
            submitted.append((time.perf_counter() - begin) * 1e3)
            end.record(stream)
            end.synchronize()
            elapsed.append(start.elapsed_time(end))
        return result, {
            "ms": round(statistics.median(elapsed), 4),
            "host_ms": round(statistics.median(submitted), 4),
        }

    def one_copy(self, stream: torch.cuda.Stream) -> dict[str, Any]:
        """Time one big copy each way, the most that the link can give."""
        pool = self.cache.host[0].view(torch.uint8).view(-1)
        pinned = pool[: min(pool.numel(), ONE_COPY_BYTES)]
        scratch = torch.full_like(pinned, VACANT, device=self.cache.target)
        result: dict[str, Any] = {"bytes": scratch.numel()}
        for direction, destination, source in (
            ("offload", pinned, scratch),
            ("load", scratch, pinned),
        ):

            def call(to: torch.Tensor = destination, of: torch.Tensor = source) -> None:
                with torch.cuda.stream(stream):
                    to.copy_(of, non_blocking=True)

            _, timing = self.time(f"one copy ({direction})", stream, call)
            result[direction] = timing | {"gb_per_s": rate(scratch.numel(), timing["ms"])}
        return result


def report_dict(report: Any) -> dict[str, Any]:
    """Turn a transfer's report into JSON."""
    return {name: getattr(report, name) for name in ("path", "reason", "copies", "calls", "bytes")}


def rate(count: int, ms: float) -> float:
    """Bytes in milliseconds as GB/s."""
    return round(count / ms / 1e6, 2)


def available_memory() -> int | None:
    """Bytes of host memory that can be taken without swapping, where Linux tells."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
