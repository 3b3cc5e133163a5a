"""SGLang's direct functions: the copies that HiCache makes with page numbers on the CPU.

Each function here takes what SGLang's takes, and answers with a report, or with the reason why
it leaves a call alone: a text. It raises for nothing that SGLang's would serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsig import _core, interop
from kvsig._core import Report
from kvsig.planning import descriptors as descriptors

__all__ = [
    "transfer_embedding_ranges_direct",
    "transfer_kv_all_layer_direct_lf_pf",
    "transfer_kv_direct",
    "transfer_kv_per_layer_direct_pf_lf",
]

U64: TypeAlias = npt.NDArray[np.uint64]
Tensors: TypeAlias = Sequence[torch.Tensor]
Answer: TypeAlias = Report | str

UNKNOWN = "an argument that kvsig does not know"
_BAD_INDICES = "indices that are not two int64 tensors of one length"
_BAD_PAGES = "indices that are not whole pages"
_OUTSIDE = "an index outside of a tensor"


class Planes(NamedTuple):
    """Planes of one width and pitch: base addresses on both sides."""

    dst: U64
    src: U64
    dst_pitch: int
    src_pitch: int
    width: int


class Geometry(NamedTuple):
    """What the tensors of a call are, without the tensors.

    Parameters
    ----------
    planes : tuple of Planes
        All of them.
    dst_units, src_units : int
        Page (or token) numbers are below these.
    device : torch.device
        Where the stream is.
    blocks : tuple
        Of each distinct tensor: first and last address, and the registered block or allocation
        that it begins in.
    seams : tuple of int
        Where allocations or registered blocks meet within a tensor.
    """

    planes: tuple[Planes, ...]
    dst_units: int
    src_units: int
    device: torch.device
    blocks: tuple[tuple[int, int, bool, tuple[int, int] | None], ...]
    seams: tuple[int, ...]


class Unserved(Exception):
    """Carries the reason why a call is left to SGLang."""


class Pages:
    """The page numbers of one load or offload: all layers of it bring the same tensors.

    Parameters
    ----------
    src, dst : Tensor
        As SGLang gives them, kept so that no other tensor can have their identity.
    page_size : int
        Tokens of a page.
    kind : {"tokens", "load", "offload"}
        "tokens": each number is a place of its own on both sides. "load": the source counts host
        pages and the destination device tokens, of which a page's first ones are read. "offload":
        the other way.
    """

    def __init__(self, src: torch.Tensor, dst: torch.Tensor, page_size: int, kind: str) -> None:
        self.src, self.dst, self.page_size, self.kind = src, dst, page_size, kind
        self.versions = _versions(src, dst)
        near, far = self._read()
        if self.versions is None:
            self.numbers = near.copy(), far.copy()
        self.aligned = True
        if kind == "tokens":
            self.runs = descriptors.page_runs(far, near)
        else:
            size = np.uint64(page_size)
            device = far if kind == "load" else near
            self.aligned = page_size == 1 or not (device % size).any()
            if self.aligned:
                self.runs = descriptors.page_runs(far // size, near // size)
            else:
                # Pages that begin anywhere: the device's side counts tokens.
                to, origin = (far, near // size) if kind == "load" else (far // size, near)
                top = int(to.max()), int(origin.max())
                self.runs = descriptors.PageRuns(to, origin, np.ones_like(far), len(far), top)
        self._patterns: dict[tuple[int, int, int], descriptors.Pattern] = {}

    def _read(self) -> tuple[U64, U64]:
        step = 1 if self.kind == "tokens" else self.page_size
        return _numbers(self.src)[::step], _numbers(self.dst)[::step]

    def same(self, src: torch.Tensor, dst: torch.Tensor, page_size: int, kind: str) -> bool:
        """Whether these are the page numbers of such a call."""
        if src is not self.src or dst is not self.dst:
            return False
        if page_size != self.page_size or kind != self.kind:
            return False
        if self.versions is not None:
            return self.versions == _versions(src, dst)
        # Made in inference mode, where writes are not counted: a look at the numbers is cheap.
        near, far = self._read()
        return bool((near == self.numbers[0]).all() and (far == self.numbers[1]).all())

    def pattern(self, planes: Planes) -> descriptors.Pattern:
        """Return the copies of one of some planes that are alike."""
        key = planes.dst_pitch, planes.src_pitch, planes.width
        found = self._patterns.get(key)
        if found is None:
            dst_pitch, src_pitch, width = key
            if not self.aligned:
                row = width // self.page_size
                dst_pitch, src_pitch = (
                    (row, src_pitch) if self.kind == "load" else (dst_pitch, row)
                )
            found = descriptors.pattern(self.runs, dst_pitch, src_pitch, width)
            self._patterns[key] = found
        return found


# The last page numbers, and the geometries by what they are: layers of a pool, both directions.
_last: Pages | None = None
_geometries: dict[Any, Geometry] = {}
_MANY = 4096


def transfer_kv_direct(
    src_layers: Tensors,
    dst_layers: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
    **more: Any,
) -> Answer:
    """Copy tokens of each source tensor to its destination tensor, by token numbers."""
    if more:
        return UNKNOWN
    return _transfer(
        "tokens", src_layers, dst_layers, src_indices, dst_indices, page_size, 0, _token_planes
    )


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Tensors,
    dst_ptrs: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
    **more: Any,
) -> Answer:
    """Copy host pages (pages, layers, page_size, ...) to layers on the device."""
    if more:
        return UNKNOWN
    return _transfer(
        "load", src_ptrs, dst_ptrs, src_indices, dst_indices, page_size, layer_id, _load_planes
    )


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Tensors,
    dst_ptrs: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
    **more: Any,
) -> Answer:
    """Copy layers on the device to host pages (pages, layers, page_size, ...)."""
    if more:
        return UNKNOWN
    return _transfer(
        "offload", src_ptrs, dst_ptrs, src_indices, dst_indices, page_size, 0, _offload_planes
    )


def transfer_embedding_ranges_direct(
    src: torch.Tensor,
    dst: torch.Tensor,
    src_starts: list[int],
    dst_starts: list[int],
    lengths: list[int],
    **more: Any,
) -> Answer:
    """Copy ranges of rows from one two-dimensional tensor to another."""
    if more:
        return UNKNOWN
    if src.ndim != 2 or dst.ndim != 2 or src.dtype != dst.dtype or src.shape[1] != dst.shape[1]:
        return "tables that are not two-dimensional and alike"
    if not (src.is_contiguous() and dst.is_contiguous()):
        return "a table that is not contiguous"
    try:
        device = _device(((src, dst),))
    except Unserved as unserved:
        return str(unserved)
    if not len(src_starts) == len(dst_starts) == len(lengths):
        return "ranges that are not of one number"
    near, far, count = (np.array(n, dtype=np.int64) for n in (src_starts, dst_starts, lengths))
    for starts, table in ((near, src), (far, dst)):
        if ((starts < 0) | (count < 0) | (starts + count > table.shape[0])).any():
            return "a range outside of its table"
    row = src.shape[1] * src.element_size()
    found = descriptors.plan(
        (far * row + dst.data_ptr()).view(np.uint64),
        (near * row + src.data_ptr()).view(np.uint64),
        (count * row).view(np.uint64),
    )
    with interop.device_guard(device):
        blocks = _blocks((src, dst))
        if seams := _seams(blocks):
            found = descriptors.split(found, seams)
        return interop.submit(found, interop.current_handle(device))


def _transfer(
    kind: str,
    srcs: Tensors,
    dsts: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
    layer: int,
    planes_of: Callable[[Tensors, Tensors, int, int], tuple[list[Planes], int, int]],
) -> Answer:
    """Serve one call of the first three functions."""
    global _last
    if type(page_size) is not int or page_size < 1:
        return "a page size that is none"
    pages = _last
    try:
        if pages is None or not pages.same(src_indices, dst_indices, page_size, kind):
            _check_indices(src_indices, dst_indices, page_size)
            if not src_indices.numel():
                return Report()
            pages = _last = Pages(src_indices, dst_indices, page_size, kind)
        geometry = _geometry(kind, srcs, dsts, page_size, layer, planes_of)
    except Unserved as unserved:
        return str(unserved)
    limits = geometry.dst_units, geometry.src_units
    if not pages.aligned:
        on_device = 0 if kind == "load" else 1
        tokens = limits[on_device] * page_size - page_size + 1
        limits = (tokens, limits[1]) if on_device == 0 else (limits[0], tokens)
    if pages.runs.top[0] >= limits[0] or pages.runs.top[1] >= limits[1]:
        return _OUTSIDE
    return _submit(geometry, pages)


def _submit(geometry: Geometry, pages: Pages) -> Report:
    with interop.device_guard(geometry.device):
        stream = interop.current_handle(geometry.device)
        report: Report | None = None
        for planes in geometry.planes:
            found = descriptors.place(pages.pattern(planes), planes.dst, planes.src)
            if geometry.seams:
                found = descriptors.split(found, geometry.seams)
            one = interop.submit(found, stream)
            report = one if report is None else report + one
    return Report() if report is None else report


def _check_indices(src: torch.Tensor, dst: torch.Tensor, page_size: int) -> None:
    for indices in (src, dst):
        if indices.dtype is not torch.int64 or indices.ndim != 1:
            raise Unserved(_BAD_INDICES)
    if src.numel() != dst.numel():
        raise Unserved(_BAD_INDICES)
    if src.numel() % page_size:
        raise Unserved(_BAD_PAGES)


def _versions(src: torch.Tensor, dst: torch.Tensor) -> tuple[int, int] | None:
    """How often tensors were written to; None for those that do not count it."""
    if src.is_inference() or dst.is_inference():
        return None
    return src._version, dst._version


def _numbers(indices: torch.Tensor) -> U64:
    """Return numbers on the CPU, as SGLang's function does: those on a GPU are waited for.

    A negative number becomes one that no tensor reaches to.
    """
    return np.ascontiguousarray(indices.detach().cpu().numpy()).view(np.uint64)


def _geometry(
    kind: str,
    srcs: Tensors,
    dsts: Tensors,
    page_size: int,
    layer: int,
    planes_of: Callable[[Tensors, Tensors, int, int], tuple[list[Planes], int, int]],
) -> Geometry:
    """Return what the tensors are: known ones by addresses, shapes and registered blocks."""
    key = (
        kind, page_size, layer, len(srcs),
        *[(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in srcs],
        *[(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in dsts],
    )  # fmt: skip
    found = _geometries.get(key)
    if found is not None:
        for start, _, _, block in found.blocks:
            if _core.memory_range(start) != block:
                break
        else:
            return found
    planes, dst_units, src_units = planes_of(srcs, dsts, page_size, layer)
    device = _device([(s, d) for s in srcs[:1] for d in dsts] + [(s, dsts[0]) for s in srcs])
    with interop.device_guard(device):
        blocks = _blocks((*srcs, *dsts))
        seams = _seams(blocks)
    if len(_geometries) >= _MANY:
        _geometries.clear()
    found = Geometry(tuple(planes), dst_units, src_units, device, blocks, seams)
    _geometries[key] = found
    return found


def _device(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.device:
    """Return the device that has the stream; leave alone what is not between it and the CPU."""
    found: torch.device | None = None
    emulated = _core.is_emulated()
    for src, dst in pairs:
        on = [t.device for t in (src, dst) if t.is_cuda]
        if on and emulated:
            raise Unserved("the CUDA runtime in use is the emulated one: unset KVSIG_CUDART")
        if len(on) > 1 or (not on and not emulated):
            raise Unserved("tensors that are not on a GPU and in host memory, one side each")
        if on and found is not None and found != on[0]:
            raise Unserved("tensors on two GPUs")
        found = on[0] if on else found
    return torch.device("cpu") if found is None else found


def _blocks(tensors: Tensors) -> tuple[tuple[int, int, bool, tuple[int, int] | None], ...]:
    found = {}
    for tensor in tensors:
        start, end = tensor.data_ptr(), tensor.data_ptr() + _reach(tensor)
        limited = tensor.is_cuda or (not _core.is_emulated() and tensor.is_pinned())
        found[start, end] = (start, end, limited, _core.memory_range(start))
    return tuple(found.values())


def _seams(blocks: Sequence[tuple[int, int, bool, tuple[int, int] | None]]) -> tuple[int, ...]:
    """Return where blocks meet inside of a tensor."""
    inside = []
    for start, end, limited, block in blocks:
        if block is not None and block[0] + block[1] >= end:
            continue
        for seam in interop.memory_seams([(start, end, limited)]).tolist():
            if start < seam < end:
                inside.append(seam)
    return tuple(inside)


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last of a tensor, with what lies between its rows."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size() if tensor.numel() else 0


def _row(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the bytes of a row, and from row to row; rows themselves are in one piece."""
    if tensor.ndim == 0 or not tensor.numel():
        raise Unserved("a tensor without rows")
    width = tensor.element_size()
    for length, stride in zip(tensor.shape[:0:-1], tensor.stride()[:0:-1], strict=True):
        if length > 1 and stride * tensor.element_size() != width:
            raise Unserved("a tensor whose rows are not in one piece")
        width *= length
    pitch = tensor.stride(0) * tensor.element_size() if tensor.shape[0] > 1 else width
    if pitch < width:
        raise Unserved("a tensor whose rows overlap")
    return width, pitch


