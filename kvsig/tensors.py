"""Torch's tensors: where they lie, and page numbers and addresses as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsig import _core
from kvsig._errors import page_out_of_range

__all__ = [
    "Named",
    "Place",
    "Places",
    "addresses",
    "arrays",
    "check_alike",
    "check_apart",
    "checked_numbers",
    "device_layers",
    "device_numbers",
    "host_layers",
    "host_pools",
    "integers",
    "layer_places",
    "memory_seams",
    "owners",
    "page_locked",
    "page_numbers",
    "place_of",
    "pool_places",
    "reach",
    "seams",
]

I64: TypeAlias = npt.NDArray[np.int64]
U64: TypeAlias = npt.NDArray[np.uint64]

_INTEGERS = frozenset(
    (torch.int8, torch.int16, torch.int32, torch.int64)
    + (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
)


def _tensor_of(array: Any, name: str) -> Any:
    """Return an array of another library as a tensor of the same memory; other things as they are.

    Parameters
    ----------
    array : object
        CuPy's, JAX's, Numba's arrays and the like have ``__dlpack__`` or
        ``__cuda_array_interface__``. NumPy's are left alone: they are never page-locked.
    name : str
        What to call it in messages.

    Raises
    ------
    TypeError
        If it says that it is an array, but cannot be taken; the message says why.
    """
    if isinstance(array, (torch.Tensor, np.ndarray)):
        return array
    try:
        if hasattr(array, "__dlpack__"):
            return torch.utils.dlpack.from_dlpack(array)
        if hasattr(array, "__cuda_array_interface__"):
            return torch.as_tensor(array, device="cuda")
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name} is a {type(array).__name__}, which torch cannot take as it is: {error}"
        ) from error
    return array


def arrays(values: Any, name: str) -> Any:
    """Return what a caller gave, with arrays of other libraries as tensors, in lists too."""
    if isinstance(values, (list, tuple)):
        return [arrays(value, f"{name}[{i}]") for i, value in enumerate(values)]
    return _tensor_of(values, name)


class Named(NamedTuple):
    """A tensor and what to call it in messages."""

    name: str
    tensor: torch.Tensor


def _device_groups(device: Any) -> list[list[torch.Tensor]]:
    """Sort the device's layers into one list, or K's and V's."""
    if isinstance(device, torch.Tensor):
        raise TypeError(
            "device is one tensor: give one tensor per layer, as list(tensor) does, "
            "or a pair of lists for K and V"
        )
    if not isinstance(device, (list, tuple)):
        raise TypeError(
            f"device must be a list of tensors, or a pair of lists, not {type(device).__name__}"
        )
    if not device:
        raise ValueError("device has no layers")
    if all(isinstance(item, torch.Tensor) for item in device):
        return [list(device)]
    if len(device) != 2 or not all(isinstance(item, (list, tuple)) for item in device):
        raise TypeError(
            "device must be a list of tensors, or a pair of lists for K and V; it has "
            f"{len(device)} entries: {', '.join(type(item).__name__ for item in device[:4])}"
        )
    for label, group in zip("KV", device, strict=True):
        for i, tensor in enumerate(group):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"device {label} layer {i} must be a tensor, not {type(tensor).__name__}"
                )
    k, v = device
    if len(k) != len(v):
        raise ValueError(
            f"device has {len(k)} K layers and {len(v)} V layers: give as many of each"
        )
    if not k:
        raise ValueError("device has no layers")
    return [list(k), list(v)]


def device_layers(device: Any) -> tuple[list[Named], tuple[str, ...]]:
    """Name the layers that the caller gave, K of all layers first, and check where they are.

    Returns
    -------
    named : list of Named
    labels : tuple of str
        ``("K ", "V ")``, or ``("",)`` for a latent or for K alone.
    """
    groups = _device_groups(device)
    labels = ("K ", "V ") if len(groups) == 2 else ("",)
    named = [
        Named(f"device {label}layer {i}", tensor)
        for label, group in zip(labels, groups, strict=True)
        for i, tensor in enumerate(group)
    ]
    _check_device(named)
    return named, labels


def _host_groups(host: Any, count: int) -> list[Any]:
    """Sort the host's side by the lists of the device."""
    if count == 1:
        return [host]
    if isinstance(host, torch.Tensor):
        if host.ndim == 0 or host.shape[0] != 2:
            raise ValueError(
                f"host has shape {tuple(host.shape)}: one tensor for K and V needs a first "
                "dimension of 2; otherwise give a pair (k_pool, v_pool)"
            )
        return [host[0], host[1]]
    if not isinstance(host, (list, tuple)):
        raise TypeError(
            f"host must be a tensor or a pair (k_pool, v_pool), not {type(host).__name__}"
        )
    if len(host) != 2:
        raise ValueError(
            f"host has {len(host)} entries, but device has K and V: give a pair (k_pool, v_pool)"
        )
    return list(host)


