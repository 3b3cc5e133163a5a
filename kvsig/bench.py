"""The benchmark: page copies by every method, beside the rivals and one big copy.

A *cell* is one geometry, order and direction of a transfer. In a cell all methods do the same
job on the same data in turn: page numbers in, bytes moved. Each is checked byte by byte once,
then timed several times with the others in between, on a stream that is not the default one.
Submission (host time until the call has returned) and completion (between two CUDA events
around the call) are kept apart. Methods are compared turn by turn, because a machine's speed is
not the same from one second to the next: what is compared ran side by side.

On the emulated runtime there are no speeds: only host time per copy, and operations.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import gc
import itertools
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import kvsig
from kvsig import _core, _threads, planning
from kvsig._commit import commit
from kvsig.geometry import Planes
from kvsig.models import MODELS

__all__ = [
    "DIRECTIONS",
    "LAYOUTS",
    "METHODS",
    "ORDERS",
    "SCOPES",
    "SECTIONS",
    "SPACINGS",
    "STREAMS",
    "Bench",
    "Cell",
    "Options",
    "compute",
    "host_costs",
    "preset",
    "product",
    "provenance",
    "size_text",
    "summary",
    "write_json",
]

SCHEMA = 1
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

DIRECTIONS = ("offload", "load", "both")
ORDERS = ("random", "runs8", "sorted", "reversed")
LAYOUTS = ("page_first_direct", "layer_first")
SCOPES = ("all", "layer")
SPACINGS = ("even", "separate")
STREAMS = ("own", "default")

#: Name on the command line -> what it is.
METHODS = {
    "auto": "kvsig, path='auto': the planner chooses",
    "batch": "kvsig, path='batch'",
    "strided": "kvsig, path='strided'",
    "loop": "kvsig, path='loop': one cudaMemcpyAsync per copy",
    "one-call": "all copies in a single call of the batch function, packed by NumPy",
    "torch": "Tensor.copy_ per page, non_blocking",
    "select": "torch index_select through a staging buffer, and one big copy of it",
    "bindings": "cuda.bindings cudaMemcpyBatchAsync, all copies in a single call",
    "cuda.core": "cuda.core copy_batch",
    "one-copy": "one big copy of as many bytes, at least 256 MiB: the limit",
}
KVSIG_METHODS = ("auto", "batch", "strided", "loop")
#: What auto is compared with: what kvsig's user could force instead.
SINGLE_METHODS = ("batch", "strided", "loop", "one-call")

PAGE_BYTES = tuple(256 << i for i in range(13))
LIMIT_BYTES = 256 * MIB
#: A cell moves no more than this, unless pages are asked for by number.
CELL_BYTES, CELL_COPIES = 256 * MIB, 65536
#: And no more copies than this layer by layer, where the host is the slower one with small pages:
#: long runs beside a CPU that changes its speed say little.
LAYER_COPIES = 16384
EMULATED_BYTES, EMULATED_COPIES = MIB, 2048
#: Milliseconds: where the first run takes less, one more is made before each that is timed. Longer
#: ones have the CPU's caches to themselves after a small part of their time.
WARM_MS = 25.0
#: Runs that tell a slow method from a fast one, turns after which the limit runs in every second
#: one only, and what is close: the time of a method over that of the fastest one.
FEW_RUNS, LIMIT_RUNS, CLOSE = 3, 9, 1.5
#: Planning and packing: layers, kinds, page bytes and scope; copies; and runs of each.
HOST_SHAPES = ((32, 2, 16 * KIB, "all"), (1, 1, 16 * KIB, "layer"), (32, 2, 512, "all"))
HOST_COPIES, HOST_RUNS = (100_000, 1_000_000), 15
#: When all cells have been measured, those go on that are known least: for so many seconds at a
#: time and so many times as many runs at most, until the standard error of auto's ratio to each
#: method that is about as fast is so small, and that of its share of the limit, over the share.
VISIT, MORE_RUNS, PRECISION, AS_FAST, SHARE_PRECISION = 3.0, 40, 0.004, 1.05, 0.02
#: A run whose CPU was slowed down by others when it ended is made again, so many times at most,
#: where submitting takes so much of its time.
RUNS_AGAIN, SUBMITS = 3, 0.8
#: Cells' shares of the time by which one cell may run ahead at first.
AHEAD = 2
#: Seconds after the last work of a stream from which on a transfer follows nothing.
APART = 60e-6
#: Methods that cost microseconds of Python per copy move only so many copies of a cell.
PYTHON_COPIES = 4096
MOST_BYTES = 2 * GIB
#: Rows and columns of the matrices of --compute, its transfers, and its turns at most.
PRODUCT = 8192
COMPUTE = (("all", 4 << 10), ("all", 32 << 10), ("layer", 32 << 10))
COMPUTE_RUNS = 40

SECTIONS = {
    "sizes": "page sizes, all layers in one call",
    "layers": "page sizes, one call per layer",
    "orders": "runs of 8, sorted and reversed pages, in both layouts",
    "layer-first": "layer_first host pool, random pages",
    "both": "both directions at once",
    "pages": "few pages",
    "models": "shapes of three models",
    "spacing": "device layers allocated separately",
    "stream": "the default stream",
    "million": "a million copies in one call",
}

I64 = npt.NDArray[np.int64]
Submit = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One transfer to be measured.

    Parameters
    ----------
    page_bytes : int
        Bytes of one page of one plane (K or V of one layer): of one copy.
    pages : int
        Pages that move, of every plane.
    layers, kinds : int
        Layers; 2 for K and V, 1 for a latent.
    direction : {"offload", "load", "both"}
        "both" is an offload and a load of as many pages at once, on two streams.
    order : {"random", "runs8", "sorted", "reversed"}
        Page numbers: random on both sides; runs of 8 neighbours in random places; ascending or
        descending neighbours on both sides.
    layout : {"page_first_direct", "layer_first"}
        Of the host pool.
    scope : {"all", "layer"}
        All layers in one call, or one call per layer.
    spacing : {"even", "separate"}
        Device layers as slices of one tensor, or allocated one by one.
    stream : {"own", "default"}
        "own" is a stream that is not the default one. "default" also measures auto on torch's
        default stream.
    section : str
        Group of the preset that the cell belongs to.
    model : str
        Name of the model whose shape it is; empty where it is none's.
    page_size : int
        Tokens per page, where the cell is a model's; else 0.
    """

    page_bytes: int
    pages: int
    layers: int = 32
    kinds: int = 2
    direction: str = "load"
    order: str = "random"
    layout: str = "page_first_direct"
    scope: str = "all"
    spacing: str = "even"
    stream: str = "own"
    section: str = "sizes"
    model: str = ""
    page_size: int = 0

    @property
    def copies(self) -> int:
        """Copies asked for: pages of every plane, both ways where it is both."""
        return self.pages * self.layers * self.kinds * (2 if self.direction == "both" else 1)

    @property
    def bytes(self) -> int:
        """Bytes that move."""
        return self.copies * self.page_bytes

    @property
    def pool_pages(self) -> int:
        """Pages there are on each side."""
        return 2 * self.pages

    @property
    def pool_bytes(self) -> int:
        """Bytes of each side."""
        return self.pool_pages * self.layers * self.kinds * self.page_bytes


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    Parameters
    ----------
    methods : sequence of str
        Of `METHODS`.
    runs : int
        Timed runs of the fastest methods in a cell; fewer where the time is short, at least 3.
        Methods that are clearly slower are timed three times, the limit nine times. In the time
        that is left then, cells go on in which auto's ratio to a method that is about as fast is
        not known to 0.4 % (standard error), as beside a CPU that others use: up to forty times as
        many runs, where the error is the largest first.
    seconds : float
        Time for everything. Cells that it does not last for are left out, and named.
    seed : int
        Of page numbers and bytes.
    verify : bool
        Compare bytes once per cell and method.
    full_speed : bool
        Begin each timed run on a CPU that is at full speed, see `FullSpeed`.
    threads : int, optional
        That may submit a transfer; by default as `kvsig.PagedKVCache` has it.
    """

    methods: Sequence[str] = tuple(METHODS)
    runs: int = 15
    seconds: float = 300.0
    seed: int = 0
    verify: bool = True
    full_speed: bool = True
    threads: int | None = None


def auto_pages(page_bytes: int, planes: int, emulated: bool, scope: str = "all") -> int:
    """Pages that a cell moves where no number is given."""
    most_bytes, most_copies = (
        (EMULATED_BYTES, EMULATED_COPIES) if emulated else (CELL_BYTES, CELL_COPIES)
    )
    if scope == "layer":
        most_copies = min(most_copies, LAYER_COPIES)
    pages = min(most_bytes // (page_bytes * planes), most_copies // planes)
    return max(2, pages // 8 * 8 if pages >= 8 else pages)


def preset(
    emulated: bool, quick: bool = False, sections: Iterable[str] | None = None
) -> list[Cell]:
    """Cells of the benchmark where no dimension is chosen.

    Parameters
    ----------
    emulated : bool
        Small transfers, and none whose point is speed.
    quick : bool
        Few page sizes, and no other section.
    sections : iterable of str, optional
        Of `SECTIONS`; by default all.

    Returns
    -------
    list of Cell
    """
    wanted = list(SECTIONS) if sections is None else list(sections)
    if quick and sections is None:
        wanted = ["sizes", "layers"]
    sizes = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB) if quick else PAGE_BYTES
    if emulated:
        sizes = tuple(size for size in sizes if size <= 64 * KIB)  # large ones only take time
    middle = (16 * KIB, 64 * KIB) if quick else (4 * KIB, 16 * KIB, 64 * KIB)
    ways = ("offload", "load")

    def some(page_bytes: int, **values: Any) -> Cell:
        planes = values.get("layers", 32) * values.get("kinds", 2)
        pages = values.pop("pages", 0) or auto_pages(
            page_bytes, planes, emulated, values.get("scope", "all")
        )
        return Cell(page_bytes=page_bytes, pages=pages, **values)

    cells: list[Cell] = []
    for section in wanted:
        add: list[Cell] = []
        if section in ("sizes", "layers"):
            scope = "all" if section == "sizes" else "layer"
            add = [some(b, direction=d, scope=scope) for d in ways for b in sizes]
        elif section == "orders":
            add = [
                some(b, direction=d, layout=layout, order=order)
                for layout in LAYOUTS
                for order in ORDERS[1:]
                for d in ways
                for b in middle
            ]
        elif section == "layer-first":
            add = [some(b, direction=d, layout="layer_first") for d in ways for b in middle]
        elif section == "both":
            add = [some(b, direction="both") for b in (16 * KIB, 64 * KIB, 256 * KIB)]
        elif section == "pages":
            add = [
                some(b, direction=d, scope=scope, pages=n)
                for scope in SCOPES
                for d in ways
                for b in (4 * KIB, 32 * KIB)
                for n in (1, 4, 16)
            ]
        elif section == "models":
            for model in MODELS.values():
                add += [
                    some(
                        model.plane_token_bytes * page_size,
                        layers=model.layers,
                        kinds=model.tensors,
                        direction=d,
                        scope="all" if d == "offload" else "layer",
                        model=model.name,
                        page_size=page_size,
                    )
                    for page_size in (1, 16, 64)
                    for d in ways
                ]
        elif section == "spacing":
            add = [some(b, direction=d, spacing="separate") for d in ways for b in middle]
        elif section == "stream":
            add = [
                some(b, direction=d, stream="default", pages=n)
                for d in ways
                for b, n in ((16 * KIB, 16), (64 * KIB, 4), (64 * KIB, 16), (64 * KIB, 64))
            ]
        elif section == "million":
            copies = 20_000 if emulated else 1_000_000
            add = [some(512, direction=d, pages=copies // 64) for d in ways]
        else:
            raise ValueError(f"section {section!r} is not one of: {', '.join(SECTIONS)}")
        cells += [replace(cell, section=section) for cell in add]
    # Large transfers say no more there, and only take time.
    return [cell for cell in cells if not emulated or cell.bytes <= 32 * MIB]


def product(
    emulated: bool,
    *,
    page_bytes: Sequence[int] = (),
    pages: Sequence[int] = (),
    layers: Sequence[int] = (),
    kinds: Sequence[int] = (),
    directions: Sequence[str] = (),
    orders: Sequence[str] = (),
    layouts: Sequence[str] = (),
    scopes: Sequence[str] = (),
    spacings: Sequence[str] = (),
    streams: Sequence[str] = (),
    models: Sequence[str] = (),
    page_sizes: Sequence[int] = (),
) -> list[Cell]:
    """Every combination of the values given; a dimension that is not given has its default.

    Parameters
    ----------
    emulated : bool
        Small transfers, where `pages` is not given.
    page_bytes, pages, layers, kinds, directions, orders, layouts, scopes, spacings, streams
        Values of the fields of `Cell`.
    models : sequence of str
        Names of models, whose shapes take the place of `page_bytes`, `layers` and `kinds`.
    page_sizes : sequence of int
        Tokens per page of these models.

    Returns
    -------
    list of Cell
    """
    shapes: list[dict[str, Any]] = []
    if models:
        for name, page_size in itertools.product(models, page_sizes or (16,)):
            model = MODELS[name]
            shapes.append(
                {
                    "page_bytes": model.plane_token_bytes * page_size,
                    "layers": model.layers,
                    "kinds": model.tensors,
                    "model": name,
                    "page_size": page_size,
                }
            )
    else:
        for count, kind, size in itertools.product(
            layers or (32,), kinds or (2,), page_bytes or PAGE_BYTES
        ):
            shapes.append({"page_bytes": size, "layers": count, "kinds": kind})
    cells = []
    for layout, scope, spacing, stream, order, direction, shape, count in itertools.product(
        layouts or LAYOUTS[:1],
        scopes or SCOPES[:1],
        spacings or SPACINGS[:1],
        streams or STREAMS[:1],
        orders or ORDERS[:1],
        directions or DIRECTIONS[:2],
        shapes,
        pages or (0,),
    ):
        planes = shape["layers"] * shape["kinds"]
        cells.append(
            Cell(
                pages=count or auto_pages(shape["page_bytes"], planes, emulated, scope),
                direction=direction,
                order=order,
                layout=layout,
                scope=scope,
                spacing=spacing,
                stream=stream,
                section="chosen",
                **shape,
            )
        )
    for cell in cells:
        if cell.pool_bytes > MOST_BYTES:
            raise ValueError(
                f"{cell.pages:,} pages of {size_text(cell.page_bytes)} in {cell.layers} layers need"
                f" {size_text(cell.pool_bytes)} on each side, twice what moves; a cell may have"
                f" {size_text(MOST_BYTES)}: ask for fewer --pages or --layers"
            )
    return cells


def size_text(count: int) -> str:
    """Write a number of bytes for people, exact where it is a whole number of units."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"


