"""What the page-copy kernel is asked for, measured through kvsig's public functions.

    PYTHONPATH=. python benchmarks/kernel.py --json FILE [--parts pools,layered]

Needs a GPU. Every transfer is on a stream of its own; figures are medians, bytes are compared, and
the limit, one copy of 1 GiB each way, is measured in the same run. A part that fails loses no
other.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvsig
from kvsig import _core
from kvsig.tools.measuring import SCHEMA
from kvsig.tools.report import bytes_text, provenance, source_text, table, write_json

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
WAYS = ("load", "offload")
RUNS = 7
#: A figure counts as met when it is this near.
TOLERANCE = 0.03
#: Host memory holds this before an offload, so that what is not to be written can be seen.
FILL = 0xA5
#: Layers of the caches of `pools`, and most bytes that one transfer of theirs moves.
LAYERS, MOST_MOVED = 32, GIB // 2


class Results:
    """Rows of one run."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.part = ""
        self.rows: list[dict[str, Any]] = []
        self.limits: dict[str, float] = {}
        self.problems: dict[str, str] = {}

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(
        self,
        what: str,
        value: float,
        unit: str,
        least: float | None = None,
        most: float | None = None,
        note: str = "",
    ) -> None:
        """Add a figure, and whether it is what it is asked to be."""
        row = {"part": self.part, "what": what, "value": round(value, 4), "unit": unit}
        if least is not None:
            row |= {"least": least, "met": value >= least * (1 - TOLERANCE)}
        if most is not None:
            row |= {"most": most, "met": value <= most * (1 + TOLERANCE)}
        if note:
            row["note"] = note
        self.rows.append(row)


# --- Memory and caches ---------------------------------------------------------------------------


def random_bytes(count: int, device: torch.device) -> torch.Tensor:
    """Make random bytes on the GPU, where it takes no time."""
    made = torch.empty(count, dtype=torch.uint8, device=device)
    made.view(torch.int64).random_()
    return made


