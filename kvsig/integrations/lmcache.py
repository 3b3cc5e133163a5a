"""kvsig inside LMCache 0.5.6 and later: its direct copies between pinned objects and paged buffers.

`install` sets what LMCache's device object makes those copies by, in the process that calls it;
there is no entry point. LMCache decides as before which transfers are direct ones, where blocks go,
and when. What kvsig does not serve goes to LMCache's own function, counted with the reason.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsig import merging, observe, streams
from kvsig._core import Report
from kvsig._counters import now, since
from kvsig.planning import descriptors

__all__ = ["install", "installed", "uninstall"]

U64: TypeAlias = npt.NDArray[np.uint64]

TRANSFER, GROUP, OBJECT = "execute_direct_copy_transfer", "DirectCopyGroupSpec", "DirectCopyObject"
WHAT = f"lmcache.{TRANSFER}"
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 0, 1
# Originals, by name: in an object, so that nobody who rebinds names rebinds these.
_originals: dict[str, Any] = {}


class Unserved(Exception):
    """Carries the reason why a transfer is left to LMCache."""


class Kept:
    """What one of LMCache's values is made of; itself it can only be read by compiled code."""

    def __init__(self, name: str, *arguments: Any, **more: Any) -> None:
        self.name, self.arguments, self.more = name, arguments, more


def _made(value: Any) -> Any:
    """Return LMCache's own value."""
    if not isinstance(value, Kept):
        return value
    return _originals[value.name](*value.arguments, **value.more)


def _read(kind: Callable[..., Any], value: Any) -> Any:
    if not isinstance(value, Kept):
        raise Unserved("a value that was made before kvsig was installed")
    return kind(*value.arguments, **value.more)


class Group(NamedTuple):
    """Layers that are laid out alike: the arguments of LMCache's group, in order."""

    pointers: list[int]  # of the paged buffers
    #: kv_size, nl, nb, bs, nh, hs (K and V, layers, blocks, tokens of a block, heads, width of a
    #: head), element_size and block_stride_elems.
    shape: Any
    layout: int  # of K, V, layers and blocks: LMCache's EngineKVFormat
    slots: int  # tokens of a chunk
    offset: int  # where the group's (kv_size, nl, slots, nh * hs) begins in an object
    blocks: list[int]  # block numbers, chunk by chunk


class Object(NamedTuple):
    """A chunk in host memory: the arguments of LMCache's object, in order."""

    host: int
    address: int  # where it begins in LMCache's host buffer, which is registered piece by piece
    size: int
    chunk: int  # its number in the transfer
    skipped: list[int]  # for each group, blocks at its beginning that are not copied


def _layout(layout: int, layers: int, blocks: int, block: int) -> tuple[list[int], list[int], int]:
    """Say where planes are, K of each layer, then V of each: buffers, offsets, and one pitch."""
    each = list(range(layers))
    if layout == 0:  # one buffer (blocks, layers, 2, ...)
        steps = [(2 * layer + kv) * block for kv in range(2) for layer in each]
        return [0] * (2 * layers), steps, 2 * layers * block
    if layout == 1:  # a layer is (2, blocks, ...)
        return each * 2, [0] * layers + [blocks * block] * layers, block
    if layout == 2:  # a layer is (blocks, 2, ...)
        return each * 2, [0] * layers + [block] * layers, 2 * block
    if layout in (4, 9):  # all K, then all V
        return list(range(2 * layers)), [0] * (2 * layers), block
    if layout in (3, 5):  # one latent, without heads
        return each, [0] * layers, block
    raise Unserved("a layout of blocks that kvsig does not know")


def _copies(group: Group, chunk: Object, skipped: int) -> tuple[U64, U64]:
    """Return where the blocks of a chunk are on the device and in host memory, plane by plane."""
    shape = group.shape
    width = shape.nh * shape.hs * shape.element_size
    block = shape.bs * width
    buffers, offsets, pitch = _layout(int(group.layout), shape.nl, shape.nb, block)
    if len(buffers) == shape.nl and shape.nh != 1:
        raise Unserved("latents with heads")
    if len(buffers) != shape.kv_size * shape.nl or max(buffers) + 1 != len(group.pointers):
        raise Unserved("as many buffers as the layout has are needed")
    if shape.block_stride_elems not in (0, shape.bs * shape.nh * shape.hs):
        raise Unserved("blocks with a stride of their own")
    if group.slots % shape.bs or group.offset + len(buffers) * group.slots * width > chunk.size:
        raise Unserved("an object that does not hold its groups")
    many = group.slots // shape.bs
    numbers = group.blocks[chunk.chunk * many + skipped : (chunk.chunk + 1) * many]
    if numbers and not 0 <= min(numbers) <= max(numbers) < shape.nb:
        raise Unserved("a block number outside of its buffer")
    bases = np.array(group.pointers, np.uint64)[buffers] + np.array(offsets, np.uint64)
    first = chunk.host + group.offset
    planes = first + np.arange(len(buffers), dtype=np.uint64) * np.uint64(group.slots * width)
    blocks = np.array(numbers, np.uint64) * np.uint64(pitch)
    places = np.arange(skipped, skipped + len(numbers), dtype=np.uint64) * np.uint64(block)
    return (bases[:, None] + blocks).ravel(), (planes[:, None] + places).ravel()


