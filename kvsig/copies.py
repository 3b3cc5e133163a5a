"""Copies between addresses, many at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvsig import _core, merging, numbers, streams
from kvsig._core import CudaError, Report
from kvsig._counters import now, since
from kvsig._transfer import none_wrong

__all__ = ["copy_batch"]

_PATHS = ("auto", "batch", "loop")
_SIGNED_MAX = (1 << 63) - 1
_WORDS = (np.dtype(np.uint64), np.dtype(np.int64))

U64 = npt.NDArray[np.uint64]


def copy_batch(
    dsts: npt.ArrayLike | torch.Tensor,
    srcs: npt.ArrayLike | torch.Tensor,
    sizes: npt.ArrayLike | torch.Tensor | int,
    stream: streams.Stream = None,
    path: str = "auto",
    batch_size: int = 256,
    check: bool = True,
    merge: bool = True,
) -> Report:
    """Copy many ranges of memory in stream order.

    The copies are ordered as a whole with the work of the stream. Among themselves they
    have no order, so no copy may write what another one writes or reads.

    Parameters
    ----------
    dsts, srcs : array of int64 or uint64, shape (n,)
        Addresses, on the GPU or on the host: NumPy arrays, CPU tensors or lists of int.
    sizes : array of int64 or uint64, shape (n,), or int
        Bytes of each copy, or of every copy. Entries of size 0 move nothing and are left
        out, whatever their addresses are.
    stream : None, int, torch.cuda.Stream or object with ``cuda_stream``, optional
        The stream to work on; by default torch's current one.
    path : {"auto", "batch", "loop"}, optional
        "auto" uses the batch function where it can; "batch" insists on it; "loop" makes
        one call per copy.
    batch_size : int, optional
        Most copies in one call of the batch function.
    check : bool, optional
        Look for copies that overlap each other. It takes a sort, a few milliseconds for
        100,000 copies; a caller that knows its ranges may turn it off.
    merge : bool, optional
        Make one copy of neighbours, and strided copies of what is evenly spaced, where there are
        256 copies or more and a good part of them is so. Never across the bounds of an allocation
        or a registered block, and never with ``path="loop"``.

    Returns
    -------
    Report
        The path taken and why, copies made (without the empty ones), calls and bytes. Copies that
        were merged count as the one that was made, rows of a strided copy one by one; its path
        is "strided", or "strided+batch" where others were made besides.

    Raises
    ------
    TypeError
        If an array holds anything but 64-bit integers, or ``stream`` is no stream.
    ValueError
        If lengths differ, an address is null or negative, a size is negative, copies
        overlap, or ``path`` or ``batch_size`` is none. Nothing has been moved then.
    BindError
        If ``path="batch"`` cannot be, with the reason.
    CudaError
        If CUDA refuses a copy.

    Notes
    -----
    The call returns when the work is queued. The memory must stay allocated, and sources
    unchanged, until the stream has come to the end of it. Addresses are not checked
    against any allocation: one that is not mapped ends the process.
    """
    start = now()
    to, origin, length, keep = _request(dsts, srcs, sizes, path, batch_size)
    _no_null(to, "dsts", keep)
    _no_null(origin, "srcs", keep)
    if check and len(to):
        _no_overlap(to, origin, length, keep)
    handle = streams.stream_handle(stream)
    if not len(to):
        return Report()
    with streams.device_guard(streams.stream_device(stream)):
        if merge and path != "loop" and len(to) >= merging.MANY:
            found = merging.merged(to, origin, length, path == "auto" and _core.strided_bound())
            if found is not None:
                try:
                    report = merging.submit(found, handle, batch_size, path)
                except CudaError as error:
                    error.add_note(
                        "neighbouring copies had been merged: merge=False tells which one it is"
                    )
                    raise
                return since("copy_batch", report, start)
        report = _core.copy_batch(to, origin, length, handle, path, min(batch_size, len(to)))
    return since("copy_batch", report, start)


def _request(
    dsts: Any, srcs: Any, sizes: Any, path: str, batch_size: int
) -> tuple[U64, U64, U64 | int, npt.NDArray[np.intp] | None]:
    """Read a request: destinations, sources, sizes, and the positions of those that move bytes."""
    if path not in _PATHS:
        raise ValueError(f"path must be 'auto', 'batch' or 'loop', not {path!r}")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be an int of at least 1, not {batch_size!r}")
    to = _addresses(dsts, "dsts")
    origin = _addresses(srcs, "srcs")
    if len(to) != len(origin):
        raise ValueError(
            f"dsts has {len(to)} addresses and srcs has {len(origin)}: give as many of each"
        )
    length: U64 | int
    keep: npt.NDArray[np.intp] | None  # positions of the entries that move something
    if isinstance(sizes, (int, np.integer)) and not isinstance(sizes, bool):
        length = int(sizes)
        if not 0 <= length <= _SIGNED_MAX:
            raise ValueError(f"sizes is {length}: a size is at least 0 and below 2**63")
        keep = None if length else np.empty(0, dtype=np.intp)
    else:
        length = _addresses(sizes, "sizes")
        if len(length) != len(to):
            raise ValueError(
                f"sizes has {len(length)} entries and dsts has {len(to)}: "
                "give as many of each, or one int for all"
            )
        keep = None if none_wrong(length, False) else np.flatnonzero(length)
    if keep is not None:
        to, origin = to[keep], origin[keep]
        if not isinstance(length, int):
            length = length[keep]
    return to, origin, length, keep


def _addresses(values: Any, name: str) -> U64:
    """Return a list of addresses or sizes as an array of kvsig's own.

    A copy always: what is checked is what is used, whoever writes into the caller's array
    meanwhile, be it another thread or a stream object of the caller's.
    """
    if type(values) is np.ndarray and values.dtype in _WORDS and values.ndim == 1:
        # What callers in a hurry give: no more NumPy than needed.
        unsigned: U64 = np.array(values, order="C").view(np.uint64)
        if none_wrong(unsigned, True):
            return unsigned
    return numbers.addresses(values, name)


def _at(place: npt.NDArray[np.intp] | None, index: Any) -> int:
    """Return the position in the caller's arrays of an entry that was kept."""
    return int(index if place is None else place[index])


