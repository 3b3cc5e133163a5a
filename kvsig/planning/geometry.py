"""Geometry of paged KV caches: where each page of each layer lies, on both sides."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "LONGEST_PITCH",
    "Planes",
    "Row",
    "Seams",
    "Side",
    "grouped",
    "join",
    "side",
]

#: cudaDevAttrMaxPitch of every device so far: a strided copy takes no longer pitch.
LONGEST_PITCH = 0x7FFFFFFF

#: Addresses, pitches or sizes.
U64: TypeAlias = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class Planes:
    """Places of one layer's K or V each, on the device and on the host.

    Every layout of a paged cache is a list of planes: row ``r`` of page ``p`` of plane ``i`` is
    ``width[i]`` bytes at ``base[i] + p * pitch[i] + r * row[i]``, on either side. All arrays are
    one-dimensional, contiguous ``uint64`` of the same length.

    Parameters
    ----------
    device_base, host_base : ndarray
        Address of page 0.
    device_pitch, host_pitch : ndarray
        Bytes from one page to the next, at least those of a page.
    device_row, host_row : ndarray
        Bytes from one row of a page to the next.
    width : ndarray
        Bytes of one row of a page.
    device_pages, host_pages : int
        Number of pages on each side; valid page numbers are below it.
    layers : int
        Number of layers. Planes are ordered K of every layer, then V of every layer
        (or one latent of every layer); where a layer has several planes of K, so do these.
    rows : int
        Rows of a page. 1 where a page of a plane lies in one piece on both sides.
    """

    device_base: U64
    device_pitch: U64
    device_row: U64
    host_base: U64
    host_pitch: U64
    host_row: U64
    width: U64
    device_pages: int
    host_pages: int
    layers: int
    rows: int = 1

    def __len__(self) -> int:
        return len(self.width)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all planes."""
        return int(self.width.sum()) * self.rows

    def select(self, layers: Sequence[int]) -> Planes:
        """Return the planes of some layers only, in the order given.

        Parameters
        ----------
        layers : sequence of int
            Layer numbers, each in ``range(self.layers)``.
        """
        chosen = np.asarray(layers, dtype=np.intp)
        return self._taken(self._table()[:, chosen].ravel(), len(chosen))

    def by_layer(self) -> Planes:
        """Return the same planes, those of each layer side by side."""
        return self._taken(self._table().T.ravel(), self.layers)

    def flat(self) -> Planes:
        """Return planes of one row each: those of row 0, 1, ... of a plane side by side."""
        if self.rows == 1:
            return self
        each = self._taken(np.repeat(np.arange(len(self)), self.rows), self.layers)
        row = np.tile(np.arange(self.rows, dtype=np.uint64), len(self))
        return replace(
            each,
            device_base=each.device_base + row * each.device_row,
            host_base=each.host_base + row * each.host_row,
            rows=1,
        )

    def _table(self) -> npt.NDArray[np.intp]:
        """Return the numbers of the planes, a column for each layer."""
        return np.arange(len(self)).reshape(-1, self.layers)

    def _taken(self, index: npt.NDArray[np.intp], layers: int) -> Planes:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        taken: dict[str, Any] = {
            name: column[index]
            for name, column in columns.items()
            if isinstance(column, np.ndarray)
        }
        return replace(self, layers=layers, **taken)

    def locate(self, address: int) -> tuple[int, int, bool] | None:
        """Find the page that holds an address, where pages have one row.

        Parameters
        ----------
        address : int
            Any address within a page, on either side.

        Returns
        -------
        (plane, page, on_device) or None
            Plane and page number, and whether it is the device's page; None where no
            page of these planes holds the address.
        """
        for on_device, base, pitch, pages in (
            (True, self.device_base, self.device_pitch, self.device_pages),
            (False, self.host_base, self.host_pitch, self.host_pages),
        ):
            # Planes of one pool lie between each other: only the rest tells them apart.
            # Below a base the difference wraps around, and is beyond every page.
            page, rest = np.divmod(np.uint64(address) - base, pitch)
            found = np.flatnonzero((page < pages) & (rest < self.width))
            if len(found):
                return int(found[0]), int(page[found[0]]), on_device
        return None


