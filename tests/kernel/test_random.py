"""Random transfers by the kernel's double, compared byte for byte with a list of plain copies.

``KVSIG_KERNEL_CASES=50000 pytest tests/kernel/test_random.py`` is the long form.
"""

import itertools
import os

import numpy as np
import pytest
import torch
from page_cases import PageCase

from kvsig import _core, emulated, kernel
from kvsig._core import KernelCode, KernelLane, KernelPlanes

CASES = int(os.environ.get("KVSIG_KERNEL_CASES", "1000"))
PARTS = 20
#: Bytes of a side, about; and of all memory.
MOST, ROOM = 1 << 18, 1 << 25


class Numbers:
    """Page numbers in device memory, as another library has them."""

    def __init__(self, values, kind):
        self.array = np.asarray(values, kind)
        self.__cuda_array_interface__ = {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.array.ctypes.data, False),
            "version": 3,
        }


class Event:
    """Knows on which stream it was recorded."""

    def record(self, stream):
        self.stream = stream


@pytest.fixture(scope="module")
def memory():
    """Bytes of both sides, and what to fill them with."""
    source = torch.from_numpy(np.random.default_rng(0).integers(0, 256, ROOM, dtype=np.uint8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of small tensors, threads cost more than they save
    yield torch.empty(ROOM, dtype=torch.uint8), torch.empty(ROOM, dtype=torch.uint8), source
    torch.set_num_threads(threads)


@pytest.fixture
def control():
    _core.rebind("emulated:13.0")
    found = emulated.Control(_core.info()["library"])
    found.reset()
    yield found
    found.reset()
    _core.rebind(None)


@pytest.mark.parametrize("part", range(PARTS))
def test_moves_what_plain_copies_move(control, memory, part):
    """Guard bytes around every tensor are compared too."""
    control.mark_device(memory[0].data_ptr(), ROOM)
    control.mark_host(memory[1].data_ptr(), ROOM)
    with emulated.Stream() as stream:
        for seed in range(part, CASES, PARTS):
            case = PageCase(seed, MOST)
            near, far = (
                side[: case.bytes_of(i)].copy_(memory[2][seed % 977 + i :][: case.bytes_of(i)])
                for i, side in enumerate(memory[:2])
            )
            wanted = near.clone(), far.clone()
            case.expect(*wanted)
            cache = case.cache(near, far)
            report, events, kept = case.run(cache, stream, Numbers, Event)
            stream.synchronize()
            for event in events:
                event.stream.synchronize()
            cache.check()
            del kept
            assert report.path == "kernel", case
            assert torch.equal(near, wanted[0]) and torch.equal(far, wanted[1]), case


@pytest.mark.parametrize("part", range(PARTS))
def test_moves_within_a_gpu(control, memory, part):
    """Both sides of a table may be device memory; a cache has no such transfers."""
    for side in memory[:2]:
        control.mark_device(side.data_ptr(), ROOM)
    with emulated.Stream() as stream:
        for seed in range(part, CASES // 20, PARTS):
            rng = np.random.default_rng(seed)
            near, far = (side.numpy()[: 1 << 18] for side in memory[:2])
            for i, side in enumerate((near, far)):
                side[:] = memory[2].numpy()[seed + i :][: 1 << 18]
            _move_within(rng, stream, near, far)


def _move_within(rng, stream, *sides):
    """Move random pages of random planes by one launch, and look at every byte of both sides."""
    planes, width, rows = (int(rng.integers(1, most)) for most in (5, 300, 4))
    pages = int(rng.integers(2, 30))
    row = [width + int(rng.integers(0, 20)) for _ in sides]
    pitch = [rows * step + int(rng.integers(0, 20)) for step in row]
    base = [
        side.ctypes.data + int(rng.integers(0, 64)) + np.arange(planes) * (step * pages)
        for side, step in zip(sides, pitch, strict=True)
    ]
    unit = kernel.unit_of(*base, *pitch, *row, width)
    full = [np.full(planes, step) for step in pitch]
    table = kernel.table(base, full, np.full(planes, width), unit, rows, row)
    count, source = int(rng.integers(1, pages + 1)), int(rng.integers(2))
    numbers = [rng.permutation(pages)[:count].astype(np.int64) for _ in sides]
    numbers[source] = rng.integers(0, pages, count)
    wanted = [side.copy() for side in sides]
    for plane, (one, other), line in itertools.product(
        range(planes), zip(*numbers, strict=True), range(rows)
    ):
        start = [
            int(base[side][plane]) - sides[side].ctypes.data + page * pitch[side] + line * row[side]
            for side, page in enumerate((int(one), int(other)))
        ]
        moved = sides[source][start[source] :][:width]
        wanted[1 - source][start[1 - source] :][:width] = moved
    code = KernelCode(kernel.build(unit))
    lane = KernelLane(planes, stream.cuda_stream)
    report, _ = _core.launch_kernel(
        code, KernelPlanes(table, 1, unit), lane, *numbers, (pages, pages), source
    )
    stream.synchronize()
    assert report.bytes == count * planes * rows * width
    for side, expected in zip(sides, wanted, strict=True):
        assert np.array_equal(side, expected)
