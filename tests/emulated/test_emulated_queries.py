"""Versions, devices, attributes and errors."""

import ctypes
import threading

import pytest
from raw_runtime import i32


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
