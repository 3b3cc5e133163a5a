"""On a real GPU, with the libcudart of the installed torch."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest
import torch

import kvsig
from kvsig import _core
from kvsig.tools.models import MODELS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean")]

PAGE = 4096


def random_bytes(count, device="cpu", pinned=False):
    made = torch.from_numpy(np.random.default_rng(count).integers(1, 256, count, dtype=np.uint8))
    if pinned:
        made = made.pin_memory()
    return made.to(device)


def rows(tensor, size=PAGE):
    """Addresses of a tensor's pages."""
    count = tensor.numel() * tensor.element_size() // size
    return np.arange(count, dtype=np.uint64) * np.uint64(size) + np.uint64(tensor.data_ptr())


def reversed_rows(tensor):
    return np.ascontiguousarray(rows(tensor)[::-1])


@pytest.fixture(params=["own", "default", "legacy handle", "per-thread handle"])
def stream(request):
    """Handle of a stream; work of the default one is forked to a stream of kvsig's own."""
    if request.param == "own":
        own = torch.cuda.Stream()
        own.wait_stream(torch.cuda.current_stream())
        yield own.cuda_stream
    else:
        yield {"default": 0, "legacy handle": 1, "per-thread handle": 2}[request.param]
    torch.cuda.synchronize()


def expected_path(stream):
    return "loop" if _core.batch_refusal(stream) else "batch"


class TestBinding:
    def test_torchs_runtime_is_taken(self):
        info = kvsig.info()
        assert info["emulated"] is False
        major, minor = torch.version.cuda.split(".")[:2]
        assert info["runtime_version"] // 1000 == int(major)
        assert info["runtime_version"] >= int(major) * 1000 + int(minor) * 10
        assert "torch" in info["found"]
        bound = [r for r in info["functions"] if r["address"] and r["library"] == "cudart"]
        files = {_core.address_file(row["address"]) for row in bound}
        assert files == {info["library"]}

    def test_batches_are_used_here(self):
        if _core.driver_version() < 12080:
            pytest.skip("the driver is older than 12.8: no batches")
        assert kvsig.info()["batch"]["path"] == "batch"


