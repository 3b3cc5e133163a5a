"""A soak of stream order: compute, offload, overwrite, load, compare, on one stream, unwaited.

``python benchmarks/soak.py --seconds 300`` uses the GPU where there is one, else the emulated
runtime (``KVSIG_CUDART`` chooses another). Epoch after epoch it makes a cache of random geometry
and queues some hundred operations on one stream without waiting for any. A model of both sides
does the same without kvsig: on a GPU torch's operators on the same stream, on the emulated runtime
NumPy on the host, where the operations are held back until the last is queued. Each comparison
counts bytes that differ. The last line is JSON; the exit status is 0 only without a mismatch.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import random
import sys
import time
from typing import Any, Protocol

import numpy as np
import torch

import kvsig
import kvsig.cache
from kvsig import _core, emulated

PAGE_SIZE = 4
#: Bytes of a token in K and V, or in the one latent.
WIDTHS = ((16, 16), (256, 256), (4096, 4096), (144,), (64, 32))
LAYOUTS = ("page_first_direct", "page_first", "layer_first")
PATHS = ("auto", *kvsig.cache.PATHS)


class Shape:
    """Random geometry of one epoch."""

    def __init__(self, rng: random.Random) -> None:
        self.layers = rng.choice([1, 2, 5])
        self.widths = rng.choice(WIDTHS)
        self.layout = rng.choice(LAYOUTS)
        self.device_pages = rng.choice([8, 32])
        self.host_pages = rng.choice([8, 48])

    def host_shape(self, width: int) -> tuple[int, ...]:
        """Shape of a host pool."""
        if self.layout == "layer_first":
            return self.layers, self.host_pages * PAGE_SIZE, width
        if self.layout == "page_first":
            return self.host_pages * PAGE_SIZE, self.layers, width
        return self.host_pages, self.layers, PAGE_SIZE, width


class Model(Protocol):
    """Both sides of a cache, what they must hold, and work on the stream other than kvsig's."""

    cache: kvsig.PagedKVCache
    stream: Any

    def compute(self, pages: list[int], layers: list[int]) -> None:
        """Queue work that writes device pages."""

    def moved(self, to_device: bool, dst: list[int], src: list[int], layers: list[int]) -> None:
        """Take notice of a transfer that is about to be queued."""

    def events(self, layers: list[int]) -> list[Any]:
        """Events for a load, one behind each layer."""

    def arrived(self, events: list[Any], layers: list[int]) -> None:
        """Queue a comparison of each layer behind its event."""

    def compare(self, pages: list[int], layers: list[int]) -> None:
        """Queue a comparison of device pages."""

    def finish(self) -> tuple[int, int]:
        """Wait, compare everything; bytes compared and bytes that differed."""


