"""The core on emulated runtimes: prototypes, paths, fallbacks, order, errors and binding."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import kvsig
from kvsig import _core, emulated, registry

REGISTRY = registry.load()
PACKAGE = Path(_core.__file__).parent
BATCH, DRIVERS = "cudaMemcpyBatchAsync", "cuMemcpyBatchAsync"
FORMS = ["12.8", "12.9", "13.0", "13.2"]
LEGACY = "the stream is the legacy default stream, which batches refuse"


@pytest.fixture
def bind():
    """Bind kvsig to an emulated runtime, by version or by file, and return its Control."""
    bound = []

    def go(spec, before=None):
        if before is not None:
            before(emulated.Control(spec if os.sep in spec else spec.partition("/")[0]))
        _core.rebind(spec if os.sep in spec and not spec[0].isdigit() else f"emulated:{spec}")
        control = emulated.Control(_core.info()["library"])
        bound.append(control)
        if before is None:
            control.reset()
        return control

    yield go
    for control in bound:
        control.reset()
    _core.rebind(None)


@pytest.fixture
def stream(bind):
    """A stream of the runtime that is bound when it is first asked for."""
    made = []

    def go():
        made.append(emulated.Stream())
        return made[-1]

    yield go
    for one in made:
        one.control.reset()
        one.synchronize()
        one.destroy()


class Copies:
    """Copies of different sizes from one buffer to another, back to front."""

    def __init__(self, count, seed=0, width=48):
        rng = np.random.default_rng(seed)
        self.count, self.width = count, width
        self.source = rng.integers(1, 256, count * width, dtype=np.uint8)
        self.target = np.zeros(count * width, np.uint8)
        starts = np.arange(count, dtype=np.uint64) * np.uint64(width)
        self.srcs = starts + np.uint64(self.source.ctypes.data)
        self.dsts = starts[::-1] + np.uint64(self.target.ctypes.data)
        self.dsts = np.ascontiguousarray(self.dsts)
        self.sizes = rng.integers(1, width + 1, count).astype(np.uint64)
        self.starts = starts.astype(int)

    @property
    def arguments(self):
        return self.dsts, self.srcs, self.sizes

    def expected(self, made=None):
        """What the target holds after the copies of these numbers, by default all."""
        after = np.zeros_like(self.target)
        for i in range(self.count) if made is None else made:
            to, start, size = self.starts[self.count - 1 - i], self.starts[i], int(self.sizes[i])
            after[to : to + size] = self.source[start : start + size]
        return after

    def check(self, made=None):
        assert (self.target == self.expected(made)).all()


def last_error():
    return kvsig.call("cudaPeekAtLastError")


def strided(rows):
    """Strided copies as `copy_strided` takes them."""
    return np.array(list(rows), np.uint64)


class TestTypedCaller:
    @pytest.mark.parametrize("version", FORMS)
    def test_batch_gets_each_argument_in_its_place(self, bind, stream, version):
        control, copies = bind(version), Copies(7)
        on = stream()
        control.record()
        report = _core.copy_batch(*copies.arguments, on.cuda_stream, "batch")
        on.synchronize()
        copies.check()
        assert report == _core.Report("batch", None, 7, 1, int(copies.sizes.sum()))
        (call,) = control.calls(BATCH)
        variant = REGISTRY.functions[BATCH].select(registry.parse_version(version))
        assert [(a["name"], a["type"]) for a in call["arguments"]] == [
            (p.name, str(p.type)) for p in variant.params
        ]
        values = {a["name"]: a["value"] for a in call["arguments"]}
        assert values["dsts"] == copies.dsts.ctypes.data
        assert values["srcs"] == copies.srcs.ctypes.data
        assert values["sizes"] == copies.sizes.ctypes.data
        assert values["count"] == 7 and values["numAttrs"] == 1
        assert values["stream"] == on.cuda_stream
        assert ("failIdx" in values) == (version < "13")
        assert values.get("failIdx", 1) != 0
        seen = call["observed"]
        # Stream order for the source, no flags and no hints; the first attribute serves all.
        assert [a["bytes"] for a in seen["attributes"]] == ["01000000" + "00" * 20]
        assert seen["attrsIdxs"] == [0]
        assert seen["dsts"] == copies.dsts.tolist() and seen["srcs"] == copies.srcs.tolist()
        assert seen["sizes"] == copies.sizes.tolist()

    @pytest.mark.parametrize("version", FORMS)
    def test_one_size_for_all(self, bind, stream, version):
        control, copies = bind(version), Copies(300)
        copies.sizes[:] = 48
        on = stream()
        control.record()
        report = _core.copy_batch(copies.dsts, copies.srcs, 48, on.cuda_stream, "batch")
        on.synchronize()
        copies.check()
        assert report == _core.Report("batch", None, 300, 2, 300 * 48)
        assert control.calls(BATCH)[1]["observed"]["sizes"] == [48] * 44

    @pytest.mark.parametrize("version", FORMS)
    @pytest.mark.parametrize(
        ("count", "batch_size", "sizes"),
        [
            (256, None, [256]), (257, None, [256, 1]), (600, None, [256, 256, 88]),
            (600, 100, [100] * 6), (3, 1, [1, 1, 1]), (1500, 1500, [1500]), (5, 2**62, [5]),
        ],
    )  # fmt: skip
    def test_calls_hold_so_many_copies_at_most(
        self, bind, stream, version, count, batch_size, sizes
    ):
        control, copies = bind(version), Copies(count)
        on = stream()
        control.record()
        setting = {} if batch_size is None else {"batch_size": batch_size}
        report = _core.copy_batch(*copies.arguments, on.cuda_stream, **setting)
        on.synchronize()
        copies.check()
        assert [call["observed"]["copies"] for call in control.calls(BATCH)] == sizes
        assert report.calls == len(sizes) and report.copies == count

    @pytest.mark.parametrize("version", ["11.8", "12.6", *FORMS, "13.5"])
    def test_strided(self, bind, stream, version):
        control = bind(version)
        on = stream()
        rng = np.random.default_rng(3)
        source = rng.integers(1, 256, (2, 6, 32), dtype=np.uint8)
        target = np.zeros((2, 6, 40), np.uint8)
        ops = strided(
            [target[i].ctypes.data + 8, 40, 3, source[i].ctypes.data, 64, 3, 24, 3, 1]
            for i in range(2)
        )
        control.record()
        report = _core.copy_strided(ops, on.cuda_stream)
        on.synchronize()
        assert report == _core.Report("strided", None, 6, 2, 2 * 3 * 24)
        assert (target[:, :3, 8:32] == source[:, ::2, :24]).all()
        assert target[:, :3, :8].sum() == 0 and target[:, 3:].sum() == 0
        assert len(control.calls("cudaMemcpy3DAsync")) == 2

    @pytest.mark.parametrize("version", ["11.8", *FORMS])
    def test_strided_slices(self, bind, stream, version):
        """Slices of rows that are neither neighbours nor as far apart on both sides."""
        bind(version)
        on = stream()
        source = np.random.default_rng(4).integers(1, 256, (3, 5, 32), dtype=np.uint8)
        target = np.zeros((3, 4, 40), np.uint8)
        ops = strided([[target.ctypes.data, 40, 4, source.ctypes.data, 32, 5, 24, 2, 3]])
        report = _core.copy_strided(ops, on.cuda_stream)
        on.synchronize()
        assert report == _core.Report("strided", None, 6, 1, 6 * 24)
        assert (target[:, :2, :24] == source[:, :2, :24]).all()
        assert target[:, 2:].sum() == 0 and target[:, :, 24:].sum() == 0

    def test_nothing_to_do(self, bind):
        control = bind("13.0")
        control.record()
        none = np.zeros(0, np.uint64)
        assert _core.copy_batch(none, none, none, 2) == _core.Report()
        assert _core.copy_batch(none, none, 16, 2, "batch") == _core.Report()
        assert _core.copy_strided(np.zeros((0, 9), np.uint64), 2) == _core.Report()
        assert control.calls() == []


class TestRefusedRequests:
    """What cannot be copied is refused before CUDA is called."""

    @pytest.fixture(autouse=True)
    def bound(self, bind):
        control = bind("13.0")
        control.record()
        yield
        assert control.calls() == []

    def refuses(self, text, *arguments, **settings):
        with pytest.raises(ValueError) as caught:
            _core.copy_batch(*arguments, **settings)
        assert str(caught.value) == text

    def test_batch(self):
        one, two = np.array([16], np.uint64), np.array([16, 32], np.uint64)
        zero = np.array([16, 0], np.uint64)
        give = "give one for each"
        self.refuses(f"1 destinations, but 2 sources; {give}", one, two, 4, 2)
        self.refuses(f"2 destinations, but 1 sizes; {give}", two, two, one, 2)
        end = "addresses and sizes must not be 0"
        self.refuses(
            f"copy 1 is not possible: dst=0x0, src=0x20, size=4; {end}", zero, two, 4, 2
        )
        self.refuses(
            f"copy 1 is not possible: dst=0x20, src=0x0, size=4; {end}", two, zero, 4, 2
        )
        self.refuses(
            f"copy 1 is not possible: dst=0x20, src=0x20, size=0; {end}", two, two, zero, 2
        )
        self.refuses("size 0 is no number of bytes to copy; it must be above 0", one, one, 0, 2)
        self.refuses("size -4 is no number of bytes to copy; it must be above 0", one, one, -4, 2)
        self.refuses("path='fast': use 'auto', 'batch' or 'loop'", one, one, 4, 2, path="fast")
        self.refuses(
            "batch_size 0 copies nothing; it must be above 0", one, one, 4, 2, batch_size=0
        )

    @pytest.mark.parametrize(
        ("column", "value"),
        [(0, 0), (3, 0), (6, 0), (7, 0), (8, 0), (1, 7), (4, 7), (2, 1), (5, 1)],
    )
    def test_strided(self, column, value):
        good = [16, 8, 2, 16, 8, 2, 8, 2, 2]
        bad = list(good)
        bad[column] = value
        with pytest.raises(ValueError) as caught:
            _core.copy_strided(strided([good, bad]), 2)
        dst, dpitch, drows, src, spitch, srows, width, height, depth = bad
        assert str(caught.value) == (
            f"strided copy 1 is not possible: dst={dst:#x}, dpitch={dpitch}, drows={drows},"
            f" src={src:#x}, spitch={spitch}, srows={srows}, width={width}, height={height},"
            f" depth={depth}; nothing may be 0, pitches not below the width, and rows from slice to"
            " slice not below the height"
        )
        with pytest.raises(ValueError, match="^6 columns; strided copies have 9$"):
            _core.copy_strided(np.ones((2, 6), np.uint64), 2)


def built(tmp_path, version, *without):
    return str(emulated.build(REGISTRY, version, tmp_path / version, without=without))


class TestFallbacks:
    """Each with its reason, every byte, no last error; and path='batch' says why it cannot be."""

    def falls_back(self, reason, on, remembered=False):
        copies = Copies(9)
        report = _core.copy_batch(*copies.arguments, on.cuda_stream)
        assert last_error() == 0
        on.synchronize()
        copies.check()
        assert report == _core.Report("loop", reason, 9, 9, int(copies.sizes.sum()))
        assert _core.batch_refusal(on.cuda_stream) == reason
        target = Copies(2)
        with pytest.raises(_core.BindError) as caught:
            _core.copy_batch(*target.arguments, on.cuda_stream, "batch")
        assert str(caught.value) == (
            f"path='batch' is not possible: {reason}. Use path='auto' or 'loop'"
        )
        on.synchronize()
        target.check(made=[])

    def test_runtime_without_the_function(self, bind, stream, monkeypatch):
        monkeypatch.setenv("KVSIG_ROUTE", "runtime")
        bind("12.6/13.0")
        self.falls_back("libcudart 12.6 has no cudaMemcpyBatchAsync", stream())
        batch = _core.info()["batch"]
        assert batch == {"path": "loop", "why": "libcudart 12.6 has no cudaMemcpyBatchAsync"}

    def test_runtime_and_driver_without_the_function(self, bind, stream):
        bind("12.6")
        self.falls_back("the driver is 12.6, and batches need 12.8", stream())

    def test_version_query_fails(self, bind, stream):
        def fault(control):
            control.reset()
            control.fault("cudaRuntimeGetVersion", 999)

        control = bind("12.9", before=fault)
        assert _core.runtime_version() == 0
        assert last_error() == 0
        path = _core.info()["library"]
        control.reset()
        self.falls_back(
            f"cudaMemcpyBatchAsync is not bound: {path} does not tell its version", stream()
        )

    @pytest.mark.parametrize("version", ["12.8", "13.0"])
    @pytest.mark.parametrize(
        ("code", "name"),
        [(801, "cudaErrorNotSupported"), (36, "cudaErrorCallRequiresNewerDriver")],
    )
    def test_not_supported_is_remembered(self, bind, stream, version, code, name):
        control = bind(version)
        on = stream()
        control.fault(BATCH, code, nth=1)
        control.record()
        copies = Copies(9)
        reason = f"cudaMemcpyBatchAsync answered {code} ({name})"
        assert _core.batch_refusal(on.cuda_stream) is None
        report = _core.copy_batch(*copies.arguments, on.cuda_stream)
        assert report == _core.Report("loop", reason, 9, 9, int(copies.sizes.sum()))
        assert last_error() == 0
        on.synchronize()
        copies.check()
        # The fault is spent, but what is permanent is not tried again.
        self.falls_back(reason, on)
        assert len(control.calls(BATCH)) == 1
        assert _core.info()["batch"] == {"path": "loop", "why": reason}

    def test_not_supported_in_a_later_call_goes_on_where_it_was(self, bind, stream):
        control = bind("13.0")
        on = stream()
        control.fault(BATCH, 801, nth=3)
        control.record()
        copies = Copies(10)
        report = _core.copy_batch(*copies.arguments, on.cuda_stream, batch_size=4)
        on.synchronize()
        copies.check()
        assert (report.path, report.calls, report.copies) == ("loop", 4, 10)
        assert len(control.calls("cudaMemcpyAsync")) == 2
        assert report.bytes == int(copies.sizes.sum())

    def test_older_driver(self, bind, stream):
        bind("12.9/12.6")
        self.falls_back("the driver is 12.6, and batches need 12.8", stream())
        assert _core.driver_version() == 12060 and _core.runtime_version() == 12090

    @pytest.mark.parametrize("version", ["12.8", "13.0"])
    def test_captured_stream_gets_the_copies_into_its_graph(self, bind, stream, version):
        control = bind(version)
        on = stream()
        copies = Copies(9)
        kvsig.call("cudaStreamBeginCapture", stream=on, mode="cudaStreamCaptureModeRelaxed")
        report = _core.copy_batch(*copies.arguments, on.cuda_stream)
        reason = "the stream is being captured, which batches refuse"
        assert (report.path, report.reason) == ("loop", reason)
        with pytest.raises(_core.BindError, match=f"^path='batch' is not possible: {reason}"):
            _core.copy_batch(*copies.arguments, on.cuda_stream, "batch")
        assert last_error() == 0
        graph = kvsig.call("cudaStreamEndCapture", stream=on)
        on.synchronize()
        copies.check(made=[])
        runnable = kvsig.call("cudaGraphInstantiate", graph=graph)
        for _ in range(2):
            kvsig.call("cudaGraphLaunch", graphExec=runnable, stream=on)
            on.synchronize()
            copies.check()
            copies.target[:] = 0
        assert control.counter("batches") == 0
        # Once the capture is over, batches are used again.
        assert _core.copy_batch(*copies.arguments, on.cuda_stream).path == "batch"
        on.synchronize()

    @pytest.mark.parametrize("version", ["12.8", "13.0"])
    def test_capture_that_only_the_call_itself_reports(self, bind, stream, version):
        control = bind(version)
        on = stream()
        control.fault(BATCH, 900, nth=1)
        copies = Copies(5)
        report = _core.copy_batch(*copies.arguments, on.cuda_stream)
        assert (report.path, report.reason) == (
            "loop",
            "cudaMemcpyBatchAsync answered 900 (cudaErrorStreamCaptureUnsupported):"
            " the stream is being captured",
        )
        assert last_error() == 0
        on.synchronize()
        copies.check()
        assert _core.copy_batch(*copies.arguments, on.cuda_stream).path == "batch"
        on.synchronize()

    def test_newer_than_every_range(self, bind, stream):
        with pytest.warns(RuntimeWarning) as seen:
            bind("14.0")
            self.falls_back(
                "libcudart 14.0 is newer than every range; the last is 13.0 to before 14.0",
                stream(),
            )
        path = _core.info()["library"]
        text = (
            f"libcudart 14.0 ({path}) is newer than every prototype of cudaMemcpyBatchAsync that"
            " kvsig knows, so pages are copied one by one. Add a"
            ' [[function.cudaMemcpyBatchAsync.variant]] with since = "14.0" to'
            f" {registry.PATH} and rebuild"
        )
        assert [str(w.message) for w in seen] == [text]
        assert _core.info()["warnings"] == [text]

    def test_newer_than_every_range_strided_goes_row_by_row(self, bind, stream):
        with pytest.warns(RuntimeWarning):
            bind("14.0")
        on = stream()
        source, target = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
        ops = strided([[target.ctypes.data, 8, 4, source.ctypes.data, 16, 4, 8, 4, 1]])
        report = _core.copy_strided(ops, on.cuda_stream)
        on.synchronize()
        reason = (
            "cudaMemcpy3DAsync is not bound: 14.0 is newer than every range; the last is 11.8 to"
            " before 14.0"
        )
        assert report == _core.Report("loop", reason, 4, 4, 32)
        assert (target[:32].reshape(4, 8) == source.reshape(4, 16)[:, :8]).all()

    def test_loop_asked_for_has_no_reason(self, bind, stream):
        control = bind("13.0")
        on = stream()
        copies = Copies(4)
        report = _core.copy_batch(*copies.arguments, on.cuda_stream, "loop")
        assert report == _core.Report("loop", None, 4, 4, int(copies.sizes.sum()))
        on.synchronize()
        copies.check()
        assert control.counter("batches") == 0


class TestMissingSymbol:
    def test_inside_its_range_is_an_error(self, bind, tmp_path, stream):
        path = built(tmp_path, "12.8", BATCH)
        control = bind(path)
        control.record()
        copies = Copies(3)
        with pytest.raises(_core.BindError) as caught:
            _core.copy_batch(*copies.arguments, 2)
        assert str(caught.value) == (
            f"cudaMemcpyBatchAsync is missing: {path} is 12.8, in the range 12.8 to before 13.0,"
            " but does not have cudaMemcpyBatchAsync. The library is damaged or is not what it"
            " says; set KVSIG_CUDART to a good one, or use path='loop'"
        )
        assert control.calls("cudaMemcpyAsync") == []
        copies.check(made=[])
        on = stream()
        assert _core.copy_batch(*copies.arguments, on.cuda_stream, "loop").path == "loop"
        on.synchronize()
        copies.check()

    def test_calling_it_by_name_says_so(self, bind, tmp_path):
        path = built(tmp_path, "13.0", "cudaMemPrefetchAsync")
        bind(path)
        with pytest.raises(_core.BindError) as caught:
            kvsig.call(
                "cudaMemPrefetchAsync", devPtr=1, count=1, location=(1, 0), stream=2
            )
        assert str(caught.value) == (
            f"cudaMemPrefetchAsync is not bound: {path} is 13.0, in the range 13.0 to before 14.0,"
            " but does not have cudaMemPrefetchAsync"
        )
        row = next(r for r in _core.info()["functions"] if r["name"] == "cudaMemPrefetchAsync")
        assert row["status"] == "missing" and row["address"] is None


class TestLegacyStream:
    """Batches from the NULL stream run on a stream of kvsig's own, in the order of the NULL one."""

    @pytest.fixture(params=["12.8", "13.0"])
    def control(self, request, bind):
        control = bind(request.param)
        # The first transfer makes the stream; where it is, the recorder tells.
        control.record()
        copies = Copies(1)
        _core.copy_batch(*copies.arguments, 0, "batch")
        control.synchronize(0)
        (call,) = control.calls(BATCH)
        self.fork = next(a["value"] for a in call["arguments"] if a["name"] == "stream")
        assert self.fork > 2
        return control

    def chain(self, size=4096):
        """Four buffers; copies from each to the next."""
        buffers = [np.zeros(size, np.uint8) for _ in range(4)]
        buffers[0][:] = np.random.default_rng(1).integers(1, 256, size)
        places = [np.array([b.ctypes.data], np.uint64) for b in buffers]
        return buffers, places

    def plain(self, dst, src, stream=0):
        kvsig.call("cudaMemcpyAsync", dst=int(dst[0]), src=int(src[0]), count=4096, stream=stream)

    def test_waits_for_work_before_it(self, control):
        (a, b, c, _), (pa, pb, pc, _) = self.chain()
        control.hold(0)
        self.plain(pb, pa)
        report = _core.copy_batch(pc, pb, 4096, 0, "batch")
        assert report.path == "batch"
        time.sleep(0.1)
        assert not b.any() and not c.any()
        control.release(0)
        control.synchronize(0)
        assert (c == a).all()

    def test_work_after_it_waits(self, control):
        (a, b, c, _), (pa, pb, pc, _) = self.chain()
        control.hold(self.fork)
        _core.copy_batch(pb, pa, 4096, 0, "batch")
        self.plain(pc, pb)
        time.sleep(0.1)
        assert not b.any() and not c.any()
        control.release(self.fork)
        control.synchronize(0)
        assert (b == a).all() and (c == a).all()

    @pytest.mark.parametrize("handle", [0, 1])
    def test_no_copy_waits_for_the_host(self, control, handle):
        (a, b, c, d), (pa, pb, pc, pd) = self.chain()
        control.hold(0)
        for to, of in ((pb, pa), (pc, pb), (pd, pc)):
            _core.copy_batch(to, of, 4096, handle, "auto")
        control.release(0)
        control.synchronize(0)
        assert (d == a).all()

    def test_order_holds_from_many_threads(self, control):
        failures, start = [], threading.Barrier(8)

        def work():
            chains = [self.chain() for _ in range(25)]
            start.wait()
            for _, (pa, pb, pc, pd) in chains:
                self.plain(pb, pa)
                _core.copy_batch(pc, pb, 4096, 0, "batch")
                self.plain(pd, pc)
            control.synchronize(0)
            failures.extend(i for i, ((a, *_, d), _) in enumerate(chains) if (a != d).any())

        run_threads(8, work)
        assert failures == []

    @pytest.mark.parametrize("version", ["12.8", "13.0"])
    def test_what_a_failed_batch_submitted_stays_in_order(self, bind, version):
        """Copies before the refused one are made, and later work of the stream sees them."""
        control = bind(version)
        control.record()
        warm = Copies(1)
        _core.copy_batch(*warm.arguments, 0)
        control.synchronize(0)
        fork = next(
            a["value"] for a in control.calls(BATCH)[0]["arguments"] if a["name"] == "stream"
        )
        (a, b, c, _), (pa, pb, pc, _) = self.chain()
        bad = np.zeros(64, np.uint8)
        control.mark_device(bad.ctypes.data, 64)
        dsts = np.array([pb[0], bad.ctypes.data], np.uint64)
        srcs = np.array([pa[0], pa[0]], np.uint64)
        control.hold(fork)
        with pytest.raises(_core.CudaError) as caught:
            _core.copy_batch(dsts, srcs, 4096, 0)
        assert caught.value.index == 1
        self.plain(pc, pb)
        time.sleep(0.1)
        assert not c.any()
        # The join comes after all that was submitted, what was done to name the copy included.
        names = [call["function"] for call in control.calls()]
        batches = [i for i, name in enumerate(names) if name in (BATCH, DRIVERS)]
        joins = [
            i for i, call in enumerate(control.calls("cudaEventRecord"))
            if {"name": "stream", "type": "cudaStream_t", "value": fork} in call["arguments"]
        ]  # fmt: skip
        records = [i for i, name in enumerate(names) if name == "cudaEventRecord"]
        assert len(batches) == 2 + (version >= "13")
        assert records[joins[-1]] > batches[-1]
        control.release(fork)
        control.synchronize(0)
        assert control.pending(fork) == 0
        assert (c == a).all()

    def test_no_way_around_is_a_reason(self, bind):
        control = bind("13.0")
        control.fault("cudaStreamCreateWithFlags", 2)
        copies = Copies(3)
        report = _core.copy_batch(*copies.arguments, 0)
        assert report.path == "loop"
        assert report.reason.startswith(
            f"{LEGACY}, and there is no way around: cudaStreamCreateWithFlags answered 2"
            " cudaErrorMemoryAllocation (out of memory)"
        )
        assert last_error() == 0
        control.synchronize(0)
        copies.check()
        control.fault("cudaStreamCreateWithFlags", 2)
        with pytest.raises(_core.BindError, match="^path='batch' is not possible: the stream is"):
            _core.copy_batch(*copies.arguments, 0, "batch")
        assert _core.copy_batch(*copies.arguments, 0).path == "batch"
        control.synchronize(0)


