"""Where the tensors of a direct call lie: planes of tokens or pages, on both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsig import _core, streams
from kvsig.memory import blocks_of, extent, seams_inside

__all__ = [
    "Geometry",
    "Planes",
    "Unserved",
    "device_of",
    "geometry",
    "load_planes",
    "memory_blocks",
    "offload_planes",
    "seams_of",
    "token_planes",
]

U64: TypeAlias = npt.NDArray[np.uint64]
Tensors: TypeAlias = Sequence[torch.Tensor]
Blocks: TypeAlias = tuple[tuple[int, int, bool, tuple[int, int] | None], ...]
PlanesOf: TypeAlias = "Callable[[Tensors, Tensors, int, int], tuple[list[Planes], int, int]]"

# Geometries by what they are: layers of a pool, both directions.
_geometries: dict[Any, Geometry] = {}
_MANY = 4096
# Registered blocks that are looked at before each launch: pools have one, or a few large ones.
_MOST_BLOCKS = 1024


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
    mapped : tuple of (int, int) or None
        The registered blocks (address, bytes) that hold all of the host's side.
    requests : dict
        Of launches that move its pages, by the tokens of a page number; None where there are none.
    """

    planes: tuple[Planes, ...]
    dst_units: int
    src_units: int
    device: torch.device
    blocks: Blocks
    seams: tuple[int, ...]
    mapped: tuple[tuple[int, int], ...] | None
    requests: dict[int, Any]


class Unserved(Exception):
    """Carries the reason why a call is left to SGLang."""


def geometry(
    kind: str,
    srcs: Tensors,
    dsts: Tensors,
    page_size: int,
    layer: int,
    planes_of: PlanesOf,
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
    device = device_of([(s, d) for s in srcs[:1] for d in dsts] + [(s, dsts[0]) for s in srcs])
    with streams.device_guard(device):
        blocks = memory_blocks((*srcs, *dsts))
        seams = seams_of(blocks)
        mapped = mapped_blocks([t for t in (*srcs, *dsts) if not t.is_cuda])
    if len(_geometries) >= _MANY:
        _geometries.clear()
    found = Geometry(tuple(planes), dst_units, src_units, device, blocks, seams, mapped, {})
    _geometries[key] = found
    return found


def device_of(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.device:
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


def memory_blocks(tensors: Tensors) -> Blocks:
    """Where distinct tensors begin and end, and the block that each begins in."""
    found = {}
    for tensor in tensors:
        start, end, limited = extent(tensor)
        found[start, end] = (start, end, limited, _core.memory_range(start))
    return tuple(found.values())


def seams_of(blocks: Blocks) -> tuple[int, ...]:
    """Return where blocks meet inside of a tensor."""
    inside = []
    for start, end, _, block in blocks:
        if block is not None and block[0] + block[1] >= end:
            continue
        inside += seams_inside(start, end)
    return tuple(inside)


def mapped_blocks(tensors: Tensors) -> tuple[tuple[int, int], ...] | None:
    """Find the registered blocks that hold all of some tensors; None where a byte is in none."""
    found: dict[tuple[int, int], None] = {}
    for tensor in tensors:
        blocks = blocks_of(tensor)
        if blocks is None:
            return None
        found.update(dict.fromkeys(blocks))
    return tuple(found) if len(found) <= _MOST_BLOCKS else None


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


def token_planes(
    srcs: Tensors, dsts: Tensors, page_size: int, layer: int
) -> tuple[list[Planes], int, int]:
    """Each tensor a plane of tokens: for `transfer_kv_direct`."""
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


def load_planes(
    srcs: Tensors, dsts: Tensors, page_size: int, layer: int
) -> tuple[list[Planes], int, int]:
    """Host pages to layers on the device, from layer `layer` on."""
    groups, pages, device_pages = _pool_planes(srcs, dsts, page_size, layer)
    return _grouped(groups), device_pages, pages


def offload_planes(
    srcs: Tensors, dsts: Tensors, page_size: int, layer: int
) -> tuple[list[Planes], int, int]:
    """Layers on the device to host pages."""
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
