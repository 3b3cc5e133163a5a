"""Which memory is whose, and what is said of it."""

import ctypes

import numpy as np
import pytest
from raw_runtime import at, numbers, u64


class TestMemory:
    def attributes(self, runtime, pointer):
        out = (ctypes.c_int * 24)()
        assert runtime.call("cudaPointerGetAttributes", out, pointer) == 0
        return out[0], out[1]

    def test_pointers_tell_what_they_are(self, runtime):
        device = runtime.new("cudaMalloc", 64)
        managed = runtime.new("cudaMallocManaged", 64, 1)
        host = runtime.new("cudaHostAlloc", 64, 0)
        plain = numbers(8)
        assert self.attributes(runtime, device + 63) == (2, 0)
        assert self.attributes(runtime, managed) == (3, 0)
        assert self.attributes(runtime, host) == (1, 0)
        assert self.attributes(runtime, at(plain)) == (0, -2)
        runtime.call("cudaHostRegister", at(plain), 64, 0)
        assert self.attributes(runtime, at(plain)) == (1, 0)
        assert runtime.new("cudaHostGetDevicePointer", at(plain), 0) == at(plain)
        runtime.call("cudaHostUnregister", at(plain))
        runtime.control.mark_device(at(plain), 64)
        assert self.attributes(runtime, at(plain)) == (2, 0)
        runtime.control.unmark_device(at(plain))
        assert self.attributes(runtime, at(plain)) == (0, -2)
        for name, pointer in (("cudaFree", device), ("cudaFree", managed), ("cudaFreeHost", host)):
            assert runtime.call(name, pointer) == 0

    def test_free_memory_is_counted(self, runtime):
        def free():
            left, total = u64(), u64()
            runtime.call("cudaMemGetInfo", ctypes.byref(left), ctypes.byref(total))
            return left.value

        before = free()
        device = runtime.new("cudaMalloc", 1 << 20)
        assert free() == before - (1 << 20)
        runtime.call("cudaFree", device)
        assert free() == before

    def test_memory_freed_under_pending_work_stays_readable(self, runtime):
        device, dst, stream = runtime.new("cudaMalloc", 64), numbers(8), runtime.stream()
        ctypes.memset(device, 1, 64)
        runtime.control.hold(stream)
        runtime.copy(at(dst), device, 64, stream)
        assert runtime.call("cudaFree", device) == 0
        runtime.control.release(stream)
        runtime.call("cudaStreamSynchronize", stream)
        assert (dst == 0x0101010101010101).all()

    def test_reset_forgets_marks(self, runtime):
        plain = numbers(8)
        runtime.control.mark_device(at(plain), 64)
        with pytest.raises(RuntimeError, match="answered error 712"):
            runtime.control.mark_device(at(plain), 64)
        runtime.control.reset()
        assert self.attributes(runtime, at(plain))[0] == 0


MEMORY_TYPE, DEVICE_POINTER, HOST_POINTER, IS_MANAGED, ORDINAL = 2, 3, 4, 8, 9
RANGE_START, RANGE_SIZE, MAPPED = 11, 12, 13


