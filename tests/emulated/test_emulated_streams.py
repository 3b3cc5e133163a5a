"""Work runs in stream order, across streams as events say."""

import ctypes
import threading
import time

import numpy as np
from raw_runtime import LEGACY, PER_THREAD, at, numbers


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
