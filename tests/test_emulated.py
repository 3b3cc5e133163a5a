"""The emulated runtime answers as real ones were seen to answer, and runs work in stream order."""

import ctypes
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from future import AFTER_TEXT, NEXT, NEXT_TEXT

from kvsig import emulated, registry

u64, i32 = ctypes.c_uint64, ctypes.c_int
STREAM_ORDER, DURING_CALL, ANY_ORDER = 1, 2, 3
LEGACY, PER_THREAD = 0, 2
NONE = 2**64 - 1


class Location(ctypes.Structure):
    _fields_ = [("type", i32), ("id", i32)]


class Attributes(ctypes.Structure):
    _fields_ = [
        ("srcAccessOrder", i32),
        ("srcLocHint", Location),
        ("dstLocHint", Location),
        ("flags", ctypes.c_uint),
    ]


class Operand(ctypes.Structure):
    _fields_ = [
        ("type", i32),
        ("ptr", u64),
        ("rowLength", u64),
        ("layerHeight", u64),
        ("locHint", Location),
    ]


class BatchOp(ctypes.Structure):
    _fields_ = [
        ("src", Operand),
        ("dst", Operand),
        ("extent", u64 * 3),
        ("srcAccessOrder", i32),
        ("flags", ctypes.c_uint),
    ]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Compile emulated runtimes by version, each once."""
    folder = tmp_path_factory.mktemp("emulated")
    entries = registry.load()
    libraries = {}

    def get(version):
        if version not in libraries:
            libraries[version] = emulated.build(entries, version, folder)
        return libraries[version]

    return get


class Runtime:
    """Calls the exported functions through ctypes, each argument as wide as its parameter."""

    def __init__(self, path, version):
        self.version = version
        self.control = emulated.Control(path)
        self.control.set_version(version)
        self.control.reset()
        self.lib = self.control.library

    def call(self, name, *arguments):
        converted = [u64(a) if isinstance(a, int) else a for a in arguments]
        return getattr(self.lib, name)(*converted)

    def new(self, name, *arguments, before=()):
        out = u64()
        assert self.call(name, *before, ctypes.byref(out), *arguments) == 0
        return out.value

    def stream(self, blocking=False):
        return self.new("cudaStreamCreateWithFlags", 0 if blocking else 1)

    def event(self):
        return self.new("cudaEventCreateWithFlags", 0)

    def copy(self, dst, src, size, stream, kind=4):
        return self.call("cudaMemcpyAsync", dst, src, size, kind, stream)

    def batch(self, dsts, srcs, sizes, stream, attributes=(STREAM_ORDER,), starts=(0,), **given):
        """Return the answer and, where the variant has it, failIdx."""
        arrays = [np.array(a, dtype=np.uint64) for a in (dsts, srcs, sizes)]
        count = given.get("count", len(arrays[0]))
        values = (Attributes * max(len(attributes), 1))(*[Attributes(a) for a in attributes])
        indices = np.array(list(starts) or [0], dtype=np.uint64)
        fail = u64(12345)
        arguments = [a.ctypes.data for a in arrays] + [count, ctypes.addressof(values)]
        arguments += [indices.ctypes.data, len(attributes)]
        if self.version < 13000:
            arguments.append(ctypes.addressof(fail))
        code = self.call("cudaMemcpyBatchAsync", *arguments, stream)
        return code, fail.value if self.version < 13000 else None

    def last_error(self):
        return self.call("cudaGetLastError")


@pytest.fixture(params=[12080, 13000], ids=["12.8", "13.0"])
def runtime(request, built):
    """A runtime of each form of the batch call."""
    runtime = Runtime(built(request.param), request.param)
    yield runtime
    runtime.control.reset()


@pytest.fixture
def latest(built):
    """The newest runtime whose prototypes are all known."""
    runtime = Runtime(built(13020), 13020)
    yield runtime
    runtime.control.reset()


def numbers(count, start=0):
    return np.arange(start, start + count, dtype=np.uint64)


def at(array, index=0):
    return array.ctypes.data + int(index) * array.itemsize


class TestStreamOrder:
    def test_copy_reads_its_source_when_its_turn_comes(self, runtime):
        stream, src, dst = runtime.stream(), numbers(8), np.zeros(8, np.uint64)
        runtime.control.hold(stream)
        assert runtime.copy(at(dst), at(src), src.nbytes, stream) == 0
        assert runtime.control.pending(stream) == 1
        assert runtime.call("cudaStreamQuery", stream) == 600
        src += 100
        assert not dst.any()
        runtime.control.release(stream)
        assert runtime.call("cudaStreamSynchronize", stream) == 0
        assert (dst == numbers(8, 100)).all()
        assert runtime.call("cudaStreamQuery", stream) == 0
        assert runtime.control.pending(stream) == 0

    def test_operations_of_a_stream_run_in_order(self, runtime):
        stream, a, b, c = runtime.stream(), numbers(64), np.zeros(64, np.uint64), numbers(64, 7)
        for _ in range(51):  # an odd number of swaps
            runtime.copy(at(b), at(a), a.nbytes, stream)
            runtime.copy(at(a), at(c), a.nbytes, stream)
            runtime.copy(at(c), at(b), a.nbytes, stream)
        runtime.call("cudaStreamSynchronize", stream)
        assert (a == numbers(64, 7)).all() and (c == numbers(64)).all()

    def test_streams_do_not_wait_for_each_other(self, runtime):
        held, free, dst = runtime.stream(), runtime.stream(), np.zeros(2, np.uint64)
        src = numbers(2, 1)
        runtime.control.hold(held)
        runtime.copy(at(dst, 0), at(src, 0), 8, held)
        runtime.copy(at(dst, 1), at(src, 1), 8, free)
        assert runtime.call("cudaStreamSynchronize", free) == 0
        assert dst.tolist() == [0, 2]

    def test_event_orders_two_streams(self, runtime):
        first, second, event = runtime.stream(), runtime.stream(), runtime.event()
        a, b, c = numbers(4, 1), np.zeros(4, np.uint64), np.zeros(4, np.uint64)
        runtime.control.hold(first)
        runtime.copy(at(b), at(a), a.nbytes, first)
        assert runtime.call("cudaEventRecord", event, first) == 0
        assert runtime.call("cudaStreamWaitEvent", second, event, 0) == 0
        runtime.copy(at(c), at(b), a.nbytes, second)
        assert runtime.call("cudaEventQuery", event) == 600
        time.sleep(0.02)
        assert not c.any()
        runtime.control.release(first)
        assert runtime.call("cudaStreamSynchronize", second) == 0
        assert (c == a).all()
        assert runtime.call("cudaEventQuery", event) == 0
        assert runtime.call("cudaEventSynchronize", event) == 0

    def test_events_measure_time_and_refuse_where_they_did_not(self, runtime):
        stream, start, end = runtime.stream(), runtime.event(), runtime.event()
        ms = ctypes.c_float(-1)
        elapsed = (ctypes.byref(ms), start, end)
        assert runtime.call("cudaEventElapsedTime", *elapsed) == 400
        runtime.call("cudaEventRecord", start, stream)
        runtime.control.hold(stream)
        runtime.call("cudaEventRecord", end, stream)
        assert runtime.call("cudaEventElapsedTime", *elapsed) == 600
        runtime.control.release(stream)
        runtime.call("cudaEventSynchronize", end)
        assert runtime.call("cudaEventElapsedTime", *elapsed) == 0
        assert ms.value >= 0
        assert runtime.call("cudaEventDestroy", start) == 0
        assert runtime.call("cudaEventQuery", end) == 0

    def test_legacy_stream_waits_for_blocking_streams_only(self, runtime):
        blocking, other = runtime.stream(blocking=True), runtime.stream()
        src, dst = numbers(3, 1), np.zeros(3, np.uint64)
        runtime.control.hold(blocking)
        runtime.control.hold(other)
        runtime.copy(at(dst, 0), at(src, 0), 8, blocking)
        runtime.copy(at(dst, 1), at(src, 1), 8, other)
        runtime.copy(at(dst, 2), at(src, 2), 8, LEGACY)
        assert runtime.call("cudaStreamQuery", LEGACY) == 600
        time.sleep(0.02)
        assert not dst.any()
        runtime.control.release(blocking)
        assert runtime.call("cudaStreamSynchronize", LEGACY) == 0
        assert dst.tolist() == [1, 0, 3]

    def test_blocking_stream_waits_for_the_legacy_stream(self, runtime):
        blocking, other = runtime.stream(blocking=True), runtime.stream()
        src, dst = numbers(3, 1), np.zeros(3, np.uint64)
        runtime.control.hold(LEGACY)
        for i, stream in enumerate((1, blocking, other)):
            runtime.copy(at(dst, i), at(src, i), 8, stream)
        runtime.call("cudaStreamSynchronize", other)
        assert runtime.call("cudaStreamQuery", blocking) == 600
        assert dst.tolist() == [0, 0, 3]
        runtime.control.release(LEGACY)
        assert runtime.call("cudaStreamSynchronize", blocking) == 0
        assert dst.tolist() == [1, 2, 3]

    def test_synchronizing_legacy_waits_for_blocking_streams(self, runtime):
        blocking, src, dst = runtime.stream(blocking=True), numbers(1, 9), np.zeros(1, np.uint64)
        runtime.control.hold(blocking)
        runtime.copy(at(dst), at(src), 8, blocking)
        threading.Timer(0.02, runtime.control.release, [blocking]).start()
        assert runtime.call("cudaStreamSynchronize", LEGACY) == 0
        assert dst[0] == 9

    def test_per_thread_handle_is_a_queue_per_thread(self, runtime):
        src, dst = numbers(2, 1), np.zeros(2, np.uint64)
        runtime.control.hold(PER_THREAD)
        runtime.copy(at(dst, 0), at(src, 0), 8, PER_THREAD)
        seen = []

        def elsewhere():
            runtime.copy(at(dst, 1), at(src, 1), 8, PER_THREAD)
            runtime.call("cudaStreamSynchronize", PER_THREAD)
            seen.append(dst.tolist())

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert seen == [[0, 2]]
        runtime.control.release(PER_THREAD)
        assert runtime.call("cudaStreamSynchronize", PER_THREAD) == 0
        assert dst.tolist() == [1, 2]

    def test_device_synchronize_waits_for_all(self, runtime):
        src, dst = numbers(4, 1), np.zeros(4, np.uint64)
        for i in range(4):
            runtime.copy(at(dst, i), at(src, i), 8, runtime.stream())
        assert runtime.call("cudaDeviceSynchronize") == 0
        assert (dst == src).all()

    def test_destroyed_stream_finishes_its_work_and_is_no_handle_any_more(self, runtime):
        stream, event = runtime.stream(), runtime.event()
        src, dst = numbers(4, 1), np.zeros(4, np.uint64)
        runtime.control.hold(stream)
        runtime.copy(at(dst), at(src), 32, stream)
        runtime.call("cudaEventRecord", event, stream)
        assert runtime.call("cudaStreamDestroy", stream) == 0
        assert runtime.call("cudaStreamQuery", stream) == 400
        assert runtime.copy(at(dst), at(src), 32, stream) == 400
        runtime.control.reset()
        assert runtime.call("cudaEventSynchronize", event) == 0
        assert (dst == src).all()
        assert runtime.call("cudaStreamDestroy", LEGACY) == 400

    def test_many_threads_on_many_streams(self, runtime):
        rounds, src = 200, numbers(8, 1)
        results = [np.zeros(8 * rounds, np.uint64) for _ in range(4)]

        def work(dst):
            stream = runtime.stream()
            for i in range(rounds):
                runtime.copy(at(dst, 8 * i), at(src), 64, stream)
            runtime.call("cudaStreamSynchronize", stream)
            runtime.call("cudaStreamDestroy", stream)

        threads = [threading.Thread(target=work, args=[dst]) for dst in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all((dst.reshape(rounds, 8) == src).all() for dst in results)


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


class TestCapture:
    def test_copies_land_in_the_graph_and_replay(self, runtime):
        a, b, c, stream = numbers(4, 1), np.zeros(4, np.uint64), np.zeros(4, np.uint64), None
        stream = runtime.stream()
        assert runtime.call("cudaStreamBeginCapture", stream, 0) == 0
        assert runtime.copy(at(b), at(a), 32, stream) == 0
        assert runtime.call("cudaMemcpy2DAsync", at(c), 16, at(b), 16, 8, 2, 4, stream) == 0
        graph = runtime.new("cudaStreamEndCapture", before=[stream])
        runtime.call("cudaStreamSynchronize", stream)
        assert not b.any()
        edges = u64()
        extra = [0] if runtime.version >= 13000 else []
        assert runtime.call("cudaGraphGetEdges", graph, 0, 0, *extra, ctypes.addressof(edges)) == 0
        assert edges.value == 1
        executable = runtime.new("cudaGraphInstantiate", graph, 0)
        assert runtime.call("cudaGraphDestroy", graph) == 0
        for start in (1, 50):
            a[:] = numbers(4, start)
            assert runtime.call("cudaGraphLaunch", executable, stream) == 0
            runtime.call("cudaStreamSynchronize", stream)
            assert (b == a).all() and c.tolist() == [start, 0, start + 2, 0]
        assert runtime.call("cudaGraphExecDestroy", executable) == 0
        assert runtime.call("cudaGraphLaunch", 0, stream) == 1

    def test_capture_info_in_each_form(self, built):
        for version, name, extra in (
            (11080, "cudaStreamGetCaptureInfo", 0),
            (12080, "cudaStreamGetCaptureInfo_v2", 3),
            (13000, "cudaStreamGetCaptureInfo", 4),
        ):
            runtime = Runtime(built(version), version)
            stream, status, number = runtime.stream(), i32(7), u64()
            rest = [u64(77) for _ in range(extra)]
            pointers = [ctypes.addressof(out) for out in (status, number, *rest)]
            assert runtime.call(name, stream, *pointers) == 0
            assert status.value == 0
            runtime.call("cudaStreamBeginCapture", stream, 0)
            assert runtime.call(name, stream, *pointers) == 0
            assert status.value == 1 and number.value > 0
            if rest:
                assert rest[-1].value == 0
            runtime.control.reset()

    def test_waiting_for_a_captured_stream_loses_the_capture(self, runtime):
        stream, status, graph = runtime.stream(), i32(), u64()
        runtime.call("cudaStreamBeginCapture", stream, 0)
        assert runtime.call("cudaStreamSynchronize", stream) == 900
        runtime.call("cudaStreamIsCapturing", stream, ctypes.byref(status))
        assert status.value == 2
        assert runtime.copy(4096, 4096, 8, stream) == 901
        assert runtime.call("cudaStreamEndCapture", stream, ctypes.byref(graph)) == 901
        assert graph.value == 0
        assert runtime.call("cudaStreamSynchronize", stream) == 0

    def test_capture_spans_streams_that_events_join(self, runtime):
        first, second = runtime.stream(), runtime.stream()
        fork, join = runtime.event(), runtime.event()
        a, b = numbers(2, 1), np.zeros(2, np.uint64)
        runtime.call("cudaStreamBeginCapture", first, 0)
        runtime.copy(at(b, 0), at(a, 0), 8, first)
        runtime.call("cudaEventRecord", fork, first)
        assert runtime.call("cudaStreamWaitEvent", second, fork, 0) == 0
        runtime.copy(at(b, 1), at(a, 1), 8, second)
        runtime.call("cudaEventRecord", join, second)
        assert runtime.call("cudaStreamWaitEvent", first, join, 0) == 0
        assert runtime.call("cudaEventQuery", join) == 907
        graph = runtime.new("cudaStreamEndCapture", before=[first])
        executable = runtime.new("cudaGraphInstantiate", graph, 0)
        runtime.call("cudaGraphLaunch", executable, first)
        runtime.call("cudaStreamSynchronize", first)
        assert (a == b).all()

    def test_capture_refuses_what_would_break_it(self, runtime):
        first, second, fork, graph = runtime.stream(), runtime.stream(), runtime.event(), u64()
        a = numbers(2)

        def begin():
            assert runtime.call("cudaStreamBeginCapture", first, 0) == 0

        def end():
            return runtime.call("cudaStreamEndCapture", first, ctypes.byref(graph))

        begin()
        runtime.call("cudaEventRecord", fork, first)
        runtime.call("cudaStreamWaitEvent", second, fork, 0)
        runtime.copy(at(a), at(a, 1), 8, second)
        assert end() == 904
        runtime.call("cudaEventRecord", fork, second)
        begin()
        assert runtime.call("cudaStreamWaitEvent", first, fork, 0) == 905
        assert end() == 901
        begin()
        assert runtime.call("cudaMalloc", ctypes.byref(graph), 8) == 900
        assert end() == 901
        assert end() == 401
        assert runtime.call("cudaStreamBeginCapture", LEGACY, 0) == 900

    def test_legacy_stream_and_captured_blocking_stream_exclude_each_other(self, runtime):
        blocking, status, graph, a = runtime.stream(blocking=True), i32(), u64(), numbers(2)
        runtime.call("cudaStreamBeginCapture", blocking, 2)
        assert runtime.call("cudaStreamIsCapturing", LEGACY, ctypes.byref(status)) == 906
        assert runtime.copy(at(a), at(a, 1), 8, LEGACY) == 906
        assert runtime.call("cudaStreamEndCapture", blocking, ctypes.byref(graph)) == 901
        assert runtime.call("cudaStreamIsCapturing", LEGACY, ctypes.byref(status)) == 0


class TestQueries:
    def test_versions(self, runtime):
        value = i32()
        runtime.control.set_version("12.9", "13.0")
        assert runtime.call("cudaRuntimeGetVersion", ctypes.byref(value)) == 0
        assert value.value == 12090
        assert runtime.call("cudaDriverGetVersion", ctypes.byref(value)) == 0
        assert value.value == 13000

    def test_no_driver_answers_35_to_all_but_versions_and_errors(self, runtime):
        value = i32(7)
        runtime.control.set_version(runtime.version, 0)
        assert runtime.call("cudaRuntimeGetVersion", ctypes.byref(value)) == 0
        assert value.value == runtime.version
        assert runtime.call("cudaDriverGetVersion", ctypes.byref(value)) == 0
        assert value.value == 0
        assert runtime.call("cudaGetDeviceCount", ctypes.byref(value)) == 35
        assert runtime.last_error() == 35

    def test_devices(self, runtime):
        value = i32()
        runtime.control.set_devices(2)
        assert runtime.call("cudaGetDeviceCount", ctypes.byref(value)) == 0
        assert value.value == 2
        assert runtime.call("cudaSetDevice", 1) == 0
        assert runtime.call("cudaGetDevice", ctypes.byref(value)) == 0
        assert value.value == 1
        assert runtime.call("cudaSetDevice", 2) == 101
        runtime.control.reset()
        assert runtime.call("cudaGetDevice", ctypes.byref(value)) == 0
        assert value.value == 0
        runtime.control.set_devices(0)
        assert runtime.call("cudaGetDeviceCount", ctypes.byref(value)) == 100

    def test_attributes(self, runtime):
        value = i32()
        answers = {11: 2147483647, 75: 9, 76: 0, 91: 1}
        runtime.control.set_attribute(91, 0)
        answers[91] = 0
        for attribute, answer in answers.items():
            runtime.call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
            assert value.value == answer
        arguments = (ctypes.byref(value), 11, 1)
        assert runtime.call("cudaDeviceGetAttribute", *arguments) == 101

    @pytest.mark.parametrize(
        ("code", "name", "text"),
        [
            (0, "cudaSuccess", "no error"),
            (1, "cudaErrorInvalidValue", "invalid argument"),
            (801, "cudaErrorNotSupported", "operation not supported"),
            (4711, "unrecognized error code", "unrecognized error code"),
        ],
    )
    def test_error_names(self, runtime, code, name, text):
        for function, expected in (("cudaGetErrorName", name), ("cudaGetErrorString", text)):
            call = getattr(runtime.lib, function)
            call.restype = ctypes.c_char_p
            assert call(code).decode() == expected

    def test_last_error_is_per_thread(self, runtime):
        runtime.call("cudaSetDevice", 99)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(runtime.last_error()))
        thread.start()
        thread.join()
        assert seen == [0]
        assert runtime.last_error() == 101


class TestOrders:
    def test_fault_strikes_the_nth_call_once(self, runtime):
        runtime.control.fault("cudaDeviceSynchronize", 719, nth=2)
        answers = [runtime.call("cudaDeviceSynchronize") for _ in range(4)]
        assert answers == [0, 719, 0, 0]
        assert runtime.last_error() == 719

    def test_fault_of_every_call(self, runtime):
        runtime.control.fault("cudaRuntimeGetVersion", 3, nth=0)
        assert [runtime.call("cudaRuntimeGetVersion", 0) for _ in range(3)] == [3, 3, 3]
        runtime.control.reset()
        assert runtime.call("cudaRuntimeGetVersion", 0) == 1

    def test_fault_inside_a_batch(self, runtime):
        src, dst, stream = numbers(4, 1), np.zeros(4, np.uint64), runtime.stream()
        runtime.control.fault("cudaMemcpyBatchAsync", 801, nth=1, fail_index=2)
        lists = [at(dst, i) for i in range(4)], [at(src, i) for i in range(4)], [8] * 4
        code, fail = runtime.batch(*lists, stream)
        assert code == 801 and fail in (None, 2)
        runtime.call("cudaStreamSynchronize", stream)
        assert dst.tolist() == [1, 2, 0, 0]
        assert runtime.batch(*lists, stream)[0] == 0
        runtime.call("cudaStreamSynchronize", stream)
        assert dst.tolist() == [1, 2, 3, 4]

    def test_fault_of_a_whole_batch_moves_nothing(self, runtime):
        src, dst, stream = numbers(1, 1), np.zeros(1, np.uint64), runtime.stream()
        runtime.control.fault("cudaMemcpyBatchAsync", 36)
        assert runtime.batch([at(dst)], [at(src)], [8], stream)[0] == 36
        runtime.call("cudaStreamSynchronize", stream)
        assert dst[0] == 0

    def test_stub_takes_any_argument(self, runtime):
        runtime.control.stub("cudaMemcpyAsync")
        runtime.control.record()
        assert runtime.copy(1, 2, 3, 4, kind=9) == 0
        (call,) = runtime.control.calls("cudaMemcpyAsync")
        assert [a["value"] for a in call["arguments"]] == [1, 2, 3, 9, 4]
        runtime.control.stub("cudaMemcpyAsync", on=False)
        assert runtime.copy(1, 2, 3, 4, kind=9) == 21

    def test_delay_keeps_the_caller(self, runtime):
        src, dst = numbers(1, 1), np.zeros(1, np.uint64)

        def took():
            begin = time.perf_counter()
            assert runtime.copy(at(dst), at(src), 8, runtime.stream()) == 0
            return time.perf_counter() - begin

        runtime.control.delay("cudaMemcpyAsync", 300_000)
        runtime.control.delay("cudaMemcpyBatchAsync", 10_000_000)
        assert 0.3 <= took() < 5
        runtime.control.delay("cudaMemcpyAsync", 0)
        assert took() < 0.3
        runtime.control.delay("cudaMemcpyAsync", 10_000_000)
        runtime.control.reset()
        assert took() < 5
        with pytest.raises(ValueError, match="microseconds must be at least 0, not -1"):
            runtime.control.delay("cudaMemcpyAsync", -1)

    def test_record_names_every_argument(self, runtime):
        src, dst, stream = numbers(2, 1), np.zeros(2, np.uint64), runtime.stream()
        runtime.control.record()
        lists = [at(dst), at(dst, 1)], [at(src), at(src, 1)], [8, 8]
        runtime.batch(*lists, stream)
        (call,) = runtime.control.calls()
        assert call["function"] == call["symbol"] == "cudaMemcpyBatchAsync"
        assert call["result"] == 0
        variant = registry.load().functions["cudaMemcpyBatchAsync"].select(runtime.version)
        assert [a["name"] for a in call["arguments"]] == [p.name for p in variant.params]
        values = {a["name"]: a["value"] for a in call["arguments"]}
        assert (values["count"], values["numAttrs"], values["stream"]) == (2, 1, stream)
        observed = call["observed"]
        assert [observed[key] for key in ("dsts", "srcs", "sizes")] == list(lists)
        assert observed["copies"] == 2 and observed["attrsIdxs"] == [0]
        expected = {"srcAccessOrder": 1, "flags": 0, "bytes": "01" + "00" * 23}
        assert observed["attributes"] == [expected]
        runtime.control.record(False)
        runtime.call("cudaDeviceSynchronize")
        assert len(runtime.control.calls()) == 1

    def test_record_shows_structs_and_signs(self, runtime):
        a = numbers(1)
        runtime.control.record()
        where = i32(-1) if runtime.version < 13000 else Location(1, -1)
        runtime.call("cudaMemAdvise", at(a), 8, i32(3), where)
        argument = runtime.control.calls()[0]["arguments"][3]
        if runtime.version < 13000:
            assert argument == {"name": "device", "type": "int", "value": -1}
        else:
            assert argument["name"] == "location"
            assert argument["bytes"] == "01000000ffffffff"

    def test_record_keeps_the_newest(self, runtime):
        runtime.control.record()
        call = runtime.lib.cudaSetDevice
        for device in range(66000):
            call(device)
        calls = runtime.control.calls()
        assert len(calls) == 65536
        assert calls[-1]["arguments"][0]["value"] == 65999
        assert runtime.control.counter("dropped") == 66000 - 65536

    def test_unknown_counter(self, runtime):
        with pytest.raises(ValueError, match="no counter 'copy': there are calls, operations"):
            runtime.control.counter("copy")


class TestLibraries:
    def test_two_runtimes_in_one_process_answer_for_themselves(self, built):
        answers = []
        for version in (12080, 13000):
            path = str(built(version))
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            value = i32()
            emulated.Control(path).set_version(version)
            library.cudaRuntimeGetVersion(ctypes.byref(value))
            answers.append((value.value, emulated.Control(path).abi))
        assert answers == [(12080, (12080, 13000)), (13000, (13000, 13020))]

    def test_available_and_resolve(self, built, tmp_path):
        for version in ("12.8", "13.0", "9.2"):
            (tmp_path / f"libcudart-emulated-{version}.so").touch()
        (tmp_path / "libcudart-emulated-new.so").touch()
        found = emulated.available(tmp_path)
        assert [(since, before) for since, before, _ in found] == [
            (9020, 12080),
            (12080, 13000),
            (13000, None),
        ]
        for version in ("12.9", "emulated:12.9", 12090):
            assert emulated.resolve(version, tmp_path).name == "libcudart-emulated-12.8.so"
        assert emulated.resolve("15.1", tmp_path).name == "libcudart-emulated-13.0.so"

    def test_resolve_says_what_is_there(self, tmp_path):
        with pytest.raises(ValueError) as caught:
            emulated.resolve("12.9", tmp_path)
        assert str(caught.value) == (
            f"no emulated CUDA runtime is built in {tmp_path}: "
            "build with `python setup.py build_ext --inplace`"
        )
        (tmp_path / "libcudart-emulated-12.8.so").touch()
        (tmp_path / "libcudart-emulated-13.0.so").touch()
        with pytest.raises(ValueError) as caught:
            emulated.resolve("11.8", tmp_path)
        assert str(caught.value) == (
            "no emulated CUDA runtime serves version 11.8: those that are built begin at 12.8, 13.0"
        )
        with pytest.raises(ValueError) as caught:
            emulated.resolve("latest", tmp_path)
        assert str(caught.value) == (
            "'latest' names no version of an emulated CUDA runtime: "
            'write MAJOR.MINOR, such as "12.9" or "emulated:12.9"'
        )

    def test_other_library_is_no_emulated_runtime(self):
        with pytest.raises(ValueError, match=r"libc\.so\.6 is not an emulated CUDA runtime"):
            emulated.Control("libc.so.6")

    def test_symbol_can_be_left_out(self, tmp_path):
        path = emulated.build(registry.load(), "13.0", tmp_path, without=["cudaMemcpyBatchAsync"])
        library = ctypes.CDLL(str(path))
        assert not hasattr(library, "cudaMemcpyBatchAsync")
        assert hasattr(library, "cudaMemcpyAsync")

    def test_build_without_sources(self, tmp_path, monkeypatch):
        monkeypatch.setattr(emulated, "SOURCES", tmp_path / "csrc")
        with pytest.raises(RuntimeError, match="is not there: it is part of kvsig's source tree"):
            emulated.build(registry.load(), "13.0", tmp_path)

    @pytest.mark.parametrize(
        ("compiler", "message"),
        [("no-such-compiler", "no C compiler to build"), ("false", r"false .* failed:")],
    )
    def test_build_without_compiler(self, tmp_path, monkeypatch, compiler, message):
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(RuntimeError, match=message):
            emulated.build(registry.load(), "13.0", tmp_path)

    def test_prototype_of_another_order_needs_no_other_behaviour(self, tmp_path):
        """A form of the next major drops two parameters, adds one and turns the order around."""
        text = Path(registry.PATH).read_text()
        head = "[function.cudaMemcpy3DBatchAsync]"
        assert text.count(head) == 1
        added = textwrap.dedent(f"""
            [[function.cudaMemcpyBatchAsync.variant]]
            since = "{NEXT_TEXT}"
            before = "{AFTER_TEXT}"
            reason = "a test"
            params = [
                "cudaStream_t stream",
                "struct cudaMemcpyAttributes *attrs",
                {{ declaration = "unsigned int flags", value = 7 }},
                "size_t count",
                "const size_t *sizes",
                "const void *const *srcs",
                "void *const *dsts",
            ]
        """)
        entries = registry.parse(text.replace(head, f"{added}\n{head}"))
        control = emulated.Control(emulated.build(entries, NEXT_TEXT, tmp_path))
        src, dst = numbers(3, 1), np.zeros(3, np.uint64)
        lists = [
            np.array(a, np.uint64)
            for a in ([at(dst, i) for i in range(3)], [at(src, i) for i in range(3)], [8] * 3)
        ]
        dsts, srcs, sizes = (u64(a.ctypes.data) for a in lists)
        control.record()
        with emulated.Stream(control) as stream:
            attributes = Attributes(STREAM_ORDER)
            code = control.library.cudaMemcpyBatchAsync(
                u64(stream.cuda_stream), ctypes.byref(attributes), i32(7), u64(3), sizes, srcs, dsts
            )
            assert code == 0
        assert (dst == src).all()
        (call,) = control.calls()
        assert call["arguments"][2] == {"name": "flags", "type": "unsigned int", "value": 7}

    def test_host_function_and_priorities_in_a_registry_that_has_them(self, tmp_path):
        text = Path(registry.PATH).read_text()
        for name, params in {
            "cudaLaunchHostFunc": ["cudaStream_t stream", "void *fn", "void *userData"],
            "cudaStreamGetPriority": ["cudaStream_t hStream", "int *priority"],
            "cudaStreamCreateWithPriority": [
                "cudaStream_t *pStream",
                "unsigned int flags",
                "int priority",
            ],
        }.items():
            text += textwrap.dedent(f"""
                [function.{name}]
                library = "cudart"
                returns = "cudaError_t"
                summary = "a test"
                page = "https://docs.nvidia.com/cuda/"

                [[function.{name}.variant]]
                since = "13.0"
                before = "14.0"
                reason = "a test"
                params = {params}
            """)
        runtime = Runtime(emulated.build(registry.parse(text), "13.0", tmp_path), 13000)
        stream, priority = runtime.new("cudaStreamCreateWithPriority", 1, i32(-9)), i32()
        assert runtime.call("cudaStreamGetPriority", stream, ctypes.byref(priority)) == 0
        assert priority.value == -5
        seen, dst, src = [], np.zeros(1, np.uint64), numbers(1, 3)
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: seen.append(int(dst[0])))
        runtime.copy(at(dst), at(src), 8, stream)
        assert runtime.call("cudaLaunchHostFunc", stream, function, 0) == 0
        runtime.call("cudaStreamSynchronize", stream)
        assert seen == [3]

    def test_stream_object(self, latest):
        src, dst = numbers(1, 5), np.zeros(1, np.uint64)
        with emulated.Stream(latest.control) as stream:
            assert stream.query()
            stream.hold()
            latest.copy(at(dst), at(src), 8, stream.cuda_stream)
            assert not stream.query() and stream.pending == 1
        assert dst[0] == 5
        with pytest.raises(RuntimeError, match="no emulated stream has the handle"):
            latest.control.pending(stream)
        with pytest.raises(RuntimeError, match="answered error 400"):
            stream.synchronize()


def run_process(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parent.parent,
    )


class TestProcess:
    def test_exit_does_not_wait_for_a_held_queue(self, built):
        done = run_process(
            """
            import ctypes, sys
            from kvsig import emulated
            control = emulated.Control(sys.argv[1])
            stream = emulated.Stream(control)
            stream.hold()
            u64, memory = ctypes.c_uint64, ctypes.create_string_buffer(64)
            copy = control.library.cudaMemcpyAsync
            address = ctypes.addressof(memory)
            for where in (stream.cuda_stream, 0):
                assert copy(u64(address), u64(address + 32), u64(8), 4, u64(where)) == 0
            print("bye")
            """,
            built(13000),
        )
        assert (done.returncode, done.stdout) == (0, "bye\n"), done.stderr

    def test_exit_in_the_middle_of_work(self, built):
        done = run_process(
            """
            import ctypes, sys
            from kvsig import emulated
            control = emulated.Control(sys.argv[1])
            u64, size = ctypes.c_uint64, 1 << 26
            a, b = ctypes.c_uint64(), ctypes.c_uint64()
            for p in (a, b):
                assert control.library.cudaMalloc(ctypes.byref(p), u64(size)) == 0
            for i in range(100):
                assert control.library.cudaMemcpyAsync(a, b, u64(size), 4, u64(0)) == 0
            print("bye")
            """,
            built(13000),
        )
        assert (done.returncode, done.stdout) == (0, "bye\n"), done.stderr

    def test_function_past_its_last_range_is_a_trap(self, built):
        done = run_process(
            """
            import ctypes, sys
            from kvsig import emulated
            control = emulated.Control(sys.argv[1])
            control.library.cudaMemcpyBatchAsync()
            """,
            built(NEXT),
        )
        assert done.returncode == -6
        assert done.stderr.startswith(
            "kvsig emulated runtime: cudaMemcpyBatchAsync called by a prototype that was never "
            f"proven for version {NEXT_TEXT}"
        )