class TestPointerAttribute:
    def ask(self, runtime, attribute, pointer):
        value = u64(0)
        code = runtime.call("cuPointerGetAttribute", ctypes.byref(value), attribute, pointer)
        return value.value if code == 0 else -code

    def test_what_the_runtime_allocated(self, runtime):
        device = runtime.new("cudaMalloc", 100)
        host = runtime.new("cudaHostAlloc", 200, 0)
        managed = runtime.new("cudaMallocManaged", 300, 1)
        for base, size, kind, has_host in (
            (device, 100, 2, False), (host, 200, 1, True), (managed, 300, 2, True),
        ):  # fmt: skip
            last = base + size - 1
            expected = {
                RANGE_START: base,
                RANGE_SIZE: size,
                MEMORY_TYPE: kind,
                ORDINAL: 0,
                MAPPED: 1,
                DEVICE_POINTER: last,
                HOST_POINTER: last if has_host else -1,
                IS_MANAGED: base == managed,
            }
            assert {what: self.ask(runtime, what, last) for what in expected} == expected
        for name, pointer in (("cudaFree", device), ("cudaFree", managed), ("cudaFreeHost", host)):
            runtime.call(name, pointer)
            assert self.ask(runtime, RANGE_START, pointer) == -1

    def test_unknown_memory_and_attributes_write_nothing(self, runtime):
        value, plain = u64(12345), numbers(8)
        for attribute, pointer in ((RANGE_START, at(plain)), (RANGE_START, 0), (999, at(plain))):
            asked = (ctypes.byref(value), attribute, pointer)
            assert runtime.call("cuPointerGetAttribute", *asked) == 1
        runtime.control.mark_device(at(plain), 64)
        assert runtime.call("cuPointerGetAttribute", ctypes.byref(value), 999, at(plain)) == 1
        assert value.value == 12345
        assert runtime.last_error() == 0

    def test_a_pool_registered_in_part_and_later(self, runtime):
        pool = numbers(96)
        chunks = [at(pool, 32 * i) for i in range(3)]
        assert runtime.call("cudaHostRegister", chunks[0], 256, 0) == 0
        assert [self.ask(runtime, RANGE_START, p) for p in chunks] == [chunks[0], -1, -1]
        assert runtime.call("cudaHostRegister", chunks[1], 256, 0) == 0
        assert self.ask(runtime, RANGE_START, chunks[1] + 255) == chunks[1]
        assert self.ask(runtime, MEMORY_TYPE, chunks[1]) == 1
        assert runtime.call("cudaHostUnregister", chunks[0]) == 0
        assert [self.ask(runtime, RANGE_SIZE, p) for p in chunks] == [-1, 256, -1]
        assert runtime.call("cudaHostUnregister", chunks[1]) == 0

    def test_marks_on_another_device(self, runtime):
        plain = numbers(8)
        runtime.control.mark_device(at(plain), 64, device=3)
        assert self.ask(runtime, ORDINAL, at(plain)) == 3
        for size, device in ((0, 0), (8, -1), (8, 16)):
            with pytest.raises(RuntimeError, match="answered error 1$"):
                runtime.control.mark_device(at(plain), size, device=device)


class TestSeams:
    @pytest.mark.parametrize("host", [False, True])
    def test_a_range_across_two_marks_is_refused(self, runtime, host):
        pool, dst, stream = numbers(64), np.zeros(64, np.uint64), runtime.stream()
        mark = runtime.control.mark_host if host else runtime.control.mark_device
        mark(at(pool), 256)
        mark(at(pool, 32), 128)  # and 16 numbers of which nothing is known
        for first, count, answer in (
            (0, 32, 0), (31, 2, 1), (32, 16, 0), (47, 2, 1), (48, 16, 0), (0, 64, 1),
        ):  # fmt: skip
            assert runtime.copy(at(dst), at(pool, first), 8 * count, stream) == answer
            assert runtime.copy(at(pool, first), at(dst), 8 * count, stream) == answer
            found, _ = runtime.batch([at(dst)], [at(pool, first)], [8 * count], stream)
            assert found == answer
        rows = (at(dst), 64, at(pool, 24), 64, 16, 2, 4, stream)
        assert runtime.call("cudaMemcpy2DAsync", *rows) == 1  # each row within one, evenly spaced
        runtime.call("cudaStreamSynchronize", stream)

    def test_a_range_that_runs_into_a_mark_is_refused(self, runtime):
        pool, dst, stream = numbers(64), np.zeros(64, np.uint64), runtime.stream()
        runtime.control.mark_host(at(pool, 32), 256)
        assert runtime.copy(at(dst), at(pool, 24), 64, stream) == 0
        assert runtime.copy(at(dst), at(pool, 24), 72, stream) == 1
        runtime.control.unmark(at(pool, 32))
        assert runtime.copy(at(dst), at(pool, 24), 72, stream) == 0
        runtime.call("cudaStreamSynchronize", stream)

    def test_direction_knows_marks(self, runtime):
        device, host, stream = numbers(8), numbers(8), runtime.stream()
        runtime.control.mark_device(at(device), 64)
        runtime.control.mark_host(at(host), 64)
        assert runtime.copy(at(device), at(host), 64, stream, kind=1) == 0
        assert runtime.copy(at(device), at(host), 64, stream, kind=2) == 1
        assert runtime.call("cudaHostUnregister", at(host)) == 0
        with pytest.raises(RuntimeError, match="answered error 713"):
            runtime.control.unmark(at(host))
        runtime.call("cudaStreamSynchronize", stream)
