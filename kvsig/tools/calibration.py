"""Measures what copies cost on this machine, for the planner: what ``kvsig calibrate`` runs.

Measuring (`measure`) knows nothing of the figures; fitting them is the cost model's own affair
(`kvsig.tools.fitting`), and `compare` says what the figures are worth.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvsig import _core
from kvsig.planning.costs import CostModel
from kvsig.tools import fitting
from kvsig.tools.cells import WAYS
from kvsig.tools.fitting import Cell, Sample
from kvsig.tools.measuring import time_once
from kvsig.tools.report import Progress
from kvsig.tools.runtimes import real_device

__all__ = ["Meter", "changes", "compare", "measure"]

U64 = npt.NDArray[np.uint64]
#: Bytes of each side that copies are scattered over; no cell moves more than half of it.
SPAN = 512 << 20
LEAST_RUNS, MOST_RUNS = 3, 15


class Meter:
    """Measures cells on the GPU: scattered copies of pinned memory, on a stream of its own.

    Raises
    ------
    ValueError
        On the emulated runtime, or where torch sees no GPU.
    """

    def __init__(self) -> None:
        if not real_device():
            raise ValueError(
                "the CUDA runtime in use is the emulated one, whose times say nothing about a GPU:"
                " calibrate on a machine with a GPU, without KVSIG_CUDART=emulated:VERSION"
            )
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream(self.device)
        self.near = torch.empty(SPAN // 8, dtype=torch.int64, device=self.device)
        self.near.random_(-(2**63), None)
        self.far = torch.empty(SPAN // 8, dtype=torch.int64, pin_memory=True)
        self.far.copy_(self.near)
        torch.cuda.synchronize(self.device)
        self.rng = np.random.default_rng(0)

    def places(self, span: int, width: int, count: int) -> U64:
        """Offsets of so many places of one width in a span, random and apart."""
        return self.rng.permutation(span // width)[:count].astype(np.uint64) * np.uint64(width)

    def submitter(self, cell: Cell) -> Callable[[], Any]:
        """Make the call of a cell; a strided copy is of all layers of a page."""
        width, rows, count = cell.width, cell.rows, cell.copies
        pitch = SPAN // rows // width * width  # from one layer to the next on the device
        if pitch < count * width:
            raise ValueError(f"{cell} does not fit into {SPAN} bytes")
        near = self.near.data_ptr() + self.places(pitch, width, count)
        far = self.far.data_ptr() + self.places(SPAN, width * rows, count)
        ends = [(near, pitch), (far, width)]
        if cell.direction == "offload":
            ends.reverse()
        (to, to_pitch), (of, of_pitch) = ends
        handle = int(self.stream.cuda_stream)
        if cell.method != "strided":
            return lambda: _core.copy_batch(to, of, width, handle, cell.method, cell.batch_size)
        ops = np.empty((count, 9), np.uint64)
        columns: tuple[Any, ...] = (to, to_pitch, rows, of, of_pitch, rows, width, rows, 1)
        for column, values in enumerate(columns):
            ops[:, column] = values
        return lambda: _core.copy_strided(ops, handle)

    def run(self, submit: Callable[[], Any]) -> tuple[float, float]:
        """Time one submission: microseconds until the end, and until the call had returned."""
        self.stream.synchronize()
        ms, host_ms = time_once(self.stream, submit)
        return ms * 1e3, host_ms * 1e3


def measure(seconds: float = 12.0) -> tuple[str, list[Sample]]:
    """Measure what copies cost on the current GPU: its name, and medians of every cell.

    Every cell is timed three times at least, which takes a few seconds.
    """
    meter = Meter()
    deadline = time.monotonic() + seconds
    batches = _core.batch_refusal(int(meter.stream.cuda_stream)) is None
    cells = [cell for cell in fitting.cells() if batches or cell.method != "batch"]
    calls = [meter.submitter(cell) for cell in cells]
    runs: list[list[tuple[float, float]]] = [[] for _ in cells]
    for submit in calls:
        meter.run(submit)
    gc.collect()
    gc.disable()
    try:
        with Progress("kvsig calibrate") as progress:
            # Round after round over all cells, so that a machine that drifts does so for all.
            for turn in range(MOST_RUNS):
                begin = time.monotonic()
                for submit, times in zip(calls, runs, strict=True):
                    times.append(meter.run(submit))
                progress.show(turn + 1, MOST_RUNS, "rounds, or fewer where the time is up")
                now = time.monotonic()
                if turn + 1 >= LEAST_RUNS and now + (now - begin) > deadline:
                    break
    finally:
        gc.enable()
    return torch.cuda.get_device_name(meter.device), [
        Sample(cell, *map(statistics.median, zip(*times, strict=True)))
        for cell, times in zip(cells, runs, strict=True)
    ]


def compare(samples: Iterable[Sample], before: CostModel, after: CostModel) -> list[dict[str, Any]]:
    """Say of each cell what was measured, and what old and new figures predict."""
    rows = []
    for sample in samples:
        cell = sample.cell
        old, new = (
            fitting.predict(getattr(model, cell.direction), cell) for model in (before, after)
        )
        times = {"us": sample.us, "submit_us": sample.submit_us, "before_us": old, "after_us": new}
        rows.append(asdict(cell) | {name: round(us, 3) for name, us in times.items()})
    return rows


def changes(before: CostModel, after: CostModel) -> list[tuple[str, str, float, float]]:
    """List direction, name, old and new value of every figure that is another one now."""
    found = []
    for way in WAYS:
        old, new = asdict(getattr(before, way)), asdict(getattr(after, way))
        found += [(way, name, old[name], new[name]) for name in old if old[name] != new[name]]
    return found
