"""Requests of the kernel functions, served by launches of the page-copy kernel.

Token numbers are read on the GPU, where they are. Where tokens lie is worked out once for each set
of buffers, and known again by what it is: addresses, pitches and the registered memory they are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsig import _core, kernel, streams
from kvsig._core import KernelCode, KernelLane, KernelPlanes, Report
from kvsig._errors import BindError, CudaError
from kvsig.call import call
from kvsig.integrations.sglang.kernel import Place, Request
from kvsig.integrations.sglang.pools import Unserved
from kvsig.launching import multiprocessors, window_pitch
from kvsig.planning import costs

__all__ = ["Launched", "WrongToken", "device_of", "launch", "refusal", "serve", "source_of"]

Numbers: TypeAlias = "tuple[int, int, int] | npt.NDArray[np.int64]"

#: Layers that one launch can tell of.
LAYERS = 1024
#: Staged pages from which copy engines are as fast, and leave the multiprocessors alone.
STAGED_BYTES = 128 << 10
#: What stands for the tokens of a buffer of which only the address is known.
ANY = 1 << 40
_MEMORY_TYPE, _DEVICE_POINTER, _HOST = 2, 3, 1
_MANY = 4096


class WrongToken(ValueError):
    """A token number on the GPU that its buffer does not have; nothing of its transfer moved."""


class Known(NamedTuple):
    """Where the tokens of requests lie, ready to be launched."""

    code: KernelCode
    planes: KernelPlanes
    limits: tuple[int, int]
    source: int
    sms: int
    rate: float
    window_pitch: int
    registered: tuple[tuple[int, tuple[int, int]], ...]
    tables: tuple[torch.Tensor, ...]


class Launched(NamedTuple):
    """A launch that is queued, and what a stream waits for: ``lane.wait(layer, value, stream)``."""

    report: Report
    lane: KernelLane | None = None
    value: int = 0


_known: dict[Any, Known] = {}
_lanes: dict[tuple[int | None, int], KernelLane] = {}
_codes: dict[tuple[int | None, int], KernelCode | str] = {}
# The last token numbers of a page-head pool, and what they were made of.
_heads: tuple[Any, torch.Tensor] | None = None


def refusal() -> str | None:
    """Say why this process cannot launch the page-copy kernel, or None."""
    try:
        return kernel.refusal() if multiprocessors() else "KVSIG_SMS is 0"
    except BindError as error:
        return str(error)


def serve(request: Request) -> Report | str:
    """Move what one call asks for; the report, or the reason why it is left to SGLang."""
    if request.staged and request.page_size * request.dst[0].token >= STAGED_BYTES:
        return "staged pages of 128 KiB or more, which copy engines move as fast"
    try:
        return launch([[request]], streams.current_handle(device_of(request))).report
    except Unserved as unserved:
        return str(unserved)


def launch(layers: Sequence[Sequence[Request]], handle: int, flags: bool = False) -> Launched:
    """Queue requests of the same token numbers as one launch.

    Parameters
    ----------
    layers : sequence of sequence of Request
        Layer by layer, as many of each; or one of several layers alone.
    handle : int
        Of the stream.
    flags : bool, optional
        Whether each layer is to raise its flag.

    Raises
    ------
    Unserved
        If the kernel cannot do it; nothing is queued.
    WrongToken
        If a launch before this one was given a number that its buffer does not have.
    """
    first = layers[0][0]
    device = device_of(first)
    with streams.device_guard(device):
        key = _key(layers)
        known = _known_again(key) or _found(key, layers, device, handle)
        sides = (1, 0) if known.source else (0, 1)
        near, far = (
            _numbers(first, side, handle, limit)
            for side, limit in zip(sides, known.limits, strict=True)
        )
        counts = [n[1] if isinstance(n, tuple) else len(n) for n in (near, far)]
        if counts[0] != counts[1]:
            raise Unserved("indices that are not of one length")
        if not counts[0]:
            return Launched(Report())
        lane = _lane(device, handle)
        listed = not (isinstance(near, tuple) and isinstance(far, tuple))
        report, value = _core.launch_kernel(
            known.code, known.planes, lane, near, far, known.limits, known.source, sms=known.sms,
            rate=known.rate, window_pitch=known.window_pitch, flags=flags,
            recorded=listed and _core.stream_recorded(handle),
        )  # fmt: skip
    return Launched(report, lane, value)


def device_of(request: Request) -> torch.device:
    """Return where a request's launch is; on the emulated runtime the CPU stands for it."""
    if request.device is not None:
        return request.device
    for indices in (request.src_indices, request.dst_indices):
        if isinstance(indices, torch.Tensor) and indices.device.type == "cuda":
            return indices.device
    if not _core.is_emulated():
        raise Unserved("indices that are not on a GPU")
    return torch.device("cpu")


