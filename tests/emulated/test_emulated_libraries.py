"""Finding and building the libraries, and what their processes do."""

import ctypes
import textwrap
from pathlib import Path

import numpy as np
import pytest
from future import AFTER_TEXT, NEXT, NEXT_TEXT
from raw_runtime import STREAM_ORDER, Attributes, Runtime, at, i32, numbers, run_process, u64

from kvsig import emulated, registry


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

    @pytest.mark.checkout
    def test_symbol_can_be_left_out(self, tmp_path):
        path = emulated.build(registry.load(), "13.0", tmp_path, without=["cudaMemcpyBatchAsync"])
        library = ctypes.CDLL(str(path))
        assert not hasattr(library, "cudaMemcpyBatchAsync")
        assert hasattr(library, "cudaMemcpyAsync")

    def test_build_without_sources(self, tmp_path, monkeypatch):
        monkeypatch.setattr(emulated.libraries, "SOURCES", tmp_path / "csrc")
        with pytest.raises(RuntimeError, match="is not there: it is part of kvsig's source tree"):
            emulated.build(registry.load(), "13.0", tmp_path)

    @pytest.mark.parametrize(
        ("compiler", "message"),
        [("no-such-compiler", "no C compiler to build"), ("false", r"false .* failed:")],
    )
    @pytest.mark.checkout
    def test_build_without_compiler(self, tmp_path, monkeypatch, compiler, message):
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(RuntimeError, match=message):
            emulated.build(registry.load(), "13.0", tmp_path)

    @pytest.mark.checkout
    def test_prototype_of_another_order_needs_no_other_behaviour(self, tmp_path):
        """A form of the next major drops two parameters, adds one, in another order."""
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

    @pytest.mark.checkout
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
