"""Kernels: compiled by the stand-in for NVRTC, loaded, launched in stream order, captured."""

import ctypes
import time

import numpy as np
import pytest
from raw_runtime import at, i32, u64

SOURCE = b"""extern "C" __global__ void __launch_bounds__(32)
kvsig_emulated_add(unsigned *numbers, unsigned value, unsigned long long count) {}
"""
NAME = b"kvsig_emulated_add"
EQ, AND, NOR = 1, 2, 3


class Launcher:
    def __init__(self, runtime):
        self.runtime = runtime
        _, self.image = compiled(runtime, SOURCE)
        self.module = runtime.new("cuModuleLoadData", self.image)
        self.function = runtime.new("cuModuleGetFunction", self.module, NAME)

    def __call__(self, numbers, value, stream, grid=1, block=32, shared=0):
        values = [u64(at(numbers)), ctypes.c_uint32(value), u64(len(numbers))]
        params = (ctypes.c_void_p * 3)(*[ctypes.addressof(v) for v in values])
        code = self.runtime.call(
            "cuLaunchKernel", self.function, grid, 1, 1, block, 1, 1, shared, stream, params, None
        )
        for v in values:  # a launch has copied them
            v.value = 0
        return code


def compiled(runtime, source, *options):
    program, size = u64(), u64()
    lib = runtime.lib
    assert lib.nvrtcCreateProgram(ctypes.byref(program), source, b"a.cu", 0, None, None) == 0
    given = options or (b"--gpu-architecture=sm_90",)
    code = lib.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    which = "CUBIN" if code == 0 else "ProgramLog"
    assert getattr(lib, f"nvrtcGet{which}Size")(program, ctypes.byref(size)) in (0, 4)
    text = ctypes.create_string_buffer(max(size.value, 1))
    getattr(lib, f"nvrtcGet{which}")(program, text)
    assert lib.nvrtcDestroyProgram(ctypes.byref(program)) == 0
    return code, text.value


@pytest.fixture
def launcher(runtime):
    return Launcher(runtime)


class TestLaunch:
    def test_in_stream_order_with_the_values_of_the_call(self, runtime, launcher):
        numbers, stream = np.arange(8, dtype=np.uint32), runtime.stream()
        runtime.control.hold(stream)
        assert launcher(numbers, 5, stream) == 0
        assert launcher(numbers, 2, stream) == 0
        assert numbers.tolist() == list(range(8))
        runtime.control.release(stream)
        assert runtime.call("cudaStreamSynchronize", stream) == 0
        assert numbers.tolist() == list(range(7, 15))
        assert runtime.control.counter("launches") == 2

    def test_captured_and_replayed(self, runtime, launcher):
        numbers, stream = np.zeros(4, np.uint32), runtime.stream()
        assert runtime.call("cudaStreamBeginCapture", stream, 0) == 0
        assert launcher(numbers, 3, stream) == 0
        graph = runtime.new("cudaStreamEndCapture", before=[stream])
        runnable = runtime.new("cudaGraphInstantiate", graph, 0)
        assert not numbers.any()
        for _ in range(3):
            assert runtime.call("cudaGraphLaunch", runnable, stream) == 0
        runtime.call("cudaStreamSynchronize", stream)
        assert numbers.tolist() == [9] * 4
        runtime.call("cudaGraphExecDestroy", runnable)
        runtime.call("cudaGraphDestroy", graph)

    def test_cluster_of_a_launch_with_attributes_is_recorded(self, runtime, launcher):
        numbers, stream = np.zeros(4, np.uint32), runtime.stream()
        values = [u64(at(numbers)), ctypes.c_uint32(1), u64(4)]
        params = (ctypes.c_void_p * 3)(*[ctypes.addressof(v) for v in values])
        attribute = np.zeros(18, np.uint32)
        attribute[[0, 2, 3, 4]] = 4, 4, 1, 1
        config = np.zeros(14, np.uint32)
        config[:6] = 4, 1, 1, 32, 1, 1
        config[8:12].view(np.uint64)[:] = stream, at(attribute)
        config[12] = 1
        runtime.control.record()
        launch = (at(config), launcher.function, params, None)
        assert runtime.call("cuLaunchKernelEx", *launch) == 0
        runtime.call("cudaStreamSynchronize", stream)
        assert numbers.tolist() == [1] * 4
        (call,) = runtime.control.calls("cuLaunchKernelEx")
        seen = call["observed"]
        assert (seen["kernel"], seen["grid"], seen["cluster"]) == (
            NAME.decode(), [4, 1, 1], [4, 1, 1],
        )  # fmt: skip
        assert seen["parameters"][1] == "01000000"
        config[0] = 6  # not whole clusters
        assert runtime.call("cuLaunchKernelEx", *launch) == 1

    @pytest.mark.parametrize(
        "shape", [{"grid": 0}, {"block": 0}, {"block": 1025}, {"shared": 64 << 10}], ids=str
    )
    def test_shapes_that_no_device_takes(self, runtime, launcher, shape):
        numbers, stream = np.zeros(4, np.uint32), runtime.stream()
        assert launcher(numbers, 1, stream, **shape) == 1
        runtime.call("cudaStreamSynchronize", stream)
        assert not numbers.any()

    def test_attributes_of_a_function(self, runtime, launcher):
        value, numbers = i32(), np.zeros(4, np.uint32)
        assert runtime.call("cuFuncGetAttribute", ctypes.byref(value), 4, launcher.function) == 0
        assert value.value == 32
        assert runtime.call("cuFuncSetAttribute", launcher.function, 8, 64 << 10) == 0
        assert launcher(numbers, 1, 0, shared=64 << 10) == 0
        runtime.call("cudaStreamSynchronize", 0)
        assert numbers.all()
        assert runtime.call("cuFuncSetAttribute", launcher.function, 4, 1) == 1

    def test_modules(self, runtime, launcher):
        out = u64()
        lost = (ctypes.byref(out), launcher.module, b"no_such_kernel")
        assert runtime.call("cuModuleGetFunction", *lost) == 500
        assert runtime.call("cuModuleLoadData", ctypes.byref(out), b"\x7fELF") == 200
        _, empty = compiled(runtime, b"__global__ void kvsig_emulated_add2() {}")
        module = runtime.new("cuModuleLoadData", empty)
        assert runtime.call("cuModuleGetFunction", ctypes.byref(out), module, NAME) == 500
        for found in (module, launcher.module):
            assert runtime.call("cuModuleUnload", found) == 0


