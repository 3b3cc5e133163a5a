"""Host pools that are registered in chunks, in part, or later; page numbers of odd types."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kvsig
from kvsig import _core, emulated


@pytest.fixture
def stream():
    _core.rebind("emulated:13.0")
    with emulated.Stream() as stream:
        yield stream
        stream.control.reset()
    _core.rebind(None)


def sides(pages=16):
    # One block: rows of a strided copy must not have the pool's blocks between them.
    device = list(torch.zeros(2, pages * 4, 256, dtype=torch.uint8))
    host = torch.randint(1, 256, (pages, 2, 4, 256), dtype=torch.uint8)
    return device, host


@pytest.mark.known_failure("pinned-in-part")
@pytest.mark.parametrize(
    ("chunks", "pinned"),
    [
        ([(0, 1)], True),
        ([(0, 0.5), (0.5, 1)], True),
        ([(0, 0.25), (0.25, 0.5), (0.5, 1)], True),
        ([(0, 0.5)], False),
        ([(0.5, 1)], False),
        ([(0, 0.25), (0.5, 1)], False),
        ([(0, 0.75)], False),
        ([], False),
    ],
)
def test_a_pool_that_is_pinned_in_part(stream, chunks, pinned):
    device, host = sides()
    for first, end in chunks:
        start, size = int(host.nbytes * first), int(host.nbytes * (end - first))
        stream.control.mark_host(host.data_ptr() + start, size)
    cache = kvsig.PagedKVCache(device, host, page_size=4)
    assert cache.pinned is pinned
    cache.load(range(16), range(16), stream=stream)
    stream.synchronize()
    assert all(torch.equal(device[i].view(16, 4, 256), host[:, i]) for i in range(2))


@pytest.mark.known_failure("chunks-within-a-page")
@pytest.mark.parametrize("path", ["auto", "batch", "strided", "loop"])
@pytest.mark.parametrize("cut", [4096 + 100, 2048 + 1, 8192 + 2047])
def test_chunks_that_meet_within_a_page(stream, path, cut):
    """Also where no page and no row ends."""
    device, host = sides()
    stream.control.mark_host(host.data_ptr(), cut)
    stream.control.mark_host(host.data_ptr() + cut, host.nbytes - cut)
    cache = kvsig.PagedKVCache(device, host, page_size=4)
    cache.load(range(16), range(15, -1, -1), stream=stream, path=path)
    stream.synchronize()
    assert all(torch.equal(device[i].view(16, 4, 256).flip(0), host[:, i]) for i in range(2))


@pytest.mark.known_failure("registered-later")
@pytest.mark.parametrize("path", ["auto", "batch", "strided", "loop"])
@pytest.mark.parametrize("load", [True, False])
def test_chunks_that_are_registered_later(stream, path, load):
    device, host = sides()
    cache = kvsig.PagedKVCache(device, host, page_size=4)
    cut = 2048 + 100
    stream.control.mark_host(host.data_ptr(), cut)
    stream.control.mark_host(host.data_ptr() + cut, host.nbytes - cut)
    move = cache.load if load else cache.offload
    with pytest.raises(kvsig.CudaError) as caught:
        move(range(16), range(16), stream=stream, path=path)
    assert caught.value.__notes__[-1] == (
        "memory of the cache has been registered or freed since the cache was made: make it anew"
    )
    stream.synchronize()
    again = kvsig.PagedKVCache(device, host, page_size=4)
    again.load(range(16), range(16), stream=stream, path=path)
    stream.synchronize()
    assert again.pinned
    assert all(torch.equal(device[i].view(16, 4, 256), host[:, i]) for i in range(2))


@pytest.mark.known_failure("odd-objects")
@pytest.mark.parametrize("side", ["device_pages", "host_pages"])
def test_page_numbers_in_an_array_of_objects(stream, side):
    cache = kvsig.PagedKVCache(*sides(), page_size=4)
    odd = np.array([1, 2], object)
    pages = ([1, 2], odd) if side == "device_pages" else (odd, [1, 2])
    with pytest.raises(TypeError, match=f"^{side} must hold integers, not object$"):
        cache.load(*pages, stream=stream)
    odd[1] = None
    with pytest.raises(TypeError, match=f"^{side} must hold integers below 2\\*\\*63, not None$"):
        cache.load(*pages, stream=stream)