def _packed_row(tensor: torch.Tensor) -> int:
    width, pitch = _row(tensor)
    if pitch != width:
        raise Unserved("device rows that are not packed")
    return width


def _token_planes(
    srcs: Tensors, dsts: Tensors, page_size: int, layer: int
) -> tuple[list[Planes], int, int]:
    if len(srcs) != len(dsts) or not srcs:
        raise Unserved("as many destinations as sources are needed")
    groups: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for src, dst in zip(srcs, dsts, strict=True):
        if src.dtype != dst.dtype or src.shape[1:] != dst.shape[1:]:
            raise Unserved("tensors of two dtypes or shapes")
        width, near = _row(src)
        _, far = _row(dst)
        groups.setdefault((far, near, width), []).append((dst.data_ptr(), src.data_ptr()))
    return _grouped(groups), min(t.shape[0] for t in dsts), min(t.shape[0] for t in srcs)


def _load_planes(
    srcs: Tensors, dsts: Tensors, page_size: int, layer: int
) -> tuple[list[Planes], int, int]:
    groups, pages, device_pages = _pool_planes(srcs, dsts, page_size, layer)
    return _grouped(groups), device_pages, pages


def _offload_planes(
    srcs: Tensors, dsts: Tensors, page_size: int, layer: int
) -> tuple[list[Planes], int, int]:
    groups, pages, device_pages = _pool_planes(dsts, srcs, page_size, layer)
    turned = {
        (far, near, width): [(host, at) for at, host in pairs]
        for (near, far, width), pairs in groups.items()
    }
    return _grouped(turned), pages, device_pages


