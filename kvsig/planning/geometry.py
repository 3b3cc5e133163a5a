"""Geometry of paged KV caches: where each page of each layer lies, on both sides."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    "page_first_direct",
]

#: cudaDevAttrMaxPitch of every device so far: a strided copy takes no longer pitch.
LONGEST_PITCH = 0x7FFFFFFF

#: Addresses, pitches or sizes.
U64: TypeAlias = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class Planes:
    """Places of one layer's K or V each, on the device and on the host.

    Every layout of a paged cache is a list of planes: page ``p`` of plane ``i`` is
    ``width[i]`` bytes at ``base[i] + p * pitch[i]``, on either side. All arrays are
    one-dimensional, contiguous ``uint64`` of the same length.

    Parameters
    ----------
    device_base, host_base : ndarray
        Address of page 0.
    device_pitch, host_pitch : ndarray
        Bytes from one page to the next.
    width : ndarray
        Bytes of one page.
    device_pages, host_pages : int
        Number of pages on each side; valid page numbers are below it.
    layers : int
        Number of layers. Planes are ordered K of every layer, then V of every layer
        (or one latent of every layer).
    """

    device_base: U64
    device_pitch: U64
    host_base: U64
    host_pitch: U64
    width: U64
    device_pages: int
    host_pages: int
    layers: int

    def __len__(self) -> int:
        return len(self.width)

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
        return Planes(
            self.device_base[index],
            self.device_pitch[index],
            self.host_base[index],
            self.host_pitch[index],
            self.width[index],
            self.device_pages,
            self.host_pages,
            len(chosen),
        )

    def locate(self, address: int) -> tuple[int, int, bool] | None:
        """Find the page that holds an address.

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
    pages: int


def layer_first(bases: Sequence[int], page_bytes: Sequence[int], pages: int) -> Side:
    """Describe planes that each lie in one piece: a tensor per layer, or (layers, tokens, ...).

    Parameters
    ----------
    bases : sequence of int
        Address of each plane.
    page_bytes : sequence of int
        Bytes of one page in each plane.
    pages : int
        Number of pages of every plane.
    """
    width = np.array(page_bytes, dtype=np.uint64)
    return Side(np.array(bases, dtype=np.uint64), width, width, pages)


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
    width = np.repeat(np.array(page_bytes, dtype=np.uint64), layers)
    layer = np.tile(np.arange(layers, dtype=np.uint64), len(pools))
    base = np.repeat(np.array(pools, dtype=np.uint64), layers) + layer * width
    return Side(base, width * np.uint64(layers), width, pages)


def join(device: Side, host: Side, layers: int) -> Planes:
    """Make the planes of a cache out of its two sides, which must be alike in number and width."""
    if not np.array_equal(device.width, host.width):
        raise ValueError("device and host pages differ in number or width")
    return Planes(
        device.base, device.pitch, host.base, host.pitch, device.width,
        device.pages, host.pages, layers,
    )  # fmt: skip


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