def provenance() -> dict[str, Any]:
    """Say where results are from: device, driver, runtime, versions, date and commit.

    The commit is that of ``KVSIG_COMMIT``, or of the checkout, or unknown.
    """
    info = kvsig.info()
    real = not info["emulated"]
    batch = next(row for row in info["functions"] if row["name"] == "cudaMemcpyBatchAsync")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "kvsig": kvsig.__version__,
        "emulated": info["emulated"],
        "device": torch.cuda.get_device_name() if real else None,
        "library": os.path.basename(info["library"]),
        "runtime_version": info["runtime_version"],
        "driver_version": info["driver_version"],
        "batch_variant": batch["variant"],
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def write_json(path: Path, data: Any) -> None:
    """Replace a file as a whole: a reader never sees half of it."""
    descriptor, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# --- Memory ------------------------------------------------------------------------------------


def page_numbers(cell: Cell, rng: np.random.Generator) -> tuple[I64, I64]:
    """Distinct page numbers of one side: those that move, and those of the other direction."""
    total, count = cell.pool_pages, cell.pages
    if cell.order == "sorted":
        order = np.arange(total)
    elif cell.order == "reversed":
        order = np.arange(total)[::-1]
        # Descending inside each half as well.
        return order[count:].copy(), order[:count].copy()
    elif cell.order == "runs8":
        run = math.gcd(8, count)  # shorter ones where the pages are not a multiple of 8
        order = (rng.permutation(total // run)[:, None] * run + np.arange(run)).ravel()
    else:
        order = rng.permutation(total)
    order = order.astype(np.int64)
    return order[:count].copy(), order[count:].copy()


def planes_of(cell: Cell) -> Planes:
    """Geometry of one call of a cell, at addresses that nobody follows: for plans alone."""
    width, pool = np.uint64(cell.page_bytes), np.uint64(cell.pool_pages)
    count, layers = cell.layers * cell.kinds, np.uint64(cell.layers)
    plane = np.arange(count, dtype=np.uint64)
    far, pitch = plane * pool * width, width
    if cell.layout == "page_first_direct":
        pitch = layers * width
        far = plane // layers * pool * pitch + plane % layers * width
    whole = Planes(
        device_base=np.uint64(1 << 40) + plane * pool * width,
        device_pitch=np.full(count, width),
        host_base=np.uint64(1 << 44) + far,
        host_pitch=np.full(count, pitch),
        width=np.full(count, width),
        device_pages=cell.pool_pages,
        host_pages=cell.pool_pages,
        layers=cell.layers,
    )
    return whole.select((0,)) if cell.scope == "layer" else whole


class Memory:
    """Device and pinned memory that all cells use in turn, so that it is allocated once."""

    def __init__(self, device: torch.device, nbytes: int, seed: int) -> None:
        self.device = device
        self.real = device.type == "cuda"
        nbytes = max(nbytes, LIMIT_BYTES if self.real else MIB)
        self.near = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.far = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.real)
        self.generator = torch.Generator(device).manual_seed(seed)

    def random(self, nbytes: int) -> torch.Tensor:
        """Random bytes on the device."""
        words = torch.empty(-(-nbytes // 8), dtype=torch.int64, device=self.device)
        words.random_(-(2**63), None, generator=self.generator)
        return words.view(torch.uint8)[:nbytes]


class Job:
    """The data of one cell, and the calls that every method is made of."""

    def __init__(
        self,
        cell: Cell,
        memory: Memory,
        seed: int,
        python_copies: int,
        threads: int | None = None,
    ) -> None:
        self.cell = cell
        self.memory = memory
        total = cell.pool_bytes
        shape = (cell.kinds, cell.layers, cell.pool_pages, cell.page_bytes)
        self.near: list[list[torch.Tensor]]
        if cell.spacing == "separate":
            self.near = [
                [
                    torch.empty(shape[2:], dtype=torch.uint8, device=memory.device)
                    for _ in range(cell.layers)
                ]
                for _ in range(cell.kinds)
            ]
        else:
            whole = memory.near[:total].view(shape)
            self.near = [list(kind.unbind(0)) for kind in whole.unbind(0)]
        pools = memory.far[:total]
        pool_shape: tuple[int, ...]
        if cell.layout == "page_first_direct":
            pool_shape = (cell.kinds, cell.pool_pages, cell.layers, 1, cell.page_bytes)
        else:
            pool_shape = (cell.kinds, cell.layers, cell.pool_pages, cell.page_bytes)
        self.far_bytes = pools
        self.far = list(pools.view(pool_shape).unbind(0))
        two = cell.kinds == 2
        self.cache = kvsig.PagedKVCache(
            device=tuple(self.near) if two else self.near[0],
            host=tuple(self.far) if two else self.far[0],
            layout=cell.layout,
            page_size=1,
            threads=threads,
        )
        rng = np.random.default_rng(seed)
        near_first, near_other = page_numbers(cell, rng)
        far_first, far_other = page_numbers(cell, rng)
        #: Direction -> device pages and host pages. Both directions share no page.
        first, other = (near_first, far_first), (near_other, far_other)
        self.pages = {"offload": first, "load": other if cell.direction == "both" else first}
        ways = ("offload", "load") if cell.direction == "both" else (cell.direction,)
        self.ways = ways
        self.python_pages = max(1, python_copies // (cell.layers * cell.kinds))
        planes = [tensor for kind in self.near for tensor in kind]
        self.near_base = np.array([tensor.data_ptr() for tensor in planes], dtype=np.int64)
        rows = [self.far_plane(k, i) for k in range(cell.kinds) for i in range(cell.layers)]
        self.far_base = np.array([tensor.data_ptr() for tensor in rows], dtype=np.int64)
        self.far_pitch = self.far_plane(0, 0).stride(0)

    def far_plane(self, kind: int, layer: int) -> torch.Tensor:
        """Host pages of one plane, (pages, bytes)."""
        if self.cell.layout == "page_first_direct":
            return self.far[kind][:, layer, 0]
        return self.far[kind][layer]

    def layer_calls(self) -> list[list[int]]:
        """Layers of each call."""
        layers = list(range(self.cell.layers))
        return [layers] if self.cell.scope == "all" else [[layer] for layer in layers]

    def kvsig(self, direction: str, path: str, stream: Any) -> list[Any]:
        """Transfer through the cache; reports of the calls."""
        near, far = self.pages[direction]
        cache = self.cache
        layers = [None] if self.cell.scope == "all" else range(self.cell.layers)
        if direction == "offload":
            return [cache.offload(near, far, layers=i, stream=stream, path=path) for i in layers]
        return [cache.load(far, near, layers=i, stream=stream, path=path) for i in layers]

    def plans(self, direction: str, path: str, stream: Any) -> list[Any]:
        """What `kvsig` would do, as plans."""
        near, far = self.pages[direction]
        cache = self.cache
        layers = [None] if self.cell.scope == "all" else range(self.cell.layers)
        if direction == "offload":
            return [
                cache.plan_offload(near, far, layers=i, stream=stream, path=path) for i in layers
            ]
        return [cache.plan_load(far, near, layers=i, stream=stream, path=path) for i in layers]

    def packed(
        self, direction: str, layers: list[int], pages: int | None = None
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Addresses of the plain list of copies, packed as a NumPy user would."""
        near, far = (numbers[:pages] for numbers in self.pages[direction])
        planes = [k * self.cell.layers + i for k in range(self.cell.kinds) for i in layers]
        here = (self.near_base[planes, None] + near * self.cell.page_bytes).ravel().view(np.uint64)
        there = (self.far_base[planes, None] + far * self.far_pitch).ravel().view(np.uint64)
        return (there, here) if direction == "offload" else (here, there)

    # Verification: the whole of both sides is compared, also what must stay as it was.

    def near_region(self) -> torch.Tensor:
        """Copy of the device's side, one tensor."""
        flat = torch.stack([torch.stack(kind) for kind in self.near])
        return flat.view(self.cell.kinds, self.cell.layers, self.cell.pool_pages, -1)

    def fill(self) -> None:
        """Put random bytes on both sides, and keep a copy of them and of what must come out."""
        cell, memory = self.cell, self.memory
        for tensors in self.near:
            for tensor in tensors:
                tensor.copy_(memory.random(tensor.numel()).view(tensor.shape))
        far_before = memory.random(self.far_bytes.numel())
        self.far_bytes.copy_(far_before)
        self.before = (self.near_region(), far_before)
        near_after, far_after = self.near_region(), far_before.clone()
        layout = cell.layout
        for way in self.ways:
            near, far = (torch.from_numpy(p).to(memory.device) for p in self.pages[way])
            for kind in range(cell.kinds):
                pool = far_after.view(cell.kinds, -1)[kind]
                before = far_before.view(cell.kinds, -1)[kind]
                for layer in range(cell.layers):
                    if layout == "page_first_direct":
                        shape = (cell.pool_pages, cell.layers, cell.page_bytes)
                        rows, old = pool.view(shape)[:, layer], before.view(shape)[:, layer]
                    else:
                        shape = (cell.layers, cell.pool_pages, cell.page_bytes)
                        rows, old = pool.view(shape)[layer], before.view(shape)[layer]
                    if way == "offload":
                        rows[far] = self.before[0][kind, layer, near]
                    else:
                        near_after[kind, layer, near] = old[far]
        self.after = (near_after, far_after)

    def restore(self) -> None:
        """Undo a transfer."""
        for kind, tensors in enumerate(self.near):
            for layer, tensor in enumerate(tensors):
                tensor.copy_(self.before[0][kind, layer])
        self.far_bytes.copy_(self.before[1])

    def wrong(self) -> str | None:
        """What is not as a transfer must leave it, or None."""
        for name, now, wanted in (
            ("device", self.near_region(), self.after[0]),
            ("host", self.far_bytes.to(self.memory.device), self.after[1]),
        ):
            if not torch.equal(now, wanted):
                bad = int((now.flatten() != wanted.flatten()).sum())
                return f"{bad:,} bytes on the {name} are wrong"
        return None

    def drop(self) -> None:
        """Free the copies that verification needs."""
        self.before = self.after = (torch.empty(0), torch.empty(0))


# --- Methods -----------------------------------------------------------------------------------


class Unavailable(Exception):
    """A method cannot be used here; the text says why."""


@dataclass(slots=True)
class Outcome:
    """What one submission of a method was made of."""

    copies: int = 0
    calls: int = 0
    bytes: int = 0
    path: str = ""
    reason: str | None = None
    whole: bool = True  # whether it was the whole cell, and can be verified


Runner = Callable[["Job", str, Any], Outcome]


def kvsig_runner(path: str) -> Runner:
    """Make a runner of kvsig's own calls."""

    def run(job: Job, direction: str, stream: Any) -> Outcome:
        outcome = Outcome()
        for report in job.kvsig(direction, path, stream):
            outcome.copies += report.copies
            outcome.calls += report.calls
            outcome.bytes += report.bytes
            outcome.path, outcome.reason = report.path, report.reason
        return outcome

    return run


def run_one_call(job: Job, direction: str, stream: Any) -> Outcome:
    """Run the plain batch: every copy in one call (per layer, where the cell is so)."""
    outcome = Outcome()
    for layers in job.layer_calls():
        dsts, srcs = job.packed(direction, layers)
        report = _core.copy_batch(
            dsts, srcs, job.cell.page_bytes, stream.cuda_stream, "batch", len(dsts)
        )
        outcome.copies += report.copies
        outcome.calls += report.calls
        outcome.bytes += report.bytes
        outcome.path = report.path
    return outcome


def run_torch(job: Job, direction: str, stream: Any) -> Outcome:
    """Run torch's ``copy_`` per page, on some of the pages where there are many."""
    near, far = (pages[: job.python_pages].tolist() for pages in job.pages[direction])
    count = 0
    with torch.cuda.stream(stream):
        for kind, tensors in enumerate(job.near):
            for layer, tensor in enumerate(tensors):
                rows = job.far_plane(kind, layer)
                for here, there in zip(near, far, strict=True):
                    if direction == "offload":
                        rows[there].copy_(tensor[here], non_blocking=True)
                    else:
                        tensor[here].copy_(rows[there], non_blocking=True)
                count += len(near)
    return Outcome(
        count, count, count * job.cell.page_bytes, "torch", whole=len(near) == job.cell.pages
    )


class Select:
    """Torch's way through a staging buffer: gather, one big copy, scatter."""

    def __init__(self, job: Job) -> None:
        cell = job.cell
        layers = len(job.layer_calls()[0])
        shape = [cell.pages, layers, cell.page_bytes // 8]
        if cell.layout == "layer_first":
            shape[:2] = shape[1::-1]
        self.near = torch.empty(shape, dtype=torch.int64, device=job.memory.device)
        self.far = torch.empty(shape, dtype=torch.int64, pin_memory=job.memory.real)
        self.index = {
            way: (torch.from_numpy(near).to(job.memory.device), torch.from_numpy(far))
            for way, (near, far) in job.pages.items()
        }

    def __call__(self, job: Job, direction: str, stream: Any) -> Outcome:
        calls = 0
        with torch.cuda.stream(stream):
            for kind in range(job.cell.kinds):
                for layers in job.layer_calls():
                    if direction == "offload":
                        self.offload(job, kind, layers, stream)
                    else:
                        self.load(job, kind, layers, stream)
                    calls += 1
        return Outcome(calls, calls, job.cell.bytes, "torch")

    def slots(self, job: Job, kind: int, layers: list[int]) -> Iterable[tuple[Any, Any]]:
        """Device layers and their places in the staging buffer."""
        for place, layer in enumerate(layers):
            slot = self.near[place] if job.cell.layout == "layer_first" else self.near[:, place]
            yield job.near[kind][layer].view(torch.int64), slot

    def block(self, job: Job, kind: int, layers: list[int]) -> tuple[Any, int]:
        """Host pages of some layers, and the dimension that pages are along."""
        pool = job.far[kind].view(torch.int64)
        part = slice(layers[0], layers[-1] + 1)
        if job.cell.layout == "layer_first":
            return pool[part], 1
        return pool[:, part, 0], 0

    def offload(self, job: Job, kind: int, layers: list[int], stream: Any) -> None:
        """Gather on the device, copy, wait, and scatter on the host."""
        near, far = self.index["offload"]
        for rows, slot in self.slots(job, kind, layers):
            slot.copy_(torch.index_select(rows, 0, near))
        self.far.copy_(self.near, non_blocking=True)
        stream.synchronize()
        block, dim = self.block(job, kind, layers)
        block.index_copy_(dim, far, self.far)

    def load(self, job: Job, kind: int, layers: list[int], stream: Any) -> None:
        """Gather on the host, copy, and scatter on the device."""
        near, far = self.index["load"]
        block, dim = self.block(job, kind, layers)
        stream.synchronize()  # the copy before may still read the staging buffer
        torch.index_select(block, dim, far, out=self.far)
        self.near.copy_(self.far, non_blocking=True)
        for rows, slot in self.slots(job, kind, layers):
            rows.index_copy_(0, near, slot)


class Bindings:
    """The rival in cuda.bindings: lists of ints in, one call."""

    def __init__(self, job: Job) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise Unavailable(f"cuda.bindings is not installed ({error})") from None
        if not hasattr(runtime, "cudaMemcpyBatchAsync"):
            raise Unavailable("this cuda.bindings has no cudaMemcpyBatchAsync")
        self.runtime = runtime
        self.attributes = runtime.cudaMemcpyAttributes()
        self.attributes.srcAccessOrder = (
            runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
        )

    def __call__(self, job: Job, direction: str, stream: Any) -> Outcome:
        outcome = Outcome(path="batch")
        for layers in job.layer_calls():
            dsts, srcs = job.packed(direction, layers)
            count = len(dsts)
            arguments: list[Any] = [dsts.tolist(), srcs.tolist(), [job.cell.page_bytes] * count]
            arguments += [count, [self.attributes], [0], 1, stream.cuda_stream]
            answer = self.runtime.cudaMemcpyBatchAsync(*arguments)
            if int(answer[0]) != 0:
                raise Unavailable(f"cuda.bindings cudaMemcpyBatchAsync answered {answer[0]!r}")
            outcome.copies += count
            outcome.calls += 1
            outcome.bytes += count * job.cell.page_bytes
        return outcome


class CudaCore:
    """The rival in cuda.core: a Buffer for each end of each copy, one call."""

    def __init__(self, job: Job) -> None:
        try:
            from cuda.core import Buffer, Device, Stream
            from cuda.core.utils import copy_batch
        except ImportError as error:
            raise Unavailable(f"cuda.core with copy_batch is not installed ({error})") from None
        Device(torch.cuda.current_device()).set_current()
        self.buffer, self.stream, self.copy = Buffer.from_handle, Stream, copy_batch

    def __call__(self, job: Job, direction: str, stream: Any) -> Outcome:
        pages = min(job.cell.pages, job.python_pages)
        size, make = job.cell.page_bytes, self.buffer
        own = self.stream.from_handle(stream.cuda_stream)
        outcome = Outcome(path="batch", whole=pages == job.cell.pages)
        for layers in job.layer_calls():
            dsts, srcs = job.packed(direction, layers, pages)
            to = [make(address, size) for address in dsts.tolist()]
            of = [make(address, size) for address in srcs.tolist()]
            self.copy(own, of, to)
            outcome.copies += len(to)
            outcome.calls += 1
            outcome.bytes += len(to) * size
        return outcome


class OneCopy:
    """The limit: one copy of as many bytes, and of at least 256 MiB."""

    def __init__(self, job: Job) -> None:
        memory = job.memory
        share = job.cell.bytes // len(job.ways)
        count = min(max(share, LIMIT_BYTES // len(job.ways)), memory.near.numel() // len(job.ways))
        self.pairs = {}
        for place, way in enumerate(job.ways):
            part = slice(place * count, (place + 1) * count)
            self.pairs[way] = (memory.near[part], memory.far[part])

    def __call__(self, job: Job, direction: str, stream: Any) -> Outcome:
        near, far = self.pairs[direction]
        with torch.cuda.stream(stream):
            if direction == "offload":
                far.copy_(near, non_blocking=True)
            else:
                near.copy_(far, non_blocking=True)
        return Outcome(1, 1, near.numel(), "one copy", whole=False)


def make_runner(method: str, job: Job) -> Runner:
    """Make a method ready for a cell, or raise `Unavailable`."""
    if method in KVSIG_METHODS:
        return kvsig_runner(method)
    if method in ("bindings", "cuda.core", "one-call"):
        refusal = _core.batch_refusal(2)
        if refusal is not None and method == "one-call":
            raise Unavailable(refusal)
    if method == "one-call":
        return run_one_call
    if not job.memory.real:
        raise Unavailable("means nothing on the emulated runtime")
    if method == "torch":
        return run_torch
    if method == "select":
        if job.cell.page_bytes % 8:
            raise Unavailable("pages are not a multiple of 8 bytes")
        return Select(job)
    if method == "bindings":
        return Bindings(job)
    if method == "cuda.core":
        return CudaCore(job)
    if method == "one-copy":
        return OneCopy(job)
    raise ValueError(f"method {method!r} is not one of: {', '.join(METHODS)}")


# --- Measuring ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Series:
    """Timed runs of one method in one cell."""

    name: str
    submit: Callable[[], Outcome]
    stream: Any
    here: bool = True  # whether the thread that times it submits it
    outcome: Outcome = field(default_factory=Outcome)
    operations: int | None = None
    verified: bool | None = None
    note: str | None = None
    first_ms: float = 0.0
    turns: list[int] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    full_speed: int = 0  # runs whose CPU was at full speed when they ended
    again: int = 0  # runs that were made again, because it was not

    def seconds_per_byte(self) -> dict[int, float]:
        """Time of a byte by turn."""
        size = 1e3 * self.outcome.bytes
        return {turn: ms / size for turn, ms in zip(self.turns, self.ms, strict=False) if size}


@dataclass(slots=True, eq=False)
class Measured:
    """A cell that has been measured once, and may be visited again."""

    cell: Cell
    series: list[Series]
    notes: dict[str, str]
    place: int  # of its entry in the result
    visits: int = 0


def park(series: list[Series]) -> None:
    """Let go of the memory that methods of a cell hold; they cannot run before they get new."""

    def parked() -> Outcome:
        raise RuntimeError("this method has no memory to work on")

    for one in series:
        one.submit = parked


def middle(values: Iterable[float]) -> tuple[float, float]:
    """Median, and its standard error.

    The error is read off the order of the values, of whatever distribution they are: two in three
    medians lie between the values that are half a root of their number before and behind the
    middle.
    """
    ordered = sorted(values)
    count = len(ordered)
    if count < 3:
        return statistics.median(ordered), math.inf
    reach = math.sqrt(count) / 2
    low = max(math.floor(count / 2 - reach), 0)
    high = min(math.ceil(count / 2 + reach), count) - 1
    return statistics.median(ordered), (ordered[high] - ordered[low]) / 2


def ratio_of(mine: Series, other: Series) -> tuple[float, float] | None:
    """How many times as fast one method was as another, the median of turns, and its error."""
    of_mine, of_other = mine.seconds_per_byte(), other.seconds_per_byte()
    ratios = [of_other[turn] / time for turn, time in of_mine.items() if turn in of_other]
    return middle(ratios) if ratios else None


def need(series: list[Series]) -> float:
    """How many times as large as they should be the errors of auto's ratios and its share are."""
    auto = next((one for one in series if one.name == "auto"), None)
    needs = [0.0]
    for one in series:
        found = ratio_of(auto, one) if auto is not None and one is not auto else None
        if found is None:
            continue
        ratio, error = found
        if one.name == "one-copy":
            needs.append(error / ratio / SHARE_PRECISION)
        elif ratio < AS_FAST:
            needs.append(error / PRECISION)
    return max(needs)


def next_turn(series: list[Series]) -> int:
    """Turn that comes after those that have been timed."""
    return 1 + max((one.turns[-1] for one in series if one.turns), default=-1)


def spread(values: list[float]) -> dict[str, float]:
    """Median, extremes, and 10th and 90th percentile."""
    found = np.percentile(values, (10, 90))
    numbers = {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "p10": float(found[0]),
        "p90": float(found[1]),
    }
    return {name: round(value, 5) for name, value in numbers.items()}


class Bar:
    """Progress on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, label: str) -> None:
        self.total = total
        self.label = label
        self.begin = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.last = self.begin

    def show(self, done: int, text: str) -> None:
        """Tell that so many are done, and what is next."""
        seconds = time.monotonic() - self.begin
        if self.terminal:
            filled = 24 * done // max(self.total, 1)
            bar = "#" * filled + "." * (24 - filled)
            line = f"[{bar}] {done}/{self.total}  {seconds:.0f} s  {text}"
            print(f"\r\x1b[K{line[:100]}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last >= 10:
            self.last = time.monotonic()
            print(
                f"{self.label}: {done} of {self.total} after {seconds:.0f} s, {text}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Take the bar away."""
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def make_stream(device: torch.device) -> Any:
    """Make a stream that is not the default one."""
    if device.type == "cuda":
        return torch.cuda.Stream(device)
    from kvsig import emulated

    return emulated.Stream()


def apart() -> None:
    """Wait until what comes next follows nothing: kvsig plans it as a transfer by itself then."""
    end = time.perf_counter() + APART
    while time.perf_counter() < end:
        pass


@functools.cache
def libc() -> ctypes.CDLL:
    """Return the C library of this process."""
    return ctypes.CDLL(None)


def current_cpu() -> int:
    """Return the number of the CPU that this thread is on, for Python cannot tell."""
    return int(libc().sched_getcpu())


class FullSpeed:
    """Puts a thread on a CPU that runs at full speed.

    The virtual CPUs of rented machines run at half their speed while others are at work on the same
    core, each by itself and for some time. A run that meets one says nothing of what is compared,
    so one is looked for that is free: by the time of a loop of Python, 10 us where the CPU at hand
    is good. Those that were free most often so far come first, as the others of a core are mostly
    at work for longer than a run. Afterwards the thread may move again, and mostly stays.

    Parameters
    ----------
    wanted : bool
        Otherwise it does nothing.
    """

    #: Loops of a look, half a microsecond each; a CPU that takes so much longer than the best one
    #: is not at full speed.
    LOOPS, NEAR = 15, 1.15
    #: What one more look counts in a CPU's record, and how much better another's must be to move.
    FRESH, BETTER = 0.05, 0.25

    def __init__(self, wanted: bool = True) -> None:
        self.cpus = sorted(os.sched_getaffinity(0)) if wanted else []
        self.best = self.least = math.inf
        #: How often each CPU was at full speed, of late: from 0, never, to 1, always.
        self.record = dict.fromkeys(self.cpus, 0.5)
        for cpu in self.cpus:
            self._try(cpu)
        self._anywhere()

    def look_ns(self) -> float:
        """Nanoseconds of the loop on the CPU at hand."""
        # The median: the best of some is that of a moment in which the others were idle.
        return statistics.median(_threads.loop_ns(1) for _ in range(self.LOOPS))

    def here(self) -> bool:
        """Whether the CPU at hand is at full speed."""
        took = self.look_ns()
        self.best, self.least = min(self.best, took), min(self.least, took)
        good = took <= self.NEAR * self.best
        cpu = current_cpu()
        if cpu in self.record:
            self.record[cpu] += self.FRESH * (good - self.record[cpu])
        return good

    def settle(self) -> None:
        """Move to a CPU at full speed, if this one is not, or was so less often than another."""
        if not self.cpus:
            return
        good = self.here()
        order = sorted(self.cpus, key=lambda cpu: -self.record[cpu])
        if good and self.record[order[0]] - self.record.get(current_cpu(), 1.0) < self.BETTER:
            return
        self.least = math.inf
        if not any(self._try(cpu) for cpu in order):
            # None is as fast as one once was: what is best now is the best there is.
            self.best = self.least
            os.sched_setaffinity(0, {order[0]})
        self._anywhere()

    def warm(self, run: Callable[[], Any]) -> None:
        """Run something until the CPU that it ran on is still at full speed, four times at most.

        Moving on is no way out then: the next CPU would not have in its caches what was run.
        """
        for last in (False, False, False, True):
            run()
            torch.cuda.synchronize()
            if last or not self.cpus or self.here():
                break
            self.settle()

    def _try(self, cpu: int) -> bool:
        os.sched_setaffinity(0, {cpu})
        return self.here()

    def _anywhere(self) -> None:
        # Threads that are started from here would otherwise all have the one CPU.
        if self.cpus:
            os.sched_setaffinity(0, self.cpus)


class Bench:
    """Measures cells.

    Parameters
    ----------
    cells : sequence of Cell
        In the order to measure.
    options : Options
        How.
    save : callable, optional
        Given the whole result after each cell, so that an interrupted run loses nothing.

    Raises
    ------
    ValueError
        If the runtime is a real one and torch sees no GPU.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        options: Options,
        save: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.cells = list(cells)
        self.options = options
        self.save = save
        self.device = target()
        self.real = self.device.type == "cuda"
        self.speed = FullSpeed(options.full_speed and self.real)
        self.streams = [make_stream(self.device) for _ in range(3)]
        self.workers = ThreadPoolExecutor(2)
        self.begin = time.monotonic()
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "bench",
            "provenance": provenance(),
            "options": asdict(options)
            | {"methods": list(options.methods), "threads": _threads.most(options.threads)},
            "cells": [],
            "skipped": [],
        }

    def run(self) -> dict[str, Any]:
        """Measure every cell that there is time for.

        Returns
        -------
        dict
            The result, as ``--json`` writes it.
        """
        self.begin = begin = time.monotonic()
        deadline = begin + self.options.seconds
        memory = Memory(
            self.device, max((c.pool_bytes for c in self.cells), default=0), self.options.seed
        )
        bar = Bar(len(self.cells), "kvsig bench")
        measured: list[Measured] = []
        for done, cell in enumerate(self.cells):
            bar.show(done, describe(cell))
            now = time.monotonic()
            left = deadline - now
            if left <= 0:
                self.result["skipped"] += [asdict(c) for c in self.cells[done:]]
                break
            # What cells leave over, later ones have; none takes what others are sure of.
            share = (done + 1 + AHEAD) / (len(self.cells) + AHEAD)
            try:
                series, notes = self.measure(cell, memory, begin + share * self.options.seconds)
                entry = self.entry(cell, series, notes)
                measured.append(Measured(cell, series, notes, done))
            except Exception as error:
                # One cell must not lose the others; memory that ran out is given back.
                entry = asdict(cell) | {"error": f"{type(error).__name__}: {error}", "methods": {}}
                if self.real:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
            self.result["cells"].append(entry)
            self.result["seconds"] = round(time.monotonic() - begin, 1)
            if self.save is not None:
                self.save(self.result)
        if self.real:
            self.refine(measured, memory, deadline, bar)
        bar.close()
        self.workers.shutdown()
        self.result["seconds"] = round(time.monotonic() - begin, 1)
        self.result["summary"] = summary(self.result)
        if self.save is not None:
            self.save(self.result)
        return self.result

    def refine(
        self, measured: list[Measured], memory: Memory, deadline: float, bar: Bar
    ) -> None:
        """Go on with the cells in which ratios are known least, while there is time."""
        most = self.options.runs * MORE_RUNS

        def wanting(one: Measured) -> float:
            turn = next_turn(one.series)
            return need(self.racing(one.series)) if turn < most else 0.0

        needs = {one.place: wanting(one) for one in measured}
        while True:
            waiting = [one for one in measured if needs[one.place] > 1]
            left = deadline - time.monotonic()
            if not waiting or left <= 0:
                break
            # Where visits help little, others come first in the end.
            one = max(waiting, key=lambda one: needs[one.place] / (1 + one.visits))
            one.visits += 1
            bar.show(len(self.cells), f"more runs: {describe(one.cell)}")
            before = next_turn(one.series)
            try:
                self.visit(one, memory, time.monotonic() + min(VISIT, left))
            except Exception as error:
                # What has been measured stays, whatever happens to more of it.
                one.notes["more runs"] = f"{type(error).__name__}: {error}"
            needs[one.place] = wanting(one)
            if next_turn(one.series) == before:
                measured.remove(one)
            self.result["cells"][one.place] = self.entry(one.cell, one.series, one.notes)
            self.result["seconds"] = round(time.monotonic() - self.begin, 1)
            if self.save is not None:
                self.save(self.result)

    def visit(self, one: Measured, memory: Memory, deadline: float) -> None:
        """Time the methods of a cell that has been measured, some more."""
        job = Job(one.cell, memory, self.options.seed, PYTHON_COPIES, self.options.threads)
        racing = self.racing(one.series)
        try:
            for each in racing:
                each.submit, each.stream = self.submission(each.name, job)
                each.submit()
            self.synchronize()
            self.time_all(racing, deadline, self.options.runs * MORE_RUNS)
        finally:
            park(racing)

    def measure(
        self, cell: Cell, memory: Memory, deadline: float
    ) -> tuple[list[Series], dict[str, str]]:
        """Measure one cell: verify every method, then time them in turn."""
        job = Job(cell, memory, self.options.seed, PYTHON_COPIES, self.options.threads)
        job.fill()
        notes: dict[str, str] = {}
        series = self.series(job, notes)
        ready = []
        for one in series:
            try:
                self.first(job, one)
                ready.append(one)
            except (Unavailable, kvsig.BindError, kvsig.CudaError) as error:
                notes[one.name] = str(error)
            except Exception as error:
                # Another library's own exceptions; they must not lose the cell.
                if one.name in KVSIG_METHODS:
                    raise
                notes[one.name] = f"{type(error).__name__}: {error}"
        # The copies for verification are not needed any more; sources keep their bytes.
        job.restore()
        job.drop()
        self.time_all(ready, deadline, self.options.runs)
        park(ready)
        return ready, notes

    def series(self, job: Job, notes: dict[str, str]) -> list[Series]:
        """Make the methods of the options ready for a cell."""
        found = []
        names = list(self.options.methods)
        if job.cell.stream == "default":
            if "auto" in names:
                names.append("auto, default stream")
        for name in names:
            method = name.partition(",")[0]
            if job.cell.direction == "both" and method in ("torch", "select", "cuda.core"):
                notes[name] = "not measured in both directions at once"
                continue
            if job.cell.section == "million" and method not in ("auto", "batch", "one-copy"):
                notes[name] = "not measured with a million copies"
                continue
            try:
                submit, own = self.submission(name, job)
            except Unavailable as error:
                notes[name] = str(error)
                continue
            one = Series(name, submit, own, here=job.cell.direction != "both")
            if method in KVSIG_METHODS:
                plans = [plan for way in job.ways for plan in job.plans(way, method, own)]
                one.operations = sum(plan.copies_out for plan in plans)
                one.note = plans[0].method
            found.append(one)
        return found

    def submission(self, name: str, job: Job) -> tuple[Callable[[], Outcome], Any]:
        """Make a call that submits a cell by a method, and the stream that it works on."""
        method = name.partition(",")[0]
        runner = make_runner(method, job)
        stream = self.streams[0]
        if name != method:
            stream = torch.cuda.default_stream() if self.real else Legacy()
        return self.submitter(runner, job, stream), stream

    def submitter(self, runner: Runner, job: Job, stream: Any) -> Callable[[], Outcome]:
        """Make a call that submits a whole transfer: one way, or both from two threads."""
        if job.cell.direction != "both":
            return lambda: runner(job, job.cell.direction, stream)
        barrier = threading.Barrier(2)

        def half(way: str, own: Any) -> Outcome:
            if self.real:
                torch.cuda.set_device(self.device)
            barrier.wait()
            return runner(job, way, own)

        def both() -> Outcome:
            own = self.streams[1:]
            if self.real:
                for one in own:
                    one.wait_stream(stream)
            tasks = [
                self.workers.submit(half, way, one)
                for way, one in zip(("offload", "load"), own, strict=True)
            ]
            parts = [task.result() for task in tasks]
            for one in own:
                if self.real:
                    stream.wait_stream(one)
                else:
                    one.synchronize()
            whole = parts[0]
            whole.copies += parts[1].copies
            whole.calls += parts[1].calls
            whole.bytes += parts[1].bytes
            return whole

        return both

    def first(self, job: Job, one: Series) -> None:
        """Run a method once: to warm it up, and to compare every byte."""
        verify = self.options.verify and one.name != "one-copy"
        if verify:
            job.restore()
        self.synchronize()
        begin = time.perf_counter()
        one.outcome = one.submit()
        one.stream.synchronize()
        one.first_ms = (time.perf_counter() - begin) * 1e3
        if verify and one.outcome.whole:
            self.synchronize()
            wrong = job.wrong()
            one.verified = wrong is None
            if wrong is not None:
                raise RuntimeError(f"{one.name}: {wrong}, in {describe(job.cell)}")

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.real:
            torch.cuda.synchronize()

    def time_all(self, series: list[Series], deadline: float, most: int) -> None:
        """Time methods in turn, so many times or as there is time, or until ratios are known."""
        first = next_turn(series)
        shuffled = random.Random(self.options.seed + first)
        gc.collect()
        gc.disable()
        try:
            order: list[Series] = []
            for turn in range(first, most):
                racing = series
                if turn >= FEW_RUNS:
                    if time.monotonic() > deadline:
                        break
                    racing = self.racing(series)
                if turn >= self.options.runs and need(racing) <= 1:
                    break
                # In another order each time, then in that backwards, so that each comes as often
                # before every other one as behind it.
                if turn % 2 and {one.name for one in order} == {one.name for one in racing}:
                    order.reverse()
                else:
                    order = shuffled.sample(racing, len(racing))
                for one in order:
                    if one.name == "one-copy" and turn >= LIMIT_RUNS and turn % 2:
                        continue
                    one.turns.append(turn)
                    # The first runs say which methods are slow, which need no more.
                    self.time_one(one, turn >= FEW_RUNS and time.monotonic() < deadline)
        finally:
            gc.enable()

    def racing(self, series: list[Series]) -> list[Series]:
        """Choose what is worth another turn: auto, methods that come close, and the limit."""
        if not self.real:
            return series
        pace = {
            one.name: statistics.median(one.ms) / max(one.outcome.bytes, 1)
            for one in series
            if one.name != "one-copy"
        }
        best = min(pace.values(), default=0.0)
        return [
            one
            for one in series
            if one.name == "one-copy"
            or one.name.startswith("auto")
            or pace.get(one.name, math.inf) <= CLOSE * best
        ]

    def time_one(self, one: Series, again: bool) -> None:
        """Time one submission; with `again`, anew if others slowed its CPU down meanwhile."""
        if not self.real:
            begin = time.perf_counter()
            one.outcome = one.submit()
            one.host_ms.append((time.perf_counter() - begin) * 1e3)
            one.stream.synchronize()
            return
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        for left in range(RUNS_AGAIN if again and one.here else 0, -1, -1):
            self.speed.settle()
            if one.first_ms < WARM_MS:
                # What ran before leaves the CPU's caches cold, which would count as this one's.
                self.speed.warm(one.submit)
            torch.cuda.synchronize()
            apart()
            start.record(one.stream)
            begin = time.perf_counter()
            one.outcome = one.submit()
            host = time.perf_counter() - begin
            end.record(one.stream)
            end.synchronize()
            took = start.elapsed_time(end)
            full = self.speed.here()
            if full or not left or not self.speed.cpus or host * 1e3 < SUBMITS * took:
                break
            one.again += 1
        one.host_ms.append(host * 1e3)
        one.ms.append(took)
        one.full_speed += full

    def entry(self, cell: Cell, series: list[Series], notes: dict[str, str]) -> dict[str, Any]:
        """Write down what a cell gave."""
        methods: dict[str, Any] = {}
        auto = next((one for one in series if one.name == "auto"), None)
        for one in series:
            outcome = one.outcome
            row: dict[str, Any] = {
                "runs": len(one.host_ms),
                "path": outcome.path,
                "reason": outcome.reason,
                "planned": one.note,
                "copies": outcome.copies,
                "calls": outcome.calls,
                "operations": one.operations if one.operations is not None else outcome.copies,
                "bytes": outcome.bytes,
                "verified": one.verified,
                "host_ms": spread(one.host_ms),
                "host_ns_per_copy": round(
                    statistics.median(one.host_ms)
                    * 1e6
                    / max(cell.copies if outcome.whole else outcome.copies, 1),
                    1,
                ),
            }
            if self.real:
                if cell.direction != "both":  # two other threads submit there
                    row["full_speed"] = round(one.full_speed / len(one.ms), 2)
                    row["made_again"] = one.again
                row["ms"] = spread(one.ms)
                row["gb_s"] = round(outcome.bytes / statistics.median(one.ms) / 1e6, 3)
                found = ratio_of(auto, one) if auto is not None and one is not auto else None
                if found is not None:
                    row["auto_ratio"] = round(found[0], 4)
                    row["auto_ratio_error"] = (
                        round(found[1], 4) if math.isfinite(found[1]) else None
                    )
            methods[one.name] = row
        limit = methods.get("one-copy", {}).get("gb_s")
        if limit:
            best = next(one for one in series if one.name == "one-copy")
            for one in series:
                # By turns, like all ratios: the link has its slow times too.
                found = ratio_of(one, best)
                if found is not None:
                    row = methods[one.name]
                    row["share"] = round(found[0], 4)
                    row["share_error"] = round(found[1], 4) if math.isfinite(found[1]) else None
        entry = asdict(cell) | {
            "copies": cell.copies,
            "bytes": cell.bytes,
            "methods": methods,
            "notes": notes,
        }
        if self.real:
            entry["limit_gb_s"] = limit
        return entry


class Legacy:
    """The default stream, as an object with a handle, for the emulated runtime."""

    cuda_stream = 0

    def synchronize(self) -> None:
        """Wait for its work."""
        kvsig.call("cudaStreamSynchronize", stream=0)


def target() -> torch.device:
    """Return the device to measure on; the CPU stands for the emulated runtime's."""
    if _core.is_emulated():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"{kvsig.info()['library']} is a real CUDA runtime, but torch sees no CUDA device: run"
            " on a machine with a GPU, or set KVSIG_CUDART=emulated:12.9"
        )
    return torch.device("cuda", torch.cuda.current_device())


def describe(cell: Cell) -> str:
    """Write a cell in one line."""
    words = [f"{cell.pages:,} pages of {size_text(cell.page_bytes)}"]
    if cell.model:
        words.append(f"{cell.model} page_size {cell.page_size}")
    words += [f"{cell.layers} layers", cell.direction, cell.order]
    if cell.layout != LAYOUTS[0]:
        words.append(cell.layout)
    if cell.scope != SCOPES[0]:
        words.append("layer by layer")
    if cell.spacing != SPACINGS[0]:
        words.append("separate layers")
    return ", ".join(words)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Compare auto with the best single method in every cell.

    Parameters
    ----------
    result : dict
        Of `Bench.run`.

    Returns
    -------
    dict
        ``compared``, the number of cells; ``worst``, the least ratio; ``behind``, the cells in
        which auto has less than 0.95 (under 1 MiB in all: 0.90) of the best; ``verified``,
        whether every method that was compared byte by byte was right; ``rivals``, the least
        ratio to each method. Ratios are medians over the turns that timed both methods.
    """
    behind: list[dict[str, Any]] = []
    worst: float | None = None
    rivals: dict[str, float] = {}
    compared = 0
    for cell in result["cells"]:
        methods = cell["methods"]
        if "gb_s" not in methods.get("auto", {}):
            continue
        mine = methods["auto"]["gb_s"]
        for name, row in methods.items():
            if name not in ("auto", "one-copy") and row["gb_s"] > 0:
                ratio = row.get("auto_ratio") or round(mine / row["gb_s"], 4)
                rivals[name] = min(rivals.get(name, ratio), ratio)
        ratios = {
            name: methods[name].get("auto_ratio") or round(mine / methods[name]["gb_s"], 4)
            for name in SINGLE_METHODS
            if name in methods
        }
        if not ratios:
            continue
        compared += 1
        best = min(ratios, key=lambda name: ratios[name])
        ratio = ratios[best]
        worst = ratio if worst is None else min(worst, ratio)
        if ratio < (0.90 if cell["bytes"] < MIB else 0.95):
            place = {name: cell[name] for name in Cell.__dataclass_fields__}
            behind.append(
                {"cell": describe(Cell(**place)), "best": best, "ratio": ratio}
                | {"auto_gb_s": mine, "best_gb_s": methods[best]["gb_s"]}
            )
    checked = [
        row["verified"]
        for cell in result["cells"]
        for row in cell["methods"].values()
        if row["verified"] is not None
    ]
    return {
        "compared": compared,
        "worst": worst,
        "behind": sorted(behind, key=lambda item: float(item["ratio"])),
        "verified": all(checked) if checked else None,
        "verifications": len(checked),
        "errors": [cell["error"] for cell in result["cells"] if "error" in cell],
        "rivals": rivals,
    }


# --- Host time ---------------------------------------------------------------------------------


def high_water() -> int | None:
    """Most bytes of memory that this process had since `reset_high_water`, where Linux tells."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_high_water() -> bool:
    """Start counting anew; False where the kernel does not allow it."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def plan_and_pack(
    prepared: planning.Prepared, near: I64, far: I64, direction: str, method: str
) -> tuple[str, float]:
    """Plan a transfer and pack all of it; what was planned, and the seconds that it took."""
    start = time.perf_counter()
    prepared.check(near, far, direction)
    transfer = prepared.transfer(near, far, direction, method)
    for _ in transfer:
        pass
    return transfer.method, time.perf_counter() - start


def host_costs(seconds: float = 20.0, seed: int = 0, full_speed: bool = True) -> dict[str, Any]:
    """Measure what planning and packing costs, without any CUDA call.

    Parameters
    ----------
    seconds : float
        Time for all.
    seed : int
        Of the page numbers.
    full_speed : bool
        Begin each timed run on a CPU that is at full speed, see `FullSpeed`.

    Returns
    -------
    dict
        ``plan`` has a row for each number of copies, geometry, direction and method: the
        nanoseconds per copy (medians of up to 15 runs, in turn), and by how much memory grew at
        most in a first run, which is not timed.
    """
    rng = np.random.default_rng(seed)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    from kvsig import costs

    model = costs.load(name)
    rows: list[dict[str, Any]] = []
    begin = time.monotonic()
    speed = FullSpeed(full_speed)
    shuffled = random.Random(seed)
    groups = list(itertools.product(HOST_SHAPES, HOST_COPIES))
    for done, ((layers, kinds, width, scope), wanted) in enumerate(groups):
        left = seconds - (time.monotonic() - begin)
        if left <= 0:
            break
        end = time.monotonic() + left / (len(groups) - done)
        pages = wanted // (layers * kinds)
        copies = pages * layers * kinds
        cases: list[tuple[Callable[[], tuple[str, float]], dict[str, Any], list[float]]] = []
        for direction, method in itertools.product(("load", "offload"), KVSIG_METHODS):
            cell = Cell(width, pages, layers, kinds, direction, scope=scope)
            prepared = planning.prepare(planes_of(cell), model)
            near, far = (page_numbers(cell, rng)[0] for _ in range(2))
            run = functools.partial(plan_and_pack, prepared, near, far, direction, method)
            reset = reset_high_water()
            before = high_water()
            planned, _ = run()
            after = high_water()
            grown = after - before if reset and before is not None and after is not None else None
            row = {
                "copies": copies,
                "layers": layers,
                "kinds": kinds,
                "page_bytes": width,
                "scope": scope,
                "direction": direction,
                "method": method,
                "planned": planned,
                "memory_grown_bytes": grown,
            }
            cases.append((run, row, []))
        # In turn: what keeps the CPU from this thread for some milliseconds is in one run of each,
        # not in most runs of one.
        for turn in range(HOST_RUNS):
            if turn >= FEW_RUNS and time.monotonic() > end:
                break
            for case, _, times in shuffled.sample(cases, len(cases)):
                speed.settle()
                times.append(case()[1])
        for _, row, times in cases:
            row |= {
                "runs": len(times),
                "ns_per_copy": round(statistics.median(times) / copies * 1e9, 2),
                "ns_per_copy_max": round(max(times) / copies * 1e9, 2),
            }
            rows.append(row)
    return {"costs": f"{model.name}, {model.source}", "plan": rows}


# --- Beside computing --------------------------------------------------------------------------


class Product:
    """Matrix products on a stream of their own, launched one by one, and transfers beside them.

    Parameters
    ----------
    device : torch.device
        A CUDA device.
    seed : int
        Of the matrices.
    count : int
        Products that are timed together.
    """

    def __init__(self, device: torch.device, seed: int, count: int = 16) -> None:
        self.device = device
        self.count = count
        generator = torch.Generator(device).manual_seed(seed)
        self.left, self.right = (
            torch.randn((PRODUCT, PRODUCT), device=device, generator=generator).to(torch.bfloat16)
            for _ in range(2)
        )
        self.out = torch.empty_like(self.left)
        self.small = torch.zeros(1024, device=device)
        self.working, self.moving = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.alone()

    def alone(self) -> list[float]:
        """Milliseconds of each product but the first one, which starts on an idle GPU.

        With an event behind each, which the next one waits for.
        """
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.count + 1)]
        with torch.cuda.stream(self.working):
            events[0].record()
            for event in events[1:]:
                torch.mm(self.left, self.right, out=self.out)
                event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)][1:]

    def unbroken(self) -> list[float]:
        """Milliseconds of a product where no event is between them, as one value."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.working):
            torch.mm(self.left, self.right, out=self.out)
            start.record()
            for _ in range(self.count):
                torch.mm(self.left, self.right, out=self.out)
            end.record()
        end.synchronize()
        return [start.elapsed_time(end) / self.count]

    def launches(self, count: int = 2000) -> list[float]:
        """Microseconds that launching a small kernel takes the host, for each of some."""
        times = []
        with torch.cuda.stream(self.working):
            for _ in range(count):
                begin = time.perf_counter_ns()
                self.small.add_(1)
                times.append((time.perf_counter_ns() - begin) / 1e3)
        self.working.synchronize()
        return times

    def beside(
        self,
        submit: Callable[[], Outcome],
        work: Callable[[], list[float]] | None = None,
    ) -> tuple[list[float], float]:
        """Times of products, or of other work, beside transfers of another thread; their GB/s."""
        stop, going = threading.Event(), threading.Event()
        moved, failures = [0], []

        def move() -> None:
            # At most two transfers are in the queue; the products run in the middle of them.
            try:
                torch.cuda.set_device(self.device)
                queued: list[torch.cuda.Event] = []
                while not stop.is_set():
                    moved[0] += submit().bytes
                    mark = torch.cuda.Event()
                    mark.record(self.moving)
                    queued.append(mark)
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
            times = (work or self.alone)()
            took = time.perf_counter() - begin
            rate = (moved[0] - before) / took / 1e9
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]
        return times, rate


def compute(
    seconds: float = 40.0,
    methods: Sequence[str] = ("auto", "batch", "strided", "loop"),
    transfers: Sequence[tuple[str, int]] = COMPUTE,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure by how much transfers slow a matrix product on another stream.

    Parameters
    ----------
    seconds : float
        Time for all.
    methods : sequence of str
        Of kvsig, to be compared with one big copy.
    transfers : sequence of (str, int)
        Scope and page size of the transfers: 32 layers of K and V, each way.
    seed : int
        Of page numbers and bytes.
    threads : int, optional
        That may submit a transfer; by default as `kvsig.PagedKVCache` has it.

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
    product = Product(device, seed)
    memory = Memory(device, 512 * MIB, seed)
    result: dict[str, Any] = {"product": f"{PRODUCT}^3 bf16", "cells": []}
    result["threads"] = _threads.most(threads)
    deadline = time.monotonic() + seconds
    shuffled = random.Random(seed)
    cases = [(scope, page, way) for scope, page in transfers for way in ("offload", "load")]
    for scope, page, direction in cases:
        if time.monotonic() > deadline:
            break
        pages = auto_pages(page, 64, emulated=False)
        pages = min(pages, memory.near.numel() // (2 * 64 * page))
        cell = Cell(page, pages, direction=direction, scope=scope)
        job = Job(cell, memory, seed, PYTHON_COPIES, threads)
        job.fill()
        job.drop()
        runs: dict[str, Callable[[], Outcome] | None] = {"alone": None}
        for name in ("one-copy", *methods):
            runner = make_runner(name, job)
            runs[name] = lambda runner=runner, job=job: runner(  # type: ignore[misc]
                job, job.cell.direction, product.moving
            )
        times: dict[str, list[float]] = {name: [] for name in runs}
        rates: dict[str, list[float]] = {name: [] for name in runs}
        notes: dict[str, str] = {}
        share = time.monotonic() + (deadline - time.monotonic()) / max(
            1, len(cases) - len(result["cells"])
        )
        for turn in range(COMPUTE_RUNS):
            if turn >= 2 and time.monotonic() > share:
                break
            # In another order each time: a GPU that has just been idle, or busy, runs at another
            # speed, and none should always come behind the same other.
            for name in shuffled.sample(list(runs), len(runs)):
                if name in notes:
                    continue
                submit = runs[name]
                torch.cuda.synchronize()
                try:
                    found, rate = (product.alone(), 0.0) if submit is None else (
                        product.beside(submit)
                    )
                except (RuntimeError, kvsig.BindError) as error:
                    notes[name] = str(error)
                    continue
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
            if values
        }
        for row in rows.values():
            if "one-copy" in rows:
                row["against_one_copy"] = round(
                    float(str(row["slowdown"])) / float(str(rows["one-copy"]["slowdown"])), 4
                )
        result["cells"].append(asdict(job.cell) | {"methods": rows, "notes": notes})
    return result
