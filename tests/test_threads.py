"""Batches submitted from several threads: the same bytes, order and errors as from one."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from kvsig import _core, _pack, _threads, emulated

WIDTH = 64
COUNT = 4096
# Seconds after which the CPU is looked at again.
LOOKED = 0.006


class Pages:
    """Pages to copy in random order, and room for them."""

    def __init__(self, seed=0, count=COUNT):
        rng = np.random.default_rng(seed)
        self.src = rng.integers(0, 256, (count, WIDTH), dtype=np.uint8)
        self.dst = np.zeros_like(self.src)
        self.order = rng.permutation(count)
        self.dsts = np.uint64(self.dst.ctypes.data) + np.uint64(WIDTH) * np.arange(
            count, dtype=np.uint64
        )
        self.srcs = np.uint64(self.src.ctypes.data) + np.uint64(WIDTH) * self.order.astype(
            np.uint64
        )

    def right(self):
        return np.array_equal(self.dst, self.src[self.order])


@pytest.mark.parametrize("threads", [2, 3, 8, 99])
@pytest.mark.parametrize("sizes", ["one", "each"])
def test_moves_bytes(control, threads, sizes):
    pages = Pages()
    given = WIDTH if sizes == "one" else np.full(COUNT, WIDTH, np.uint64)
    with emulated.Stream() as stream:
        report = _core.copy_batch(
            pages.dsts, pages.srcs, given, stream.cuda_stream, "auto", 64, threads
        )
        stream.synchronize()
    assert pages.right()
    assert (report.path, report.copies, report.calls) == ("batch", COUNT, COUNT // 64)
    assert report.bytes == COUNT * WIDTH


@pytest.mark.parametrize("legacy", [False, True])
def test_order_of_the_callers_stream(control, legacy):
    """What was there before comes first, what is submitted later comes last."""
    first, then = Pages(1), Pages(2)
    then.src[:] = 7
    out = np.zeros_like(first.dst)
    outs = np.uint64(out.ctypes.data) + np.uint64(WIDTH) * np.arange(COUNT, dtype=np.uint64)
    with emulated.Stream() as made:
        stream = 0 if legacy else made.cuda_stream
        control.hold(stream)
        # first.src is written by a copy that is still held when the batch is submitted.
        fresh = np.random.default_rng(3).integers(0, 256, first.src.shape, dtype=np.uint8)
        _core.copy_batch(
            np.array([first.src.ctypes.data], np.uint64),
            np.array([fresh.ctypes.data], np.uint64),
            fresh.nbytes, stream, "loop",
        )
        _core.copy_batch(first.dsts, first.srcs, WIDTH, stream, "batch", 64, 4)
        # Reads what the batch has written.
        _core.copy_batch(outs, first.dsts, WIDTH, stream, "loop")
        assert not out.any() and not first.dst.any()
        control.release(stream)
        _core.call("cudaStreamSynchronize", stream=stream)
    assert np.array_equal(out, fresh[first.order])


def test_the_first_refused_copy_is_named(control):
    pages = Pages()
    with emulated.Stream() as stream:
        control.fault("cudaMemcpyBatchAsync", 1, nth=0, fail_index=5)
        with pytest.raises(_core.CudaError) as caught:
            _core.copy_batch(pages.dsts, pages.srcs, WIDTH, stream.cuda_stream, "auto", 64, 4)
        control.reset()
        stream.synchronize()
    expected = 5 if _core.runtime_version() < 13000 else None
    assert caught.value.index == expected
    assert _core.call("cudaPeekAtLastError") == 0


def test_whoever_is_free_takes_the_next_call(control):
    """A thread that comes late keeps nobody waiting: every call is made once, whoever makes it."""
    pages = Pages()
    with emulated.Stream() as stream:
        control.record()
        _core.copy_batch(pages.dsts, pages.srcs, WIDTH, stream.cuda_stream, "batch", 60, 4)
        stream.synchronize()
        counts = [row["observed"]["copies"] for row in control.calls("cudaMemcpyBatchAsync")]
    assert pages.right()
    assert sorted(counts) == [COUNT % 60] + [60] * (COUNT // 60)


@pytest.mark.parametrize("nth", [0, 3, 40])
def test_a_refused_call_stops_the_others(control, nth):
    pages = Pages()
    made = []
    with emulated.Stream() as stream:
        for _ in range(20):
            control.record()
            control.fault("cudaMemcpyBatchAsync", 1, nth=nth)
            with pytest.raises(_core.CudaError):
                _core.copy_batch(pages.dsts, pages.srcs, WIDTH, stream.cuda_stream, "auto", 16, 4)
            assert _core.call("cudaPeekAtLastError") == 0
            made.append(len(control.calls("cudaMemcpyBatchAsync")))
            control.reset()
            stream.synchronize()
            if made[-1] <= nth + 1 + 4:
                break
    # Each of the others may be in the middle of one call, and the driver is asked once more. A
    # thread that is put to sleep before it has told the others is rare.
    assert made[-1] <= nth + 1 + 4 < COUNT // 16, made


@pytest.mark.parametrize("code", [801, 36])
@pytest.mark.parametrize("nth", [0, 30])
@pytest.mark.parametrize("sizes", ["one", "each"])
def test_falls_back_as_one_thread_does(control, code, nth, sizes):
    pages = Pages()
    given = WIDTH if sizes == "one" else np.full(COUNT, WIDTH, np.uint64)
    with emulated.Stream() as stream:
        control.fault("cudaMemcpyBatchAsync", code, nth=nth)
        report = _core.copy_batch(pages.dsts, pages.srcs, given, stream.cuda_stream, "auto", 64, 4)
        stream.synchronize()
    assert pages.right()
    assert report.path == "loop"
    assert report.reason.startswith(f"cudaMemcpyBatchAsync answered {code} (")
    assert report.bytes == COUNT * WIDTH


def test_a_helper_that_cannot_begin_takes_no_call(control):
    """The caller, and who else can, make them all; and nobody finds the error later."""
    for nth in range(3):
        pages = Pages(nth)
        with emulated.Stream() as stream:
            control.fault("cudaStreamWaitEvent", 999, nth=0)
            report = _core.copy_batch(
                pages.dsts, pages.srcs, WIDTH, stream.cuda_stream, "batch", 64, 4
            )
            stream.synchronize()
        control.reset()
        assert pages.right()
        assert (report.path, report.calls, report.bytes) == ("batch", COUNT // 64, COUNT * WIDTH)
        assert _core.call("cudaPeekAtLastError") == 0


@pytest.mark.parametrize("code", [801, 36, 999])
@pytest.mark.parametrize("nth", [1, 2, 0])
def test_an_event_between_threads_that_fails_is_no_refusal_of_batches(control, code, nth):
    """It is raised as what it is, and batches go on to be used."""
    with emulated.Stream() as stream:
        for seed in range(50):
            pages = Pages(seed)
            control.fault("cudaEventRecord", code, nth=nth)
            try:
                _core.copy_batch(pages.dsts, pages.srcs, WIDTH, stream.cuda_stream, "auto", 64, 4)
            except _core.CudaError as error:
                assert (error.function, error.code) == ("cudaEventRecord", code)
                break
            finally:
                assert _core.call("cudaPeekAtLastError") == 0
                control.reset()
                _core.call("cudaDeviceSynchronize")
        else:
            raise AssertionError("no helper has made a call")
        pages = Pages(99)
        report = _core.copy_batch(
            pages.dsts, pages.srcs, WIDTH, stream.cuda_stream, "auto", 64, 4
        )
        stream.synchronize()
    assert pages.right()
    assert (report.path, report.reason) == ("batch", None)


def test_who_waits_for_no_helper_that_has_done_nothing(control):
    """Each helper that made calls is waited for in the caller's stream, by an event; no other."""

    def stream_of(row):
        return next(int(one["value"]) for one in row["arguments"] if one["type"] == "cudaStream_t")

    waited = []
    with emulated.Stream() as stream:
        for seed in range(20):
            pages = Pages(seed)
            control.record()
            _core.copy_batch(pages.dsts, pages.srcs, WIDTH, stream.cuda_stream, "batch", 64, 4)
            batches = control.calls("cudaMemcpyBatchAsync")
            waits = control.calls("cudaStreamWaitEvent")
            stream.synchronize()
            assert pages.right()
            helpers = {stream_of(row) for row in batches} - {stream.cuda_stream}
            waiting = [stream_of(row) for row in waits]
            assert helpers <= set(waiting), "each begins behind what the caller's stream has"
            assert waiting.count(stream.cuda_stream) == len(helpers) <= 3
            waited.append(len(helpers))
            control.reset()
    assert max(waited) > 0


