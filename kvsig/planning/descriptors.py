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

from kvsig.planning._runs import placed, planned
from kvsig.planning.geometry import LONGEST_PITCH

__all__ = [
    "Descriptors",
    "PageList",
    "PageRuns",
    "Pattern",
    "page_lists",
    "page_runs",
    "pattern",
    "place",
    "plan",
    "split",
]

U64: TypeAlias = npt.NDArray[np.uint64]
I64: TypeAlias = npt.NDArray[np.int64]

#: Rows from which one strided copy is cheaper than a batch of copies: a call of its own takes
#: as long as four to six copies in a batch.
MIN_ROWS = 8
#: Sizes of copies that one list may have and be given to the kernel: each is a launch.
MOST_SIZES = 4
#: Page numbers of the kernel are below it.
MOST_PAGES = 1 << 31

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
        Rows from which evenly spaced copies become a strided one, at least 2.

    Returns
    -------
    Descriptors
        The same bytes, in fewer copies.
    """
    return Descriptors(*planned(dsts, srcs, sizes, seams, min_rows))


class PageList(NamedTuple):
    """Copies of one size, as page numbers of two stretches of memory.

    Parameters
    ----------
    size : int
        Bytes of each.
    pages : pair of ndarray of int64, shape (n,)
        Where they begin on either side, in grains from where the stretch begins.
    """

    size: int
    pages: tuple[I64, I64]


def page_lists(
    sides: Sequence[tuple[U64, int]], sizes: U64, grain: int
) -> list[PageList] | None:
    """Read copies as pages that may begin at every multiple of some bytes.

    Parameters
    ----------
    sides : pair of (ndarray of uint64, int)
        Addresses of the copies on either side, at least one, and where the stretch of memory
        begins that all of them are in.
    sizes : ndarray of uint64, shape (n,)
        Bytes of each. Entries of no bytes are left out.
    grain : int
        A power of two.

    Returns
    -------
    list of PageList or None
        By size. None where an address is before its stretch, too far behind that or between two
        multiples of the grain, or where there are too many sizes.
    """
    one, other = (_pages_from(start, addresses, grain) for addresses, start in sides)
    if one is None or other is None:
        return None
    ends = np.append(np.flatnonzero(sizes[1:] != sizes[:-1]), len(sizes) - 1)
    distinct = [int(size) for size in np.unique(sizes[ends]) if size]
    if len(distinct) > MOST_SIZES:
        return None
    if len(ends) == 1 and distinct:
        return [PageList(distinct[0], (one, other))]
    places = [(size, sizes == np.uint64(size)) for size in distinct]
    return [PageList(size, (one[place], other[place])) for size, place in places]


def _pages_from(start: int, addresses: U64, grain: int) -> I64 | None:
    away = addresses - np.uint64(start)  # an address before the start wraps around
    if int(np.bitwise_or.reduce(away)) & (grain - 1):
        return None
    away >>= np.uint64(grain.bit_length() - 1)
    return away.view(np.int64) if int(away.max()) < MOST_PAGES else None


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
    if max(dst_pitch, src_pitch) > LONGEST_PITCH:
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
    dsts, srcs = placed(found.dsts, dst_bases), placed(found.srcs, src_bases)
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