class TestCopyBatch:
    @pytest.mark.parametrize("memory", ["pinned", "registered", "pageable"])
    @pytest.mark.parametrize("path", ["auto", "loop"])
    def test_bit_exact_both_ways(self, stream, memory, path):
        pages = 700
        device = random_bytes(pages * PAGE, "cuda")
        host = torch.zeros(pages * PAGE, dtype=torch.uint8, pin_memory=memory == "pinned")
        if memory == "registered":
            kvsig.call("cudaHostRegister", ptr=host, size=pages * PAGE)
        back = torch.zeros_like(device)
        torch.cuda.synchronize()
        try:
            down = _core.copy_batch(reversed_rows(host), rows(device), PAGE, stream, path)
            up = _core.copy_batch(reversed_rows(back), rows(host), PAGE, stream, path)
            torch.cuda.synchronize()
        finally:
            if memory == "registered":
                kvsig.call("cudaHostUnregister", ptr=host)
        wanted = device.cpu()
        assert torch.equal(host.view(pages, PAGE), wanted.view(pages, PAGE).flip(0))
        assert torch.equal(back.cpu(), wanted)
        for report in (down, up):
            assert report.path == (expected_path(stream) if path == "auto" else "loop")
            assert report.copies == pages and report.bytes == pages * PAGE

    def test_sizes_of_each_copy(self, stream):
        rng = np.random.default_rng(5)
        sizes = rng.integers(1, PAGE + 1, 300).astype(np.uint64)
        device, host = random_bytes(300 * PAGE, "cuda"), torch.zeros(300 * PAGE, dtype=torch.uint8)
        host = host.pin_memory()
        torch.cuda.synchronize()
        _core.copy_batch(rows(host), rows(device), sizes, stream)
        torch.cuda.synchronize()
        wanted = device.cpu().view(300, PAGE).clone()
        for row, size in zip(wanted, sizes.tolist(), strict=True):
            row[size:] = 0
        assert torch.equal(host.view(300, PAGE), wanted)

    @pytest.mark.parametrize("own", [True, False], ids=["own", "default"])
    def test_stream_order_holds_before_and_after(self, own):
        """Nothing is waited for in between: a copy out of order takes a wrong number along."""
        rounds, numbers = 64, 1 << 20
        source = torch.empty(numbers, dtype=torch.int32, device="cuda")
        host = torch.empty(numbers, dtype=torch.int32, pin_memory=True)
        back = torch.empty_like(source)
        kept = torch.empty((rounds, numbers // 64), dtype=torch.int32, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream() if own else torch.cuda.default_stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            handle = torch.cuda.current_stream().cuda_stream
            for i in range(rounds):
                source.fill_(i)
                _core.copy_batch(rows(host), rows(source), PAGE, handle)
                _core.copy_batch(rows(back), rows(host), PAGE, handle)
                kept[i].copy_(back[:: 64])
            torch.cuda.current_stream().synchronize()
        assert torch.equal(kept.cpu(), torch.arange(rounds, dtype=torch.int32)[:, None].expand(
            rounds, numbers // 64))  # fmt: skip

    def test_capture_lands_in_the_graph(self):
        host = random_bytes(40 * PAGE, pinned=True)
        device = torch.zeros(40 * PAGE, dtype=torch.uint8, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            handle = torch.cuda.current_stream().cuda_stream
            report = _core.copy_batch(rows(device), rows(host), PAGE, handle)
            with pytest.raises(kvsig.BindError, match="being captured"):
                _core.copy_batch(rows(device), rows(host), PAGE, handle, "batch")
        assert (report.path, report.copies) == ("loop", 40)
        assert report.reason == "the stream is being captured, which batches refuse"
        torch.cuda.synchronize()
        assert not device.any()
        for _ in range(2):
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(device.cpu(), host)
            device.zero_()

    def test_from_four_threads(self):
        failures = []

        def work(seed):
            device = random_bytes((200 + seed) * PAGE, "cuda")
            host = torch.zeros(device.numel(), dtype=torch.uint8, pin_memory=True)
            back = torch.zeros_like(device)
            own = torch.cuda.Stream()
            torch.cuda.synchronize()
            for _ in range(20):
                back.zero_()
                torch.cuda.default_stream().synchronize()
                for handle in (own.cuda_stream, 0):
                    _core.copy_batch(reversed_rows(host), rows(device), PAGE, handle)
                    _core.copy_batch(reversed_rows(back), rows(host), PAGE, handle)
                    torch.cuda.synchronize()
                    if not torch.equal(back, device):
                        failures.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


class TestCopyStrided:
    def test_bit_exact_both_ways(self, stream):
        device = random_bytes(64 * PAGE, "cuda")
        host = torch.zeros(64 * PAGE, dtype=torch.uint8, pin_memory=True)
        back = torch.zeros_like(device)
        torch.cuda.synchronize()

        def every_other(dst, src):
            """The even pages of src, packed into the first half of dst; then the odd ones."""
            half = 32 * PAGE
            return np.array(
                [[dst.data_ptr() + i * half, PAGE, 32, src.data_ptr() + i * PAGE, 2 * PAGE, 32,
                  PAGE, 32, 1] for i in (0, 1)], dtype=np.uint64,
            )  # fmt: skip

        report = _core.copy_strided(every_other(host, device), stream)
        assert report == _core.Report("strided", None, 64, 2, 64 * PAGE)
        there = every_other(host, back)
        again = np.ascontiguousarray(there[:, [3, 4, 5, 0, 1, 2, 6, 7, 8]])
        _core.copy_strided(again, stream)
        torch.cuda.synchronize()
        pages = device.cpu().view(64, PAGE)
        assert torch.equal(host.view(64, PAGE), torch.cat([pages[::2], pages[1::2]]))
        assert torch.equal(back.cpu(), device.cpu())


class TestErrors:
    @pytest.mark.parametrize("legacy", [False, True], ids=["own", "default"])
    def test_the_bad_copy_is_named(self, legacy):
        """A destination that crosses two registered blocks, at index 5 of 8."""
        if expected_path(2) != "batch":
            pytest.skip(f"no batches here: {_core.batch_refusal(2)}")
        block = 16 * PAGE
        memory = np.zeros(2 * block + PAGE, np.uint8)
        start = -(-memory.ctypes.data // PAGE) * PAGE
        for i in (0, 1):
            kvsig.call("cudaHostRegister", ptr=start + i * block, size=block)
        device = random_bytes(8 * PAGE, "cuda")
        handle = 0 if legacy else torch.cuda.Stream().cuda_stream
        torch.cuda.synchronize()
        dsts = np.arange(8, dtype=np.uint64) * np.uint64(PAGE) + np.uint64(start)
        dsts[5] = start + block - PAGE // 2
        try:
            with pytest.raises(kvsig.CudaError) as caught:
                _core.copy_batch(dsts, rows(device), PAGE, handle, "batch")
            assert kvsig.call("cudaPeekAtLastError") == 0
            torch.cuda.synchronize()
        finally:
            for i in (0, 1):
                kvsig.call("cudaHostUnregister", ptr=start + i * block)
        error = caught.value
        assert (error.code, error.name, error.index) == (1, "cudaErrorInvalidValue", 5)
        assert error.function in ("cudaMemcpyBatchAsync", "cuMemcpyBatchAsync")
        offset = start - memory.ctypes.data
        made = torch.from_numpy(memory)[offset : offset + 5 * PAGE]
        assert torch.equal(made, device.cpu()[: 5 * PAGE])
        # The process goes on: the next transfer works.
        host = torch.zeros(8 * PAGE, dtype=torch.uint8, pin_memory=True)
        _core.copy_batch(rows(host), rows(device), PAGE, handle)
        torch.cuda.synchronize()
        assert torch.equal(host, device.cpu())

    def test_call_raises_and_clears(self):
        with pytest.raises(kvsig.CudaError) as caught:
            kvsig.call("cudaSetDevice", device=10_000)
        assert (caught.value.code, caught.value.name) == (101, "cudaErrorInvalidDevice")
        assert kvsig.call("cudaPeekAtLastError") == 0


class TestManagedMemory:
    def test_prefetch_and_advise_by_one_line_on_every_major(self):
        size = 1 << 20
        pointer = kvsig.call("cudaMallocManaged", size=size)
        try:
            ctypes.memset(pointer, 0x5A, size)
            for advice in ("cudaMemAdviseSetReadMostly", "cudaMemAdviseUnsetReadMostly"):
                kvsig.call("cudaMemAdvise", devPtr=pointer, count=size, advice=advice, device=0,
                           location={"type": "cudaMemLocationTypeDevice", "id": 0})  # fmt: skip
            kvsig.call("cudaMemPrefetchAsync", devPtr=pointer, count=size, dstDevice=0,
                       location={"type": "cudaMemLocationTypeDevice", "id": 0},
                       stream=torch.cuda.current_stream())  # fmt: skip
            device = torch.zeros(size, dtype=torch.uint8, device="cuda")
            places = np.array([pointer], np.uint64), np.array([device.data_ptr()], np.uint64)
            _core.copy_batch(places[1], places[0], size, 0)
            torch.cuda.synchronize()
            assert (device == 0x5A).all()
        finally:
            kvsig.call("cudaFree", devPtr=pointer)


@pytest.mark.parametrize("path", ["auto", "batch", "loop"])
@pytest.mark.parametrize("layout", ["page_first_direct", "layer_first"])
@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
class TestPagedKVCache:
    def test_round_trip_to_other_pages(self, model, layout, path):
        pages, moved, page_size = 24, 10, 16
        generator = torch.Generator().manual_seed(7)

        def layers():
            return [
                torch.randint(-(2**15), 2**15, (pages * page_size, model.heads, model.width),
                              dtype=torch.int16, generator=generator).cuda().view(torch.bfloat16)
                for _ in range(model.layers)
            ]  # fmt: skip

        groups = [layers() for _ in range(model.tensors)]
        shape = (
            (pages, model.layers, page_size, model.heads, model.width)
            if layout == "page_first_direct"
            else (model.layers, pages * page_size, model.heads, model.width)
        )
        pools = [torch.zeros(shape, dtype=torch.bfloat16).pin_memory() for _ in groups]
        single = len(groups) == 1
        cache = kvsig.PagedKVCache(
            device=groups[0] if single else tuple(groups),
            host=pools[0] if single else tuple(pools), layout=layout, page_size=page_size,
        )  # fmt: skip
        order = np.random.default_rng(1).permutation(pages)
        first, parked, second = order[:moved], order[::-1][:moved], order[moved : 2 * moved]
        before = [[layer.view(torch.int16).clone() for layer in group] for group in groups]
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            offloaded = cache.offload(first, parked, path=path)
            loaded = cache.load(parked, second, path=path)
            torch.cuda.current_stream().synchronize()
        for group, old in zip(groups, before, strict=True):
            for layer, was in zip(group, old, strict=True):
                expected = was.view(pages, page_size, -1).clone()
                expected[second] = expected[first]
                assert torch.equal(layer.view(torch.int16).view(pages, page_size, -1), expected)
        if path != "auto":
            assert offloaded.path == loaded.path == path
        assert offloaded.bytes == loaded.bytes == moved * page_size * model.token_bytes
