"""Layouts of host pools: from the tensors that hold one to the planes that a transfer moves."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvsig import tensors
from kvsig.planning import geometry
from kvsig.planning.geometry import Planes
from kvsig.tensors import Named

__all__ = ["LAYOUTS", "Cache", "read"]

#: Names of the layouts, and the shape of a pool in each.
LAYOUTS = {
    "layer_first": "(layers, tokens, ...), or a list of one (tokens, ...) per layer",
    "page_first": "(tokens, layers, ...)",
    "page_first_direct": "(pages, layers, page_size, ...)",
    "page_head": "(pages, heads, page_size, layers, ...)",
}

#: What a page of a tensor consists of in each, the outermost first.
_ORDERS = {
    "layer_first": ("rows", "heads"),
    "page_first": ("rows", "layers"),
    "page_first_direct": ("layers", "rows"),
    "page_head": ("heads", "rows", "layers"),
}


class Cache(NamedTuple):
    """What a cache is made of: its tensors by name, and where their pages are."""

    near: list[Named]
    far: list[Named]
    planes: Planes


def read(device: Any, host: Any, layout: str, page_size: int) -> Cache:
    """Look at the tensors of a cache, and check that they fit together.

    Parameters
    ----------
    device : list of Tensor, or pair of such lists
        One tensor per layer, (tokens, ...).
    host : Tensor, list of Tensor, or pair of these
        The pool in host memory.
    layout : str
        One of `LAYOUTS`.
    page_size : int
        Tokens per page.

    Returns
    -------
    Cache

    Raises
    ------
    TypeError, ValueError
        If they do not fit; the message names the tensor and both values.
    """
    near, labels = tensors.device_layers(device)
    layers = len(near) // len(labels)
    shape = near[0].tensor.shape
    heads = int(shape[1]) if layout == "page_head" and len(shape) > 1 else 1
    if layout == "layer_first":
        far, each = tensors.host_layers(host, labels, layers), 1
    else:
        far, each = tensors.host_pools(host, labels), layers
    places = tensors.places(far, layout, layers, page_size, heads)
    on_device = tensors.places(near, "layer_first", layers, page_size)
    tensors.check_alike(
        near,
        [item for item in far for _ in range(each)],
        on_device.page_bytes,
        [size for size in places.page_bytes for _ in range(each)],
        page_size,
    )
    tensors.check_apart(near + far)
    rows = page_size if layout in ("page_first", "page_head") else 1
    device_side = geometry.side(*on_device, _ORDERS["layer_first"], layers, rows, heads)
    host_side = geometry.side(*places, _ORDERS[layout], layers, rows, heads)
    return Cache(near, far, geometry.join(device_side, host_side, layers, rows))
