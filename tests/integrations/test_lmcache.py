"""LMCache's direct copies through kvsig: layouts, both directions, compared by every byte."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standins import module

from kvsig import observe
from kvsig.emulated import Control
from kvsig.integrations import lmcache as integration

LAYERS, BLOCKS, BLOCK, HEADS, DIM, SLOTS = 3, 20, 4, 2, 8, 16
PIECE = 1 << 12
ROW = HEADS * DIM * 2
DEVICE = torch.device("cpu")


def tensors(layout: int) -> tuple[list[torch.Tensor], Any]:
    """Return paged buffers, and what finds the blocks of a layer's K or V, (blocks, bytes)."""
    kinds = 1 if layout in (3, 5) else 2
    block = BLOCK * ROW // 2
    shapes = {
        0: [(BLOCKS, LAYERS, 2, block)], 1: [(2, BLOCKS, block)] * LAYERS,
        2: [(BLOCKS, 2, block)] * LAYERS, 3: [(BLOCKS, block)] * LAYERS,
        4: [(BLOCKS, block)] * 2 * LAYERS,
    }  # fmt: skip
    shapes[5], shapes[9] = shapes[3], shapes[4]
    buffers = [torch.randint(-99, 99, shape, dtype=torch.int16) for shape in shapes[layout]]
    find = {
        0: lambda kv, layer: buffers[0][:, layer, kv], 1: lambda kv, layer: buffers[layer][kv],
        2: lambda kv, layer: buffers[layer][:, kv],
    }.get(layout, lambda kv, layer: buffers[kv * LAYERS + layer])  # fmt: skip
    return buffers, (kinds, find)


class Shape(SimpleNamespace):
    """What LMCache says of paged buffers."""

    def __init__(self, kinds: int, **more: Any) -> None:
        given = {"nl": LAYERS, "nb": BLOCKS, "bs": BLOCK, "nh": HEADS, "hs": DIM}
        if kinds == 1:
            given |= {"nh": 1, "hs": HEADS * DIM}
        super().__init__(
            **{"kv_size": kinds, "element_size": 2, "block_stride_elems": 0} | given | more
        )