def run_threads(count, work):
    """Run a function in threads, and raise what one of them raised."""
    errors = []

    def guarded():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class TestErrors:
    @pytest.mark.parametrize("version", ["12.8", "13.0"])
    def test_everything_about_it(self, bind, stream, version):
        control = bind(version)
        on = stream()
        control.fault(BATCH, 719, nth=0)
        control.fault(DRIVERS, 719, nth=0)
        copies = Copies(3)
        with pytest.raises(_core.CudaError) as caught:
            _core.copy_batch(*copies.arguments, on.cuda_stream)
        error = caught.value
        label = REGISTRY.functions[BATCH].select(registry.parse_version(version)).label
        library = _core.info()["library"]
        assert (error.code, error.name, error.text) == (
            719, "cudaErrorLaunchFailure", "unspecified launch failure",
        )  # fmt: skip
        assert (error.function, error.variant, error.library) == (BATCH, label, library)
        assert error.index is None
        assert str(error) == (
            "cudaMemcpyBatchAsync answered 719 cudaErrorLaunchFailure (unspecified launch failure)"
            f" [prototype of {label}, {library}]"
        )
        assert last_error() == 0
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is _core.CudaError
        assert str(again) == str(error) and vars(again) == vars(error)

    @pytest.mark.parametrize("version", FORMS)
    @pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 256])
    def test_the_copy_is_named_over_the_whole_request(self, bind, stream, version, batch_size):
        """By failIdx on 12.x, through the driver's own entry point on 13.x."""
        control = bind(version)
        on = stream()
        copies = Copies(8)
        copies.sizes[:] = 16
        block = np.zeros(64, np.uint8)
        control.mark_device(block.ctypes.data, 64)
        copies.dsts[5] = block.ctypes.data + 56
        control.record()
        with pytest.raises(_core.CudaError) as caught:
            _core.copy_batch(*copies.arguments, on.cuda_stream, batch_size=batch_size)
        assert caught.value.index == 5
        assert caught.value.function == BATCH
        assert " at copy 5 [" in str(caught.value)
        assert pickle.loads(pickle.dumps(caught.value)).index == 5
        assert last_error() == 0
        on.synchronize()
        copies.check(made=range(5))
        assert len(control.calls(DRIVERS)) == (version >= "13")

    def test_by_order_of_the_fault(self, bind, stream):
        control = bind("12.9")
        on = stream()
        control.fault(BATCH, 1, nth=3, fail_index=2)
        copies = Copies(20)
        with pytest.raises(_core.CudaError) as caught:
            _core.copy_batch(*copies.arguments, on.cuda_stream, batch_size=5)
        assert caught.value.index == 12
        on.synchronize()
        copies.check(made=range(12))

    def test_without_the_drivers_help_13_names_no_copy(self, bind, tmp_path, stream):
        control = bind(built(tmp_path, "13.0", DRIVERS))
        on = stream()
        control.fault(BATCH, 1, nth=1, fail_index=2)
        with pytest.raises(_core.CudaError) as caught:
            _core.copy_batch(*Copies(4).arguments, on.cuda_stream)
        assert caught.value.index is None

    def test_loop_and_strided_name_theirs(self, bind, stream):
        control = bind("13.0")
        on = stream()
        control.fault("cudaMemcpyAsync", 1, nth=4)
        copies = Copies(8)
        with pytest.raises(_core.CudaError) as caught:
            _core.copy_batch(*copies.arguments, on.cuda_stream, "loop")
        assert (caught.value.function, caught.value.index) == ("cudaMemcpyAsync", 3)
        on.synchronize()
        copies.check(made=range(3))
        control.fault("cudaMemcpy3DAsync", 12, nth=2)
        ops = strided([copies.dsts[i], 8, 1, copies.srcs[i], 8, 1, 8, 1, 1] for i in range(3))
        with pytest.raises(_core.CudaError) as caught:
            _core.copy_strided(ops, on.cuda_stream)
        assert (caught.value.function, caught.value.index) == ("cudaMemcpy3DAsync", 1)
        assert last_error() == 0
        on.synchronize()

    def test_call_raises_and_clears(self, bind):
        bind("12.9")
        with pytest.raises(_core.CudaError) as caught:
            kvsig.call("cudaSetDevice", device=7)
        assert (caught.value.code, caught.value.name) == (101, "cudaErrorInvalidDevice")
        assert last_error() == 0

    def test_an_error_that_was_there_before_stays(self, bind, stream):
        """kvsig clears what its own calls left, not what others have yet to see."""
        control = bind("13.0")
        on = stream()
        assert control.library.cudaSetDevice(99) == 101
        copies = Copies(3)
        _core.copy_batch(*copies.arguments, on.cuda_stream)
        assert last_error() == 101
        on.synchronize()


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