class Side(NamedTuple):
    """One side of a cache: the places of its planes, and its number of pages."""

    base: U64
    pitch: U64
    width: U64
    row: U64
    pages: int


def side(
    bases: Sequence[int],
    page_bytes: Sequence[int],
    pages: int,
    order: Sequence[str],
    layers: int,
    rows: int = 1,
    heads: int = 1,
) -> Side:
    """Describe the planes of tensors that hold one layer each, or all of them.

    Parameters
    ----------
    bases, page_bytes : sequence of int
        Address of each tensor, and bytes of one page of one layer in it.
    pages : int
        Pages of every tensor, which follow each other.
    order : sequence of {"layers", "rows", "heads"}
        What a page of a tensor consists of, the outermost first. Without "layers" there is a
        tensor for each.
    layers, rows, heads : int
        How many there are. A page that is to be seen as one piece is one row; heads that lie apart
        on either side are planes of their own, head by head.
    """
    shape = (-1, 1, 1 if "layers" in order else layers)
    base, size = (np.array(values, np.uint64).reshape(shape) for values in (bases, page_bytes))
    counts = {"layers": layers, "rows": rows, "heads": heads}
    steps: dict[str, U64] = dict.fromkeys(counts, np.zeros(1, np.uint64))
    step: U64 = size // (rows * heads)
    width = step
    for axis in reversed(order):
        steps[axis], step = step, step * counts[axis]
    head, layer = np.arange(heads, dtype=np.uint64)[:, None], np.arange(layers, dtype=np.uint64)
    start = base + head * steps["heads"] + layer * steps["layers"]
    columns = np.broadcast_arrays(start, step, width, steps["rows"])
    start, pitch, width, row = (np.ascontiguousarray(column).ravel() for column in columns)
    return Side(start, pitch, width, row, pages)


def join(device: Side, host: Side, layers: int, rows: int = 1) -> Planes:
    """Make the planes of a cache out of its two sides, which must be alike in number and width."""
    if not np.array_equal(device.width, host.width):
        raise ValueError("device and host pages differ in number or width")
    planes = Planes(
        device.base, device.pitch, device.row, host.base, host.pitch, host.row, device.width,
        device.pages, host.pages, layers, rows,
    )  # fmt: skip
    packed = np.array_equal(device.row, device.width) and np.array_equal(host.row, host.width)
    if not packed or rows == 1:
        return planes
    return replace(planes, width=planes.width * np.uint64(rows), rows=1)


class Row(NamedTuple):
    """One plane, in Python's integers: addresses and pitches of device and host, and bytes."""

    device: int
    host: int
    device_pitch: int
    host_pitch: int
    width: int


#: Evenly spaced planes; and slices that are alike and evenly spaced, which one strided copy can
#: take a page of.
Slice: TypeAlias = list[Row]
Group: TypeAlias = list[Slice]
#: Bytes from one plane to another, on the device and on the host.
Distance: TypeAlias = tuple[int, int]


class Seams:
    """Addresses that no single copy may have on both sides of it.

    Parameters
    ----------
    device, host : array_like of uint64 or None
        Where an allocation, or a block of host memory that was registered by itself, begins or
        ends.
    device_pages, host_pages : int
        Pages on each side.
    """

    def __init__(
        self,
        device: npt.ArrayLike | None,
        host: npt.ArrayLike | None,
        device_pages: int,
        host_pages: int,
    ) -> None:
        #: Sorted addresses and the last page of each side, device first.
        self.sides = [
            (np.unique(np.array(() if seams is None else seams, np.uint64)).tolist(), pages - 1)
            for seams, pages in ((device, device_pages), (host, host_pages))
        ]

    def between(self, rows: list[Row]) -> bool:
        """Whether a seam lies between the outermost of some planes whatever the page is."""
        low, high = min(rows), max(rows)
        return any(
            _inside(seams, low[side] + last * low[2 + side], high[side] + high.width)
            for side, (seams, last) in enumerate(self.sides)
        )

    def touch(self, rows: list[Row]) -> bool:
        """Whether some page, or some run of pages, of these planes may meet a seam."""
        return any(
            _inside(
                seams,
                min(row[side] for row in rows),
                max(row[side] + last * row[2 + side] + row.width for row in rows),
            )
            for side, (seams, last) in enumerate(self.sides)
        )