class TestCompiler:
    @pytest.mark.parametrize(
        ("source", "options", "code", "log"),
        [
            (SOURCE, [b"-arch=sm_80", b"--std=c++17"], 0, None),
            (SOURCE, [b"-arch=sm_999"], 5, b"nvrtc: error: invalid value for option: -arch=sm_999"),
            (SOURCE, [b"-arch=native"], 5, b"nvrtc: error: invalid value for option"),
            (b"int a;\n  #error no\n", [b"-arch=sm_90"], 6, b"a.cu(2): error: #error no"),
        ],
    )
    def test_answers(self, runtime, source, options, code, log):
        found, text = compiled(runtime, source, *options)
        assert found == code
        assert log is None or text.startswith(log)

    def test_a_virtual_architecture_has_no_cubin(self, runtime):
        assert compiled(runtime, SOURCE, b"-arch=compute_90") == (0, b"")

    def test_version_and_architectures(self, runtime):
        major, minor, count = i32(), i32(), i32()
        runtime.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        assert major.value * 1000 + minor.value * 10 == runtime.version
        runtime.lib.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        assert runtime.lib.nvrtcGetSupportedArchs(numbers) == 0
        assert list(numbers) == sorted(numbers) and 90 in numbers
        assert (70 in numbers) == (runtime.version < 13000)
        text = runtime.lib.nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        assert text(6) == b"NVRTC_ERROR_COMPILATION"


class TestWords:
    def wait(self, runtime, stream, word, value, flags=0):
        return runtime.call("cuStreamWaitValue32_v2", stream, at(word), value, flags)

    @pytest.mark.parametrize(
        ("flags", "value", "before", "after"),
        [(0, 5, 4, 6), (0, 1, 2**32 - 1, 1), (EQ, 5, 6, 5), (AND, 4, 3, 6),
         (NOR, 0xF0, 2**32 - 1, 2**32 - 2)],
    )  # fmt: skip
    def test_a_wait_keeps_its_stream_and_no_other(self, runtime, flags, value, before, after):
        word = np.array([before], np.uint32)
        src, dst = np.array([7, 8], np.uint64), np.zeros(2, np.uint64)
        first, second = runtime.stream(), runtime.stream()
        assert self.wait(runtime, first, word, value, flags) == 0
        runtime.copy(at(dst), at(src), 8, first)
        runtime.copy(at(dst, 1), at(src, 1), 8, second)
        assert runtime.call("cudaStreamSynchronize", second) == 0
        time.sleep(0.02)
        assert dst.tolist() == [0, 8]
        assert runtime.call("cudaStreamQuery", first) == 600
        assert runtime.call("cuStreamWriteValue32_v2", second, at(word), after, 0) == 0
        assert runtime.call("cudaStreamSynchronize", first) == 0
        assert dst.tolist() == [7, 8]

    def test_reset_ends_waits(self, runtime):
        word, stream = np.zeros(1, np.uint32), runtime.stream()
        assert self.wait(runtime, stream, word, 1) == 0
        runtime.control.reset()
        assert runtime.call("cudaStreamSynchronize", stream) == 0

    def test_wrong_words(self, runtime):
        word, stream = np.zeros(2, np.uint32), runtime.stream()
        wait = ("cuStreamWaitValue32_v2", stream)
        assert runtime.call(*wait, 0, 1, 0) == 1
        assert runtime.call(*wait, at(word) + 1, 1, 0) == 1
        assert runtime.call(*wait, at(word), 1, 8) == 1
        assert runtime.call("cuStreamWaitValue32", stream, at(word), 0, 0) == 801
