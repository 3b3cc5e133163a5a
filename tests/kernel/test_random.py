"""Random transfers by the kernel's double, compared byte for byte with a list of plain copies.

``KVSIG_KERNEL_CASES=50000 pytest tests/kernel/test_random.py`` is the long form.
"""

import os

import numpy as np
import pytest
import torch
from page_cases import PageCase

import kvsig
from kvsig import _core, emulated, kernel
from kvsig._core import KernelCode, KernelLane, KernelPlanes

CASES = int(os.environ.get("KVSIG_KERNEL_CASES", "1000"))
PARTS = 20
#: Bytes of a side, about; and of all memory.
MOST, ROOM = 1 << 18, 1 << 24


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
    return torch.empty(ROOM, dtype=torch.uint8), torch.empty(ROOM, dtype=torch.uint8), source


@pytest.fixture
def control(memory):
    _core.rebind("emulated:13.0")
    found = emulated.Control(_core.info()["library"])
    found.reset()
    found.mark_device(memory[0].data_ptr(), ROOM)
    found.mark_host(memory[1].data_ptr(), ROOM)
    yield found
    found.reset()
    _core.rebind(None)


@pytest.mark.parametrize("part", range(PARTS))
def test_moves_what_plain_copies_move(control, memory, part):
    """Guard bytes around every tensor are compared too."""
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