class Pool:
    """As much host memory as device memory.

    Parameters
    ----------
    size : int
        Bytes of each: a multiple of 1 GiB.
    device : torch.device
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.device = torch.empty(size, dtype=torch.uint8, device=device)

    def fill_host(self, constant: bool) -> None:
        """Fill it from the device: many times faster than the CPU could."""
        there = random_bytes(GIB, self.device.device)
        if constant:
            there.fill_(FILL)
        for start in range(0, self.size, GIB):
            self.host[start : start + GIB].copy_(there)
        torch.cuda.synchronize()


class Case:
    """A cache on a pool, and pages in random order.

    Parameters
    ----------
    pool : Pool
    width : int
        Bytes of a page of one layer.
    **options
        Of `kvsig.PagedKVCache`.
    """

    def __init__(self, pool: Pool, width: int, layers: int = LAYERS, **options: Any) -> None:
        self.pool, self.width, self.layers = pool, width, layers
        self.pages = pool.size // layers // width
        self.near = pool.device.view(layers, self.pages, width)
        self.cache = kvsig.PagedKVCache(
            list(self.near), pool.host.view(self.pages, layers, 1, width), page_size=1, **options
        )
        self.moved = min(self.pages // 2, MOST_MOVED // layers // width)
        rng = np.random.default_rng(width)
        self.device_pages = rng.permutation(self.pages)[: self.moved]
        self.host_pages = rng.permutation(self.pages)[: self.moved]
        self.bytes = self.moved * layers * width

    def submit(self, way: str, stream: torch.cuda.Stream, **options: Any) -> kvsig.Report:
        if way == "load":
            return self.cache.load(self.host_pages, self.device_pages, stream=stream, **options)
        return self.cache.offload(self.device_pages, self.host_pages, stream=stream, **options)

    def chunks(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Host pages as plain copies bring them to the device, and the first one's number."""
        each = max(1, GIB // (self.layers * self.width))
        host = self.pool.host.view(self.pages, self.layers, self.width)
        for start in range(0, self.pages, each):
            yield host[start : start + each].to(self.near.device), start

    def wrong(self, way: str) -> int:
        """Places that are not as they should be, moved or not; `prepare` came before."""
        near = torch.from_numpy(self.device_pages).to(self.near.device)
        far = torch.from_numpy(self.host_pages).to(self.near.device)
        wrong, untouched = 0, torch.ones(self.pages, dtype=torch.bool, device=self.near.device)
        untouched[near] = False
        for chunk, start in self.chunks():
            here = (far >= start) & (far < start + len(chunk))
            ours, theirs = near[here], far[here] - start
            for layer in range(self.layers):
                got, kept = chunk[theirs, layer], self.near[layer, ours]
                wrong += not torch.equal(got, kept)
            if way == "offload":
                rest = torch.ones(len(chunk), dtype=torch.bool, device=chunk.device)
                rest[theirs] = False
                wrong += bool((chunk[rest] != FILL).any())
        if way == "load":
            wrong += sum(bool(layer[untouched].any()) for layer in self.near)
        return wrong

    def prepare(self, way: str) -> None:
        """Put the destination into a known state; sources hold random bytes already."""
        if way == "load":
            self.pool.device.zero_()
        else:
            self.pool.fill_host(constant=True)
        torch.cuda.synchronize()


# --- Timing --------------------------------------------------------------------------------------


def timing_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()  # made now, not when it is needed
    return event


class Timer:
    """Times one submission: host time, and from the request to the end of its work, in µs."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.begin, self.end = timing_event(), timing_event()

    def __call__(self, submit: Callable[[], Any]) -> tuple[float, float]:
        self.stream.synchronize()
        self.begin.record(self.stream)
        start = time.perf_counter()
        submit()
        host = time.perf_counter() - start
        self.end.record(self.stream)
        self.end.synchronize()
        return host * 1e6, self.begin.elapsed_time(self.end) * 1e3


def medians(timer: Timer, submit: Callable[[], Any], runs: int = RUNS) -> tuple[float, float]:
    submit()
    found = [timer(submit) for _ in range(runs)]
    return tuple(statistics.median(column) for column in zip(*found, strict=True))  # type: ignore


class Products:
    """Matrix products on a stream of their own.

    Parameters
    ----------
    rows : int
        Of the left matrix; few of them are as a model decodes.
    inner : int
        Rows and columns of the right one.
    group : int
        Products between two events.
    """

    def __init__(self, device: torch.device, rows: int, inner: int = 8192, group: int = 1) -> None:
        self.stream, self.group = torch.cuda.Stream(device), group
        self.left = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
        self.right = torch.randn(inner, inner, device=device, dtype=torch.bfloat16)
        self.out = torch.empty(rows, inner, device=device, dtype=torch.bfloat16)
        torch.cuda.synchronize()

    def queue(self, count: int) -> None:
        with torch.cuda.stream(self.stream):
            for _ in range(count):
                torch.mm(self.left, self.right, out=self.out)

    def start(self, groups: int) -> list[torch.cuda.Event]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(groups + 1)]
        events[0].record(self.stream)
        for event in events[1:]:
            self.queue(self.group)
            event.record(self.stream)
        return events

    @staticmethod
    def times(events: Sequence[torch.cuda.Event]) -> list[float]:
        """Milliseconds of each group but the first ones, beside which nothing may run yet."""
        events[-1].synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)][4:]

    def alone(self, groups: int) -> float:
        self.times(self.start(groups))
        return statistics.median(self.times(self.start(groups)))

    def beside(
        self, groups: int, submit: Callable[[], Any], moved: int, stream: torch.cuda.Stream
    ) -> tuple[float, float]:
        """Median of a group beside transfers one behind the other, and their GB/s meanwhile."""
        events = self.start(groups)
        marks = [torch.cuda.Event(enable_timing=True)]
        marks[0].record(stream)
        while not events[-1].query():
            submit()
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record(stream)
            if len(marks) > 3:
                marks[-3].synchronize()
        torch.cuda.synchronize()
        length = events[0].elapsed_time(events[-1])
        inside = [mark for mark in marks if 0 < events[4].elapsed_time(mark) and
                  events[0].elapsed_time(mark) < length]  # fmt: skip
        if len(inside) < 3:
            raise RuntimeError(f"{len(inside)} transfers ended beside the products: too few")
        rate = moved * (len(inside) - 1) / inside[0].elapsed_time(inside[-1]) / 1e6
        return statistics.median(self.times(events)), rate


# --- Parts ---------------------------------------------------------------------------------------


class Bench:
    """The parts, and what they share."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.gpu = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream(self.gpu)
        self.timer = Timer(self.stream)

    def limit(self) -> None:
        """One copy of 1 GiB each way."""
        host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(GIB, dtype=torch.uint8, device=self.gpu)

        def copy(to: torch.Tensor, source: torch.Tensor) -> Callable[[], Any]:
            def submit() -> None:
                with torch.cuda.stream(self.stream):
                    to.copy_(source, non_blocking=True)

            return submit

        for way, submit in (("load", copy(device, host)), ("offload", copy(host, device))):
            self.results.limits[way] = GIB / medians(self.timer, submit)[1] / 1e3
            self.results.add(f"one copy of 1 GiB, {way}", self.results.limits[way], "GB/s")

    def first(self) -> None:
        """The first transfer after a cache was made, and the tenth."""
        pool = Pool(GIB, self.gpu)
        with torch.cuda.stream(self.stream):
            pool.device[:MIB].copy_(pool.host[:MIB], non_blocking=True)
        for path, width in (("kernel", 2 * KIB), ("auto", 2 * KIB), ("kernel", 2 * KIB + 4)):
            size = pool.size // (LAYERS * width) * LAYERS * width
            begin = time.perf_counter()
            case = Case(_part(pool, size), width)
            made = time.perf_counter() - begin
            case.device_pages, case.host_pages = case.device_pages[:64], case.host_pages[:64]
            torch.cuda.synchronize()
            times = []
            for _ in range(10):
                begin = time.perf_counter()
                case.submit("load", self.stream, path=path)
                self.stream.synchronize()
                times.append((time.perf_counter() - begin) * 1e6)
            name = f"path {path}, {width} B, 64 pages of {LAYERS} layers: first over tenth"
            note = f"first {times[0]:.0f} µs, tenth {times[9]:.0f}; made in {made * 1e3:.0f} ms"
            self.results.add(name, times[0] - times[9], "µs", most=100, note=note)

    def pools(self) -> None:
        """Pools of 1 GiB: all layers in one call, and layer by layer."""
        self._bandwidth(Pool(GIB, self.gpu), [512 << i for i in range(6)], self._asked_small)

    def large(self) -> None:
        """Pools of 16 GiB, the list in host memory."""
        asked = {256: 0.40, 512: 0.60, 2 * KIB: 0.85, 4 * KIB: 0.85}
        begin = time.perf_counter()
        pool = Pool(16 * GIB, self.gpu)
        self.results.add("16 GiB of page-locked memory", time.perf_counter() - begin, "s")
        # 32 layers side by side, as pools of 1 GiB are measured; and one plane of 16 GiB, whose
        # list of pages is 32 times as long for the same bytes.
        for layers in (LAYERS, 1):
            self._bandwidth(pool, list(asked), lambda width, _: asked[width], False, layers=layers)

    @staticmethod
    def _asked_small(width: int, way: str) -> float | None:
        if width >= KIB:
            return 0.88
        return 0.80 if way == "load" else None

    def _bandwidth(
        self,
        pool: Pool,
        widths: Sequence[int],
        asked: Callable[[int, str], float | None],
        layered: bool = True,
        layers: int = LAYERS,
    ) -> None:
        for way in WAYS:
            # Loads first: they leave the host pool as it is.
            if way == "load":
                pool.fill_host(constant=False)
            else:
                pool.device.view(torch.int64).random_()
            for width in widths:
                case = Case(pool, width, layers, sms=4, rate=0)
                how = "all layers" if layers > 1 else "one plane"
                self._share(case, way, how, {}, asked(width, way))
                if layered:
                    self._layer_by_layer(case, way, asked(width, way))

    def _share(
        self, case: Case, way: str, how: str, options: dict[str, Any], least: float | None
    ) -> None:
        case.prepare(way)
        report = case.submit(way, self.stream, path="kernel", **options)
        self.stream.synchronize()
        wrong = case.wrong(way)
        host, total = medians(
            self.timer, lambda: case.submit(way, self.stream, path="kernel", **options)
        )
        self._add_share(case, way, how, host, total, least, wrong, report.calls)

    def _add_share(
        self, case: Case, way: str, how: str, host: float, total: float,
        least: float | None, wrong: int, calls: int,
    ) -> None:  # fmt: skip
        rate = case.bytes / total / 1e3
        pool = bytes_text(case.pool.size)
        note = f"{rate:.1f} GB/s, host {host:.0f} µs, {calls} launches"
        name = f"{pool} pools, {bytes_text(case.width)}, {way}, {how}"
        self.results.add(name, rate / self.results.limits[way], "of limit", least, note=note)
        if wrong:
            self.results.add(name + ": wrong bytes", wrong, "bytes", most=0)

    def _layer_by_layer(self, case: Case, way: str, least: float | None) -> None:
        if way == "load":
            events = [timing_event() for _ in range(case.layers)]
            self._share(case, way, "layers with events", {"events": events}, least)

        def submit() -> kvsig.Report:
            report = kvsig.Report()
            for layer in range(case.layers):
                report += case.submit(way, self.stream, path="kernel", layers=layer)
            return report

        case.prepare(way)
        report = submit()
        self.stream.synchronize()
        wrong = case.wrong(way)
        host, total = medians(self.timer, submit)
        self._add_share(case, way, "a call a layer", host, total, least, wrong, report.calls)

    def layered(self) -> None:
        """Layered loads, idle and beside products that wait for their layers."""
        products = Products(self.gpu, 4096)
        for name, layers, width, most in (("A16", 32, 32 * KIB, 1.5), ("B16", 80, 4 * KIB, 2.0)):
            load = LayeredLoad(self, products, layers, width)
            for path in ("kernel", "auto", "batch"):
                asked = most if path == "kernel" else None
                try:
                    load.measure(name, path, asked)
                except kvsig.BindError as error:
                    self.results.problems[f"layered {name} {path}"] = str(error)

    def beside(self) -> None:
        """A saturating product, and one as a model decodes, beside long transfers of 4 KiB."""
        pool = Pool(GIB, self.gpu)
        pool.fill_host(constant=False)
        case, fewer = Case(pool, 4 * KIB), Case(pool, 4 * KIB)
        # Batches of such pages take so long that whole transfers would outlast the products.
        part = fewer.moved // 16
        fewer.device_pages, fewer.host_pages = fewer.device_pages[:part], fewer.host_pages[:part]
        for kind, products, groups in (
            ("8192^3", Products(self.gpu, 8192), 96),
            ("16-row", Products(self.gpu, 16, group=32), 40),
        ):
            alone = products.alone(groups)
            for way, path in itertools.product(WAYS, ("kernel", "batch")):
                one = case if path == "kernel" else fewer
                moved = len(one.device_pages) * one.layers * one.width
                found = [
                    products.beside(
                        groups, partial(one.submit, way, self.stream, path=path),
                        moved, self.stream,
                    )
                    for _ in range(3)
                ]  # fmt: skip
                slow = statistics.median(time for time, _ in found) / alone - 1
                rate = statistics.median(rate for _, rate in found)
                name = f"{kind} product beside {way} by {path}"
                ours = path == "kernel" and kind == "8192^3"
                note = f"{alone:.3f} ms alone a group of {products.group}"
                self.results.add(f"{name}: slower by", slow * 100, "%", None,
                                 10.0 if ours else None, note)  # fmt: skip
                least = {"load": 45.0, "offload": 40.0}[way] if ours else None
                self.results.add(f"{name}: moved meanwhile", rate, "GB/s", least)

    def short(self) -> None:
        """16 pages of 4 KiB: one layer beside a product, and all of 80 layers idle."""
        pool = Pool(GIB, self.gpu)
        case = Case(_part(pool, GIB // (320 * KIB) * 320 * KIB), 4 * KIB, 80)
        case.device_pages, case.host_pages = case.device_pages[:16], case.host_pages[:16]
        products = Products(self.gpu, 8192)
        for way, path in itertools.product(WAYS, ("kernel", "batch", "auto")):
            ours = path == "kernel"
            host, total = medians(
                self.timer, partial(case.submit, way, self.stream, path=path), 31
            )
            name = f"16 pages of 4 KiB of 80 layers, idle, {way} by {path}"
            self.results.add(name, total, "µs", most=120 if ours else None)
            self.results.add(name + ": host", host, "µs", most=15 if ours else None)
            self._short_beside(case, products, way, path)

    def _short_beside(self, case: Case, products: Products, way: str, path: str) -> None:
        def submit() -> kvsig.Report:
            return case.submit(way, self.stream, path=path, layers=0)

        submit()
        torch.cuda.synchronize()
        events = products.start(100)
        events[3].synchronize()
        times = []
        while not events[-1].query() and len(times) < 200:
            times.append(self.timer(submit)[1])
        torch.cuda.synchronize()
        found = sorted(times[:-1])
        if len(found) < 10:
            raise RuntimeError(f"{len(found)} short transfers beside the products: too few")
        name = f"16 pages of 4 KiB of a layer beside 8192^3 products, {way} by {path}"
        note = f"{len(found)} times, tenth {found[-len(found) // 10]:.0f} µs, max {found[-1]:.0f}"
        most = 30 if path == "kernel" else None
        self.results.add(name, statistics.median(found), "µs", most=most, note=note)

    def numbers(self) -> None:
        """Host time of a load whose page numbers are on the GPU, behind long work."""
        pool = Pool(GIB, self.gpu)
        case = Case(pool, 4 * KIB)
        host_lists = case.host_pages, case.device_pages
        lists = [torch.from_numpy(pages).to(self.gpu) for pages in host_lists]
        for kind, (far, near) in (("CUDA", lists), ("host", host_lists)):
            for path in ("kernel", "auto"):
                times = []
                for _ in range(RUNS + 1):
                    torch.cuda.synchronize()
                    with torch.cuda.stream(self.stream):
                        torch.cuda._sleep(200_000_000)
                    begin = time.perf_counter()
                    case.cache.load(far, near, stream=self.stream, path=path)
                    times.append((time.perf_counter() - begin) * 1e6)
                    if self.stream.query():
                        times[-1] = float("inf")  # the work is over: it has been waited for
                torch.cuda.synchronize()
                case.cache.check()
                ours = kind == "CUDA" and path == "kernel"
                self.results.add(
                    f"{kind} page numbers, path {path}: submission behind 0.1 s of work",
                    statistics.median(times[1:]), "µs", most=1000 if ours else None,
                )  # fmt: skip


def _part(pool: Pool, size: int) -> Pool:
    """Take the beginning of a pool."""
    part = object.__new__(Pool)
    part.size, part.host, part.device = size, pool.host[:size], pool.device[:size]
    return part


class LayeredLoad:
    """A load of 64 pages of K and V of all layers, whose consumers are matrix products.

    Parameters
    ----------
    bench : Bench
    products : Products
    layers, width : int
        Layers, and bytes of a page of one of K and V.
    """

    BEFORE, PAGES = 6, 64

    def __init__(self, bench: Bench, products: Products, layers: int, width: int) -> None:
        self.bench, self.products, self.layers, self.width = bench, products, layers, width
        host_pages = GIB // (layers * width)
        shape = host_pages, layers, 1, width
        self.pools = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        for pool in self.pools:
            pool.copy_(random_bytes(pool.numel(), bench.gpu).view(shape))
        self.near = torch.zeros(
            (2, layers, 4 * self.PAGES, width), dtype=torch.uint8, device=bench.gpu
        )
        self.cache = kvsig.PagedKVCache(
            (list(self.near[0]), list(self.near[1])), tuple(self.pools), page_size=1
        )
        rng = np.random.default_rng(1)
        self.far_pages = rng.permutation(host_pages)[: self.PAGES]
        self.near_pages = rng.permutation(4 * self.PAGES)[: self.PAGES]
        self.begin, self.end = timing_event(), timing_event()
        # As engines have them: only the last one is asked for its time.
        self.events = [torch.cuda.Event() for _ in range(layers - 1)] + [timing_event()]

    def request(self, path: str) -> float:
        """Submit the load; host time in µs."""
        stream = self.bench.stream
        self.begin.record(stream)
        start = time.perf_counter()
        self.cache.load(
            self.far_pages, self.near_pages, stream=stream, path=path, events=self.events
        )
        return (time.perf_counter() - start) * 1e6

    def idle(self, path: str) -> tuple[float, float]:
        """Milliseconds until each of all layers is there, and host time."""
        torch.cuda.synchronize()
        host = self.request(path)
        torch.cuda.synchronize()
        return self.begin.elapsed_time(self.events[-1]), host

    def run(self, path: str | None) -> tuple[float, float, float]:
        """All products, with or without a load: its ms and host µs, and ms of the products."""
        torch.cuda.synchronize()
        stream = self.products.stream
        first, last = timing_event(), timing_event()
        first.record(stream)
        self.products.queue(self.BEFORE)
        host = 0.0 if path is None else self.request(path)
        for event in self.events:
            if path is not None:
                stream.wait_event(event)
            self.products.queue(1)
        last.record(stream)
        torch.cuda.synchronize()
        load = 0.0 if path is None else self.begin.elapsed_time(self.events[-1])
        return load, host, first.elapsed_time(last)

    def wrong(self) -> int:
        """Bytes of the device's side that are not as they should be."""
        wrong = 0
        far, near = torch.from_numpy(self.far_pages), torch.from_numpy(self.near_pages)
        for group, pool in enumerate(self.pools):
            expected = torch.zeros_like(self.near[group])
            expected[:, near.to(expected.device)] = (
                pool[far, :, 0].transpose(0, 1).to(expected.device)
            )
            wrong += int((expected != self.near[group]).sum())
        return wrong

    def measure(self, name: str, path: str, most: float | None) -> None:
        add = self.bench.results.add
        self.near.zero_()
        self.run(path)
        wrong = self.wrong()
        idle = [self.idle(path) for _ in range(RUNS)]
        pairs = [(self.run(None), self.run(path)) for _ in range(RUNS)]
        alone = statistics.median(time for time, _ in idle)
        beside = statistics.median(with_load[0] for _, with_load in pairs)
        later = statistics.median(with_load[2] - without[2] for without, with_load in pairs)
        whole = statistics.median(without[2] for without, _ in pairs)
        host = statistics.median(with_load[1] for _, with_load in pairs)
        host_idle = statistics.median(time for _, time in idle)
        title = f"{name} layered load by {path}"
        note = f"{alone:.2f} ms idle, {beside:.2f} beside {self.BEFORE} queued products"
        add(f"{title}: beside over idle", beside / alone, "times", most=most, note=note)
        allowed = 20 + 3 * self.layers if path == "kernel" else None
        note = f"{host_idle:.0f} µs idle"
        add(f"{title}: host time beside", host, "µs", most=allowed, note=note)
        add(f"{title}: the products end later by", later, "ms", note=f"of {whole:.1f} ms")
        if wrong:
            add(f"{title}: wrong bytes", wrong, "bytes", most=0)


#: Part -> what it is of; in this order. The first transfer of a process comes first.
PARTS = {
    "first": "(h) the first transfer after making a cache",
    "pools": "(a) pools of 1 GiB",
    "layered": "(c) layered loads beside queued products",
    "beside": "(d) products beside long transfers",
    "short": "(e, f) 16 pages of 4 KiB",
    "numbers": "(g) page numbers on the GPU",
    "large": "(b) pools of 16 GiB",
}


def measure(parts: Sequence[str], seconds: float) -> Results:
    """Run parts in turn; what fails is recorded, and the rest goes on."""
    results = Results(seconds)
    bench = Bench(results)
    for part in ("limit", *parts) if "first" not in parts else ("first", "limit", *parts[1:]):
        results.part = part
        if results.left() < 5:
            results.problems[part] = "no time left"
            continue
        begin = time.perf_counter()
        try:
            getattr(bench, part)()
        except Exception as error:
            traceback.print_exc()
            results.problems[part] = f"{type(error).__name__}: {error}"
        # Between parts: what one has held is free for the next.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        print(f"{part}: {time.perf_counter() - begin:.1f} s", flush=True)
    return results


def text_of(result: dict[str, Any]) -> str:
    """Write the rows as a table."""
    rows = [["what", "value", "asked", "met", ""]]
    for row in result["rows"]:
        asked = "".join(f"{word} {row[key]:g}" for key, word in (("least", ">="), ("most", "<="))
                        if key in row)  # fmt: skip
        met = {True: "yes", False: "NO", None: ""}[row.get("met")]
        value = f"{row['value']:.4g} {row['unit']}"
        rows.append([row["what"], value, asked, met, row.get("note", "")])
    lines = [*source_text(result["provenance"]), "", *table(rows, labels=5, left=True, rule=True)]
    lines += [f"{part} failed: {problem}" for part, problem in result["problems"].items()]
    judged = [row["met"] for row in result["rows"] if "met" in row]
    lines.append(f"{sum(judged)} of {len(judged)} met")
    return "\n".join(lines)


def main() -> int:
    parts = "\n".join(f"  {name:<8} {text}" for name, text in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"parts (default: all):\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=240, help="no part begins after them")
    parser.add_argument("--parts", default=",".join(PARTS))
    args = parser.parse_args()
    chosen = [name.strip() for name in args.parts.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    if _core.is_emulated() or not torch.cuda.is_available():
        print("the kernel's speed needs a GPU, and a real CUDA runtime", file=sys.stderr)
        return 1
    results = measure([name for name in PARTS if name in chosen], args.seconds)
    result = {
        "schema": SCHEMA,
        "kind": "kernel",
        "provenance": provenance(),
        "limits": {way: round(rate, 2) for way, rate in results.limits.items()},
        "rows": results.rows,
        "problems": results.problems,
    }
    print(text_of(result))
    if args.json:
        write_json(args.json, result)
    return 1 if results.problems else 0


if __name__ == "__main__":
    sys.exit(main())