class OnGpu:
    """Torch's operators on the stream, beside a mirror of both sides in device memory."""

    def __init__(self, shape: Shape, rng: random.Random, stream: Any, device: str = "cuda") -> None:
        self.stream, self.on, self.layers = stream, torch.device(device), shape.layers
        self.side = torch.cuda.Stream() if device == "cuda" else None
        tokens = shape.device_pages * PAGE_SIZE
        pin = device == "cuda"
        self.groups = [
            [self._bytes(tokens, width) for _ in range(shape.layers)] for width in shape.widths
        ]
        self.pools = [
            torch.empty(shape.host_shape(width), dtype=torch.uint8, pin_memory=pin)
            for width in shape.widths
        ]
        for pool in self.pools:
            pool.copy_(self._bytes(*pool.shape))
        # (layers, pages, bytes of a page), in device memory both
        self.near = [torch.stack([self._paged(t) for t in group]) for group in self.groups]
        self.far = [self._host_paged(shape, pool.to(self.on)).clone() for pool in self.pools]
        self.wrong = torch.zeros((), dtype=torch.int64, device=self.on)
        self.compared = 0
        self.shape = shape
        latent = len(shape.widths) == 1
        self.cache = kvsig.PagedKVCache(
            self.groups[0] if latent else tuple(self.groups),
            self.pools[0] if latent else tuple(self.pools),
            shape.layout,
            PAGE_SIZE,
        )
        if device == "cuda":
            torch.cuda.synchronize()

    def _bytes(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.on)

    def _paged(self, layer: torch.Tensor) -> torch.Tensor:
        return layer.view(-1, PAGE_SIZE * layer.shape[-1])

    def _host_paged(self, shape: Shape, pool: torch.Tensor) -> torch.Tensor:
        width = PAGE_SIZE * pool.shape[-1]
        if shape.layout == "layer_first":
            return pool.view(shape.layers, shape.host_pages, width)
        if shape.layout == "page_first":
            rows = pool.view(shape.host_pages, PAGE_SIZE, shape.layers, -1).permute(2, 0, 1, 3)
            return rows.reshape(shape.layers, shape.host_pages, width)
        return pool.view(shape.host_pages, shape.layers, width).transpose(0, 1)

    def _index(self, pages: list[int]) -> torch.Tensor:
        index = torch.tensor(pages, dtype=torch.int64, pin_memory=self.on.type == "cuda")
        return index.to(self.on, non_blocking=True)

    def _within(self, stream: Any) -> Any:
        return torch.cuda.stream(stream)

    def compute(self, pages: list[int], layers: list[int]) -> None:
        """Multiply and add, modulo 256, on the pages and on the mirror."""
        with self._within(self.stream):
            index = self._index(pages)
            for group, mirror in zip(self.groups, self.near, strict=True):
                for layer in layers:
                    for pages_of in (self._paged(group[layer]), mirror[layer]):
                        pages_of[index] = pages_of[index] * 5 + (layer + 77)

    def moved(self, to_device: bool, dst: list[int], src: list[int], layers: list[int]) -> None:
        """Copy between the mirrors."""
        with self._within(self.stream):
            to, origin = self._index(dst), self._index(src)
            for near, far in zip(self.near, self.far, strict=True):
                sides = (near, far) if to_device else (far, near)
                for layer in layers:
                    sides[0][layer][to] = sides[1][layer][origin]

    def events(self, layers: list[int]) -> list[Any]:
        """Torch's own."""
        return [torch.cuda.Event() for _ in layers]

    def arrived(self, events: list[Any], layers: list[int]) -> None:
        """Compare each layer on another stream behind its event; the first stream waits."""
        assert self.side is not None
        for event, layer in zip(events, layers, strict=True):
            self.side.wait_event(event)
            self._compare(self.side, slice(None), [layer])
        self.stream.wait_stream(self.side)

    def compare(self, pages: list[int], layers: list[int]) -> None:
        """Count bytes of pages that differ, on the stream."""
        with self._within(self.stream):
            index = self._index(pages)
        self._compare(self.stream, index, layers)

    def _compare(self, stream: Any, index: Any, layers: list[int]) -> None:
        with self._within(stream):
            for group, mirror in zip(self.groups, self.near, strict=True):
                for layer in layers:
                    now, want = self._paged(group[layer])[index], mirror[layer][index]
                    self.wrong += (now != want).sum()
                    self.compared += now.numel()

    def finish(self) -> tuple[int, int]:
        """Compare both sides whole."""
        self._compare(self.stream, slice(None), list(range(self.layers)))
        if self.on.type == "cuda":
            torch.cuda.synchronize()
        wrong = int(self.wrong)
        for pool, mirror in zip(self.pools, self.far, strict=True):
            now = self._host_paged(self.shape, pool)
            wrong += int((now != mirror.cpu()).sum())
            self.compared += pool.numel()
        return self.compared, wrong


