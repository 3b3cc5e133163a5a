"""What CUDA refuses: the error, the copy that it names, and the last error."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from core_help import BATCH, DRIVERS, FORMS, REGISTRY, Copies, built, last_error, strided

import kvsig
from kvsig import _core, registry


class TestErrors:
    @pytest.mark.known_failure("no-index-at-all")
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

    @pytest.mark.known_failure("no-fail-index")
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

    @pytest.mark.checkout
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

    @pytest.mark.known_failure("last-error")
    def test_call_raises_and_clears(self, bind):
        bind("12.9")
        with pytest.raises(_core.CudaError) as caught:
            kvsig.call("cudaSetDevice", device=7)
        assert (caught.value.code, caught.value.name) == (101, "cudaErrorInvalidDevice")
        assert last_error() == 0

    @pytest.mark.known_failure("last-error")
    def test_an_error_that_was_there_before_stays(self, bind, stream):
        """kvsig clears what its own calls left, not what others have yet to see."""
        control = bind("13.0")
        on = stream()
        assert control.library.cudaSetDevice(99) == 101
        copies = Copies(3)
        _core.copy_batch(*copies.arguments, on.cuda_stream)
        assert last_error() == 101
        on.synchronize()


#: Codes about the arguments of a call, and codes that tell a state of the process, of the device
#: or of the stream.
ARGUMENTS, STATES = (1, 12), (2, 3, 4, 35, 46, 100, 400, 700, 709, 719, 802, 804, 807, 999)


class TestWhatIsToBlame:
    """A copy is named only by errors that are about what a call was given."""

    @pytest.mark.known_failure("blamed-page")
    @pytest.mark.parametrize("code", ARGUMENTS + STATES)
    @pytest.mark.parametrize("path", ["batch", "loop", "strided"])
    @pytest.mark.parametrize("spec", ["12.9", "13.0", "12.6/13.0"])
    def test_by_code(self, bind, stream, spec, path, code):
        control, on, copies = bind(spec), stream(), Copies(8)
        batch = DRIVERS if spec.startswith("12.6") else BATCH
        if path == "strided":
            control.fault("cudaMemcpy3DAsync", code, nth=3)
            rows = zip(copies.dsts, copies.srcs, strict=True)
            ops = strided([dst, 8, 1, src, 8, 1, 8, 1, 1] for dst, src in rows)
            with pytest.raises(_core.CudaError) as caught:
                _core.copy_strided(ops, on.cuda_stream)
        else:
            if path == "loop":
                control.fault("cudaMemcpyAsync", code, nth=3)
            else:
                control.fault(batch, code, fail_index=2)
                if batch == BATCH:
                    control.fault(DRIVERS, code, fail_index=2)
            with pytest.raises(_core.CudaError) as caught:
                _core.copy_batch(*copies.arguments, on.cuda_stream, path)
        assert caught.value.code == code
        assert caught.value.index == (2 if code in ARGUMENTS else None)
        assert ("at copy 2" in str(caught.value)) == (code in ARGUMENTS)
        assert last_error() == 0

    def test_a_state_is_not_asked_for_again(self, bind, stream):
        """Where no copy is to blame, the call is not made again to find one."""
        control, on = bind("13.0"), stream()
        control.fault(BATCH, 700)
        control.record()
        with pytest.raises(_core.CudaError):
            _core.copy_batch(*Copies(4).arguments, on.cuda_stream)
        assert control.calls(DRIVERS) == []

    @pytest.mark.known_failure("wrong-call")
    @pytest.mark.parametrize("nth", [1, 2])
    @pytest.mark.parametrize("function", ["cudaEventRecord", "cudaStreamWaitEvent"])
    def test_of_the_way_around_the_legacy_stream_name_the_call_that_failed(
        self, bind, function, nth
    ):
        control = bind("13.0")
        _core.copy_batch(*Copies(1).arguments, 0)
        control.fault(function, 400, nth=nth)
        with pytest.raises(_core.CudaError) as caught:
            _core.copy_batch(*Copies(4).arguments, 0)
        assert (caught.value.function, caught.value.code) == (function, 400)
        assert caught.value.index is None and last_error() == 0

    @pytest.mark.known_failure("leaked-stream")
    @pytest.mark.parametrize("nth", [1, 2])
    def test_a_way_around_that_is_half_made_is_given_back(self, bind, nth):
        control = bind("13.0")
        control.record()
        for _ in range(3):
            control.fault("cudaEventCreateWithFlags", 2, nth=nth)
            report = _core.copy_batch(*Copies(4).arguments, 0)
            assert report.path == "loop" and "there is no way around" in report.reason
        control.synchronize(0)
        made = len(control.calls("cudaStreamCreateWithFlags"))
        assert made == 3 and len(control.calls("cudaStreamDestroy")) == made
        assert len(control.calls("cudaEventDestroy")) == 3 * (nth - 1)
        # The next one is made, for nothing fails any more.
        assert _core.copy_batch(*Copies(4).arguments, 0).path == "batch"

    @pytest.mark.known_failure("lost-notes")
    def test_notes_outlive_a_pickle(self):
        error = _core.CudaError(1, "name", "text", "function", "variant", "library", 7)
        assert pickle.loads(pickle.dumps(error)).index == 7
        error.add_note("the copy that failed begins at page 3")
        error.add_note("and one more")
        error.addresses = 4096, 8192  # as a transfer says of the copy that failed
        again = pickle.loads(pickle.dumps(error))
        assert again.__notes__ == error.__notes__ and str(again) == str(error)
        assert again.addresses == (4096, 8192)
        again.add_note("of its own")
        assert len(error.__notes__) == 2
