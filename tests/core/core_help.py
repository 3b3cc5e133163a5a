"""What the tests of the core share."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np

import kvsig
from kvsig import _core, emulated, registry

REGISTRY = registry.load()
PACKAGE = Path(_core.__file__).parent
BATCH, DRIVERS = "cudaMemcpyBatchAsync", "cuMemcpyBatchAsync"
FORMS = ["12.8", "12.9", "13.0", "13.2"]
LEGACY = "the stream is the legacy default stream, which batches refuse"


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


def built(tmp_path, version, *without):
    return str(emulated.build(REGISTRY, version, tmp_path / version, without=without))


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