def _lane(device: torch.device, handle: int) -> KernelLane:
    lane = _lanes.get((device.index, handle))
    if lane is None:
        if _core.stream_recorded(handle):
            raise Unserved("a captured stream that no transfer has run on before")
        lane = _lanes[device.index, handle] = KernelLane(LAYERS, handle)
    wrong = lane.take_wrong()
    if wrong is not None:
        side = ("device", "host")[wrong[0]]
        raise WrongToken(
            f"token number {wrong[1]} of the {side}'s side was {wrong[2]}, which its buffer does "
            "not have: an earlier transfer of this stream moved nothing"
        )
    return lane


def _numbers(request: Request, side: int, handle: int, limit: int) -> Numbers:
    """Return a side's token numbers: where they are on the GPU, or checked ones in host memory."""
    indices = (request.src_indices, request.dst_indices)[side]
    if isinstance(indices, np.ndarray):
        return indices
    heads = (request.src, request.dst)[side][0].head
    if heads > 1:
        indices = _by_head(indices, heads, request.page_size, handle)
    known = (torch.int32, torch.int64) if indices.is_cuda else (torch.int64,)
    if indices.dtype not in known or indices.ndim != 1 or not indices.is_contiguous():
        raise Unserved("indices that are not a list of int32 or int64")
    if indices.is_cuda:
        return indices.data_ptr(), indices.numel(), indices.element_size()
    listed: npt.NDArray[np.int64] = np.ascontiguousarray(indices.numpy())
    if len(listed) and (listed.min() < 0 or listed.max() >= limit):
        raise Unserved("an index outside of a tensor")
    return listed


def _by_head(indices: torch.Tensor, heads: int, page: int, handle: int) -> torch.Tensor:
    """Number the rows of (pages, heads, page_size) that hold tokens' first heads, on the GPU."""
    global _heads
    made_of = id(indices), indices.data_ptr(), len(indices), heads, page, handle
    versions = -1 if indices.is_inference() else indices._version
    if _heads is not None and versions >= 0 and _heads[0] == (made_of, versions, indices):
        return _heads[1]
    rows = indices + indices // page * ((heads - 1) * page)
    _heads = None if versions < 0 else (_Same((made_of, versions, indices)), rows)
    return rows