def python(text, before="", **environment):
    """Output of a fresh interpreter, which must succeed within a minute."""
    done = subprocess.run(
        [sys.executable, "-c", before + "\n" + textwrap.dedent(text)],
        capture_output=True, text=True, timeout=60,
        cwd=environment.pop("cwd", PACKAGE.parent),
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestImport:
    def test_touches_no_cuda_and_no_torch(self):
        text = python(
            """
            import sys
            import kvsig._core
            maps = open("/proc/self/maps").read()
            assert "libcuda" not in maps, maps
            assert "torch" not in sys.modules
            print(kvsig._core.loaded_cudarts())
            """,
            KVSIG_CUDART="/nonexistent/libcudart.so.12",
        )
        assert text == "[]\n"

    def test_an_edited_registry_says_rebuild(self, tmp_path):
        package = tmp_path / "kvsig"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("_emulated", "*.c"))
        toml = package / "signatures.toml"
        text = toml.read_text()
        edited = text.replace("size_t numAttrs", "unsigned int numAttrs", 1)
        assert edited != text
        toml.write_text(edited)
        done = subprocess.run(
            [sys.executable, "-c", "import kvsig._core"], cwd=tmp_path, text=True,
            capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1] == (
            f"ImportError: {toml} is not the registry that this extension was built from;"
            " rebuild with: python setup.py build_ext --inplace"
            " (or, for an installed package: pip install --force-reinstall --no-deps .)"
        )


