"""Page numbers and addresses, as callers list them and as arrays of 64-bit integers."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsig._errors import page_out_of_range
from kvsig.memory import check_whole

__all__ = ["addresses", "checked_numbers", "device_numbers", "page_numbers"]

I64: TypeAlias = npt.NDArray[np.int64]
U64: TypeAlias = npt.NDArray[np.uint64]

_SIGNED_MAX = (1 << 63) - 1
_INTEGERS = frozenset(
    (torch.int8, torch.int16, torch.int32, torch.int64)
    + (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
)


def _array(values: Any, name: str) -> npt.NDArray[Any]:
    """What a caller listed as an array: its own memory, or a copy of a CUDA tensor's."""
    if isinstance(values, torch.Tensor):
        if values.dtype not in _INTEGERS:
            if values.numel():
                raise TypeError(f"{name} must hold integers, not {values.dtype}")
            return np.empty(values.shape, np.int64)  # no number is of the wrong type
        if values.layout is not torch.strided or values.is_meta:
            raise TypeError(f"{name} must be in memory, number by number: give a dense tensor")
        check_whole(name, values)
        values = (values if values.is_cpu else values.cpu()).numpy()
    array = np.asarray(values)
    return array if array.size else array.astype(np.int64)  # no number is of the wrong type


def page_numbers(values: Any, name: str, limit: int) -> I64:
    """Return page numbers as one-dimensional contiguous int64, a copy but of int64 arrays.

    Parameters
    ----------
    values : sequence, range, array or tensor of int
        A CUDA tensor is copied to the CPU first, which waits for the work that makes it.
    name : str
        What to call them in messages.
    limit : int
        Number of pages there are; named in messages only.

    Raises
    ------
    TypeError
        If they are no integers.
    ValueError
        If they are not one flat list.
    """
    if type(values) is np.ndarray and values.dtype == np.int64 and values.ndim == 1:
        return np.ascontiguousarray(values)
    if isinstance(values, range):
        _check_range(values, name, limit)
        array = np.arange(values.start, values.stop, values.step, dtype=np.int64)
    elif isinstance(values, torch.Tensor):
        array = _array(values, name)
    elif isinstance(values, (list, tuple)) or hasattr(values, "__array__"):
        try:
            array = _array(values, name)
        except ValueError:
            raise ValueError(f"{name} must be one flat list of page numbers, not nested") from None
    else:
        raise TypeError(
            f"{name} must be a list, range, array or tensor of page numbers, "
            f"not {type(values).__name__}"
        )
    objects: Iterable[object] = array.flat if array.dtype.kind == "O" else ()
    for item in objects:
        if type(item) is not int or abs(item) >= 2**63:
            raise TypeError(f"{name} must hold integers below 2**63, not {item!r}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, not {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, not of shape {array.shape}")
    if array.dtype == np.uint64 and len(array) and array.max() >> np.uint64(63):
        index = int(np.argmax(array >> np.uint64(63)))
        raise page_out_of_range(name, index, array[index], limit)
    # A copy: elements of the other list may be the caller's code, and free a tensor's memory.
    return np.array(array, dtype=np.int64, order="C")


def _check_range(pages: range, name: str, limit: int) -> None:
    """Refuse a range that leaves the pages there are, before memory for all of it is asked for."""
    if not pages or (0 <= pages[0] < limit and 0 <= pages[-1] < limit):
        return
    position = 0
    if 0 <= pages[0] < limit:
        room = pages[0] if pages.step < 0 else limit - 1 - pages[0]
        position = room // abs(pages.step) + 1
    raise page_out_of_range(name, position, pages[position], limit)


def _on_device(values: Any, name: str, device: torch.device) -> tuple[int, int, int] | None:
    """Address, count and bytes of page numbers in device memory; None where they are not there."""
    if isinstance(values, torch.Tensor):
        if not values.is_cuda or values.dtype not in (torch.int32, torch.int64):
            return None
        if values.ndim != 1 or not values.is_contiguous():
            return None
        if values.device != device:
            raise ValueError(
                f"{name} is on {values.device}, but the device tensors are on {device}: "
                "give page numbers there, or in host memory"
            )
        return values.data_ptr(), values.numel(), values.element_size()
    interface = getattr(values, "__cuda_array_interface__", None)
    return None if interface is None else _as_described(interface, name)


