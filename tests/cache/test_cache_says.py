"""PagedKVCache: what it says of itself, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from test_cache import DEVICE_PAGES, HOST_PAGES, Setup, layers, pool

import kvsig


@pytest.mark.usefixtures("runtime")
class TestSaysWhatItIs:
    def test_attributes(self):
        cache = Setup(rows=[(2, 12), (2, 8)]).cache
        assert (cache.num_layers, cache.page_size, cache.layout) == (3, 4, "page_first_direct")
        assert (cache.device_pages, cache.host_pages) == (DEVICE_PAGES, HOST_PAGES)
        assert cache.page_bytes == 3 * 4 * (24 + 16) * 2
        assert cache.device == torch.device("cpu")
        assert cache.pinned is False

    def test_repr(self):
        assert repr(Setup().cache) == (
            "PagedKVCache(3 layers of K and V, layout='page_first_direct', page_size=4, "
            "page_bytes=768, device_pages=10 on cpu, host_pages=14 pageable)"
        )
        assert "3 layers of one latent, layout='layer_first'" in repr(
            Setup("stacked", rows=[(4,)]).cache
        )

    @pytest.mark.known_failure("freed-pool")
    def test_keeps_its_tensors(self, stream):
        device, host = layers(), pool()
        device[1][:] = 7
        cache = kvsig.PagedKVCache(device, host, page_size=4)
        del device
        cache.offload([1], [2], stream=stream)
        stream.synchronize()
        assert (host[2, 1] == 7).all()
