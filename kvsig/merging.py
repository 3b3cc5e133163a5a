"""Lists of copies: merged where it pays, and queued as a plan of descriptors says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvsig import _core, memory
from kvsig._core import Report
from kvsig.planning import descriptors
from kvsig.planning._runs import neighbours
from kvsig.planning.descriptors import Descriptors

__all__ = ["MANY", "merged", "submit"]

#: Copies from which merging pays: looking for what belongs together takes as long as some tens.
MANY = 256

U64 = npt.NDArray[np.uint64]


def merged(dsts: U64, srcs: U64, sizes: U64 | int, strided: bool) -> Descriptors | None:
    """Merge copies where it pays; None where they are best made as they are."""
    listed = None if isinstance(sizes, int) else sizes
    joined, even = neighbours(dsts, srcs, listed, 0 if listed is not None else int(sizes))
    if 4 * (joined + (even if strided else 0)) < len(dsts):
        return None
    if not _core.is_emulated() and all(_core.memory_range(int(a[0])) is None for a in (dsts, srcs)):
        return None  # nobody says where allocations end
    width = np.full(len(dsts), sizes, dtype=np.uint64) if listed is None else listed
    rows = descriptors.MIN_ROWS if strided else len(dsts) + 1
    found = descriptors.plan(dsts, srcs, width, min_rows=rows)
    seams = _seams_within(found)
    if seams:
        found = descriptors.plan(dsts, srcs, width, np.array(sorted(seams), np.uint64), rows)
    return found


def _seams_within(found: Descriptors) -> set[int]:
    """Where allocations and registered blocks end within the copies of a plan."""
    columns = descriptors
    seams: set[int] = set()
    for alone, base, pitch in (
        (found.dsts, columns.DST, columns.DPITCH),
        (found.srcs, columns.SRC, columns.SPITCH),
    ):
        last = found.rows[:, pitch] * (found.rows[:, columns.HEIGHT] - np.uint64(1))
        starts = np.concatenate((alone, found.rows[:, base]))
        sizes = np.broadcast_to(np.uint64(found.sizes), alone.shape)
        ends = starts + np.concatenate((sizes, last + found.rows[:, columns.WIDTH]))
        low = high = 0
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if low <= start and end <= high:
                continue
            block = _core.memory_range(start)
            if block is not None and end <= block[0] + block[1]:
                low, high = block[0], block[0] + block[1]
            else:
                seams.update(memory.seams_inside(start, end))
    return seams


def submit(
    found: Descriptors, stream: int, batch_size: int = 256, path: str = "auto"
) -> Report:
    """Queue what a plan of descriptors says.

    Parameters
    ----------
    found : Descriptors
        The copies.
    stream : int
        Handle of the stream.
    batch_size : int, optional
        Most copies in one call of the batch function.
    path : {"auto", "batch"}, optional
        For those that stand alone.

    Raises
    ------
    BindError, CudaError
        As the core does. Some copies may have been queued; each writes what it would have
        written, so making all of them again is right.
    """
    report = None
    if len(found.dsts):
        size = min(batch_size, len(found.dsts))
        report = _core.copy_batch(found.dsts, found.srcs, found.sizes, stream, path, size)
    if len(found.rows):
        strided = _core.copy_strided(found.rows, stream)
        report = strided if report is None else strided + report
    return Report() if report is None else report
