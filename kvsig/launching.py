"""What launches of the page-copy kernel need, or the reason why they cannot be had."""

from __future__ import annotations

import functools
import logging
import operator
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsig import kernel, memory, streams
from kvsig._core import BindError, CudaError, KernelCode, KernelLane, KernelPlanes, Report
from kvsig._transfer import Launches
from kvsig.call import call
from kvsig.planning import Direction, Planes, costs, descriptors
from kvsig.planning._plan import kernel_pays
from kvsig.planning.descriptors import Descriptors

__all__ = [
    "AddressLaunches",
    "Followers",
    "launches_of",
    "multiprocessors",
    "planes_in_memory",
    "window_pitch",
]

logger = logging.getLogger("kvsig")

U64: TypeAlias = npt.NDArray[np.uint64]

#: Pages of fewer bytes, of pools of more bytes, are handled in order of their host addresses: a
#: random page of a large pool costs the look-up of its address.
SMALL_PAGE, WINDOWED_POOL = 4096, 256 << 20


def window_pitch(page: int, pitch: int, pages: int) -> int:
    """Bytes from page to page that a launch orders host pages by; 0: it takes them as they come.

    Parameters
    ----------
    page : int
        Bytes of a page.
    pitch, pages : int
        Bytes from page to page of the host pool, and how many it has.
    """
    return pitch if page < SMALL_PAGE and pitch * pages > WINDOWED_POOL else 0


#: Copies of a transfer by which it is told whether pages are small enough for the kernel at all.
MANY = 1 << 14


def multiprocessors() -> int:
    """How many multiprocessors a long transfer of an engine may take: ``KVSIG_SMS``, or 4.

    0: copy engines only.
    """
    return _multiprocessors(os.environ.get("KVSIG_SMS", "").strip())


@functools.cache
def _multiprocessors(given: str) -> int:
    if given and not given.isdigit():
        logger.warning("kvsig: KVSIG_SMS is %r, no number of multiprocessors: 4 is taken", given)
    return int(given) if given.isdigit() else 4


def _unit_of(planes: Planes) -> int:
    columns = (
        planes.device_base, planes.host_base, planes.device_pitch, planes.host_pitch, planes.width,
    )  # fmt: skip
    rows = () if planes.rows == 1 else (planes.device_row, planes.host_row)
    return kernel.unit_of(*columns, *rows)