def test_transfers_of_many_threads_at_once(control):
    """One has the helpers, the others work alone; all bytes are right."""
    wrong = []

    def run(seed):
        pages = Pages(seed)
        with emulated.Stream() as stream:
            for _ in range(5):
                pages.dst[:] = 0
                _core.copy_batch(
                    pages.dsts, pages.srcs, WIDTH, stream.cuda_stream, "batch", 64, 4
                )
                stream.synchronize()
                if not pages.right():
                    wrong.append(seed)

    runners = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert not wrong


class TestCpu:
    def test_looks_at_the_cpu(self, monkeypatch):
        monkeypatch.setattr(_threads, "_best", float("inf"))
        assert _threads.look() == 1, "the first look is the best so far"
        monkeypatch.setattr(_threads, "_best", 1.0)
        assert _threads.look() == _threads.SLOWEST
        took = iter(range(0, 10**6, 1000))
        monkeypatch.setattr(_threads.time, "perf_counter_ns", lambda: next(took))
        for best, slow in ((1000, 1), (850, 1), (625, 1.6), (100, _threads.SLOWEST)):
            monkeypatch.setattr(_threads, "_best", best)
            assert _threads.look() == pytest.approx(slow), best

    def test_looks_now_and_then_only(self, monkeypatch):
        looks = []
        monkeypatch.setattr(_pack, "look", lambda: looks.append(1) or 1.5)
        time.sleep(LOOKED)
        begin = time.perf_counter()
        assert {_pack.slowness() for _ in range(20000)} == {1.5}
        assert 1 <= len(looks) <= 2 + (time.perf_counter() - begin) / 0.005
        monkeypatch.setattr(_pack, "look", lambda: 1.0)
        time.sleep(LOOKED)
        assert _pack.slowness() == 1

    def test_looks_again_whoever_looked_at_the_same_time(self, monkeypatch):
        inside = threading.Barrier(2)

        def look():
            try:
                inside.wait(0.2)  # two threads are in here at once, if that can be
            except threading.BrokenBarrierError:
                pass
            return 1.5

        monkeypatch.setattr(_pack, "look", look)
        time.sleep(LOOKED)
        runners = [threading.Thread(target=_pack.slowness) for _ in range(2)]
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join()
        monkeypatch.setattr(_pack, "look", lambda: 1.0)
        time.sleep(LOOKED)
        assert _pack.slowness() == 1

    @pytest.mark.parametrize(
        ("cpus", "few", "many"),
        [(1, 1, 1), (7, 1, 1), (8, 2, 2), (15, 2, 2), (16, 4, 2), (64, 4, 2)],
    )
    def test_several_where_there_are_cpus(self, monkeypatch, cpus, few, many):
        monkeypatch.setattr(_threads.os, "sched_getaffinity", lambda pid: set(range(cpus)))
        assert _threads.most(None) == (few, many)
        for threads in (1, 4, 8):
            assert _threads.most(threads) == (threads, threads)

    @pytest.mark.parametrize("threads", [0, 9, True, "4", 1.0])
    def test_bad_number(self, threads):
        text = f"threads must be an int from 1 to 8, or None, not {threads!r}"
        with pytest.raises(ValueError) as caught:
            _threads.most(threads)
        assert str(caught.value) == text
