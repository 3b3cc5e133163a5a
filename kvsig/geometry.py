"""Geometry of paged KV caches: where each page of each layer lies, on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Planes", "Side", "join", "layer_first", "page_first_direct"]

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