@pytest.fixture
def lmcache(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A small LMCache: a device object, whose values can only be made and handed on."""
    calls: list[Any] = []
    ops = SimpleNamespace(
        DirectCopyGroupSpec=lambda *a: ("group", a), DirectCopyObject=lambda *a: ("object", a),
        execute_direct_copy_transfer=lambda *a: calls.append(a),
    )  # fmt: skip
    module(monkeypatch, "lmcache", __version__="0.5.6", device_ops=ops)
    originals = dict(vars(ops))
    yield SimpleNamespace(ops=ops, calls=calls, originals=originals)
    integration.uninstall()


def transfer(ops: Any, direction: int, groups: list[Any], objects: list[Any]) -> None:
    """Call as LMCache does: values by the names of the device object, at the time of the call."""
    ops.execute_direct_copy_transfer(
        direction, DEVICE, PIECE, [ops.DirectCopyGroupSpec(*group) for group in groups],
        [ops.DirectCopyObject(*each) for each in objects],
    )  # fmt: skip


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("layout", [0, 1, 2, 3, 4, 5, 9])
def test_chunks_of_every_layout(
    lmcache: SimpleNamespace, control: Control, layout: int, direction: int
) -> None:
    integration.install()
    buffers, (kinds, find) = tensors(layout)
    size = 64 + kinds * LAYERS * SLOTS * ROW
    host = torch.randint(-99, 99, (3, size // 2), dtype=torch.int16)
    per_chunk, skipped = SLOTS // BLOCK, (0, 3, 0)
    blocks = random.Random(layout).sample(range(6, BLOCKS), 3 * per_chunk)
    blocks[4:8] = [2, 3, 4, 5]  # neighbours
    wanted_host, before = host.clone(), [b.clone() for b in buffers]
    # The second group of an object begins behind 64 bytes that are not its own.
    planes = wanted_host[:, 32:].view(3, kinds, LAYERS, per_chunk, -1)
    for chunk, kv, layer in itertools.product((0, 1, 2), range(kinds), range(LAYERS)):
        if chunk == 1 and direction == 1:
            continue  # LMCache leaves a chunk out
        for i in range(skipped[chunk], per_chunk):
            at = blocks[chunk * per_chunk + i]
            if direction == 0:
                find(kv, layer)[at] = planes[chunk, kv, layer, i]
            else:
                planes[chunk, kv, layer, i] = find(kv, layer)[at]
    wanted = [b.clone() for b in buffers]
    for buffer, old in zip(buffers, before, strict=True):
        buffer.copy_(old)
    chunks = (0, 1, 2) if direction == 0 else (0, 2)
    transfer(
        lmcache.ops, direction,
        [([b.data_ptr() for b in buffers], Shape(kinds), layout, SLOTS, 64, blocks)],
        [(host[c].data_ptr(), 1000 + c * size, size, c, [skipped[c]]) for c in chunks],
    )  # fmt: skip
    control.synchronize()
    assert torch.equal(host, wanted_host) and all(map(torch.equal, buffers, wanted))
    assert lmcache.calls == [] and observe.stats()["integrations"]["lmcache"]["calls"] == 1


def test_a_block_over_the_end_of_a_registered_piece_is_two_copies(
    lmcache: SimpleNamespace, control: Control
) -> None:
    integration.install()
    buffers, _ = tensors(4)
    size = 2 * LAYERS * SLOTS * ROW
    host = torch.zeros(2 * PIECE, dtype=torch.int8)
    at = PIECE - 100  # of LMCache's buffer, which is registered in pieces
    control.mark_host(host.data_ptr(), PIECE)
    control.mark_host(host.data_ptr() + PIECE, PIECE)
    group = ([b.data_ptr() for b in buffers], Shape(2), 4, SLOTS, 0, [1, 7, 9, 3])
    transfer(lmcache.ops, 1, [group], [(host.data_ptr() + at, at, size, 0, [0])])
    control.synchronize()
    found = host[at : at + size].view(torch.int16).view(2 * LAYERS, 4, -1)
    assert all(torch.equal(found[i], b[[1, 7, 9, 3]]) for i, b in enumerate(buffers))
    assert lmcache.calls == [] and observe.stats()["integrations"]["lmcache"]["copies"] == 25


class TestWhatIsLeftAlone:
    """LMCache's own function gets the call, with LMCache's own values."""

    def left(self, lmcache: SimpleNamespace, **more: Any) -> str:
        buffers, _ = tensors(4)
        given = {"layout": 4, "blocks": [0, 1, 2, 3], "shape": Shape(2), "skipped": [0]} | more
        host = torch.zeros(2 * LAYERS * SLOTS * ROW, dtype=torch.int8)
        group = ([b.data_ptr() for b in buffers], given["shape"], given["layout"], SLOTS, 0,
                 given["blocks"])  # fmt: skip
        each = host.data_ptr(), 0, host.nbytes - given.get("short", 0), 0, given["skipped"]
        transfer(lmcache.ops, given.get("direction", 0), [group], [each])
        assert lmcache.calls == [
            (given.get("direction", 0), DEVICE, PIECE, [("group", group)], [("object", each)])
        ]
        (reason,) = observe.stats()["passed_on"][integration.WHAT]
        return reason

    @pytest.mark.parametrize(
        ("more", "reason"),
        [
            ({"layout": 10}, "a layout of blocks that kvsig does not know"),
            ({"layout": 1}, "as many buffers as the layout has"),
            ({"blocks": [0, 1, 2, BLOCKS]}, "a block number outside"),
            ({"shape": Shape(2, block_stride_elems=999)}, "blocks with a stride of their own"),
            ({"skipped": [0, 0]}, "an object that does not hold its groups"),
            ({"short": 1}, "an object that does not hold its groups"),
            ({"direction": 2}, "a direction"),
        ],
    )
    def test_with_the_reason(
        self, lmcache: SimpleNamespace, control: Control, more: Any, reason: str
    ) -> None:
        integration.install()
        assert self.left(lmcache, **more).startswith(reason)

    def test_an_error_of_cudas(self, lmcache: SimpleNamespace, control: Control) -> None:
        integration.install()
        control.fault("cudaMemcpyBatchAsync", 1)
        buffers, _ = tensors(4)
        host = torch.zeros(2 * LAYERS * SLOTS * ROW, dtype=torch.int8)
        group = ([b.data_ptr() for b in buffers], Shape(2), 4, SLOTS, 0, [1, 7, 9, 3])
        transfer(lmcache.ops, 0, [group], [(host.data_ptr(), 0, host.nbytes, 0, [0])])
        assert len(lmcache.calls) == 1 and len(observe.stats()["fallbacks"]) == 1

    def test_values_that_were_made_before(
        self, lmcache: SimpleNamespace, control: Control
    ) -> None:
        early = lmcache.ops.DirectCopyGroupSpec(1)
        integration.install()
        lmcache.ops.execute_direct_copy_transfer(0, DEVICE, PIECE, [early], [])
        assert lmcache.calls == [(0, DEVICE, PIECE, [("group", (1,))], [])]


class TestInstall:
    def test_and_uninstall(self, lmcache: SimpleNamespace, control: Control) -> None:
        assert integration.install() == integration.install() and integration.installed()
        assert all(getattr(lmcache.ops, n) is not f for n, f in lmcache.originals.items())
        integration.uninstall()
        integration.uninstall()
        assert vars(lmcache.ops) == lmcache.originals and not integration.installed()

    def test_the_switch(
        self, lmcache: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KVSIG_DISABLE", "1")
        assert integration.install() == [] and vars(lmcache.ops) == lmcache.originals

    def test_an_lmcache_without_direct_copies(self, lmcache: SimpleNamespace) -> None:
        del lmcache.ops.DirectCopyObject
        with pytest.raises(ImportError, match=r"no DirectCopyObject: LMCache 0\.5\.6 or later"):
            integration.install()

    def test_without_lmcache(self) -> None:
        with pytest.raises(ImportError, match=r"LMCache 0\.5\.6 or later is needed"):
            integration.install()