class TestFinding:
    @pytest.mark.parametrize(
        ("spec", "text"),
        [
            (
                "/nonexistent/libcudart.so.12",
                "KVSIG_CUDART='/nonexistent/libcudart.so.12': there is no such file; give the path"
                " of a libcudart, or emulated:VERSION, such as emulated:12.9",
            ),
            ("emulated:10.2", "no emulated CUDA runtime serves version 10.2"),
            ("emulated:twelve", "KVSIG_CUDART='emulated:twelve'"),
            ("libm.so.6", "libm.so.6 is no CUDA runtime (KVSIG_CUDART=libm.so.6): it does not have"
             " cudaRuntimeGetVersion"),
            ("libnothing.so", "libnothing.so cannot be loaded (KVSIG_CUDART=libnothing.so):"),
            ("libnothing.so", "; give the path of a libcudart, or emulated:VERSION, such as"
             " emulated:12.9"),
        ],
    )  # fmt: skip
    def test_what_is_no_runtime_is_refused(self, monkeypatch, spec, text):
        _core.rebind(None)
        monkeypatch.setenv("KVSIG_CUDART", spec)
        with pytest.raises(_core.BindError) as caught:
            _core.bind()
        assert text in str(caught.value)

    def test_the_environment_chooses(self):
        text = python(
            "import json, kvsig._core as c; print(json.dumps(c.info()))",
            KVSIG_CUDART="emulated:12.9/13.0",
        )
        info = json.loads(text)
        assert (info["runtime_version"], info["driver_version"]) == (12090, 13000)
        assert info["emulated"] is True and info["found"] == "KVSIG_CUDART=emulated:12.9/13.0"
        assert info["libraries"] == [] and info["warnings"] == []
        assert [row["name"] for row in info["functions"]] == list(REGISTRY.functions)
        for row in info["functions"]:
            if row["status"] == "bound":
                assert row["address"] and row["variant"]