def _inside(seams: list[int], start: int, end: int) -> bool:
    index = bisect_right(seams, start)
    return index < len(seams) and seams[index] < end


def grouped(planes: Planes, seams: Seams) -> list[Group]:
    """Sort planes into the fewest groups that one strided copy each can take a page of.

    Parameters
    ----------
    planes : Planes
        The geometry.
    seams : Seams
        What a copy must not cross.

    Returns
    -------
    list of list of list of Row
        Groups of slices of planes. The planes of a slice are evenly spaced on both sides, and so
        are the slices of a group, at a whole number of those steps.
    """
    table = _fused(planes)

    def groups(order: list[Row]) -> list[Group]:
        slices = [
            [row for part in chain for row in part]
            for chain in _chains([[row] for row in order], seams, _are_rows)
        ]
        return _chains(slices, seams, _are_slices)

    # K of each layer in turn is the usual order of one array; a list of tensors may lie in memory
    # in any order.
    return min(groups(table), groups(sorted(table)), key=len)


def _fused(planes: Planes) -> list[Row]:
    """Make one wider plane of planes that lie side by side on both sides."""
    columns = (
        planes.device_base, planes.host_base, planes.device_pitch, planes.host_pitch, planes.width,
    )  # fmt: skip
    found: list[Row] = []
    for row in (Row(*map(int, values)) for values in zip(*columns, strict=True)):
        if not row.width:
            continue
        last = found[-1] if found else None
        if (
            last is not None
            and _distance([last], [row]) == (last.width, last.width)
            and row[2:4] == last[2:4]
            and last.width + row.width <= min(row.device_pitch, row.host_pitch)
        ):
            found[-1] = last._replace(width=last.width + row.width)
        else:
            found.append(row)
    return found


def _distance(one: Slice, other: Slice) -> Distance:
    return other[0].device - one[0].device, other[0].host - one[0].host


def _are_rows(one: Slice, _: Slice, way: Distance) -> bool:
    """Whether two planes at a distance can be rows of one copy."""
    return all(one[0].width <= abs(part) <= LONGEST_PITCH for part in way)


def _are_slices(one: Slice, other: Slice, way: Distance) -> bool:
    """Whether two slices at a distance can be so of one copy: alike, a whole number of steps on."""
    if not len(one) == len(other) > 1:
        return False
    step = _distance(one, one[1:])
    return step == _distance(other, other[1:]) and all(
        abs(part) % each == 0 and abs(part) >= len(one) * each
        for part, each in zip(way, step, strict=True)
    )


def _chains(
    slices: list[Slice], seams: Seams, fit: Callable[[Slice, Slice, Distance], bool]
) -> list[Group]:
    """Cut a list into the longest chains of slices at one distance, upwards on both sides."""
    chains: list[Group] = []
    step: Distance | None = None
    for part in slices:
        last = chains[-1][-1] if chains else part
        way = _distance(last, part)
        if (
            chains
            and step in (None, way)
            and (way[0] > 0) == (way[1] > 0)
            and last[0][2:] == part[0][2:]
            and fit(last, part, way)
            and not seams.between(last + part)
        ):
            chains[-1].append(part)
            step = way
        else:
            chains.append([part])
            step = None
    return [chain if chain[0] <= chain[-1] else chain[::-1] for chain in chains]
