"""Lists of copies, as engines give them: neighbours become one copy, even spacing a strided one.

Addresses and sizes in, a plan out. CUDA makes each copy of a list by itself, at about half a
microsecond of host time, however close they lie; so runs are merged before they get there. Copies
of one list have no order among themselves, so runs that descend are merged as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Descriptors", "PageRuns", "Pattern", "page_runs", "pattern", "place", "plan", "split"]

U64: TypeAlias = npt.NDArray[np.uint64]

#: Rows from which one strided copy is cheaper than a batch of copies: a call of its own takes
#: as long as four to six copies in a batch.
MIN_ROWS = 8
#: The widest pitch of a strided copy, in bytes: CUDA counts it as a signed 32-bit number.
MAX_PITCH = (1 << 31) - 1

_NONE = np.empty(0, dtype=np.uint64)
_NO_ROWS = np.empty((0, 9), dtype=np.uint64)
DST, DPITCH, DROWS, SRC, SPITCH, SROWS, WIDTH, HEIGHT, DEPTH = range(9)


class Descriptors(NamedTuple):
    """What a list of copies comes to.

    Parameters
    ----------
    dsts, srcs : ndarray of uint64, shape (n,)
        Addresses of the copies that stand alone.
    sizes : ndarray of uint64, shape (n,), or int
        Bytes of each, or of all.
    rows : ndarray of uint64, shape (m, 9)
        Strided copies: dst, dpitch, drows, src, spitch, srows, width, height, depth.
    """

    dsts: U64
    srcs: U64
    sizes: U64 | int
    rows: U64


def plan(
    dsts: U64,
    srcs: U64,
    sizes: U64,
    seams: U64 = _NONE,
    min_rows: int = MIN_ROWS,
) -> Descriptors:
    """Merge neighbouring copies, and find those that are evenly spaced.

    Parameters
    ----------
    dsts, srcs, sizes : ndarray of uint64, shape (n,)
        Addresses and bytes of each copy. Entries of no bytes move nothing and are left out. No
        destination overlaps another destination or a source.
    seams : ndarray of uint64, sorted, optional
        Where allocations and registered blocks begin and end: no copy is merged across one,
        since CUDA refuses those. A copy that crosses one as it is given is left as it is.
    min_rows : int, optional
        Rows from which evenly spaced copies become a strided one.

    Returns
    -------
    Descriptors
        The same bytes, in fewer copies.
    """
    if not sizes.all():
        keep = np.flatnonzero(sizes)
        dsts, srcs, sizes = dsts[keep], srcs[keep], sizes[keep]
    if len(dsts) < 2:
        return Descriptors(dsts, srcs, sizes, _NO_ROWS)
    breaks = _run_breaks(dsts, srcs, sizes, seams)
    if len(breaks) < len(dsts):
        dsts, srcs, sizes = _merged(dsts, srcs, sizes, breaks)
    return _strided(dsts, srcs, sizes, seams, min_rows)


def _run_breaks(dsts: U64, srcs: U64, sizes: U64, seams: U64) -> npt.NDArray[np.intp]:
    """Return where runs of neighbours begin, the first of all included."""
    up = srcs[:-1] + sizes[:-1] == srcs[1:]
    down = srcs[1:] + sizes[1:] == srcs[:-1]
    if up.any():
        up &= dsts[:-1] + sizes[:-1] == dsts[1:]
    if down.any():
        down &= dsts[1:] + sizes[1:] == dsts[:-1]
        # A run goes one way: what turns begins a new one.
        down[1:] &= ~up[:-1]
        up[1:] &= ~down[:-1]
    joined = up | down
    if len(seams) and joined.any():
        at = np.flatnonzero(joined)
        # Two neighbours meet at the higher of their addresses.
        near = np.maximum(srcs[at], srcs[at + 1])
        far = np.maximum(dsts[at], dsts[at + 1])
        joined[at[_on_seam(near, seams) | _on_seam(far, seams)]] = False
    starts = np.flatnonzero(~joined)
    starts += 1
    return np.concatenate((np.zeros(1, dtype=np.intp), starts))


def _on_seam(addresses: U64, seams: U64) -> npt.NDArray[np.bool_]:
    index = np.searchsorted(seams, addresses)
    index[index == len(seams)] = 0
    found: npt.NDArray[np.bool_] = seams[index] == addresses
    return found


def _merged(dsts: U64, srcs: U64, sizes: U64, starts: npt.NDArray[np.intp]) -> tuple[U64, U64, U64]:
    lasts = np.append(starts[1:], len(dsts))
    lasts -= 1
    return (
        np.minimum(dsts[starts], dsts[lasts]),
        np.minimum(srcs[starts], srcs[lasts]),
        np.add.reduceat(sizes, starts),
    )


def _strided(dsts: U64, srcs: U64, sizes: U64, seams: U64, min_rows: int) -> Descriptors:
    """Take out copies of one size that are evenly spaced on both sides."""
    if len(dsts) < min_rows:
        return Descriptors(dsts, srcs, sizes, _NO_ROWS)
    far, near = dsts[1:] - dsts[:-1], srcs[1:] - srcs[:-1]  # descending steps wrap around
    same = (far[1:] == far[:-1]) & (near[1:] == near[:-1]) & (sizes[2:] == sizes[:-2])
    same &= sizes[1:-1] == sizes[:-2]
    if not same.any():
        return Descriptors(dsts, srcs, sizes, _NO_ROWS)
    # Row numbers: a stretch of k equal pairs of steps is k + 2 rows.
    edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])).astype(np.int8)))
    first, last = edges[::2], edges[1::2] + 1
    long = last - first + 1 >= min_rows
    first, last = first[long], last[long]
    # Two stretches may meet in a row: it is the former's.
    first[1:] += first[1:] == last[:-1]
    first, last = _usable(first, last, far, near, sizes)
    if len(seams):
        first, last = _between_seams(first, last, dsts, srcs, sizes, seams, min_rows)
    if not len(first):
        return Descriptors(dsts, srcs, sizes, _NO_ROWS)
    rows = _rows(first, last, dsts, srcs, sizes)
    # Rows that go into strided copies, by the running sum of where such begin and end.
    marks = np.zeros(len(dsts) + 1, dtype=np.int8)
    marks[first] += 1
    marks[last + 1] -= 1
    alone = np.cumsum(marks[:-1], dtype=np.int8) == 0
    return Descriptors(dsts[alone], srcs[alone], sizes[alone], rows)


def _usable(
    first: npt.NDArray[np.intp], last: npt.NDArray[np.intp], far: U64, near: U64, sizes: U64
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Keep the stretches whose pitches a strided copy can have: all up, or all down."""
    dpitch, spitch, width = far[first], near[first], sizes[first]
    down = (dpitch >> np.uint64(63)).astype(np.bool_)
    dpitch, spitch = np.where(down, -dpitch, dpitch), np.where(down, -spitch, spitch)
    fits = (dpitch >= width) & (spitch >= width)
    fits &= (dpitch <= np.uint64(MAX_PITCH)) & (spitch <= np.uint64(MAX_PITCH))
    return first[fits], last[fits]


