"""Many threads, and the GIL."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from core_help import python, run_threads

from kvsig import _core


class TestThreads:
    def test_bind_once_with_many_threads(self, bind):
        control = bind("12.9")
        _core.rebind("emulated:12.9")
        control.record()
        barrier = threading.Barrier(32)
        seen = []

        def work():
            barrier.wait()
            seen.append(_core.runtime_version())

        run_threads(32, work)
        assert seen == [12090] * 32
        assert len(control.calls("cudaRuntimeGetVersion")) == 1

    @pytest.mark.known_failure("gil")
    def test_a_blocked_call_holds_no_gil(self):
        """This thread must run on to release what the other waits for."""
        done = python(
            """
            import threading, kvsig
            from kvsig import _core, emulated
            _core.rebind("emulated:13.0")
            stream = emulated.Stream()
            stream.hold()
            kvsig.call("cudaMemsetAsync", devPtr=bytearray_address, value=7, count=8,
                       stream=stream)
            waiter = threading.Thread(
                target=kvsig.call, args=("cudaStreamSynchronize",), kwargs={"stream": stream})
            waiter.start()
            waiter.join(0.3)
            assert waiter.is_alive()
            stream.release()
            waiter.join()
            assert array.tolist() == [7] * 8
            print("released")
            """,
            before="import numpy as np; array = np.zeros(8, np.uint8);"
            " bytearray_address = array.ctypes.data",
        )
        assert done == "released\n"

    @pytest.mark.known_failure("gil")
    @pytest.mark.parametrize("path", ["batch", "loop", "strided"])
    def test_copies_hold_no_gil(self, bind, stream, path):
        bind("13.0")
        on = stream()
        on.hold()
        size = 400_000
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        steps = np.arange(size, dtype=np.uint64)
        dsts = steps + np.uint64(target.ctypes.data)
        srcs = steps + np.uint64(source.ctypes.data)
        ops = np.ones((100_000, 9), np.uint64)
        ops[:, 0], ops[:, 3] = dsts[:100_000], srcs[:100_000]
        ticks, stop = [], threading.Event()

        def tick():
            while not stop.is_set():
                ticks.append(time.perf_counter())
                time.sleep(0.0005)

        thread = threading.Thread(target=tick)
        thread.start()
        time.sleep(0.01)
        start = time.perf_counter()
        if path == "strided":
            _core.copy_strided(ops, on.cuda_stream)
        else:
            _core.copy_batch(dsts, srcs, 1, on.cuda_stream, path)
        end = time.perf_counter()
        stop.set()
        thread.join()
        # The copies are still queued: their memory has to outlive them.
        on.release()
        on.synchronize()
        third = (end - start) / 3
        inside = [t for t in ticks if start + third < t < end - third]
        assert inside, f"no other thread ran in the middle of {end - start:.3f} s"


@pytest.mark.known_failure("no-gil")
def test_an_interpreter_that_keeps_the_gil_off_is_refused():
    """Told by a stand-in for a free-threaded interpreter's own answer."""
    told = python(
        """
        import sys
        sys._is_gil_enabled = lambda: False
        for name in ("kvsig._loader", "kvsig._core", "kvsig.call"):
            try:
                __import__(name)
            except ImportError as error:
                print(error)
        """
    )
    lines = told.splitlines()
    assert len(lines) == 3 and len(set(lines)) == 1
    assert lines[0].startswith("kvsig needs the GIL, and this free-threaded interpreter was told")
