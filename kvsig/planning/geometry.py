"""Geometry of paged KV caches: where each page of each layer lies, on both sides."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

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
    "layer_first",
    "page_first",
    "page_first_direct",
    "page_head",
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
        Bytes from one page to the next.
    width : ndarray
        Bytes of one row of a page.
    device_pages, host_pages : int
        Number of pages on each side; valid page numbers are below it.
    layers : int
        Number of layers. Planes are ordered K of every layer, then V of every layer
        (or one latent of every layer); where a layer has several planes of K, so do these.
    rows : int
        Rows of a page. 1 where a page of a plane lies in one piece on both sides.
    device_row, host_row : ndarray, optional
        Bytes from one row to the next; needed where there are several.
    """

    device_base: U64
    device_pitch: U64
    host_base: U64
    host_pitch: U64
    width: U64
    device_pages: int
    host_pages: int
    layers: int
    rows: int = 1
    device_row: U64 | None = None
    host_row: U64 | None = None

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
        groups = len(self) // self.layers
        chosen = np.asarray(layers, dtype=np.intp)
        index = (np.arange(groups, dtype=np.intp)[:, None] * self.layers + chosen).ravel()
        return self._taken(index, len(chosen))

    def by_layer(self) -> Planes:
        """Return the same planes, those of each layer side by side."""
        groups = len(self) // self.layers
        index = np.arange(len(self), dtype=np.intp).reshape(groups, self.layers).T.ravel()
        return self._taken(index, self.layers)

    def _taken(self, index: npt.NDArray[np.intp], layers: int) -> Planes:
        return replace(
            self,
            device_base=self.device_base[index],
            device_pitch=self.device_pitch[index],
            host_base=self.host_base[index],
            host_pitch=self.host_pitch[index],
            width=self.width[index],
            layers=layers,
            device_row=None if self.device_row is None else self.device_row[index],
            host_row=None if self.host_row is None else self.host_row[index],
        )

    def flat(self) -> Planes:
        """Return planes of one row each: those of row 0, 1, ... of a plane side by side."""
        if self.rows == 1:
            return self
        if self.device_row is None or self.host_row is None:
            raise ValueError(f"pages have {self.rows} rows, but nothing says how far apart")
        row = np.tile(np.arange(self.rows, dtype=np.uint64), len(self))

        def spread(values: U64) -> U64:
            return np.repeat(values, self.rows)

        return Planes(
            spread(self.device_base) + row * spread(self.device_row),
            spread(self.device_pitch),
            spread(self.host_base) + row * spread(self.host_row),
            spread(self.host_pitch),
            spread(self.width),
            self.device_pages,
            self.host_pages,
            self.layers,
        )

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


def _whole(value: int | Sequence[int]) -> U64:
    return np.array(value, dtype=np.uint64)


def _table(base: U64, pitch: U64, width: U64, row: U64, pages: int) -> Side:
    """Bring columns of any shape that fit together into one list, in the order of `base`."""
    columns = np.broadcast_arrays(base, pitch, width, row)
    base, pitch, width, row = (np.ascontiguousarray(column).ravel() for column in columns)
    return Side(base, pitch, width, row, pages)


def layer_first(
    bases: Sequence[int],
    page_bytes: Sequence[int],
    pages: int,
    layers: int | None = None,
    rows: int = 1,
    heads: int = 1,
) -> Side:
    """Describe planes that each lie in one piece: a tensor per layer, or (layers, tokens, ...).

    Parameters
    ----------
    bases : sequence of int
        Address of each plane.
    page_bytes : sequence of int
        Bytes of one page in each plane.
    pages : int
        Number of pages of every plane.
    layers : int, optional
        Number of layers; as many as planes if not given.
    rows, heads : int
        Rows that a page is to be seen as, and parts of a row that are planes of their own: as the
        other side needs it.
    """
    shape = (-1, 1, len(bases) if layers is None else layers)
    base, size = _whole(bases).reshape(shape), _whole(page_bytes).reshape(shape)
    row = size // np.uint64(rows)
    width = row // np.uint64(heads)
    head = np.arange(heads, dtype=np.uint64).reshape(1, -1, 1)
    return _table(base + head * width, size, width, row, pages)


def page_first_direct(
    pools: Sequence[int], page_bytes: Sequence[int], layers: int, pages: int
) -> Side:
    """Describe planes of pools (pages, layers, page_size, ...): the layers of a page lie together.

    Parameters
    ----------
    pools : sequence of int
        Address of each pool: K and V, or one latent.
    page_bytes : sequence of int
        Bytes of one page of one layer in each pool.
    layers, pages : int
        Layers and pages of every pool.
    """
    base, size = _whole(pools)[:, None], _whole(page_bytes)[:, None]
    layer = np.arange(layers, dtype=np.uint64)
    return _table(base + layer * size, size * np.uint64(layers), size, size, pages)


def page_first(
    pools: Sequence[int], page_bytes: Sequence[int], layers: int, pages: int, rows: int
) -> Side:
    """Describe planes of pools (tokens, layers, ...): the layers of a token lie together.

    Parameters
    ----------
    pools, page_bytes, layers, pages
        As in `page_first_direct`.
    rows : int
        Tokens of a page, which are its rows.
    """
    base, width = _whole(pools)[:, None], _whole(page_bytes)[:, None] // np.uint64(rows)
    layer, row = np.arange(layers, dtype=np.uint64), width * np.uint64(layers)
    return _table(base + layer * width, row * np.uint64(rows), width, row, pages)


