"""SGLang's kernel functions: the copies that HiCache makes with page numbers on the GPU.

Each function here takes what SGLang's takes and answers with a `Request`: where tokens lie, in
numbers and tensors that the page-copy kernel can take as they are. Nothing is read from the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["AHEAD_OF_TIME", "JUST_IN_TIME", "TUNING", "Place", "Request"]


class Place(NamedTuple):
    """Where the tokens of one pool lie on one side.

    Parameters
    ----------
    base : int or Tensor
        Address of token 0 of the first layer, or a uint64 table of one address a layer, on the
        GPU.
    token : int
        Bytes from token to token.
    layer : int
        Bytes from layer to layer; 0 with a table.
    head : int
        Page-head pools, whose pages are (heads, page_size, layers, width of a head): heads, of
        which each token has one piece. 0 for others.
    rows : int
        Tokens that there are; 0 with a table, which does not say.
    """

    base: int | torch.Tensor
    token: int
    layer: int = 0
    head: int = 0
    rows: int = 0


class Request(NamedTuple):
    """A call of a kernel function: token ``src_indices[i]`` goes to ``dst_indices[i]``.

    Parameters
    ----------
    src, dst : tuple of Place
        One place for each of K and V, or one latent.
    src_indices, dst_indices : Tensor or ndarray of int64
        Token numbers, mostly on the GPU. An array holds numbers that are known to be good.
    width : int
        Bytes of a token in one layer.
    layers : int
        Layers that are copied.
    page_size : int
        Tokens of a page, for page-head pools, and where tokens of a page are known to follow each
        other; otherwise 1.
    staged : bool
        Whether SGLang gathers pages on the GPU first, and copies them to the host page by page.
    device : torch.device or None
        Where the kernel is to run, if the token numbers do not say.
    name : int
        Stands for where tokens lie, of which it is one; 0: that is looked at each time.
    blocks : tuple of (int, int)
        Registered blocks (address, bytes) that hold all of the host's side, where they were looked
        for.
    """

    src: tuple[Place, ...]
    dst: tuple[Place, ...]
    src_indices: torch.Tensor | npt.NDArray[np.int64]
    dst_indices: torch.Tensor | npt.NDArray[np.int64]
    width: int
    layers: int = 1
    page_size: int = 1
    staged: bool = False
    device: torch.device | None = None
    name: int = 0
    blocks: tuple[tuple[int, int], ...] = ()


def _whole(*tensors: torch.Tensor, token: int, first: int = 0, layer: int = 0, head: int = 0) -> (
    tuple[Place, ...]
):  # fmt: skip
    return tuple(
        Place(t.data_ptr() + first, token, layer, head, t.nbytes // token) for t in tensors
    )


def _tables(*tensors: torch.Tensor, token: int) -> tuple[Place, ...]:
    return tuple(Place(table, token) for table in tensors)


def _rows(*tensors: torch.Tensor) -> tuple[Place, ...]:
    return tuple(
        Place(t.data_ptr(), t.stride(0) * t.element_size(), rows=t.shape[0]) for t in tensors
    )


def _pool(*tensors: torch.Tensor) -> tuple[Place, ...]:
    """Places of (tokens, layers, ...)."""
    return tuple(
        Place(
            t.data_ptr(), t.stride(0) * t.element_size(), t.stride(1) * t.element_size(),
            rows=t.shape[0],
        )
        for t in tensors
    )  # fmt: skip


def _per_layer(
    src_k: Any, dst_k: Any, src_v: Any, dst_v: Any, src_indices: Any, dst_indices: Any,
    item_size: int, **_: Any,
) -> Request:  # fmt: skip
    src, dst = _whole(src_k, src_v, token=item_size), _whole(dst_k, dst_v, token=item_size)
    return Request(src, dst, src_indices, dst_indices, item_size)


def _per_layer_pf_lf(
    src_k: Any, dst_k: Any, src_v: Any, dst_v: Any, src_indices: Any, dst_indices: Any,
    layer_id: int, item_size: int, src_layout_dim: int, **_: Any,
) -> Request:  # fmt: skip
    src = _whole(src_k, src_v, token=src_layout_dim, first=layer_id * item_size)
    dst = _whole(dst_k, dst_v, token=item_size)
    return Request(src, dst, src_indices, dst_indices, item_size)


def _per_layer_ph_lf(
    src_k: Any, dst_k: Any, src_v: Any, dst_v: Any, src_indices: Any, dst_indices: Any,
    layer_id: int, item_size: int, src_layout_dim: int, page_size: int, head_num: int, **_: Any,
) -> Request:  # fmt: skip
    first = layer_id * (item_size // head_num)
    src = _whole(src_k, src_v, token=src_layout_dim, first=first, head=head_num)
    dst = _whole(dst_k, dst_v, token=item_size)
    return Request(src, dst, src_indices, dst_indices, item_size, 1, page_size)


def _all_layer(
    src_k_layers: Any, dst_k_layers: Any, src_v_layers: Any, dst_v_layers: Any, src_indices: Any,
    dst_indices: Any, item_size: int, num_layers: int, **_: Any,
) -> Request:  # fmt: skip
    src = _tables(src_k_layers, src_v_layers, token=item_size)
    dst = _tables(dst_k_layers, dst_v_layers, token=item_size)
    return Request(src, dst, src_indices, dst_indices, item_size, num_layers)


def _all_layer_lf_pf(
    src_k_layers: Any, dst_k: Any, src_v_layers: Any, dst_v: Any, src_indices: Any,
    dst_indices: Any, item_size: int, dst_layout_dim: int, num_layers: int, **_: Any,
) -> Request:  # fmt: skip
    src = _tables(src_k_layers, src_v_layers, token=item_size)
    dst = _whole(dst_k, dst_v, token=dst_layout_dim, layer=item_size)
    return Request(src, dst, src_indices, dst_indices, item_size, num_layers)


def _all_layer_lf_ph(
    src_k_layers: Any, dst_k: Any, src_v_layers: Any, dst_v: Any, src_indices: Any,
    dst_indices: Any, item_size: int, dst_layout_dim: int, num_layers: int, page_size: int,
    head_num: int, **_: Any,
) -> Request:  # fmt: skip
    src = _tables(src_k_layers, src_v_layers, token=item_size)
    piece = item_size // head_num
    dst = _whole(dst_k, dst_v, token=dst_layout_dim, layer=piece, head=head_num)
    return Request(src, dst, src_indices, dst_indices, item_size, num_layers, page_size)


def _per_layer_mla(
    src: Any, dst: Any, src_indices: Any, dst_indices: Any, item_size: int, **_: Any
) -> Request:
    sides = _whole(src, token=item_size), _whole(dst, token=item_size)
    return Request(*sides, src_indices, dst_indices, item_size)


def _per_layer_mla_pf_lf(
    src: Any, dst: Any, src_indices: Any, dst_indices: Any, layer_id: int, item_size: int,
    src_layout_dim: int, **_: Any,
) -> Request:  # fmt: skip
    near = _whole(src, token=src_layout_dim, first=layer_id * item_size)
    return Request(near, _whole(dst, token=item_size), src_indices, dst_indices, item_size)


def _all_layer_mla(
    src_layers: Any, dst_layers: Any, src_indices: Any, dst_indices: Any, item_size: int,
    num_layers: int, **_: Any,
) -> Request:  # fmt: skip
    sides = _tables(src_layers, token=item_size), _tables(dst_layers, token=item_size)
    return Request(*sides, src_indices, dst_indices, item_size, num_layers)


def _all_layer_mla_lf_pf(
    src_layers: Any, dst: Any, src_indices: Any, dst_indices: Any, item_size: int,
    dst_layout_dim: int, num_layers: int, **_: Any,
) -> Request:  # fmt: skip
    near = _tables(src_layers, token=item_size)
    far = _whole(dst, token=dst_layout_dim, layer=item_size)
    return Request(near, far, src_indices, dst_indices, item_size, num_layers)


def _one_layer(
    k_cache_dst: Any, v_cache_dst: Any, indices_dst: Any, k_cache_src: Any, v_cache_src: Any,
    indices_src: Any, *, element_dim: int | None = None, page_size: int | None = None, **_: Any,
) -> Request:  # fmt: skip
    width = (element_dim or k_cache_dst.shape[-1]) * k_cache_dst.element_size()
    sides = _rows(k_cache_src, v_cache_src), _rows(k_cache_dst, v_cache_dst)
    return Request(*sides, indices_src, indices_dst, width, 1, page_size or 1)


def _one_layer_mla(
    cache_dst: Any, indices_dst: Any, cache_src: Any, indices_src: Any, *,
    element_dim: int | None = None, page_size: int | None = None, **_: Any,
) -> Request:  # fmt: skip
    width = (element_dim or cache_dst.shape[-1]) * cache_dst.element_size()
    sides = _rows(cache_src), _rows(cache_dst)
    return Request(*sides, indices_src, indices_dst, width, 1, page_size or 1)


def _every_layer(
    k_ptr_dst: Any, v_ptr_dst: Any, indices_dst: Any, k_ptr_src: Any, v_ptr_src: Any,
    indices_src: Any, *, kv_cache_src_stride_bytes: int, kv_cache_dst_stride_bytes: int,
    element_size: int | None = None, page_size: int | None = None, **_: Any,
) -> Request:  # fmt: skip
    width = element_size or kv_cache_dst_stride_bytes
    src = _tables(k_ptr_src, v_ptr_src, token=kv_cache_src_stride_bytes)
    dst = _tables(k_ptr_dst, v_ptr_dst, token=kv_cache_dst_stride_bytes)
    layers = int(k_ptr_src.shape[0])
    return Request(src, dst, indices_src, indices_dst, width, layers, page_size or 1)


def _every_layer_mla(
    ptr_dst: Any, indices_dst: Any, ptr_src: Any, indices_src: Any, *,
    cache_src_stride_bytes: int, cache_dst_stride_bytes: int, element_size: int,
    page_size: int | None = None, **_: Any,
) -> Request:  # fmt: skip
    src = _tables(ptr_src, token=cache_src_stride_bytes)
    dst = _tables(ptr_dst, token=cache_dst_stride_bytes)
    layers = int(ptr_src.shape[0])
    return Request(src, dst, indices_src, indices_dst, element_size, layers, page_size or 1)


def _staged(
    k_ptr_src: Any, v_ptr_src: Any, src_indices: Any, dst_indices: Any, staging_k: Any,
    staging_v: Any, dst_k: Any, dst_v: Any, *, page_size: int, element_size: int | None = None,
    **_: Any,
) -> Request:  # fmt: skip
    width = element_size or dst_k.stride(1) * dst_k.element_size()
    src = _tables(k_ptr_src, v_ptr_src, token=width)
    layers = int(k_ptr_src.shape[0])
    return Request(
        src, _pool(dst_k, dst_v), src_indices, dst_indices, width, layers, page_size, True
    )


def _staged_mla(
    ptr_src: Any, src_indices: Any, dst_indices: Any, staging: Any, dst: Any, *, page_size: int,
    element_size: int | None = None, **_: Any,
) -> Request:  # fmt: skip
    width = element_size or dst.stride(1) * dst.element_size()
    sides = _tables(ptr_src, token=width), _pool(dst)
    layers = int(ptr_src.shape[0])
    return Request(*sides, src_indices, dst_indices, width, layers, page_size, True)


#: Functions of ``sgl_kernel.kvcacheio``, by name.
AHEAD_OF_TIME: dict[str, Callable[..., Request]] = {
    "transfer_kv_per_layer": _per_layer,
    "transfer_kv_per_layer_pf_lf": _per_layer_pf_lf,
    "transfer_kv_per_layer_ph_lf": _per_layer_ph_lf,
    "transfer_kv_all_layer": _all_layer,
    "transfer_kv_all_layer_lf_pf": _all_layer_lf_pf,
    "transfer_kv_all_layer_lf_ph": _all_layer_lf_ph,
    "transfer_kv_per_layer_mla": _per_layer_mla,
    "transfer_kv_per_layer_mla_pf_lf": _per_layer_mla_pf_lf,
    "transfer_kv_all_layer_mla": _all_layer_mla,
    "transfer_kv_all_layer_mla_lf_pf": _all_layer_mla_lf_pf,
}

#: Functions of ``sglang.kernels.ops.kvcache.hicache`` (0.5.17 and later), by name.
JUST_IN_TIME: dict[str, Callable[..., Request]] = {
    "transfer_hicache_one_layer": _one_layer,
    "transfer_hicache_all_layer": _every_layer,
    "transfer_hicache_one_layer_mla": _one_layer_mla,
    "transfer_hicache_all_layer_mla": _every_layer_mla,
    "transfer_hicache_all_layer_staged_lf_pf": _staged,
    "transfer_hicache_all_layer_mla_staged_lf_pf": _staged_mla,
}

#: Arguments that say how SGLang's kernels are to run, and nothing of what is copied.
TUNING = frozenset(("block_quota", "num_warps_per_block", "unroll"))