def _as_described(interface: Any, name: str) -> tuple[int, int, int] | None:
    """Read ``__cuda_array_interface__``, once; None for what is no flat list of int32 or int64."""
    try:
        kind, shape, strides = interface["typestr"], interface["shape"], interface.get("strides")
        address, counts = operator.index(interface["data"][0]), [operator.index(n) for n in shape]
        masked = interface.get("mask") is not None
        size = {"<i4": 4, "<i8": 8}.get(kind, 0)
        if not size or len(counts) != 1 or (strides is not None and tuple(strides) != (size,)):
            return None
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise TypeError(
            f"{name} has a __cuda_array_interface__ that is not as the protocol has it: {error!r}"
        ) from error
    (count,) = counts
    # The kernel reads there without asking anybody, and a fault of it ends the CUDA context.
    if masked or count < 0 or address % size or not (0 < address < 2**64 or count == 0 == address):
        raise ValueError(
            f"{name} has {count} numbers of {size} bytes at {address:#x}"
            f"{' and a mask' if masked else ''} by its __cuda_array_interface__, which is no list "
            "that can be read"
        )
    return address, count, size


def device_numbers(
    device_pages: Any, host_pages: Any, device: torch.device
) -> tuple[Any, Any] | None:
    """Look for page numbers that the GPU can read where they are.

    Parameters
    ----------
    device_pages, host_pages : object
        As callers give them: CUDA tensors, or objects with ``__cuda_array_interface__``, of int32
        or int64, one-dimensional and contiguous.
    device : torch.device
        The one that is to read them.

    Returns
    -------
    (device_pages, host_pages) or None
        With (address, count, bytes of a number) in the place of what is in device memory; None
        where neither is.

    Raises
    ------
    ValueError
        If a tensor of them is on another GPU.
    """
    kinds = type(device_pages), type(host_pages)
    if kinds == (list, list) or kinds == (np.ndarray, np.ndarray):
        return None  # what callers in a hurry give
    near = _on_device(device_pages, "device_pages", device)
    far = _on_device(host_pages, "host_pages", device)
    if near is None and far is None:
        return None
    return (device_pages if near is None else near), (host_pages if far is None else far)


def checked_numbers(values: Any, name: str, limit: int, distinct: bool) -> I64:
    """Return page numbers in host memory, a copy of them, checked by themselves.

    Raises
    ------
    TypeError, ValueError
        If they are no page numbers, out of range, or (`distinct`) one comes twice.
    """
    pages = page_numbers(values, name, limit).copy()
    outside = np.flatnonzero((pages < 0) | (pages >= limit))
    if len(outside):
        raise page_out_of_range(name, int(outside[0]), pages[outside[0]], limit)
    if distinct and len(np.unique(pages)) != len(pages):
        raise ValueError(f"{name} has a page more than once: a destination page may be given once")
    return pages


def addresses(values: Any, name: str) -> U64:
    """Return a copy of 64-bit integers as contiguous uint64, none above the signed range."""
    if isinstance(values, torch.Tensor) and values.device.type != "cpu":
        raise TypeError(
            f"{name} is on {values.device}: addresses are read on the CPU, pass {name}.cpu()"
        )
    if isinstance(values, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in values):
        raise TypeError(f"{name} holds tensors: give their addresses, as t.data_ptr() does")
    array = _array(values, name)
    if array.dtype.kind not in "iu" or array.dtype.itemsize != 8:
        raise TypeError(f"{name} must hold int64 or uint64, not {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, not of shape {array.shape}")
    native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    # Read as unsigned, a negative number is above the signed range: one pass finds both.
    unsigned: U64 = native.view(np.uint64)
    if len(unsigned) and int(unsigned.max()) > _SIGNED_MAX:
        index = int(np.argmax(unsigned > _SIGNED_MAX))
        value = int(native[index])
        what = "is negative" if value < 0 else "is not below 2**63"
        raise ValueError(f"{name}[{index}] {what}: {value}")
    return unsigned