class TestRoutes:
    def rows(self):
        return {row["name"]: row for row in _core.info()["functions"]}

    def test_older_runtime_over_a_new_driver_batches_through_the_driver(self, bind, stream):
        control = bind("12.6/13.0")
        on = stream()
        copies = Copies(300)
        control.record()
        report = _core.copy_batch(*copies.arguments, on.cuda_stream, "batch")
        on.synchronize()
        copies.check()
        assert report == _core.Report("batch", None, 300, 2, int(copies.sizes.sum()))
        first, second = control.calls(DRIVERS)
        assert [a["name"] for a in first["arguments"]] == [
            p.name for p in REGISTRY.functions[DRIVERS].variants[-1].params
        ]
        values = {a["name"]: a["value"] for a in second["arguments"]}
        assert values["dsts"] == copies.dsts.ctypes.data + 256 * 8
        assert values["count"] == 44 and values["hStream"] == on.cuda_stream
        assert second["observed"]["attributes"][0]["bytes"] == "01000000" + "00" * 20
        info = _core.info()
        assert info["route"] == "driver"
        assert info["batch"] == {
            "path": "batch",
            "why": "cuMemcpyBatchAsync of the driver, pinned at 12.8: libcudart 12.6 has no batch"
            " function",
        }
        row = self.rows()[DRIVERS]
        assert row["pinned"] == "12.8" and row["status"] == "bound" and row["address"]
        assert self.rows()[BATCH]["status"] == "absent"
        assert self.rows()[BATCH]["why"] == "12.6 is older than 12.8"

    def test_the_lookup_is_asked_for_the_pinned_version(self, bind):
        control = bind("12.6/13.0")
        _core.rebind("emulated:12.6/13.0")
        control.record()
        _core.bind()
        (call,) = control.calls("cuGetProcAddress")
        values = {a["name"]: a["value"] for a in call["arguments"]}
        assert values["cudaVersion"] == 12080 and values["flags"] == 0

    def test_the_drivers_errors_name_the_copy(self, bind, stream):
        control = bind("12.6/13.0")
        on = stream()
        control.fault(DRIVERS, 1, nth=2, fail_index=1)
        copies = Copies(8)
        with pytest.raises(_core.CudaError) as caught:
            _core.copy_batch(*copies.arguments, on.cuda_stream, batch_size=4)
        error = caught.value
        assert (error.function, error.index, error.variant) == (DRIVERS, 5, "12.8 and later")
        on.synchronize()
        copies.check(made=range(5))

    @pytest.mark.parametrize("code", [801, 36])
    def test_the_driver_refuses(self, bind, stream, code):
        control = bind("12.6/13.0")
        on = stream()
        control.fault(DRIVERS, code)
        copies = Copies(8)
        report = _core.copy_batch(*copies.arguments, on.cuda_stream)
        assert report.path == "loop"
        assert report.reason.startswith(f"cuMemcpyBatchAsync answered {code} (cudaError")
        on.synchronize()
        copies.check()
        assert _core.copy_batch(*copies.arguments, on.cuda_stream).reason == report.reason
        on.synchronize()

    @pytest.mark.parametrize(
        ("wanted", "spec", "route"),
        [
            ("auto", "12.9/13.0", "runtime"), ("auto", "13.0", "runtime"),
            ("auto", "12.6/13.0", "driver"), ("auto", "11.8/12.8", "driver"),
            ("auto", "11.8/12.6", "none"), ("runtime", "12.6/13.0", "none"),
            ("runtime", "13.0", "runtime"), ("driver", "13.0", "driver"),
            ("driver", "12.9/13.0", "driver"), ("driver", "12.9/12.6", "none"),
            ("", "13.0", "runtime"),
        ],
    )  # fmt: skip
    def test_choice(self, bind, stream, monkeypatch, wanted, spec, route):
        monkeypatch.setenv("KVSIG_ROUTE", wanted)
        control = bind(spec)
        on = stream()
        assert _core.info()["route"] == route
        copies = Copies(5)
        control.record()
        report = _core.copy_batch(*copies.arguments, on.cuda_stream)
        on.synchronize()
        copies.check()
        assert report.path == ("loop" if route == "none" else "batch")
        assert len(control.calls(BATCH)) == (route == "runtime")
        assert len(control.calls(DRIVERS)) == (route == "driver")

    def test_legacy_stream_through_the_driver(self, bind):
        control = bind("12.6/13.0")
        copies = Copies(5)
        assert _core.copy_batch(*copies.arguments, 0).path == "batch"
        control.synchronize(0)
        copies.check()

    def test_driver_route_without_the_function(self, bind, tmp_path, stream, monkeypatch):
        monkeypatch.setenv("KVSIG_ROUTE", "driver")
        path = built(tmp_path, "13.0", DRIVERS)
        bind(path)
        on = stream()
        copies = Copies(2)
        report = _core.copy_batch(*copies.arguments, on.cuda_stream)
        assert report.reason == (
            f"KVSIG_ROUTE=driver, and cuMemcpyBatchAsync is not bound: cuGetProcAddress of {path}"
            " does not give cuMemcpyBatchAsync of 12.8: it answered 500, with status 1"
            " (CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND)"
        )
        on.synchronize()
        copies.check()

    def test_nonsense(self, monkeypatch):
        _core.rebind("emulated:13.0")
        monkeypatch.setenv("KVSIG_ROUTE", "nonsense")
        with pytest.raises(_core.BindError) as caught:
            _core.bind()
        assert str(caught.value) == "KVSIG_ROUTE='nonsense': use auto, runtime or driver"
        _core.rebind(None)


class TestReport:
    def test_adds_up(self):
        batch = _core.Report("batch", None, 3, 1, 30)
        loop = _core.Report("loop", "why", 2, 2, 20)
        assert batch + loop == _core.Report("batch+loop", "why", 5, 3, 50)
        assert batch + loop + batch == _core.Report("batch+loop", "why", 8, 4, 80)
        assert _core.Report() + loop == loop and loop + _core.Report() == loop
        assert pickle.loads(pickle.dumps(loop)) == loop
        assert hash(loop) == hash(loop + _core.Report())
        assert repr(loop) == "Report(path='loop', copies=2, calls=2, bytes=20, reason='why')"
        assert loop != 3
        with pytest.raises(TypeError):
            loop + 3