def page_head(
    pools: Sequence[int],
    page_bytes: Sequence[int],
    layers: int,
    pages: int,
    rows: int,
    heads: int,
) -> Side:
    """Describe planes of pools (pages, heads, page_size, layers, ...): one for each head.

    Parameters
    ----------
    pools, page_bytes, layers, pages, rows
        As in `page_first`.
    heads : int
        Heads of a layer; each is a plane, in the order head by head.
    """
    base, size = _whole(pools)[:, None, None], _whole(page_bytes)[:, None, None]
    width = size // np.uint64(rows * heads)
    layer, row = np.arange(layers, dtype=np.uint64), width * np.uint64(layers)
    head = np.arange(heads, dtype=np.uint64)[:, None] * row * np.uint64(rows)
    pitch = row * np.uint64(rows * heads)
    return _table(base + head + layer * width, pitch, width, row, pages)


def join(device: Side, host: Side, layers: int, rows: int = 1) -> Planes:
    """Make the planes of a cache out of its two sides, which must be alike in number and width."""
    if not np.array_equal(device.width, host.width):
        raise ValueError("device and host pages differ in number or width")
    planes = Planes(
        device.base, device.pitch, host.base, host.pitch, device.width,
        device.pages, host.pages, layers, rows, device.row, host.row,
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


#: Planes that one strided copy can take: slices of evenly spaced planes.
Group: TypeAlias = list[list[Row]]


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
        self.device, self.host = _sorted(device), _sorted(host)
        sides = ((self.device, device_pages), (self.host, host_pages))
        self._sides = [
            (side, [int(seam) for seam in seams], pages - 1)
            for side, (seams, pages) in enumerate(sides)
        ]

    def between(self, low: Row, high: Row) -> bool:
        """Whether a seam lies between two planes whatever the page is."""
        return any(
            _inside(seams, low[side] + last * low[2 + side], high[side] + high.width)
            for side, seams, last in self._sides
        )

    def touch(self, rows: Iterable[Row]) -> bool:
        """Whether some page, or some run of pages, of these planes may meet a seam."""
        rows = list(rows)
        return any(
            _inside(
                seams,
                min(row[side] for row in rows),
                max(row[side] + last * row[2 + side] + row.width for row in rows),
            )
            for side, seams, last in self._sides
        )


def _sorted(addresses: npt.ArrayLike | None) -> U64:
    return np.unique(np.asarray(() if addresses is None else addresses, dtype=np.uint64))


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
    # K of each layer in turn is the usual order of one array; a list of tensors may lie in memory
    # in any order.
    as_given = _stacked(_split(table, seams), seams)
    by_address = _stacked(_split(sorted(table), seams), seams)
    return by_address if len(by_address) < len(as_given) else as_given


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
            and row.device == last.device + last.width
            and row.host == last.host + last.width
            and row[2:4] == last[2:4]
            and last.width + row.width <= min(row.device_pitch, row.host_pitch)
        ):
            found[-1] = last._replace(width=last.width + row.width)
        else:
            found.append(row)
    return found


def _distance(one: Row, other: Row) -> tuple[int, int]:
    return other.device - one.device, other.host - one.host


def _upwards(distance: tuple[int, int]) -> bool:
    return distance[0] > 0


def _same_sense(distance: tuple[int, int]) -> bool:
    return (distance[0] > 0) == (distance[1] > 0)


def _split(table: list[Row], seams: Seams) -> list[list[Row]]:
    """Cut planes into the fewest slices that are evenly spaced on both sides, in one sense."""
    slices: list[list[Row]] = []
    start = 0
    while start < len(table):
        members = [table[start]]
        step: tuple[int, int] | None = None
        for row in table[start + 1 :]:
            last = members[-1]
            way = _distance(last, row)
            if row[2:] != last[2:] or (step is not None and way != step) or not _same_sense(way):
                break
            if seams.between(last, row):
                break
            if not all(row.width <= abs(part) <= LONGEST_PITCH for part in way):
                break
            step = way
            members.append(row)
        start += len(members)
        slices.append(members if step is None or _upwards(step) else members[::-1])
    return slices


def _follows(last: list[Row], members: list[Row], seams: Seams) -> bool:
    """Whether a slice can be the next one of a group: alike, and a whole number of steps on."""
    if len(members) != len(last) or len(last) < 2 or members[0][2:] != last[0][2:]:
        return False
    step, way = _distance(*last[:2]), _distance(last[0], members[0])
    if step != _distance(*members[:2]) or not _same_sense(way):
        return False
    for part, each in zip(way, step, strict=True):
        if abs(part) % each or abs(part) < len(last) * each:
            return False
    low, high = (last, members) if _upwards(way) else (members, last)
    return not seams.between(low[0], high[-1])


def _stacked(slices: list[list[Row]], seams: Seams) -> list[Group]:
    """Put slices that are alike and evenly spaced into groups: K and V of all layers, mostly."""
    groups: list[Group] = []
    start = 0
    while start < len(slices):
        group = [slices[start]]
        distance: tuple[int, int] | None = None
        for members in slices[start + 1 :]:
            way = _distance(group[-1][0], members[0])
            if not _follows(group[-1], members, seams) or (
                distance is not None and way != distance
            ):
                break
            distance = way
            group.append(members)
        start += len(group)
        groups.append(group if distance is None or _upwards(distance) else group[::-1])
    return groups