def host_layers(host: Any, labels: Sequence[str], layers: int) -> list[Named]:
    """Name the tensors of a "layer_first" host pool, one for each layer, and check them."""
    named = []
    for label, pool in zip(labels, _host_groups(host, len(labels)), strict=True):
        if isinstance(pool, torch.Tensor):
            tensors = list(pool.unbind(0)) if pool.ndim else []
        elif isinstance(pool, (list, tuple)):
            tensors = list(pool)
        else:
            raise TypeError(
                f"host {label}pool must be a tensor or a list of one per layer, "
                f"not {type(pool).__name__}"
            )
        if len(tensors) != layers:
            raise ValueError(
                f"host {label}pool has {len(tensors)} layers, device has {layers}: "
                "layer_first is (layers, tokens, ...), or a list of one (tokens, ...) per layer"
            )
        for i, tensor in enumerate(tensors):
            name = f"host {label}layer {i}"
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
            named.append(Named(name, tensor))
    _check_host(named)
    return named


def host_pools(host: Any, labels: Sequence[str]) -> list[Named]:
    """Name the pools of a "page_first_direct" host side, and check them."""
    pools = _host_groups(host, len(labels))
    for label, pool in zip(labels, pools, strict=True):
        if not isinstance(pool, torch.Tensor):
            raise TypeError(f"host {label}pool must be a tensor, not {type(pool).__name__}")
    named = [Named(f"host {label}pool", pool) for label, pool in zip(labels, pools, strict=True)]
    _check_host(named)
    return named


def owners(host: Any, named: list[Named]) -> list[Named]:
    """Tensors that the caller gave for the host's side, and that some of `named` are views of.

    A view stays where it was when memory of another place is set into the tensor that it is of.
    """
    pools = [("host", host)]
    if not isinstance(host, torch.Tensor):
        pools = [(f"host[{i}]", pool) for i, pool in enumerate(host)]
    given = {id(item.tensor) for item in named}
    return [
        Named(name, pool)
        for name, pool in pools
        if isinstance(pool, torch.Tensor) and id(pool) not in given
    ]


def _check_device(named: list[Named]) -> None:
    """Check that the layers are where the CUDA runtime in use can reach them."""
    kind = "cpu" if _core.is_emulated() else "cuda"
    first = named[0]
    for name, tensor in named:
        where = tensor.device
        if where.type != kind:
            raise ValueError(
                f"{name} is on {where}, but the emulated CUDA runtime reaches CPU tensors only: "
                "unset KVSIG_CUDART to use the GPU"
                if kind == "cpu"
                else f"{name} is on {where}: device tensors must be on a CUDA device"
            )
        if where != first.tensor.device:
            raise ValueError(
                f"{name} is on {where} and {first.name} on {first.tensor.device}: "
                "a cache has one device; make one for each"
            )
    _check_packed(named)


def _check_host(named: list[Named]) -> None:
    for name, tensor in named:
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}: the host pool must be in CPU memory")
    _check_packed(named)


