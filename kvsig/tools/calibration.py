"""Measures what copies cost on this machine, for the planner: what ``kvsig calibrate`` runs.

Measuring (`measure`) knows nothing of the figures; fitting them is the cost model's own affair
(`kvsig.tools.fitting`), and `compare` says what the figures are worth.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
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

__all__ = ["Compared", "Meter", "changes", "compare", "measure"]

U64 = npt.NDArray[np.uint64]
#: Bytes of each side that copies are scattered over; no cell moves more than half of it.
SPAN = 512 << 20
LEAST_RUNS, MOST_RUNS = 3, 15


@dataclass(frozen=True, slots=True)
class Compared:
    """One cell: measured, and predicted by two sets of figures.

    Parameters
    ----------
    sample : Sample
        What was measured.
    before_us, after_us : float
        Predicted by the figures that kvsig had before, and by the new ones.
    """

    sample: Sample
    before_us: float
    after_us: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        submit = self.sample.submit_seconds
        return asdict(self.sample.cell) | {
            "us": round(self.sample.seconds * 1e6, 3),
            "submit_us": None if submit is None else round(submit * 1e6, 3),
            "before_us": round(self.before_us, 3),
            "after_us": round(self.after_us, 3),
        }


class Meter:
    """Measures cells on the GPU: scattered copies of pinned memory, on a stream of its own.

    Parameters
    ----------
    seed : int
        Of the addresses.

    Raises
    ------
    ValueError
        On the emulated runtime, or where torch sees no GPU.
    """

    def __init__(self, seed: int = 0) -> None:
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
        self.rng = np.random.default_rng(seed)
        self.limit = _core.batch_refusal(int(self.stream.cuda_stream))

    def scattered(self, base: int, width: int, count: int) -> U64:
        """Addresses of so many places of one width, random and apart."""
        places = self.rng.permutation(SPAN // width)[:count].astype(np.uint64)
        return base + places * np.uint64(width)

    def plain(self, cell: Cell) -> Callable[[], Any]:
        """Make the call of a cell of plain copies."""
        near = self.scattered(self.near.data_ptr(), cell.width, cell.copies)
        far = self.scattered(self.far.data_ptr(), cell.width, cell.copies)
        to, of = (far, near) if cell.direction == "offload" else (near, far)
        handle, path, size = int(self.stream.cuda_stream), cell.method, cell.batch_size
        return lambda: _core.copy_batch(to, of, cell.width, handle, path, size)

    def strided(self, cell: Cell) -> Callable[[], Any]:
        """Make the call of a cell of strided copies: all layers of a page, one copy each."""
        width, rows, count = cell.width, cell.rows, cell.copies
        pitch = SPAN // rows // width * width  # from one layer to the next on the device
        if pitch < count * width:
            raise ValueError(f"{cell} does not fit into {SPAN} bytes")
        pages = self.rng.permutation(pitch // width)[:count].astype(np.uint64)
        blocks = self.rng.permutation(SPAN // (width * rows))[:count].astype(np.uint64)
        near = np.uint64(self.near.data_ptr()) + pages * np.uint64(width)
        far = np.uint64(self.far.data_ptr()) + blocks * np.uint64(width * rows)
        ends = [(near, pitch), (far, width)]
        if cell.direction == "offload":
            ends.reverse()
        ops = np.ones((count, 9), np.uint64)  # dst, dpitch, drows, src, spitch, srows, ...
        (ops[:, 0], ops[:, 1]), (ops[:, 3], ops[:, 4]) = ends
        ops[:, 6], ops[:, 7] = width, rows
        ops[:, 2] = ops[:, 5] = rows
        handle = int(self.stream.cuda_stream)
        return lambda: _core.copy_strided(ops, handle)

    def submitter(self, cell: Cell) -> Callable[[], Any]:
        """Make the call of a cell."""
        return self.strided(cell) if cell.method == "strided" else self.plain(cell)

    def run(self, submit: Callable[[], Any]) -> tuple[float, float]:
        """Time one submission: seconds until the end, and until the call had returned."""
        self.stream.synchronize()
        ms, host_ms = time_once(self.stream, submit)
        return ms / 1e3, host_ms / 1e3


def measure(seconds: float = 12.0, seed: int = 0) -> tuple[str, list[Sample]]:
    """Measure what copies cost on the current GPU.

    Parameters
    ----------
    seconds : float
        Time for measuring; every cell is timed three times at least, which takes a few.
    seed : int
        Of the addresses.

    Returns
    -------
    name : str
        Of the device, as CUDA gives it.
    samples : list of Sample
        Medians of every cell that the cost model asks for.

    Raises
    ------
    ValueError
        On the emulated runtime, or where torch sees no GPU.
    """
    meter = Meter(seed)
    deadline = time.monotonic() + seconds
    cells = [cell for cell in fitting.cells() if cell.method != "batch" or meter.limit is None]
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
        Sample(
            cell,
            statistics.median(total for total, _ in times),
            statistics.median(submit for _, submit in times),
        )
        for cell, times in zip(cells, runs, strict=True)
    ]


def compare(samples: Sequence[Sample], before: CostModel, after: CostModel) -> list[Compared]:
    """Predict measured cells by the figures that there were, and by new ones."""
    return [
        Compared(
            sample,
            fitting.predict(getattr(before, sample.cell.direction), sample.cell),
            fitting.predict(getattr(after, sample.cell.direction), sample.cell),
        )
        for sample in samples
    ]


def changes(before: CostModel, after: CostModel) -> list[tuple[str, str, float, float]]:
    """List direction, name, old and new value of every figure that is another one now."""
    return [
        (direction, figure.name, *values)
        for direction in WAYS
        for figure in fields(getattr(before, direction))
        if len(set(values := figures(figure.name, direction, before, after))) > 1
    ]


def figures(name: str, direction: str, *models: CostModel) -> tuple[float, float]:
    """Values of a figure in two models."""
    before, after = (float(getattr(getattr(model, direction), name)) for model in models)
    return before, after