def _pool_planes(
    pools: Tensors, layers: Tensors, page_size: int, first: int
) -> tuple[dict[tuple[int, int, int], list[tuple[int, int]]], int, int]:
    """Find (device, host) bases of layers and pools, by (device pitch, host pitch, width)."""
    if len(pools) not in (1, 2) or not layers or len(layers) % len(pools):
        raise Unserved("one pool, or K's and V's with as many layers of each, are needed")
    count = len(layers) // len(pools)
    if type(first) is not int or first < 0:
        raise Unserved("a layer that is none")
    groups: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for number, pool in enumerate(pools):
        if pool.ndim < 3 or not pool.numel() or not pool.is_contiguous():
            raise Unserved("a host pool that is not (pages, layers, page_size, ...) in one piece")
        if first + count > pool.shape[1]:
            raise Unserved("more layers than the host pool has")
        width = pool.nbytes // (pool.shape[0] * pool.shape[1])
        for i, tensor in enumerate(layers[number * count : (number + 1) * count]):
            if tensor.dtype != pool.dtype or _packed_row(tensor) * page_size != width:
                raise Unserved("layers and host pages of two dtypes or sizes")
            host = pool.data_ptr() + (first + i) * width
            key = width, width * pool.shape[1], width
            groups.setdefault(key, []).append((tensor.data_ptr(), host))
    return groups, min(p.shape[0] for p in pools), min(t.shape[0] for t in layers) // page_size


def _grouped(groups: dict[tuple[int, int, int], list[tuple[int, int]]]) -> list[Planes]:
    return [
        Planes(
            np.array([pair[0] for pair in pairs], dtype=np.uint64),
            np.array([pair[1] for pair in pairs], dtype=np.uint64),
            *key,
        )
        for key, pairs in groups.items()
    ]
