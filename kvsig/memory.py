"""Memory as the driver knows it: where allocations and registered blocks begin and end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsig import _core

__all__ = [
    "Extent",
    "Place",
    "blocks_of",
    "check_whole",
    "extent",
    "listed",
    "locked_blocks",
    "place_of",
    "seams",
    "seams_inside",
]

U64: TypeAlias = npt.NDArray[np.uint64]
Extent: TypeAlias = tuple[int, int, bool]
"""Where memory begins and ends, and whether it is limited: of the device, or page-locked."""


def extent(tensor: torch.Tensor) -> Extent:
    """Where a tensor lies, with what lies between its rows."""
    start = tensor.data_ptr()
    limited = not _core.is_emulated() and (tensor.is_cuda or tensor.is_pinned())
    return start, start + _reach(tensor), limited


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last of a tensor."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


class Place(NamedTuple):
    """Where a tensor's memory is: its address, what it is part of, and how many bytes that has."""

    address: int
    storage: torch.UntypedStorage
    size: int


def place_of(tensor: torch.Tensor) -> Place:
    """Look where a tensor's memory is."""
    storage = tensor.untyped_storage()
    return Place(tensor.data_ptr(), storage, storage.nbytes())


def check_whole(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that its storage does not hold: storages can be resized by themselves."""
    end = tensor.storage_offset() * tensor.element_size() + _reach(tensor)
    room = tensor.untyped_storage().nbytes()
    if tensor.numel() and (end > room or not tensor.data_ptr()):
        raise ValueError(
            f"{name} has {tensor.nbytes} bytes by its shape, but its storage has {room}: it was "
            "resized; give a tensor that has its memory"
        )


def seams(extents: Iterable[Extent], given: Iterable[int] = ()) -> U64:
    """Where the allocations and registered blocks that hold some memory begin and end.

    CUDA refuses a copy whose rows lie in two of them. Limited memory that the driver does not
    answer for counts as an allocation of its own.

    Parameters
    ----------
    extents : iterable of (start, end, limited)
    given : iterable of int, optional
        More of them.

    Returns
    -------
    ndarray of uint64
        Sorted.
    """
    found = {seam for where in extents for seam in _bounds(*where)}
    return np.array(sorted(found.union(given)), dtype=np.uint64)


def seams_inside(start: int, end: int) -> list[int]:
    """Seams between two addresses, both excluded, as far as the driver knows of any."""
    return [seam for seam in set(_bounds(start, end, False)) if start < seam < end]


def locked_blocks(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]] | None:
    """Find the page-locked blocks that hold all of some host tensors, and what lies between rows.

    ``is_pinned`` of a tensor looks at its first byte only.

    Returns
    -------
    list of (address, size) or None
        Each block once; None where some memory is pageable. Where the driver cannot be asked,
        torch is believed, and no block is known.
    """
    found: dict[tuple[int, int], None] = {}
    for tensor in tensors:
        blocks = blocks_of(tensor)
        if blocks is not None:
            found.update(dict.fromkeys(blocks))
        elif _core.memory_range(tensor.data_ptr()) is not None or not tensor.is_pinned():
            return None
    return list(found)


def blocks_of(tensor: torch.Tensor) -> list[tuple[int, int]] | None:
    """Find the blocks that hold all of a tensor, by address and size; None where a byte is in none.

    Blocks are allocations of the device, and page-locked memory of the host.
    """
    found = []
    place, end = tensor.data_ptr(), tensor.data_ptr() + _reach(tensor)
    while place < end:
        block = _core.memory_range(place)
        if block is None:
            return None
        found.append(block)
        place = block[0] + block[1]
    return found


def _bounds(start: int, end: int, limited: bool) -> Iterator[int]:
    """Bounds of the allocations that some memory lies in."""
    last = _core.memory_range(end - 1)
    if _core.memory_range(start) is None and last is None:
        if limited:
            yield from (start, end)
        return
    if last is not None:
        yield from (last[0], last[0] + last[1])
    # Pageable memory between registered blocks has no end that could be asked for. Blocks are of
    # whole pages of 4 KiB; in pools of more than 256 MiB the short ones may be stepped over.
    step = max(1 << 12, (end - start) >> 16)
    place = start
    while place < end:
        block = _core.memory_range(place)
        if block is None:
            place += step
            continue
        yield from (block[0], block[0] + block[1])
        place = max(block[0] + block[1], place + 1)


def listed(values: Any, name: str) -> list[int]:
    """Seams that a caller knows of, in any order."""
    array = np.asarray(values)
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu" or (array < 0).any()):
        raise ValueError(f"{name} must be a list of addresses, not {values!r}")
    return [int(address) for address in array]
