"""Compiles and calls ``c_baseline.c``, the hand-written copies that kvsig is measured against."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

import kvsig
from kvsig import registry

SOURCE = Path(__file__).resolve().parent / "c_baseline.c"
U64 = npt.NDArray[np.uint64]

ORDER_STREAM, ORDER_ANY = 1, 3
FLAG_OVERLAP = 1


def compiler() -> list[str]:
    """The C compiler, as the start of a command."""
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if found is None:
        raise RuntimeError("no C compiler: install one, or name it in CC")
    return found.split()


def build(folder: Path) -> Path:
    """Compile the shared library into a folder."""
    library = folder / "libkvsig-baseline.so"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*compiler(), *flags, str(SOURCE), "-o", str(library)], check=True)
    return library


def pointer(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def handles(streams: list[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(streams))(*streams)


class Baseline:
    """The C functions, on the CUDA functions that kvsig has bound.

    Each method returns the host's time in nanoseconds and raises on an error of CUDA. Arrays
    are C-contiguous uint64 and must outlive the call, not the copies.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.library = ctypes.CDLL(str(build(Path(folder))))
        info = kvsig.info()
        rows = {row["name"]: row for row in info["functions"]}
        self.address = {name: row["address"] or 0 for name, row in rows.items()}
        variant = registry.load().functions["cudaMemcpyBatchAsync"].select(info["runtime_version"])
        self.parameters = len(variant.params) if variant else 0

    @property
    def has_batch(self) -> bool:
        return bool(self.address["cudaMemcpyBatchAsync"]) and self.parameters in (8, 9)

    def _call(self, name: str, *arguments: object) -> int:
        elapsed = ctypes.c_int64()
        code = getattr(self.library, name)(*arguments, ctypes.byref(elapsed))
        if code != 0:
            kvsig.call("cudaGetLastError")
            raise RuntimeError(f"{name}: CUDA answered {code}")
        return elapsed.value

    def _function(self, name: str) -> ctypes.c_void_p:
        if not self.address[name]:
            raise RuntimeError(f"{name} is not there")
        return ctypes.c_void_p(self.address[name])

    def batch(
        self,
        dsts: U64,
        srcs: U64,
        sizes: U64,
        streams: list[int],
        per_call: int = 256,
        order: int = ORDER_STREAM,
        flags: int = 0,
    ) -> int:
        return self._call(
            "baseline_batch",
            self._function("cudaMemcpyBatchAsync"),
            ctypes.c_int(self.parameters),
            pointer(dsts),
            pointer(srcs),
            pointer(sizes),
            ctypes.c_size_t(len(dsts)),
            ctypes.c_size_t(per_call),
            ctypes.c_int(order),
            ctypes.c_uint(flags),
            handles(streams),
            ctypes.c_size_t(len(streams)),
        )

    def loop(self, dsts: U64, srcs: U64, sizes: U64, streams: list[int]) -> int:
        return self._call(
            "baseline_loop",
            self._function("cudaMemcpyAsync"),
            pointer(dsts),
            pointer(srcs),
            pointer(sizes),
            ctypes.c_size_t(len(dsts)),
            handles(streams),
            ctypes.c_size_t(len(streams)),
        )

    def strided(self, ops: U64, streams: list[int]) -> int:
        return self._call(
            "baseline_strided",
            self._function("cudaMemcpy2DAsync"),
            pointer(ops),
            ctypes.c_size_t(len(ops)),
            handles(streams),
            ctypes.c_size_t(len(streams)),
        )

    def three_d(self, ops: U64, streams: list[int]) -> int:
        return self._call(
            "baseline_3d",
            self._function("cudaMemcpy3DAsync"),
            pointer(ops),
            ctypes.c_size_t(len(ops)),
            handles(streams),
            ctypes.c_size_t(len(streams)),
        )

    def mixed(
        self,
        dsts: U64,
        srcs: U64,
        sizes: U64,
        ops: U64,
        streams: list[int],
        per_call: int,
        strided_per_call: int,
    ) -> int:
        return self._call(
            "baseline_mixed",
            self._function("cudaMemcpyBatchAsync"),
            ctypes.c_int(self.parameters),
            pointer(dsts),
            pointer(srcs),
            pointer(sizes),
            ctypes.c_size_t(len(dsts)),
            ctypes.c_size_t(per_call),
            self._function("cudaMemcpy2DAsync"),
            pointer(ops),
            ctypes.c_size_t(len(ops)),
            ctypes.c_size_t(strided_per_call),
            handles(streams),
            ctypes.c_size_t(len(streams)),
        )

    def threads(
        self,
        dsts: U64,
        srcs: U64,
        sizes: U64,
        streams: list[int],
        per_call: int = 256,
        loop: bool = False,
    ) -> int:
        name = "cudaMemcpyAsync" if loop else "cudaMemcpyBatchAsync"
        return self._call(
            "baseline_threads",
            self._function(name),
            ctypes.c_int(0 if loop else self.parameters),
            pointer(dsts),
            pointer(srcs),
            pointer(sizes),
            ctypes.c_size_t(len(dsts)),
            ctypes.c_size_t(per_call),
            handles(streams),
            ctypes.c_size_t(len(streams)),
        )