def _check_packed(named: list[Named]) -> None:
    for name, tensor in named:
        if tensor.layout is not torch.strided or not tensor.is_contiguous():
            stride = tuple(tensor.stride()) if tensor.layout is torch.strided else tensor.layout
            raise ValueError(
                f"{name} is not contiguous (shape {tuple(tensor.shape)}, stride {stride}): "
                "its rows must be packed"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{name} is empty (shape {tuple(tensor.shape)})")
        _check_memory(name, tensor)


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor's storage holds it: storages can be resized by themselves."""
    length = tensor.nbytes if tensor.is_contiguous() else reach(tensor)
    start = tensor.storage_offset() * tensor.element_size()
    return bool(start + length <= tensor.untyped_storage().nbytes())


def _check_memory(name: str, tensor: torch.Tensor) -> None:
    if not _is_whole(tensor) or (tensor.numel() and not tensor.data_ptr()):
        raise ValueError(
            f"{name} has {tensor.nbytes} bytes by its shape, but its storage has "
            f"{tensor.untyped_storage().nbytes()}: it was resized; give a tensor that has its "
            "memory"
        )


class Place(NamedTuple):
    """Where a tensor's memory is: its address, what it is part of, and how many bytes that has."""

    address: int
    storage: torch.UntypedStorage
    size: int


def place_of(tensor: torch.Tensor) -> Place:
    """Look where a tensor's memory is."""
    storage = tensor.untyped_storage()
    return Place(tensor.data_ptr(), storage, storage.nbytes())


class Places(NamedTuple):
    """Where tensors lie: their addresses, the bytes of a page in each, and the pages there are."""

    bases: list[int]
    page_bytes: list[int]
    pages: int


def layer_places(named: list[Named], page_size: int) -> Places:
    """Look at tensors that hold one layer each, (tokens, ...)."""
    first = named[0]
    widths = []
    for name, tensor in named:
        tokens = tensor.shape[0] if tensor.ndim else 0
        pages, rest = divmod(tokens, page_size)
        if rest or not pages:
            raise ValueError(
                f"{name} has {tokens} tokens, {rest} more than {pages} pages of {page_size}: "
                "the number of tokens must be a multiple of page_size"
            )
        if tokens != first.tensor.shape[0]:
            raise ValueError(
                f"{name} has {tokens} tokens, {first.name} has {first.tensor.shape[0]}: "
                "all layers of a side must have as many"
            )
        widths.append(tensor.nbytes // pages)
    bases = [item.tensor.data_ptr() for item in named]
    return Places(bases, widths, first.tensor.shape[0] // page_size)


# Dimensions of a pool by layout: what it is counted in, and what must stand where.
_SHAPES = {
    "page_first": ("tokens", "layers"),
    "page_first_direct": ("pages", "layers", "page_size"),
    "page_head": ("pages", "heads", "page_size", "layers"),
}


def pool_places(
    named: list[Named], layout: str, layers: int, page_size: int, like: torch.Tensor
) -> tuple[Places, int]:
    """Look at pools that hold all layers.

    Parameters
    ----------
    named : list of Named
        K's pool and V's, or one.
    layout : {"page_first", "page_first_direct", "page_head"}
        What their dimensions are.
    layers, page_size : int
        Layers, and tokens of a page.
    like : Tensor
        A layer on the device, (tokens, heads, ...): the heads of "page_head" are its.

    Returns
    -------
    places : Places
    heads : int
        Heads of a layer where they lie apart, otherwise 1.
    """
    heads = int(like.shape[1]) if layout == "page_head" and like.ndim > 1 else 1
    wanted = {"layers": layers, "page_size": page_size, "heads": heads}
    dimensions = _SHAPES[layout]
    first, widths = named[0], []
    unit = page_size if dimensions[0] == "tokens" else 1
    for name, tensor in named:
        shape = tuple(tensor.shape)
        inner = tuple(wanted[word] for word in dimensions[1:])
        if shape[1 : len(dimensions)] != inner:
            raise ValueError(
                f"{name} has shape {shape}: {layout} is ({', '.join(dimensions)}, ...), "
                f"here ({', '.join([dimensions[0], *map(str, inner)])}, ...)"
            )
        if shape[0] % unit:
            raise ValueError(
                f"{name} has {shape[0]} tokens, {shape[0] % unit} more than "
                f"{shape[0] // unit} pages of {page_size}: "
                "the number of tokens must be a multiple of page_size"
            )
        if shape[0] != first.tensor.shape[0]:
            raise ValueError(
                f"{name} has {shape[0]} {dimensions[0]}, {first.name} has "
                f"{first.tensor.shape[0]}: K and V must have as many"
            )
        widths.append(tensor.nbytes // (shape[0] // unit * layers))
    bases = [item.tensor.data_ptr() for item in named]
    return Places(bases, widths, first.tensor.shape[0] // unit), heads


def check_alike(
    device: list[Named],
    host: list[Named],
    near: Sequence[int],
    far: Sequence[int],
    page_size: int,
) -> None:
    """Check that both sides hold the same tokens: type, and bytes of a page of each plane."""
    for i, (one, other) in enumerate(zip(device, host, strict=True)):
        if one.tensor.dtype != other.tensor.dtype:
            raise ValueError(
                f"{one.name} is {one.tensor.dtype}, {other.name} is {other.tensor.dtype}: "
                "pages are moved as they are, not converted"
            )
        if near[i] != far[i]:
            raise ValueError(
                f"{one.name} has {near[i] // page_size} bytes per token, "
                f"{other.name} has {far[i] // page_size}: both sides must have as many"
            )


def check_apart(named: list[Named]) -> None:
    """Check that no two tensors share memory: a copy could write what another one reads."""
    spans = sorted(
        (item.tensor.data_ptr(), item.tensor.data_ptr() + item.tensor.nbytes, item.name)
        for item in named
    )
    for (_, end, one), (start, _, other) in zip(spans, spans[1:], strict=False):
        if end > start:
            raise ValueError(f"{one} and {other} overlap in memory by {end - start} bytes")


def seams(named: list[Named], given: Iterable[int]) -> npt.NDArray[np.uint64]:
    """Where the allocations and registered blocks that hold tensors begin and end.

    CUDA refuses a copy whose rows lie in two of them. Where the driver cannot be asked about
    memory of the device, or about page-locked memory, each tensor counts as one of its own.
    """
    found = {int(seam) for seam in given}
    emulated = _core.is_emulated()
    for _, tensor in named:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        limited = not emulated and (tensor.is_cuda or tensor.is_pinned())
        found.update(_blocks(start, end, limited))
    return np.array(sorted(found), dtype=np.uint64)


def memory_seams(extents: Iterable[tuple[int, int, bool]]) -> U64:
    """Find where the allocations and registered blocks within some memory begin and end.

    Parameters
    ----------
    extents : iterable of (start, end, limited)
        Addresses. Limited memory that the driver does not answer for (device memory, page-locked
        memory) counts as an allocation of its own.

    Returns
    -------
    ndarray of uint64
        Sorted, only those within an extent or at its bounds.
    """
    found: set[int] = set()
    for start, end, limited in extents:
        found.update(seam for seam in _blocks(start, end, limited) if start <= seam <= end)
    return np.array(sorted(found), dtype=np.uint64)


def reach(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last of a tensor, with what lies between its rows."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def page_locked(tensor: torch.Tensor) -> bool:
    """Whether all of a host tensor is page-locked; ``is_pinned`` looks at its first byte only."""
    place, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    while place < end:
        block = _core.memory_range(place)
        if block is None:
            # At the first byte: where the driver cannot be asked, torch is believed.
            return place == tensor.data_ptr() and tensor.is_pinned()
        place = block[0] + block[1]
    return True


def _blocks(start: int, end: int, limited: bool) -> Iterator[int]:
    """Bounds of the allocations that a tensor lies in."""
    last = _core.memory_range(end - 1)
    if _core.memory_range(start) is None and last is None:
        if limited:
            yield from (start, end)
        return
    if last is not None:
        yield from (last[0], last[0] + last[1])
    # Pageable memory between registered blocks has no end that could be asked for. Blocks are of
    # whole pages of 4 KiB; in pools of more than 256 MiB the short ones may be stepped over.
    step = max(1 << 12, (end - start) >> 16)
    place = start
    while place < end:
        block = _core.memory_range(place)
        if block is None:
            place += step
            continue
        yield from (block[0], block[0] + block[1])
        place = max(block[0] + block[1], place + 1)


# --- Numbers ----------------------------------------------------------------------------------


def integers(tensor: torch.Tensor, name: str) -> npt.NDArray[Any]:
    """Return an integer tensor as an array: its own memory, or a copy of a CUDA tensor's.

    Raises
    ------
    TypeError
        If the elements are not integers, or not in memory one by one.
    ValueError
        If its storage has become too small for it.
    """
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} must hold integers, not {tensor.dtype}")
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise TypeError(f"{name} must be in memory, number by number: give a dense tensor")
    _check_memory(name, tensor)
    return np.asarray((tensor if tensor.is_cpu else tensor.cpu()).numpy())


def _odd(array: npt.NDArray[Any]) -> Iterator[object]:
    """Which of some objects are no page numbers."""
    return (item for item in array.flat if type(item) is not int or abs(item) >= 2**63)


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
    if type(values) is np.ndarray:
        if values.dtype == np.int64 and values.ndim == 1:
            return np.ascontiguousarray(values)
        array: npt.NDArray[Any] = values
    elif isinstance(values, torch.Tensor):
        array = integers(values, name)
    elif isinstance(values, range):
        _check_range(values, name, limit)
        array = np.arange(values.start, values.stop, values.step, dtype=np.int64)
    elif isinstance(values, (list, tuple)) or hasattr(values, "__array__"):
        try:
            array = np.asarray(values)
        except ValueError:
            raise ValueError(f"{name} must be one flat list of page numbers, not nested") from None
    else:
        raise TypeError(
            f"{name} must be a list, range, array or tensor of page numbers, "
            f"not {type(values).__name__}"
        )
    if array.size == 0:
        array = array.astype(np.int64)  # no number is of the wrong type
    if array.dtype.kind == "O":
        for item in _odd(array):
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
    if interface is None or interface["typestr"] not in ("<i4", "<i8"):
        return None
    (count, *more), strides = interface["shape"], interface.get("strides")
    size = int(interface["typestr"][2])
    if more or (strides is not None and tuple(strides) != (size,)):
        return None
    return int(interface["data"][0]), int(count), size


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
    """Return a list of addresses as an array, in any order."""
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.uint64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array < 0).any():
        raise ValueError(f"{name} must be a list of addresses, not {values!r}")
    return array.astype(np.uint64)
