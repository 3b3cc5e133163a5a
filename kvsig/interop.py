"""What other libraries give for streams, arrays and numbers, and what kvsig makes of it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvsig import _core
from kvsig._core import Report
from kvsig.planning.descriptors import Descriptors
from kvsig.streams import current_handle, device_guard

__all__ = [
    "current_handle",
    "device_guard",
    "memory_seams",
    "page_number",
    "stream_number",
    "submit",
    "tensor_of",
]


def stream_number(stream: Any) -> int | None:
    """Return the handle of a stream in any form but torch's.

    Parameters
    ----------
    stream : object
        An integer of Python or NumPy; an object with the ``__cuda_stream__`` protocol (a method,
        or an attribute, that gives ``(version, handle)``: cuda.core, numba, nvmath); one with
        ``cuda_stream`` (torch, kvsig's emulated streams) or ``ptr`` (CuPy).

    Returns
    -------
    int or None
        The ``cudaStream_t`` as a number; None for what is no stream.

    Raises
    ------
    ValueError
        If the protocol answers a version other than 0.
    """
    if isinstance(stream, (bool, np.bool_)):
        return None
    if isinstance(stream, (int, np.integer)):
        return int(stream)
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        version, handle = protocol() if callable(protocol) else protocol
        if version != 0:
            raise ValueError(
                f"{type(stream).__name__}.__cuda_stream__ is of version {version}: kvsig knows 0, "
                "give the handle (int)"
            )
        return int(handle)
    for name in ("cuda_stream", "ptr"):
        handle = getattr(stream, name, None)
        if isinstance(handle, (int, np.integer)) and not isinstance(handle, (bool, np.bool_)):
            return int(handle)
    return None


def tensor_of(array: Any, name: str) -> torch.Tensor:
    """Return an array of another library as a tensor of the same memory.

    Parameters
    ----------
    array : Tensor, or object with ``__dlpack__``, ``__cuda_array_interface__`` or ``__array__``
        CuPy, JAX, Numba, NumPy arrays and the like.
    name : str
        What to call it in messages.

    Raises
    ------
    TypeError
        If it has none of these, or is read-only NumPy memory.
    """
    if isinstance(array, torch.Tensor):
        return array
    if isinstance(array, np.ndarray):
        if not array.flags.writeable:
            raise TypeError(f"{name} is a read-only array: give one that can be written, or a copy")
        return torch.from_numpy(array)
    if hasattr(array, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(array)
    if hasattr(array, "__cuda_array_interface__"):
        return torch.as_tensor(array, device="cuda")
    raise TypeError(
        f"{name} must be a tensor, or an array with __dlpack__ or __cuda_array_interface__, "
        f"not {type(array).__name__}"
    )


def page_number(value: Any, name: str, least: int = 0) -> int:
    """Return an integer of Python or NumPy (0-dimensional arrays included) as an int.

    Raises
    ------
    TypeError
        If it is a bool, or no integer.
    ValueError
        If it is below `least`.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an int, not {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, not {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    return number


def memory_seams(extents: Iterable[tuple[int, int, bool]]) -> npt.NDArray[np.uint64]:
    """Find where the allocations and registered blocks within some memory begin and end.

    CUDA refuses a copy that has rows on both sides of such an address.

    Parameters
    ----------
    extents : iterable of (start, end, limited)
        Addresses. Limited memory that the driver does not answer for (device memory, page-locked
        memory) counts as an allocation of its own.

    Returns
    -------
    ndarray of uint64
        Sorted, only those strictly within an extent or at its bounds.
    """
    found: set[int] = set()
    for start, end, limited in extents:
        found.update(seam for seam in _blocks(start, end, limited) if start <= seam <= end)
    return np.array(sorted(found), dtype=np.uint64)


def _blocks(start: int, end: int, limited: bool) -> Iterator[int]:
    if _core.memory_range(start) is None and _core.memory_range(end - 1) is None:
        if limited:
            yield from (start, end)
        return
    # Pageable memory between registered blocks has no end that could be asked for.
    step = max(1 << 16, (end - start) >> 16)
    at = start
    while at < end:
        block = _core.memory_range(at)
        if block is None:
            at += step
            continue
        yield from (block[0], block[0] + block[1])
        at = max(block[0] + block[1], at + 1)


def submit(found: Descriptors, stream: int, batch_size: int = 256) -> Report:
    """Queue what a plan of descriptors says.

    Parameters
    ----------
    found : Descriptors
        The copies.
    stream : int
        Handle of the stream.
    batch_size : int, optional
        Most copies in one call of the batch function.

    Raises
    ------
    BindError, CudaError
        As the core does. Some copies may have been queued; each writes what it would have
        written, so making all of them again is right.
    """
    if not len(found.rows):
        if not len(found.dsts):
            return Report()
        size = min(batch_size, len(found.dsts))
        return _core.copy_batch(found.dsts, found.srcs, found.sizes, stream, "auto", size)
    report = _core.copy_strided(found.rows, stream)
    if len(found.dsts):
        size = min(batch_size, len(found.dsts))
        report += _core.copy_batch(found.dsts, found.srcs, found.sizes, stream, "auto", size)
    return report
