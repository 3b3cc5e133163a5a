"""Geometry of paged KV caches: where each page of each layer lies, on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Planes"]


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

    device_base: npt.NDArray[np.uint64]
    device_pitch: npt.NDArray[np.uint64]
    host_base: npt.NDArray[np.uint64]
    host_pitch: npt.NDArray[np.uint64]
    width: npt.NDArray[np.uint64]
    device_pages: int
    host_pages: int
    layers: int

    def __len__(self) -> int:
        return len(self.width)

    def select(self, layers: Sequence[int]) -> Planes:
        """Planes of some layers only, in the order given.

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