class OnEmulated:
    """Copies that the emulated runtime queues, beside a mirror in NumPy."""

    SNAPSHOT = 1 << 22

    def __init__(self, shape: Shape, rng: random.Random, stream: emulated.Stream) -> None:
        self.rng, self.stream, self.layers = rng, stream, shape.layers
        made = np.random.default_rng(rng.getrandbits(32))
        self.groups = [
            [
                made.integers(0, 256, (shape.device_pages * PAGE_SIZE, width), dtype=np.uint8)
                for _ in range(shape.layers)
            ]
            for width in shape.widths
        ]
        self.pools = [
            made.integers(0, 256, shape.host_shape(width), dtype=np.uint8) for width in shape.widths
        ]
        self.near = [[self._paged(a).copy() for a in group] for group in self.groups]
        self.views = [self._host_paged(shape, pool) for pool in self.pools]
        pages = shape.host_pages
        self.far = [[view.reshape(pages, -1).copy() for view in group] for group in self.views]
        # As allocated and registered memory, which the kernel can be let loose on.
        self.marked = [array for group in self.groups for array in group] + self.pools
        for array in self.marked:
            mark = stream.control.mark_device if array.ndim == 2 else stream.control.mark_host
            mark(array.ctypes.data, array.nbytes)
        self.fresh = made.integers(0, 256, 1 << 20, dtype=np.uint8)
        self.snapshots = np.zeros(self.SNAPSHOT, np.uint8)
        self.expected: list[tuple[int, np.ndarray]] = []
        self.used = 0
        latent = len(shape.widths) == 1
        device = [[torch.from_numpy(a) for a in group] for group in self.groups]
        host = [torch.from_numpy(pool) for pool in self.pools]
        self.cache = kvsig.PagedKVCache(
            device[0] if latent else tuple(device),
            host[0] if latent else tuple(host),
            shape.layout,
            PAGE_SIZE,
        )
        stream.hold()

    def _paged(self, layer: np.ndarray) -> np.ndarray:
        return layer.reshape(-1, PAGE_SIZE * layer.shape[-1])

    def _host_paged(self, shape: Shape, pool: np.ndarray) -> list[np.ndarray]:
        if shape.layout == "layer_first":
            return [self._paged(layer) for layer in pool]
        if shape.layout == "page_first":
            rows = pool.reshape(shape.host_pages, PAGE_SIZE, shape.layers, -1)
            return [rows[:, :, layer] for layer in range(shape.layers)]
        flat = pool.reshape(shape.host_pages, shape.layers, -1)
        return [flat[:, layer] for layer in range(shape.layers)]

    def _queue(self, to: int, origin: int, count: int) -> None:
        kvsig.call("cudaMemcpyAsync", dst=to, src=origin, count=count, kind=4,
                   stream=self.stream.cuda_stream)  # fmt: skip

    def _each(self, pages: list[int], layers: list[int]) -> Any:
        for group, mirror in zip(self.groups, self.near, strict=True):
            for layer in layers:
                paged = self._paged(group[layer])
                for page in pages:
                    yield paged[page], mirror[layer], page

    def compute(self, pages: list[int], layers: list[int]) -> None:
        """Write bytes that are nowhere else."""
        for page_bytes, mirror, page in self._each(pages, layers):
            at = self.rng.randrange(len(self.fresh) - page_bytes.size)
            source = self.fresh[at : at + page_bytes.size]
            self._queue(page_bytes.ctypes.data, source.ctypes.data, source.size)
            mirror[page] = source

    def moved(self, to_device: bool, dst: list[int], src: list[int], layers: list[int]) -> None:
        """Copy between the mirrors."""
        for near, far in zip(self.near, self.far, strict=True):
            to, origin = (near, far) if to_device else (far, near)
            for layer in layers:
                to[layer][dst] = origin[layer][src]

    def events(self, layers: list[int]) -> list[Any]:
        """What queues a comparison of its layer when it is recorded."""
        model = self

        class Event:
            def __init__(self, layer: int) -> None:
                self.layer = layer

            def record(self, stream: Any) -> None:
                model.compare(list(range(len(model.near[0][0]))), [self.layer])

        return [Event(layer) for layer in layers]

    def arrived(self, events: list[Any], layers: list[int]) -> None:
        """The events have done it."""

    def compare(self, pages: list[int], layers: list[int]) -> None:
        """Queue copies of pages into a place of their own, for a look at them in the end."""
        for page_bytes, mirror, page in self._each(pages, layers):
            if self.used + page_bytes.size > self.SNAPSHOT:
                return
            to = self.snapshots[self.used : self.used + page_bytes.size]
            self._queue(to.ctypes.data, page_bytes.ctypes.data, to.size)
            self.expected.append((self.used, mirror[page].copy()))
            self.used += page_bytes.size

    def finish(self) -> tuple[int, int]:
        """Let the queue go, wait, and compare snapshots and both sides."""
        self.stream.release()
        self.stream.synchronize()
        compared = wrong = 0
        pairs = [(self.snapshots[at : at + len(want)], want) for at, want in self.expected]
        for group, mirror in zip(self.groups, self.near, strict=True):
            pairs += [(self._paged(a), b) for a, b in zip(group, mirror, strict=True)]
        for views, mirrors in zip(self.views, self.far, strict=True):
            pairs += list(zip(views, mirrors, strict=True))
        for now, want in pairs:
            compared += want.size
            wrong += int((now.reshape(want.shape) != want).sum())
        for array in self.marked:
            self.stream.control.unmark(array.ctypes.data)
        return compared, wrong


