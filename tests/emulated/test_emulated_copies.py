"""Single copies, strided copies and what else is done to memory."""

import ctypes
import time

import numpy as np
import pytest
from raw_runtime import (
    ANY_ORDER,
    LEGACY,
    NONE,
    STREAM_ORDER,
    Attributes,
    BatchOp,
    Location,
    Operand,
    at,
    i32,
    numbers,
    u64,
)


class TestCopies:
    def test_strided_copy(self, runtime):
        src, dst, stream = numbers(64), np.zeros(64, np.uint64), runtime.stream()
        rows = (at(dst, 1), 128, at(src, 2), 64, 24, 4, 4, stream)
        assert runtime.call("cudaMemcpy2DAsync", *rows) == 0
        runtime.call("cudaStreamSynchronize", stream)
        expected = np.zeros((4, 16), np.uint64)
        expected[:, 1:4] = src.reshape(8, 8)[:4, 2:5]
        assert (dst.reshape(4, 16) == expected).all()

    @pytest.mark.parametrize(
        ("dpitch", "spitch", "width", "height", "kind", "answer"),
        [
            (8, 16, 16, 2, 4, 12),
            (16, 8, 16, 2, 4, 12),
            (2**31, 16, 16, 2, 4, 12),
            (16, 16, 16, 2, 5, 21),
            (8, 8, 0, 2, 4, 0),
            (8, 8, 16, 0, 4, 0),
        ],
    )
    def test_strided_arguments(self, runtime, dpitch, spitch, width, height, kind, answer):
        src, dst, stream = numbers(64), np.zeros(64, np.uint64), runtime.stream()
        rows = (at(dst), dpitch, at(src), spitch, width, height, kind, stream)
        assert runtime.call("cudaMemcpy2DAsync", *rows) == answer
        runtime.call("cudaStreamSynchronize", stream)
        assert not dst.any()

    def test_plain_arguments(self, runtime):
        a, stream = numbers(8), runtime.stream()
        assert runtime.copy(0, at(a), 8, stream) == 1
        assert runtime.copy(at(a), 0, 8, stream) == 1
        assert runtime.copy(0, 0, 0, stream) == 0
        assert runtime.copy(at(a), at(a, 4), 8, stream, kind=5) == 21
        assert runtime.copy(at(a), at(a, 4), 8, at(a)) == 400

    def test_tracked_memory_must_be_where_the_kind_says(self, runtime):
        device = runtime.new("cudaMalloc", 64)
        host = runtime.new("cudaHostAlloc", 64, 0)
        plain, stream = numbers(8), runtime.stream()
        assert runtime.copy(device, host, 64, stream, kind=1) == 0
        assert runtime.copy(host, device, 64, stream, kind=1) == 1
        assert runtime.copy(host, device, 64, stream, kind=2) == 0
        assert runtime.copy(device, host, 64, stream, kind=2) == 1
        assert runtime.copy(device, at(plain), 64, stream, kind=1) == 0
        assert runtime.copy(device, host, 65, stream) == 1
        runtime.call("cudaStreamSynchronize", stream)
        assert runtime.call("cudaFree", device) == 0
        assert runtime.call("cudaFreeHost", host) == 0
        assert runtime.call("cudaFree", device) == 1

    def test_memset(self, runtime):
        dst, stream = numbers(4), runtime.stream()
        assert runtime.call("cudaMemsetAsync", at(dst), 0x1FF, 16, stream) == 0
        runtime.call("cudaStreamSynchronize", stream)
        assert dst.tolist() == [NONE, NONE, 2, 3]

    def test_3d_batch(self, runtime):
        src, dst, stream = numbers(64), np.zeros(64, np.uint64), runtime.stream()
        op = BatchOp(
            Operand(1, at(src), 32, 4), Operand(1, at(dst), 0, 0), (u64 * 3)(16, 2, 2), STREAM_ORDER
        )
        bad = BatchOp(Operand(1, 0), Operand(1, at(dst)), (u64 * 3)(8, 1, 1), STREAM_ORDER)
        ops, fail = (BatchOp * 2)(op, bad), u64()
        arguments = [2, ctypes.addressof(ops)]
        if runtime.version < 13000:
            arguments.append(ctypes.addressof(fail))
        assert runtime.call("cudaMemcpy3DBatchAsync", *arguments, 0, LEGACY) == 1
        assert runtime.call("cudaMemcpy3DBatchAsync", *arguments, 0, stream) == 1
        assert fail.value == (1 if runtime.version < 13000 else 0)
        runtime.call("cudaStreamSynchronize", stream)
        assert dst[:9].tolist() == [0, 1, 4, 5, 16, 17, 20, 21, 0]

    def test_copy_with_attributes(self, latest):
        src, dst, stream = numbers(2, 1), np.zeros(2, np.uint64), latest.stream()
        latest.control.hold(stream)
        for i, order in enumerate((STREAM_ORDER, ANY_ORDER)):
            attributes = ctypes.addressof(keep := Attributes(order))
            arguments = (at(dst, i), at(src, i), 8, attributes, stream)
            assert latest.call("cudaMemcpyWithAttributesAsync", *arguments) == 0
            assert keep.srcAccessOrder == order
        src += 100
        latest.control.release(stream)
        latest.call("cudaStreamSynchronize", stream)
        assert dst.tolist() == [101, 2]

    def test_prefetch_and_advice_are_taken(self, runtime):
        a, stream = numbers(8), runtime.stream()
        where = [i32(0)] if runtime.version < 13000 else [Location(1, 0)]
        assert runtime.call("cudaMemAdvise", at(a), 64, i32(1), *where) == 0
        flags = [] if runtime.version < 13000 else [i32(0)]
        assert runtime.call("cudaMemPrefetchAsync", at(a), 64, *where, *flags, stream) == 0
        assert runtime.call("cudaStreamSynchronize", stream) == 0

    def test_many_copies_are_cheap(self, runtime):
        count, stream = 1 << 20, runtime.stream()
        src, dst = numbers(count), np.zeros(count, np.uint64)
        dsts, srcs = at(dst) + 8 * numbers(count), at(src) + 8 * numbers(count)
        began = time.monotonic()
        for i in range(0, count, 256):
            part = slice(i, i + 256)
            assert runtime.batch(dsts[part], srcs[part], [8] * 256, stream)[0] == 0
        runtime.call("cudaStreamSynchronize", stream)
        assert (dst == src).all()
        assert time.monotonic() - began < 10
