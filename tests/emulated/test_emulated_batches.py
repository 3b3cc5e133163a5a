"""Batches answer, move and refuse as real ones were seen to."""

import ctypes

import numpy as np
import pytest
from raw_runtime import (
    ANY_ORDER,
    DURING_CALL,
    NONE,
    PER_THREAD,
    STREAM_ORDER,
    Attributes,
    at,
    i32,
    numbers,
    u64,
)


class TestBatch:
    def test_moves_every_copy(self, runtime):
        random = np.random.default_rng(1)
        src, dst = random.integers(0, 2**60, 4096, np.uint64), np.zeros(4096, np.uint64)
        order = random.permutation(256)
        dsts = [at(dst, 16 * i) for i in order]
        srcs = [at(src, 16 * i) for i in order[::-1]]
        stream = runtime.stream()
        code, fail = runtime.batch(dsts, srcs, [128] * 256, stream)
        assert code == 0 and fail in (None, NONE)
        runtime.call("cudaStreamSynchronize", stream)
        expected = np.zeros_like(src).reshape(256, 16)
        expected[order] = src.reshape(256, 16)[order[::-1]]
        assert (dst.reshape(256, 16) == expected).all()
        assert runtime.control.counter("batches") == 1
        assert runtime.control.counter("copies") == 256
        assert runtime.control.counter("bytes") == 256 * 128

    @pytest.mark.parametrize("stream", [0, 1])
    def test_legacy_stream_is_refused(self, runtime, stream):
        src, dst = numbers(1, 5), np.zeros(1, np.uint64)
        assert runtime.batch([at(dst)], [at(src)], [8], stream)[0] == 1
        runtime.call("cudaDeviceSynchronize")
        assert dst[0] == 0
        assert runtime.call("cudaPeekAtLastError") == 1
        assert runtime.last_error() == 1
        assert runtime.last_error() == 0

    def test_per_thread_handle_is_taken(self, runtime):
        src, dst = numbers(1, 5), np.zeros(1, np.uint64)
        assert runtime.batch([at(dst)], [at(src)], [8], PER_THREAD)[0] == 0
        runtime.call("cudaStreamSynchronize", PER_THREAD)
        assert dst[0] == 5

    @pytest.mark.parametrize(
        "change",
        [
            {"count": 0},
            {"attributes": ()},
            {"attributes": (0,)},
            {"attributes": (4,)},
            {"attributes": (1, 1, 1), "starts": (0, 1, 2)},
            {"attributes": (1, 1), "starts": (0, 0)},
            {"attributes": (1, 1), "starts": (0, 2)},
            {"attributes": (1,), "starts": (1,)},
        ],
        ids=str,
    )
    def test_bad_lists_are_refused_whole(self, runtime, change):
        src, dst = numbers(2, 5), np.zeros(2, np.uint64)
        stream = runtime.stream()
        code, fail = runtime.batch(
            [at(dst), at(dst, 1)], [at(src), at(src, 1)], [8, 8], stream, **change
        )
        assert code == 1 and fail in (None, NONE)
        runtime.call("cudaStreamSynchronize", stream)
        assert not dst.any()

    @pytest.mark.parametrize("what", ["dst", "src", "size"])
    def test_copies_before_a_bad_one_are_made(self, runtime, what):
        src, dst, stream = numbers(10, 1), np.zeros(10, np.uint64), runtime.stream()
        lists = {
            "dst": [at(dst, i) for i in range(10)],
            "src": [at(src, i) for i in range(10)],
            "size": [8] * 10,
        }
        lists[what][5] = 0
        code, fail = runtime.batch(*lists.values(), stream)
        assert code == 1 and fail in (None, 5)
        runtime.call("cudaStreamSynchronize", stream)
        assert dst.tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 0, 0]

    def test_captured_stream_is_refused_and_nothing_recorded(self, runtime):
        src, dst, stream = numbers(1, 5), np.zeros(1, np.uint64), runtime.stream()
        assert runtime.call("cudaStreamBeginCapture", stream, 0) == 0
        assert runtime.batch([at(dst)], [at(src)], [8], stream)[0] == 900
        status = i32()
        assert runtime.call("cudaStreamIsCapturing", stream, ctypes.byref(status)) == 0
        assert status.value == 1
        graph = runtime.new("cudaStreamEndCapture", before=[stream])
        executable = runtime.new("cudaGraphInstantiate", graph, 0)
        assert runtime.call("cudaGraphLaunch", executable, stream) == 0
        runtime.call("cudaStreamSynchronize", stream)
        assert dst[0] == 0

    def test_inside_a_batch_there_is_no_order(self, runtime):
        a, b, c = numbers(1, 5), np.zeros(1, np.uint64), np.zeros(1, np.uint64)
        stream = runtime.stream()
        runtime.batch([at(b), at(c)], [at(a), at(b)], [8, 8], stream)
        runtime.call("cudaStreamSynchronize", stream)
        assert (b[0], c[0]) == (5, 0)

    def test_batches_are_in_stream_order(self, runtime):
        a, b, c = numbers(1, 5), np.zeros(1, np.uint64), np.zeros(1, np.uint64)
        stream = runtime.stream()
        runtime.batch([at(b)], [at(a)], [8], stream)
        runtime.batch([at(c)], [at(b)], [8], stream)
        runtime.call("cudaStreamSynchronize", stream)
        assert c[0] == 5

    def test_access_order_says_when_a_source_is_read(self, runtime):
        src, dst, stream = numbers(4, 1), np.zeros(4, np.uint64), runtime.stream()
        runtime.control.hold(stream)
        code, _ = runtime.batch(
            [at(dst, i) for i in range(4)],
            [at(src, i) for i in range(4)],
            [8] * 4,
            stream,
            attributes=(STREAM_ORDER, DURING_CALL, ANY_ORDER),
            starts=(0, 1, 3),
        )
        assert code == 0
        src += 100
        runtime.control.release(stream)
        runtime.call("cudaStreamSynchronize", stream)
        assert dst.tolist() == [101, 2, 3, 4]

    def test_range_across_two_registered_blocks_is_refused(self, runtime):
        pool, dst, stream = numbers(64), np.zeros(64, np.uint64), runtime.stream()
        for half in (0, 32):
            assert runtime.call("cudaHostRegister", at(pool, half), 256, 0) == 0
        assert runtime.call("cudaHostRegister", at(pool, 16), 256, 0) == 712
        code, fail = runtime.batch(
            [at(dst), at(dst, 8)], [at(pool), at(pool, 28)], [64, 64], stream
        )
        assert code == 1 and fail in (None, 1)
        assert runtime.copy(at(dst), at(pool, 28), 64, stream) == 1
        rows = (at(dst), 64, at(pool, 24), 64, 16, 2, 4, stream)
        assert runtime.call("cudaMemcpy2DAsync", *rows) == 1
        assert runtime.copy(at(dst), at(pool, 24), 64, stream) == 0
        runtime.call("cudaStreamSynchronize", stream)
        for half in (0, 32):
            assert runtime.call("cudaHostUnregister", at(pool, half)) == 0
        assert runtime.call("cudaHostUnregister", at(pool)) == 713
        assert runtime.copy(at(dst), at(pool, 28), 64, stream) == 0

    def test_driver_entry_point_by_version(self, runtime):
        symbol = ctypes.create_string_buffer(b"cuMemcpyBatchAsync")
        function, status = u64(), i32(-1)
        arguments = (symbol, ctypes.byref(function), i32(12080), 0, ctypes.byref(status))
        assert runtime.lib.cuGetProcAddress_v2(*arguments) == 0
        assert status.value == 0
        src, dst, stream = numbers(2, 5), np.zeros(2, np.uint64), runtime.stream()
        lists = [np.array(a, np.uint64) for a in ([at(dst), at(dst, 1)], [at(src), 0], [8, 8])]
        attributes, starts, fail = Attributes(STREAM_ORDER), u64(0), u64()
        call = ctypes.CFUNCTYPE(i32, *[u64] * 9)(function.value)
        pointers = [a.ctypes.data for a in lists]
        code = call(
            *pointers,
            2,
            ctypes.addressof(attributes),
            ctypes.addressof(starts),
            1,
            ctypes.addressof(fail),
            stream,
        )
        assert (code, fail.value) == (1, 1)
        assert runtime.last_error() == 0  # the driver's errors are not the runtime's
        runtime.call("cudaStreamSynchronize", stream)
        assert dst.tolist() == [5, 0]
        arguments = (symbol, ctypes.byref(function), i32(12000), 0, ctypes.byref(status))
        assert runtime.lib.cuGetProcAddress_v2(*arguments) == 500
        assert (function.value, status.value) == (0, 2)
        symbol = ctypes.create_string_buffer(b"cuNoSuchThing")
        arguments = (symbol, ctypes.byref(function), i32(12080), 0, ctypes.byref(status))
        assert runtime.lib.cuGetProcAddress_v2(*arguments) == 500
        assert (function.value, status.value) == (0, 1)