class _Same(tuple):  # type: ignore[type-arg]
    """Compares a tensor, kept so that its identity is not given again, by identity alone."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple) and self[:2] == other[:2] and self[2] is other[2]

    __hash__ = None  # type: ignore[assignment]


def _key(layers: Sequence[Sequence[Request]]) -> tuple[Any, ...]:
    return tuple(
        r.name or (r.width, r.layers, r.page_size, *(_place_key(p) for p in r.src + r.dst))
        for layer in layers
        for r in layer
    )


def _place_key(place: Place) -> tuple[int, ...]:
    base = place.base
    if isinstance(base, torch.Tensor):
        version = -1 if base.is_inference() else base._version
        return (id(base), base.data_ptr(), version, *place[1:])
    return base, *place[1:]


def _known_again(key: tuple[Any, ...]) -> Known | None:
    found = _known.get(key)
    if found is None:
        return None
    for address, block in found.registered:
        if _core.memory_range(address) != block:
            del _known[key]  # it was registered anew, or is not any more
            return None
    return found


def _found(
    key: tuple[Any, ...], layers: Sequence[Sequence[Request]], device: torch.device, handle: int
) -> Known:
    """Work out where the tokens of requests lie, and put it where the kernel reads it."""
    if _core.stream_recorded(handle):
        raise Unserved("buffers that no transfer has used before the stream was captured")
    why = refusal()
    if why is not None:
        raise Unserved(why)
    columns = [_layer_columns(layer) for layer in layers]
    if not columns[0] or any(len(column) != len(columns[0]) for column in columns):
        raise Unserved("layers that are not alike")
    planes = np.array(columns, dtype=np.uint64).reshape(-1, 5)  # src, dst, their pitches, width
    many = layers[0][0].layers if len(layers) == 1 else len(layers)
    source = source_of(planes[:, 0], planes[:, 1])
    requests = [request for layer in layers for request in layer]
    if any(_core.memory_range(block[0]) != block for r in requests for block in r.blocks):
        raise Unserved("host memory that is not page-locked any more")
    limits = (
        min(_rows(place) for request in requests for place in request.src),
        min(_rows(place) for request in requests for place in request.dst),
    )
    near, far = (1, 0) if source else (0, 1)
    unit = kernel.unit_of(planes)
    table = kernel.table(
        (planes[:, near], planes[:, far]), (planes[:, 2 + near], planes[:, 2 + far]), planes[:, 4],
        unit,
    )  # fmt: skip
    model = costs.load(streams.device_name(device))
    rate = (model.load if source else model.offload).kernel_rate / 1e3
    pitch, page = int(planes[:, 2 + far].max()), int(planes[:, 4].max())
    known_end = pitch * limits[far] < ANY
    blocks = {_core.memory_range(int(a)): int(a) for a in planes[:, far]}
    blocks |= {block: block[0] for request in requests for block in request.blocks}
    found = Known(
        _code(device, unit), KernelPlanes(table, len(planes) // many, unit),
        (limits[near], limits[far]), source, multiprocessors(), rate,
        window_pitch(page, pitch, limits[far]) if known_end else 0,
        tuple((address, block) for block, address in blocks.items() if block is not None),
        tuple(p.base for r in requests for p in r.src + r.dst if isinstance(p.base, torch.Tensor)),
    )  # fmt: skip
    if len(_known) >= _MANY:
        _known.clear()
    _known[key] = found
    return found


def _layer_columns(requests: Sequence[Request]) -> list[tuple[int, int, int, int, int]]:
    """Planes of requests, layer by layer: addresses, pitches, width; heads are planes."""
    rows = []
    bases = [
        [_bases(place, request.layers) for place in request.src + request.dst]
        for request in requests
    ]
    for layer in range(requests[0].layers):
        for request, of in zip(requests, bases, strict=True):
            half = len(request.src)
            heads = max(1, *(place.head for place in request.src + request.dst))
            width = request.width // heads
            for i, (src, dst) in enumerate(zip(request.src, request.dst, strict=True)):
                for head in range(heads):
                    rows.append((
                        of[i][layer] + head * _head_step(src, request, width),
                        of[half + i][layer] + head * _head_step(dst, request, width),
                        src.token // (src.head or 1), dst.token // (dst.head or 1), width,
                    ))  # fmt: skip
    return rows


def _head_step(place: Place, request: Request, width: int) -> int:
    return request.page_size * (place.token // place.head) if place.head else width


def _bases(place: Place, layers: int) -> list[int]:
    base = place.base
    if isinstance(base, torch.Tensor):
        if base.numel() != layers:
            raise Unserved("a table that has not one address for each layer")
        # Waits for what makes the table: once, at the first transfer of a pool.
        return [int(address) for address in base.view(torch.int64).tolist()]
    return [base + layer * place.layer for layer in range(layers)]


def _rows(place: Place) -> int:
    return place.rows * (place.head or 1) if place.rows else ANY


def _fact(attribute: int, address: int) -> int:
    fact = np.zeros(1, dtype=np.uint64)
    call("cuPointerGetAttribute", data=fact, attribute=attribute, ptr=address)
    return int(fact[0])


def source_of(srcs: npt.NDArray[np.uint64], dsts: npt.NDArray[np.uint64]) -> int:
    """Tell the direction of a transfer by its addresses.

    Returns
    -------
    int
        1 for transfers from the host to the device, 0 for those back.

    Raises
    ------
    Unserved
        If the kernel cannot reach one of them, or they are otherwise.
    """
    try:
        sides = [{_fact(_MEMORY_TYPE, int(a)) == _HOST for a in side} for side in (srcs, dsts)]
        moved = any(_fact(_DEVICE_POINTER, int(a)) != a for side in (srcs, dsts) for a in side)
    except CudaError:
        raise Unserved("memory that is neither a GPU's nor page-locked") from None
    if moved:
        raise Unserved("host memory that the GPU knows by other addresses")
    if sides not in ([{True}, {False}], [{False}, {True}]):
        raise Unserved("buffers that are not on a GPU and in host memory, one side each")
    return 1 if sides[0] == {True} else 0


def _code(device: torch.device, unit: int) -> KernelCode:
    found = _codes.get((device.index, unit))
    if found is None:
        try:
            found = KernelCode(kernel.build(unit))
        except BindError as error:  # not tried again: it takes as long as compiling does
            found = str(error)
        _codes[device.index, unit] = found
    if isinstance(found, str):
        raise Unserved(found)
    return found
