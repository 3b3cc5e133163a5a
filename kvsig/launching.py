"""What a cache needs to launch the page-copy kernel, or the reason why it cannot be had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvsig import kernel, streams
from kvsig._core import BindError, CudaError, KernelCode, KernelLane, KernelPlanes
from kvsig._transfer import Launches
from kvsig.call import call
from kvsig.planning import Planes

__all__ = ["SMALL_PAGE", "WINDOWED_POOL", "Followers", "launches_of", "planes_in_memory"]

#: Pages of fewer bytes, of pools of more bytes, are handled in order of their host addresses: a
#: random page of a large pool costs the look-up of its address.
SMALL_PAGE, WINDOWED_POOL = 4096, 256 << 20


def _unit_of(planes: Planes) -> int:
    columns = (
        planes.device_base, planes.host_base, planes.device_pitch, planes.host_pitch, planes.width,
    )  # fmt: skip
    rows = () if planes.rows == 1 else (planes.device_row, planes.host_row)
    return kernel.unit_of(*columns, *(row for row in rows if row is not None))


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
    none = np.zeros(len(ordered), np.uint64)
    table = kernel.table(
        (ordered.device_base, ordered.host_base),
        (ordered.device_pitch, ordered.host_pitch),
        ordered.width,
        unit,
        ordered.rows,
        (
            none if ordered.device_row is None else ordered.device_row,
            none if ordered.host_row is None else ordered.host_row,
        ),
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
    pinned: bool,
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
    pinned : bool
        Whether all of it is page-locked.
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
    if not pinned:
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
    pitch = int(planes.host_pitch.max())
    page = int(planes.width.max()) * planes.rows
    windowed = page < SMALL_PAGE and pitch * planes.host_pages > WINDOWED_POOL
    return (
        Launches(
            KernelCode(compiled),
            planes_in_memory(planes, unit),
            planes.layers,
            (planes.device_pages, planes.host_pages),
            sms,
            rates,
            pitch if windowed else 0,
        ),
        "",
    )