class Totals:
    """What was done."""

    def __init__(self) -> None:
        self.operations: collections.Counter[str] = collections.Counter()
        self.paths: collections.Counter[str] = collections.Counter()
        self.epochs = self.moved = self.compared = self.mismatches = 0

    def took(self, report: kvsig.Report) -> None:
        """Count a transfer."""
        self.paths[report.path] += 1
        self.moved += report.bytes


def step(model: Model, shape: Shape, rng: random.Random, totals: Totals) -> None:
    """Queue one operation, or one for each step of the round trip of some pages."""
    layers = sorted(rng.sample(range(shape.layers), rng.randint(1, shape.layers)))
    given = None if len(layers) == shape.layers else layers
    count = rng.randint(1, min(shape.device_pages, shape.host_pages))
    near, far = rng.sample(range(shape.device_pages), count), _pages(rng, shape.host_pages, count)
    path = rng.choice(PATHS)

    def go(move: Any, *arguments: Any) -> None:
        try:
            totals.took(move(*arguments, path=path))
        except kvsig.BindError:  # nothing was queued
            totals.operations[f"{path} refused"] += 1
            totals.took(move(*arguments))

    cache, stream = model.cache, model.stream
    kind = rng.choice(["round trip", "round trip", "compute", "offload", "load", "layered load"])
    totals.operations[kind] += 1
    if kind in ("compute", "round trip"):
        model.compute(near, layers)
    if kind in ("offload", "round trip"):
        model.moved(False, far, near, layers)
        go(cache.offload, near, far, given, stream)
    if kind == "round trip":
        model.compute(near, layers)  # what was offloaded is overwritten at once
        near = rng.sample(range(shape.device_pages), count)
    if kind in ("load", "round trip"):
        model.moved(True, near, far, layers)
        go(cache.load, far, near, given, stream)
        model.compare(near, layers)
    if kind == "layered load":
        model.moved(True, near, far, layers)
        events = model.events(layers)
        go(functools.partial(cache.load, events=events), far, near, layers, stream)
        model.arrived(events, layers)


def _pages(rng: random.Random, pages: int, count: int) -> list[int]:
    """Page numbers: one after the other, or as they come."""
    if rng.random() < 0.5:
        first = rng.randrange(pages - count + 1)
        found = list(range(first, first + count))
        return found[::-1] if rng.random() < 0.3 else found
    return rng.sample(range(pages), count)


def soak(seconds: float, seed: int, make: Any, steps: int = 60) -> Totals:
    """Run epochs until the time is up, or something differed."""
    totals, end = Totals(), time.monotonic() + seconds
    while time.monotonic() < end and not totals.mismatches:
        rng = random.Random(f"{seed} {totals.epochs}")
        shape = Shape(rng)
        model = make(shape, rng)
        for _ in range(steps):
            step(model, shape, rng, totals)
        compared, wrong = model.finish()
        totals.epochs += 1
        totals.compared += compared
        totals.mismatches += wrong
    return totals


def main(argv: list[str] | None = None) -> int:
    """Soak for a while, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="time budget (60)")
    parser.add_argument("--seed", type=int, default=0, help="epoch i is made by seed and i (0)")
    args = parser.parse_args(argv)
    if torch.cuda.is_available():
        stream: Any = torch.cuda.Stream()
        name = torch.cuda.get_device_name()
        totals = soak(args.seconds, args.seed, lambda shape, rng: OnGpu(shape, rng, stream))
    else:
        os.environ.setdefault("KVSIG_CUDART", "emulated:13.0")
        stream = emulated.Stream()
        name = "emulated"
        totals = soak(args.seconds, args.seed, lambda shape, rng: OnEmulated(shape, rng, stream))
    print(
        json.dumps(
            {
                "device": name,
                "runtime": _core.runtime_version(),
                "driver": _core.driver_version(),
                "seed": args.seed,
                "seconds": args.seconds,
                "epochs": totals.epochs,
                "operations": dict(totals.operations),
                "paths": dict(totals.paths),
                "bytes_moved": totals.moved,
                "bytes_compared": totals.compared,
                "mismatches": totals.mismatches,
            }
        )
    )
    return 1 if totals.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