def _no_null(addresses: U64, name: str, place: npt.NDArray[np.intp] | None) -> None:
    if not none_wrong(addresses, False):
        raise ValueError(f"{name}[{_at(place, np.argmin(addresses))}] is null (address 0)")


def _surely_apart(dsts: U64, srcs: U64, widest: int) -> bool:
    """Whether nothing overlaps even if every copy has the size of the widest one."""
    width = np.uint64(widest)
    starts = np.sort(dsts)  # with one size for all no permutation is needed: several times faster
    if (starts[1:] - starts[:-1] < width).any():
        return False
    if srcs.max() + width <= starts[0] or srcs.min() >= starts[-1] + width:
        return True  # the usual case: the two sides lie apart
    needles = np.sort(srcs)
    # The last destination that starts before a source's end is the only one it can overlap.
    candidate = np.searchsorted(starts, needles + width) - 1
    return not ((candidate >= 0) & (starts[candidate] + width > needles)).any()


def _no_overlap(dsts: U64, srcs: U64, sizes: U64 | int, place: npt.NDArray[np.intp] | None) -> None:
    """Raise if a destination overlaps another one, or any source."""
    if _surely_apart(dsts, srcs, sizes if isinstance(sizes, int) else int(sizes.max())):
        return
    length = np.full(len(dsts), sizes, dtype=np.uint64) if isinstance(sizes, int) else sizes

    def say(index: Any, other: str, position: Any) -> ValueError:
        addresses = dsts if other == "dsts" else srcs
        return ValueError(
            f"dsts[{_at(place, index)}] ({int(dsts[index]):#x}, {length[index]} bytes) overlaps "
            f"{other}[{_at(place, position)}] "
            f"({int(addresses[position]):#x}, {length[position]} bytes): "
            "copies of one batch have no order among themselves"
        )

    order = np.argsort(dsts, kind="stable")
    starts = dsts[order]
    ends = starts + length[order]
    clash = ends[:-1] > starts[1:]
    if clash.any():
        first = int(np.argmax(clash))
        one, other = sorted((int(order[first]), int(order[first + 1])))
        raise say(one, "dsts", other)
    # Destinations are disjoint from here on, so their ends are sorted too.
    reading = np.argsort(srcs)  # a search in order is the faster one
    needles = srcs[reading]
    candidate = np.searchsorted(starts, needles + length[reading]) - 1
    clash = (candidate >= 0) & (ends[candidate] > needles)
    if clash.any():
        hit = int(np.argmax(clash))
        raise say(order[candidate[hit]], "srcs", reading[hit])
