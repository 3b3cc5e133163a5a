"""How long this machine takes to submit a copy: in some seconds, with nothing built.

Machines differ by more than what is compared on them. 512 copies of a page by batch calls of 256,
32 times one behind the other, from C, by one thread, and by four with calls of 64: microseconds a
copy, until the last one has arrived. Only Python with NumPy, a C compiler and libcudart are needed.

    python benchmarks/submission.py [--cudart FILE] [--kib 16] [--most-load US --most-offload US]

With `--most-...` it ends with exit code 1 where neither one thread nor four are that fast, in the
median, so that a longer benchmark need not begin.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from ctypes import byref, c_int, c_int64, c_size_t, c_uint, c_void_p
from pathlib import Path

import numpy as np

COPIES, TRANSFERS, PER_CALL, THREADS = 512, 32, 256, 4
#: cudaStreamNonBlocking
NON_BLOCKING = 1


class Cuda:
    """A libcudart, by ctypes."""

    def __init__(self, path: str) -> None:
        try:
            self.library = ctypes.CDLL(path)
        except OSError as error:
            raise SystemExit(f"{error}: name a libcudart with --cudart") from None
        version = c_int()
        self.call("cudaRuntimeGetVersion", byref(version))
        self.version = version.value
        if self.version < 12080:
            raise SystemExit(f"{path} is {self.version}: batches came with 12080")
        # As in kvsig's registry: 13.0 dropped failIdx.
        self.parameters = 9 if self.version < 13000 else 8

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            raise SystemExit(f"{name} answered {code}")

    def memory(self, size: int, host: bool) -> int:
        address = c_void_p()
        if host:
            self.call("cudaHostAlloc", byref(address), c_size_t(size), c_uint(0))
        else:
            self.call("cudaMalloc", byref(address), c_size_t(size))
        assert address.value
        return address.value

    def stream(self) -> int:
        stream = c_void_p()
        self.call("cudaStreamCreateWithFlags", byref(stream), c_uint(NON_BLOCKING))
        assert stream.value
        return stream.value


def compiled(folder: Path) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("no C compiler")
    source, library = Path(__file__).with_name("c_baseline.c"), folder / "baseline.so"
    flags = ["-std=gnu11", "-O2", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cudart", default="libcudart.so.13", help="a libcudart, 12.8 or later")
    parser.add_argument("--kib", type=int, default=16, help="of a page")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--most-load", type=float, default=float("inf"), help="us per copy")
    parser.add_argument("--most-offload", type=float, default=float("inf"), help="us per copy")
    args = parser.parse_args()
    cuda = Cuda(args.cudart)
    with tempfile.TemporaryDirectory() as folder:
        baseline = compiled(Path(folder))
    function = ctypes.cast(cuda.library.cudaMemcpyBatchAsync, c_void_p)
    streams = (c_void_p * THREADS)(*(cuda.stream() for _ in range(THREADS)))
    page = args.kib << 10
    total = COPIES * TRANSFERS
    near, far = cuda.memory(total * page, False), cuda.memory(total * page, True)
    rng = np.random.default_rng(0)
    sizes = np.full(total, page, np.uint64)
    worst = 0
    print(f"runtime {cuda.version}, pages of {args.kib} KiB")
    print("us per copy: median, the best tenth")
    for way, most in (("load", args.most_load), ("offload", args.most_offload)):
        here, there = (
            (base + rng.permutation(total) * page).astype(np.uint64) for base in (near, far)
        )
        dsts, srcs = (here, there) if way == "load" else (there, here)

        def run(threads: int, dsts: object = dsts, srcs: object = srcs) -> float:
            taken = c_int64()
            begin = time.perf_counter()
            for start in range(0, total, COPIES):
                arrays = [
                    c_void_p(array[start : start + COPIES].ctypes.data)  # type: ignore[index]
                    for array in (dsts, srcs, sizes)
                ]
                if threads == 1:
                    code = baseline.baseline_batch(
                        function, c_int(cuda.parameters), *arrays, c_size_t(COPIES),
                        c_size_t(PER_CALL), c_int(1), c_uint(0), streams, c_size_t(1),
                        byref(taken),
                    )  # fmt: skip
                else:
                    code = baseline.baseline_threads(
                        function, c_int(cuda.parameters), *arrays, c_size_t(COPIES), c_size_t(64),
                        streams, c_size_t(threads), byref(taken),
                    )  # fmt: skip
                if code != 0:
                    raise SystemExit(f"cudaMemcpyBatchAsync answered {code}")
            for stream in streams:
                cuda.call("cudaStreamSynchronize", c_void_p(stream))
            return (time.perf_counter() - begin) * 1e6 / total

        found: dict[int, list[float]] = {1: [], THREADS: []}
        for _ in range(args.runs):
            for threads, values in found.items():
                run(threads)
                values.append(run(threads))
        medians = {threads: statistics.median(values) for threads, values in found.items()}
        for threads, values in found.items():
            print(
                f"{way:>8}, {threads} threads: {medians[threads]:.3f}"
                f" {np.percentile(values, 10):.3f}, {page / medians[threads] / 1e3:.1f} GB/s"
            )
        worst |= min(medians.values()) > most
    return worst


if __name__ == "__main__":
    sys.exit(main())
