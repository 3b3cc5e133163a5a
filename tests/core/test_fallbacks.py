"""Where batches cannot be used: every byte still moves, with a reason and no last error."""

from __future__ import annotations

import numpy as np
import pytest
from core_help import BATCH, DRIVERS, REGISTRY, Copies, built, last_error, strided
from future import NEXT_TEXT, last

import kvsig
from kvsig import _core, registry


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

    @pytest.mark.known_failure("no-function")
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

    @pytest.mark.known_failure("driver-too-old")
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

    @pytest.mark.known_failure("driver-too-old")
    def test_older_driver(self, bind, stream):
        bind("12.9/12.6")
        self.falls_back("the driver is 12.6, and batches need 12.8", stream())
        assert _core.driver_version() == 12060 and _core.runtime_version() == 12090

    @pytest.mark.known_failure("capture")
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

    @pytest.mark.known_failure("newer-than-known")
    def test_newer_than_every_range(self, bind, stream):
        with pytest.warns(RuntimeWarning) as seen:
            bind(NEXT_TEXT)
            self.falls_back(
                f"libcudart {NEXT_TEXT} is newer than every range; the last is {last(BATCH)}",
                stream(),
            )
        path = _core.info()["library"]
        text = (
            f"libcudart {NEXT_TEXT} ({path}) is newer than every prototype of cudaMemcpyBatchAsync"
            " that kvsig knows, so pages are copied one by one. Add a"
            f' [[function.cudaMemcpyBatchAsync.variant]] with since = "{NEXT_TEXT}" to'
            f" {registry.PATH} and rebuild"
        )
        assert [str(w.message) for w in seen] == [text]
        assert _core.info()["warnings"] == [text]

    def test_newer_than_every_range_strided_goes_row_by_row(self, bind, stream):
        with pytest.warns(RuntimeWarning):
            bind(NEXT_TEXT)
        on = stream()
        source, target = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
        ops = strided([[target.ctypes.data, 8, 4, source.ctypes.data, 16, 4, 8, 4, 1]])
        report = _core.copy_strided(ops, on.cuda_stream)
        on.synchronize()
        reason = (
            f"cudaMemcpy3DAsync is not bound: {NEXT_TEXT} is newer than every range; the last is"
            f" {last('cudaMemcpy3DAsync')}"
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
    @pytest.mark.checkout
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

    @pytest.mark.checkout
    def test_one_of_another_library_is_not_taken(self, bind, tmp_path, monkeypatch):
        """The loader also looks at what a library depends on: there, at another libcudart."""
        whole = built(tmp_path / "whole", "13.0")
        monkeypatch.setenv("KVSIG_EMULATED_CFLAGS", f"-Wl,--no-as-needed {whole}")
        partial = built(tmp_path / "partial", "13.0", BATCH)
        bind(partial)
        row = next(row for row in _core.info()["functions"] if row["name"] == BATCH)
        assert (row["status"], row["why"]) == (
            "missing", f"{BATCH} of 13.0 comes from {whole}, not from {partial}",
        )  # fmt: skip

    @pytest.mark.checkout
    def test_calling_it_by_name_says_so(self, bind, tmp_path):
        path = built(tmp_path, "13.0", "cudaMemPrefetchAsync")
        bind(path)
        with pytest.raises(_core.BindError) as caught:
            kvsig.call("cudaMemPrefetchAsync", devPtr=1, count=1, location=(1, 0), stream=2)
        assert str(caught.value) == (
            f"cudaMemPrefetchAsync is not bound: {path} is 13.0, in the range 13.0 to before 14.0,"
            " but does not have cudaMemPrefetchAsync"
        )
        row = next(r for r in _core.info()["functions"] if r["name"] == "cudaMemPrefetchAsync")
        assert row["status"] == "missing" and row["address"] is None


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

    @pytest.mark.known_failure("pinned-lookup")
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
        assert report.reason.startswith(f"cuMemcpyBatchAsync answered {code} (CUDA_ERROR_")
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

    @pytest.mark.checkout
    def test_driver_route_without_the_function(self, bind, tmp_path, stream, monkeypatch):
        monkeypatch.setenv("KVSIG_ROUTE", "driver")
        path = built(tmp_path, "13.0", DRIVERS)
        bind(path)
        on = stream()
        copies = Copies(2)
        report = _core.copy_batch(*copies.arguments, on.cuda_stream)
        assert report.reason == (
            f"KVSIG_ROUTE=driver, and cuMemcpyBatchAsync is not bound: cuGetProcAddress of {path}"
            " does not give cuMemcpyBatchAsync of 12.8: it answered 500"
            " (CUDA_ERROR_NOT_FOUND), with status 1 (CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND)"
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