def _serve(
    direction: Any, device: Any, piece: int, groups: list[Group], objects: list[Object]
) -> Report:
    """Copy all blocks of all objects, on torch's current stream."""
    if int(direction) not in (_HOST_TO_DEVICE, _DEVICE_TO_HOST):
        raise Unserved("a direction that kvsig does not know")
    near, far, sizes, seams = [], [], [], set()
    for chunk in objects:
        if len(chunk.skipped) != len(groups):
            raise Unserved("an object that does not hold its groups")
        for group, skipped in zip(groups, chunk.skipped, strict=True):
            one, other = _copies(group, chunk, skipped)
            shape = group.shape
            near.append(one)
            far.append(other)
            block = shape.bs * shape.nh * shape.hs * shape.element_size
            sizes.append(np.full(len(one), block, np.uint64))
            seams.update(group.pointers)  # layers may be allocated by themselves
        first = chunk.host - chunk.address % piece
        seams.update(range(first, chunk.host + chunk.size + 1, piece))
    if not near:
        return Report()
    on_device, in_host, width = map(np.concatenate, (near, far, sizes))
    dsts, srcs = (on_device, in_host) if int(direction) == _HOST_TO_DEVICE else (in_host, on_device)
    marks = sorted(seams)
    found = descriptors.plan(dsts, srcs, width, np.array(marks, np.uint64))
    found = descriptors.split(found, marks)
    place = torch.device(device)
    with streams.device_guard(place):
        return merging.submit(found, streams.current_handle(place))


def _transfer(
    direction: Any, device: Any, piece: int, groups: list[Any], objects: list[Any]
) -> None:
    """Stand in for LMCache's function."""
    start = now()
    try:
        report = _serve(
            direction, device, piece, [_read(Group, value) for value in groups],
            [_read(Object, value) for value in objects],
        )  # fmt: skip
    except Unserved as unserved:
        observe.passed_on(WHAT, str(unserved))
    except Exception as error:  # LMCache's server ends a request with an exception that it gets
        observe.fell_back(WHAT, error)
    else:
        since(WHAT, report, start)
        return
    own = _originals[TRANSFER]
    own(direction, device, piece, [_made(v) for v in groups], [_made(v) for v in objects])


def _device_ops() -> Any:
    try:
        ops = importlib.import_module("lmcache").device_ops
    except (ImportError, AttributeError) as error:
        raise ImportError(f"LMCache 0.5.6 or later is needed, with device_ops: {error}") from error
    missing = [name for name in (TRANSFER, GROUP, OBJECT) if not hasattr(ops, name)]
    if missing:
        raise ImportError(
            f"lmcache.device_ops has no {', '.join(missing)}: LMCache 0.5.6 or later is needed, "
            "built for CUDA 12.8 or later"
        )
    return ops


def install() -> list[str]:
    """Let kvsig make LMCache's direct copies in this process.

    Returns
    -------
    list of str
        What is set on ``lmcache.device_ops`` now; nothing where ``KVSIG_DISABLE`` is set.

    Raises
    ------
    ImportError
        If there is no LMCache with direct copies.
    """
    if observe.disabled():
        observe.logger.info("kvsig for lmcache is switched off by KVSIG_DISABLE")
        return []
    ops = _device_ops()
    if not _originals:
        for name in (TRANSFER, GROUP, OBJECT):
            _originals[name] = getattr(ops, name)
        for name in (GROUP, OBJECT):
            setattr(ops, name, functools.partial(Kept, name))
        setattr(ops, TRANSFER, _transfer)
        version = getattr(sys.modules["lmcache"], "__version__", "of unknown version")
        observe.announce("lmcache", f"LMCache {version}", TRANSFER, "all other functions")
    return list(_originals)


def installed() -> bool:
    """Whether kvsig makes LMCache's direct copies in this process."""
    return bool(_originals)


def uninstall() -> None:
    """Give LMCache its own functions back; does nothing where `install` was not called."""
    if _originals:
        ops = _device_ops()
        for name, original in _originals.items():
            setattr(ops, name, original)
        _originals.clear()