def _between_seams(
    first: npt.NDArray[np.intp],
    last: npt.NDArray[np.intp],
    dsts: U64,
    srcs: U64,
    sizes: U64,
    seams: U64,
    min_rows: int,
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Cut stretches where their rows lie on both sides of a seam."""
    pieces: list[tuple[int, int]] = []
    for start, stop in zip(first.tolist(), last.tolist(), strict=True):
        index = np.arange(start, stop)
        change = np.zeros(len(index), dtype=np.bool_)
        for side in (dsts[start : stop + 1], srcs[start : stop + 1]):
            begin = np.searchsorted(seams, side, side="right")
            end = np.searchsorted(seams, side + sizes[start], side="left")
            # A row that crosses a seam as it was given stays alone, and is refused alone.
            change |= (begin[1:] != begin[:-1]) | (end[:-1] != end[1:])
        cuts = [*index[change].tolist(), stop]
        for cut in cuts:
            if cut - start + 1 >= min_rows:
                pieces.append((start, cut))
            start = cut + 1
    found = np.array(pieces, dtype=np.intp).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _rows(
    first: npt.NDArray[np.intp], last: npt.NDArray[np.intp], dsts: U64, srcs: U64, sizes: U64
) -> U64:
    height = (last - first + 1).astype(np.uint64)
    rows = np.ones((len(first), 9), dtype=np.uint64)
    low = np.where(dsts[last] < dsts[first], last, first)
    high = np.where(dsts[last] < dsts[first], last - 1, first + 1)
    rows[:, DST], rows[:, SRC] = dsts[low], srcs[low]
    rows[:, DPITCH] = np.abs((dsts[high] - dsts[low]).view(np.int64)).view(np.uint64)
    rows[:, SPITCH] = np.abs((srcs[high] - srcs[low]).view(np.int64)).view(np.uint64)
    rows[:, WIDTH], rows[:, HEIGHT] = sizes[first], height
    rows[:, DROWS] = rows[:, SROWS] = height
    return rows


class PageRuns(NamedTuple):
    """Page numbers as runs: pages that follow each other on both sides.

    Parameters
    ----------
    dst, src, lengths : ndarray of uint64, shape (runs,)
        First page of each run on either side, and its pages.
    pages : int
        Pages of all runs.
    top : tuple of int
        Highest page number of the destination and of the source, -1 where there are none.
    """

    dst: U64
    src: U64
    lengths: U64
    pages: int
    top: tuple[int, int]


def page_runs(dst: U64, src: U64) -> PageRuns:
    """Find the runs of a list of page numbers.

    Parameters
    ----------
    dst, src : ndarray of uint64, shape (n,)
        Page ``src[i]`` goes to page ``dst[i]``. Pages may be single tokens.

    Returns
    -------
    PageRuns
        In the order given.
    """
    pages = len(dst)
    if not pages:
        return PageRuns(dst, src, dst, 0, (-1, -1))
    top = int(dst.max()), int(src.max())
    if pages == 1:
        return PageRuns(dst, src, np.ones(1, dtype=np.uint64), 1, top)
    one = np.uint64(1)
    breaks = np.flatnonzero((dst[1:] - dst[:-1] != one) | (src[1:] - src[:-1] != one))
    breaks += 1
    starts = np.concatenate((np.zeros(1, dtype=np.intp), breaks))
    count = np.diff(np.append(starts, pages)).astype(np.uint64)
    return PageRuns(dst[starts], src[starts], count, pages, top)


class Pattern(NamedTuple):
    """The copies of one plane, as offsets from its two base addresses.

    Parameters
    ----------
    dsts, srcs : ndarray of uint64, shape (n,)
        Offsets of the copies that stand alone.
    sizes : ndarray of uint64, shape (n,), or int
        Bytes of each, or of all.
    rows : ndarray of uint64, shape (m, 9)
        Strided copies, with offsets for addresses.
    """

    dsts: U64
    srcs: U64
    sizes: U64 | int
    rows: U64


def pattern(
    runs: PageRuns, dst_pitch: int, src_pitch: int, width: int, min_rows: int = MIN_ROWS
) -> Pattern:
    """Work out the copies of a plane from page numbers and the plane's pitches.

    Parameters
    ----------
    runs : PageRuns
        The pages.
    dst_pitch, src_pitch : int
        Bytes from one page to the next on either side, at least `width`.
    width : int
        Bytes of a page.
    min_rows : int, optional
        Pages from which a run becomes a strided copy, where it is not one piece of memory.
    """
    far, near = runs.dst * np.uint64(dst_pitch), runs.src * np.uint64(src_pitch)
    if len(runs.dst) == runs.pages:
        return Pattern(far, near, width, _NO_ROWS)
    if dst_pitch == src_pitch == width:
        return Pattern(far, near, runs.lengths * np.uint64(width), _NO_ROWS)
    if max(dst_pitch, src_pitch) > MAX_PITCH:
        long = np.zeros(len(far), dtype=np.bool_)
    else:
        long = runs.lengths >= np.uint64(min_rows)
    rows = np.ones((int(long.sum()), 9), dtype=np.uint64)
    rows[:, DST], rows[:, SRC] = far[long], near[long]
    rows[:, DPITCH], rows[:, SPITCH], rows[:, WIDTH] = dst_pitch, src_pitch, width
    rows[:, HEIGHT] = rows[:, DROWS] = rows[:, SROWS] = runs.lengths[long]
    short = ~long
    count = runs.lengths[short].astype(np.intp)
    # The pages of short runs, one by one: the number of each within its run.
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    step = within.astype(np.uint64)
    return Pattern(
        np.repeat(far[short], count) + step * np.uint64(dst_pitch),
        np.repeat(near[short], count) + step * np.uint64(src_pitch),
        width,
        rows,
    )


def place(found: Pattern, dst_bases: U64, src_bases: U64) -> Descriptors:
    """Put the copies of a plane at the base addresses of several that are alike.

    Parameters
    ----------
    found : Pattern
        The copies of one of them.
    dst_bases, src_bases : ndarray of uint64, shape (planes,)
        Address of page 0 of each plane on either side.

    Returns
    -------
    Descriptors
        The copies of all planes, plane by plane.
    """
    dsts = (dst_bases[:, None] + found.dsts).ravel()
    srcs = (src_bases[:, None] + found.srcs).ravel()
    sizes = found.sizes if isinstance(found.sizes, int) else np.tile(found.sizes, len(dst_bases))
    if not len(found.rows):
        return Descriptors(dsts, srcs, sizes, found.rows)
    rows = np.tile(found.rows, (len(dst_bases), 1))
    rows[:, DST] += np.repeat(dst_bases, len(found.rows))
    rows[:, SRC] += np.repeat(src_bases, len(found.rows))
    return Descriptors(dsts, srcs, sizes, rows)


def split(found: Descriptors, seams: Sequence[int]) -> Descriptors:
    """Cut copies at seams that they cross; strided ones that do become single rows first.

    Parameters
    ----------
    found : Descriptors
        What may cross them.
    seams : sequence of int
        Addresses.
    """
    marks: U64 = np.sort(np.asarray(seams, dtype=np.uint64))
    rows = found.rows
    dsts, srcs = [found.dsts], [found.srcs]
    sizes = [np.broadcast_to(np.uint64(found.sizes), found.dsts.shape)]
    if len(rows):
        crosses = np.zeros(len(rows), dtype=np.bool_)
        for base, pitch in ((DST, DPITCH), (SRC, SPITCH)):
            end = rows[:, base] + rows[:, pitch] * (rows[:, HEIGHT] - np.uint64(1)) + rows[:, WIDTH]
            crosses |= _inside(rows[:, base], end, marks) > 0
        for row in rows[crosses]:
            step = np.arange(row[HEIGHT], dtype=np.uint64)
            dsts.append(row[DST] + step * row[DPITCH])
            srcs.append(row[SRC] + step * row[SPITCH])
            sizes.append(np.full(len(step), row[WIDTH]))
        rows = rows[~crosses]
    to, origin, size = np.concatenate(dsts), np.concatenate(srcs), np.concatenate(sizes)
    while len(to):
        cut = np.zeros(len(to), dtype=np.uint64)  # bytes before the first seam inside
        for starts in (to, origin):
            index = np.searchsorted(marks, starts, side="right")
            reach = np.append(marks, np.uint64(0))[index] - starts
            inside = (index < len(marks)) & (reach < size)
            cut = np.where(inside & ((cut == 0) | (reach < cut)), reach, cut)
        at = np.flatnonzero(cut)
        if not len(at):
            break
        rest = size[at] - cut[at]
        size[at] = cut[at]
        to = np.concatenate((to, to[at] + cut[at]))
        origin = np.concatenate((origin, origin[at] + cut[at]))
        size = np.concatenate((size, rest))
    return Descriptors(to, origin, size, rows)


def _inside(start: U64, end: U64, marks: U64) -> npt.NDArray[np.intp]:
    """Count the marks strictly between starts and ends."""
    return np.searchsorted(marks, end, side="left") - np.searchsorted(marks, start, side="right")
