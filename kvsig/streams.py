"""Streams and devices, as callers give them and as CUDA takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsig import _core

__all__ = [
    "Stream",
    "current_handle",
    "device_guard",
    "device_name",
    "event_handles",
    "event_stream",
    "new_stream",
    "stream_device",
    "stream_handle",
]

#: A stream as callers give it: None (torch's current one), a handle, a torch.cuda.Stream, or any
#: object with ``cuda_stream``, ``__cuda_stream__`` or ``ptr``. Only checked at run time.
Stream: TypeAlias = Any

# The handle of a device's current stream without making a Stream object for it: a tenth of
# the time. Compiled graphs of torch use it; builds that lack it take the public way.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


_NO_GUARD = nullcontext()


def current_handle(device: torch.device | None) -> int:
    """Return the handle of torch's current stream.

    Parameters
    ----------
    device : torch.device or None
        A CUDA device; None means the current one, or on the emulated runtime the legacy
        default stream, which is what torch starts with too.
    """
    if device is None:
        if _core.is_emulated():
            return 0
        if not torch.backends.cuda.is_built():
            raise ValueError(
                f"torch {torch.__version__} is built without CUDA and has no current stream: "
                "give a stream"
            )
        return int(torch.cuda.current_stream().cuda_stream)
    if device.type != "cuda":
        return 0
    if _raw_stream is not None:
        return _raw_stream(device.index)
    return int(torch.cuda.current_stream(device).cuda_stream)


def stream_handle(stream: Stream, device: torch.device | None = None) -> int:
    """Return the handle of a stream that the caller gave.

    Parameters
    ----------
    stream : None, int, torch.cuda.Stream or object with a stream's handle
        None is torch's current stream. Objects of other libraries have the ``__cuda_stream__``
        protocol (cuda.core, Numba, nvmath) or ``ptr`` (CuPy).
    device : torch.device, optional
        Where the tensors lie: a stream of another device is refused. A CPU device stands
        for the emulated runtime.

    Raises
    ------
    TypeError
        If it is no stream.
    ValueError
        If it belongs to another device or to another runtime, is no handle, or its protocol is
        of a version that kvsig does not know.
    """
    if stream is None:
        return current_handle(device)
    if _is_number(stream):
        handle = int(stream)
    else:
        found = _handle_of(stream)
        if found is None:
            raise TypeError(
                "stream must be None, a handle (int), a torch.cuda.Stream or an object with "
                f"cuda_stream, not {_name(stream)}"
            )
        handle = found
        _same_place(stream, device)
    if not 0 <= handle < 1 << 64:
        raise ValueError(
            f"stream handle {handle} is not an address: give the cudaStream_t as it is"
        )
    return handle


def _is_number(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _handle_of(stream: Any) -> int | None:
    """Return the handle that a stream object has, in any library's way; None for other things."""
    for name in ("cuda_stream", "ptr"):
        found: Any = getattr(stream, name, None)
        if _is_number(found):
            return int(found)
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is None:
        return None
    version, handle = protocol() if callable(protocol) else protocol
    if version != 0:
        raise ValueError(
            f"{_name(stream)}.__cuda_stream__ is of version {version}: kvsig knows 0, give the "
            "handle (int)"
        )
    return int(handle)


def _name(thing: object) -> str:
    kind = type(thing)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _same_place(stream: object, device: torch.device | None) -> None:
    """Refuse a stream object of another device, or of the runtime that is not in use."""
    emulated = _core.is_emulated()
    if emulated and isinstance(stream, torch.cuda.Stream):
        raise ValueError(
            "stream is a torch.cuda.Stream, but the CUDA runtime in use is the emulated one: "
            "give a kvsig.emulated.Stream, or unset KVSIG_CUDART"
        )
    if not emulated and type(stream).__module__ == "kvsig.emulated":
        raise ValueError(
            "stream is a kvsig.emulated.Stream, but the CUDA runtime in use is a real one: "
            "give a torch.cuda.Stream"
        )
    owner = stream_device(stream)
    if owner is not None and device is not None and owner != device:
        raise ValueError(
            f"stream is on {owner}, but the device tensors are on {device}: "
            "give a stream of the tensors' device"
        )


def stream_device(stream: Stream) -> torch.device | None:
    """Return the device of a torch stream; None for what does not tell."""
    owner = getattr(stream, "device", None)
    return owner if isinstance(owner, torch.device) else None


def device_name(device: torch.device) -> str | None:
    """Return the name of a CUDA device; None for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def device_guard(device: torch.device | None) -> AbstractContextManager[object]:
    """Make a CUDA device the current one for a while, if it is not."""
    if device is None or device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _NO_GUARD
    return torch.cuda.device(device)


def event_stream(stream: Stream, handle: int, device: torch.device) -> Any:
    """Return the stream as an event's ``record`` takes it: torch's want a stream object."""
    if device.type != "cuda":
        return handle if stream is None else stream
    if isinstance(stream, torch.cuda.Stream):
        return stream
    if stream is None:
        return torch.cuda.current_stream(device)
    return torch.cuda.ExternalStream(handle, device=device)


def event_handles(events: Sequence[Any]) -> npt.NDArray[np.uint64] | None:
    """Return the handles of torch events that exist already; None where not all of them do.

    A torch event is made by its first recording, which torch has to do itself.
    """
    if not all(type(event) is torch.cuda.Event for event in events):
        return None
    handles = [event.cuda_event for event in events]
    return np.array(handles, np.uint64) if all(handles) else None


def new_stream(device: torch.device) -> Any:
    """Make a stream of kvsig's own on a device; an emulated one where the CPU stands for it."""
    if device.type == "cuda":
        return torch.cuda.Stream(device)
    from kvsig import emulated

    return emulated.Stream()
