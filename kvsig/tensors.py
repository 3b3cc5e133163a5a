"""Torch's tensors: those of a cache by name, checked, and where their pages lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from kvsig import _core
from kvsig.memory import check_whole

__all__ = [
    "Named",
    "Places",
    "arrays",
    "check_alike",
    "check_apart",
    "device_layers",
    "host_layers",
    "host_pools",
    "owners",
    "places",
]


def arrays(values: Any, name: str) -> Any:
    """Return what a caller gave, with arrays of other libraries as tensors of the same memory.

    Parameters
    ----------
    values : object
        CuPy's, JAX's, Numba's arrays and the like have ``__dlpack__`` or
        ``__cuda_array_interface__``; lists may hold some. NumPy's are left alone: they are never
        page-locked.
    name : str
        What to call it in messages.

    Raises
    ------
    TypeError
        If it says that it is an array, but cannot be taken; the message says why.
    """
    if isinstance(values, (list, tuple)):
        return [arrays(value, f"{name}[{i}]") for i, value in enumerate(values)]
    if isinstance(values, (torch.Tensor, np.ndarray)):
        return values
    try:
        if hasattr(values, "__dlpack__"):
            return torch.utils.dlpack.from_dlpack(values)
        if hasattr(values, "__cuda_array_interface__"):
            return torch.as_tensor(values, device="cuda")
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name} is a {type(values).__name__}, which torch cannot take as it is: {error}"
        ) from error
    return values


class Named(NamedTuple):
    """A tensor and what to call it in messages."""

    name: str
    tensor: torch.Tensor


def _named(name: str, tensor: Any) -> Named:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    return Named(name, tensor)


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
        _named(f"device {label}layer {i}", tensor)
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
        named += [_named(f"host {label}layer {i}", tensor) for i, tensor in enumerate(tensors)]
    _check_host(named)
    return named


def host_pools(host: Any, labels: Sequence[str]) -> list[Named]:
    """Name the pools of a "page_first_direct" host side, and check them."""
    pools = _host_groups(host, len(labels))
    named = [_named(f"host {label}pool", pool) for label, pool in zip(labels, pools, strict=True)]
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
        check_whole(name, tensor)


class Places(NamedTuple):
    """Where tensors lie: their addresses, the bytes of a page in each, and the pages there are."""

    bases: list[int]
    page_bytes: list[int]
    pages: int


# Dimensions of a tensor by layout: what it is counted in, and what must stand where.
_SHAPES = {
    "layer_first": ("tokens",),
    "page_first": ("tokens", "layers"),
    "page_first_direct": ("pages", "layers", "page_size"),
    "page_head": ("pages", "heads", "page_size", "layers"),
}


def places(
    named: list[Named], layout: str, layers: int, page_size: int, heads: int = 1
) -> Places:
    """Look where pages lie in tensors of one side.

    Parameters
    ----------
    named : list of Named
        Tensors of one layer each in "layer_first", otherwise K's pool and V's, or one.
    layout : {"layer_first", "page_first", "page_first_direct", "page_head"}
        What their dimensions are.
    layers, page_size, heads : int
        Layers, tokens of a page, and heads of a layer in "page_head".
    """
    wanted = {"layers": layers, "page_size": page_size, "heads": heads}
    counted, *inner = _SHAPES[layout]
    sizes = tuple(wanted[word] for word in inner)
    unit = page_size if counted == "tokens" else 1
    first, widths = named[0], []
    for name, tensor in named:
        shape = tuple(tensor.shape)
        if shape[1 : len(sizes) + 1] != sizes:
            raise ValueError(
                f"{name} has shape {shape}: {layout} is ({', '.join([counted, *inner])}, ...), "
                f"here ({', '.join([counted, *map(str, sizes)])}, ...)"
            )
        count = shape[0] if shape else 0
        pages, rest = divmod(count, unit)
        if rest or not pages:
            raise ValueError(
                f"{name} has {count} tokens, {rest} more than {pages} pages of {page_size}: "
                "the number of tokens must be a multiple of page_size"
            )
        if count != first.tensor.shape[0]:
            raise ValueError(
                f"{name} has {count} {counted}, {first.name} has {first.tensor.shape[0]}: "
                f"{'K and V' if inner else 'all layers of a side'} must have as many"
            )
        widths.append(tensor.nbytes // (pages * (layers if inner else 1)))
    return Places([item.tensor.data_ptr() for item in named], widths, pages)


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
