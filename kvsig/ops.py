"""Transfers as operators of torch, for programs that compile: ``torch.ops.kvsig.load`` and so on.

Importing this module defines them. Plain calls of a cache's methods are as good anywhere else,
and faster. A cache is made and registered first, outside of what is compiled::

    handle = kvsig.ops.register(cache, layers)
    torch.ops.kvsig.load(handle, layers, host_pages, device_pages)
    torch.ops.kvsig.offload(handle, layers, device_pages, host_pages)

The device's tensors are arguments, so that a compiler knows what is written and read. The host
pool is none: compilers may copy an argument that is written to, and a pool must not be copied.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from kvsig.cache import PagedKVCache

__all__ = ["register", "unregister"]

_numbers = itertools.count(1)
_caches: dict[int, tuple[PagedKVCache, tuple[int, ...]]] = {}

_library = torch.library.Library("kvsig", "DEF")
_library.define(
    "load(int cache, Tensor(a!)[] layers, Tensor host_pages, Tensor device_pages) -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "offload(int cache, Tensor[] layers, Tensor device_pages, Tensor host_pages) -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def register(cache: PagedKVCache, layers: Any) -> int:
    """Make a cache known to the operators.

    Parameters
    ----------
    cache : PagedKVCache
        Kept until `unregister`.
    layers : sequence of Tensor
        The device's tensors as they are given to the operators: K's, then V's, or one latent's.

    Returns
    -------
    int
        What the operators take for the cache.

    Raises
    ------
    TypeError
        If it is no cache, or the layers are not tensors.
    ValueError
        If there are not as many tensors as the cache has planes.
    """
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache must be a PagedKVCache, not {type(cache).__name__}")
    tensors = list(layers)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"layers[{i}] must be a tensor, not {type(tensor).__name__}")
    if len(tensors) not in (cache.num_layers, 2 * cache.num_layers):
        raise ValueError(
            f"layers has {len(tensors)} tensors, the cache {cache.num_layers} layers: "
            "give the device's tensors, K's and then V's"
        )
    number = next(_numbers)
    _caches[number] = cache, tuple(tensor.data_ptr() for tensor in tensors)
    return number


def unregister(handle: int) -> None:
    """Forget a cache.

    Raises
    ------
    ValueError
        If no cache is registered by that number.
    """
    if _caches.pop(handle, None) is None:
        raise ValueError(f"no cache is registered as {handle!r}")


def _known(handle: int, layers: list[torch.Tensor]) -> PagedKVCache:
    """Return a cache whose tensors these are: a compiler's copies would be filled for nothing."""
    found = _caches.get(handle)
    if found is None:
        raise ValueError(
            f"no cache is registered as {handle}: kvsig.ops.register(cache, layers) gives a number"
        )
    cache, addresses = found
    for i, tensor in enumerate(layers):
        if i < len(addresses) and tensor.data_ptr() != addresses[i]:
            raise ValueError(
                f"layers[{i}] is at {tensor.data_ptr():#x}, the cache's is at {addresses[i]:#x}: "
                "a compiler may have copied it (backend aot_eager does); use inductor, or call "
                "cache.load outside of what is compiled"
            )
    if len(layers) != len(addresses):
        raise ValueError(f"layers has {len(layers)} tensors, the cache has {len(addresses)}")
    return cache


def _load(
    cache: int, layers: list[torch.Tensor], host_pages: torch.Tensor, device_pages: torch.Tensor
) -> None:
    _known(cache, layers).load(host_pages, device_pages)


def _offload(
    cache: int, layers: list[torch.Tensor], device_pages: torch.Tensor, host_pages: torch.Tensor
) -> None:
    _known(cache, layers).offload(device_pages, host_pages)


def _nothing(*arguments: Any) -> None:
    """Stand for an operator where shapes alone are followed: it gives nothing back."""


for _name, _function in (("load", _load), ("offload", _offload)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kvsig::{_name}", _nothing, lib=_library)
# What an offload writes is no argument: a compiler must not take it for useless.
torch.fx.node.has_side_effect(torch.ops.kvsig.offload.default)
