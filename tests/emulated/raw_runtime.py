"""The functions of an emulated runtime through ctypes, for the tests of this folder."""

import ctypes
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

from kvsig import emulated

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


def numbers(count, start=0):
    return np.arange(start, start + count, dtype=np.uint64)


def at(array, index=0):
    return array.ctypes.data + int(index) * array.itemsize


def run_process(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