def planes_in_memory(planes: Planes, unit: int) -> KernelPlanes:
    """Put a geometry where the kernel reads it.

    Parameters
    ----------
    planes : Planes
        Of all layers that a launch may move.
    unit : int
        Bytes that divide all of its addresses, pitches and widths.

    Returns
    -------
    KernelPlanes
        Layer by layer.
    """
    ordered = planes.by_layer()
    table = kernel.table(
        (ordered.device_base, ordered.host_base),
        (ordered.device_pitch, ordered.host_pitch),
        ordered.width,
        unit,
        ordered.rows,
        (ordered.device_row, ordered.host_row),
    )
    return KernelPlanes(table, len(ordered) // ordered.layers, unit)


def _mapped_elsewhere(host: Sequence[torch.Tensor]) -> bool:
    """Whether the GPU knows some of the host pool by other addresses."""
    return any(
        int(call("cudaHostGetDevicePointer", pHost=tensor.data_ptr(), flags=0))
        != tensor.data_ptr()
        for tensor in host
    )


class Followers:
    """Streams on which events wait for the layers of launches, one for each lane of launches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams: dict[KernelLane, Any] = {}

    def record(self, events: Sequence[Any], lane: KernelLane, value: int) -> None:
        """Record an event behind a wait for each layer of a launch, of which `value` tells."""
        stream = self.streams.get(lane)
        if stream is None:
            stream = self.streams.setdefault(lane, streams.new_stream(self.device))
        number = streams.stream_handle(stream, self.device)
        handles = streams.event_handles(events)
        if handles is not None:
            lane.tell(handles, value, number)
            return
        for layer, event in enumerate(events):
            lane.wait(layer, value, number)
            event.record(stream)


def launches_of(
    planes: Planes,
    host: Sequence[torch.Tensor],
    locked: list[tuple[int, int]] | None,
    sms: int,
    rates: tuple[float, float],
) -> tuple[Launches | None, str]:
    """Compile the kernel for the current device, and say what launches of a cache have in common.

    Parameters
    ----------
    planes : Planes
        All planes of the cache.
    host : sequence of Tensor
        The host pool.
    locked : list of (int, int) or None
        The page-locked blocks that hold it, by address and size; None where it is pageable.
    sms : int
        Multiprocessors of a long transfer; 0: the kernel is not wanted.
    rates : (float, float)
        Bytes a microsecond that long loads and offloads are held to; 0: not held.

    Returns
    -------
    launches : Launches or None
    why_not : str
        The reason, where there are none.
    """
    if sms == 0:
        return None, "the cache was made with sms=0: the copy engine only"
    if locked is None:
        return None, "the host pool is pageable, and the kernel reads and writes mapped memory only"
    refusal = kernel.refusal()
    if refusal is not None:
        return None, refusal
    unit = _unit_of(planes)
    try:
        if _mapped_elsewhere(host):
            return None, "the GPU knows the host pool by other addresses than the host does"
        compiled = kernel.build(unit)
    except (BindError, CudaError) as error:
        return None, str(error)
    page, pitch = int(planes.width.max()) * planes.rows, int(planes.host_pitch.max())
    return (
        Launches(
            KernelCode(compiled),
            planes_in_memory(planes, unit),
            planes.layers,
            (planes.device_pages, planes.host_pages),
            sms,
            rates,
            window_pitch(page, pitch, planes.host_pages),
            locked,
        ),
        "",
    )


class AddressLaunches:
    """Launches for copies that are given by addresses, between a GPU's tensors and the host's.

    A page may begin at every multiple of some bytes from the first tensor of a side on, so that a
    list of addresses is a list of page numbers, of one plane.

    Parameters
    ----------
    device, host : sequence of Tensor
        Where all copies begin and end, row by row.
    direction : Direction
    sms : int
        Multiprocessors of a long transfer.

    Raises
    ------
    BindError
        With the reason why the kernel cannot be had for them.
    """

    def __init__(
        self,
        device: Sequence[torch.Tensor],
        host: Sequence[torch.Tensor],
        direction: Direction,
        sms: int,
    ) -> None:
        model = costs.load(streams.device_name(device[0].device))
        self.costs = model.load if direction == Direction.LOAD else model.offload
        self.rates = model.load.kernel_rate, model.offload.kernel_rate
        widths = {tensor[0].nbytes for tensor in device}
        refusal = "KVSIG_SMS is 0" if sms == 0 else kernel.refusal()
        if refusal is None and not any(
            kernel_pays(self.costs, sms, MANY, 0, 0, MANY * width, MANY) for width in widths
        ):
            refusal = "pages are large"
        locked = memory.locked_blocks(host)
        if refusal is None and locked is None:
            refusal = "host memory is pageable, and the kernel reads and writes mapped memory only"
        if refusal is None and _mapped_elsewhere(host):
            refusal = "the GPU knows host memory by other addresses than the host does"
        if refusal is not None:
            raise BindError(refusal)
        self.direction, self.sms, self.locked = direction, sms, locked or []
        sides = device, host
        starts, ends = zip(*map(_stretch, sides), strict=True)
        # What divides all distances within a side, as a power of two: rows begin there, and so do
        # the pieces of a host row, each of which has the length of a row on the device.
        distances = [*widths, *(t.stride(0) * t.element_size() for t in (*device, *host))]
        for side, start in zip(sides, starts, strict=True):
            distances += [tensor.data_ptr() - start for tensor in side]
        bits = functools.reduce(operator.or_, distances)
        self.grain = bits & -bits
        self.starts = starts
        self.limits = tuple((e - s) // self.grain + 1 for s, e in zip(starts, ends, strict=True))
        self._launches: dict[int, Launches] = {}
        for width in widths:
            self._of(width)  # compiled now, rather than at the first transfer

    def copy(
        self, dsts: U64, srcs: U64, sizes: U64, planned: Descriptors, stream: int
    ) -> Report | None:
        """Copy by launches, one for each size, where that is faster than what has been planned.

        Parameters
        ----------
        dsts, srcs, sizes : ndarray of uint64, shape (n,)
            Addresses and bytes.
        planned : Descriptors
            The same bytes as they would be copied otherwise.
        stream : int
            Handle of the stream.

        Returns
        -------
        Report or None
            None where nothing has been queued.
        """
        rows = planned.rows[:, descriptors.HEIGHT].sum()
        if not kernel_pays(
            self.costs, self.sms, len(planned.dsts), len(planned.rows), rows, sizes.sum(), len(dsts)
        ):
            return None
        sides = [(dsts, self.starts[0]), (srcs, self.starts[1])]
        if self.direction == Direction.OFFLOAD:
            sides = [(srcs, self.starts[0]), (dsts, self.starts[1])]
        lists = descriptors.page_lists(sides, sizes, self.grain)
        if lists is None:
            return None
        launches = [self._of(found.size) for found in lists]
        for found, one in zip(lists, launches, strict=True):
            if not one.ready(stream) or any(map(_beyond, found.pages, self.limits)):
                return None
        report = Report()
        for found, one in zip(lists, launches, strict=True):
            report += one.copy(*found.pages, self.direction, stream)
        return report

    def _of(self, width: int) -> Launches:
        """Return what launches of copies of one size have in common, made at the first of them."""
        found = self._launches.get(width)
        if found is None:
            unit = kernel.unit_of([*self.starts, self.grain, width])
            table = kernel.table(self.starts, (self.grain, self.grain), [width], unit)
            found = self._launches[width] = Launches(
                KernelCode(kernel.build(unit)), KernelPlanes(table, 1, unit), 1, self.limits,
                self.sms, self.rates, window_pitch(width, self.grain, self.limits[1]), self.locked,
            )  # fmt: skip
        return found


def _stretch(side: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Return where the first of some tensors begins, and the last one ends."""
    return (
        min(tensor.data_ptr() for tensor in side),
        max(memory.extent(tensor)[1] for tensor in side),
    )


def _beyond(pages: npt.NDArray[np.int64], limit: int) -> bool:
    return int(pages.max()) >= limit
