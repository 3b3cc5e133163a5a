"""Reads the planner's figures off measured copies: what to measure, and what follows of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from kvsig.planning.costs import CostModel, DirectionCosts, builtin
from kvsig.tools.cells import WAYS

__all__ = ["Cell", "Sample", "cells", "fit", "predict"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to be measured."""

    #: "batch", "loop" or "strided".
    method: str
    #: "offload" or "load".
    direction: str
    #: Bytes of one copy, or of one row of a strided copy.
    width: int
    #: Rows of a strided copy, otherwise 1.
    rows: int
    #: Number of copies; of strided copies: operations.
    copies: int
    #: Copies per batch call; 1 for the other methods.
    batch_size: int

    @property
    def calls(self) -> int:
        """CUDA calls that it takes."""
        return -(-self.copies // self.batch_size)


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured cell: microseconds until the last byte is there, and until the call returned.

    Raises
    ------
    ValueError
        If a time is not positive.
    """

    cell: Cell
    us: float
    submit_us: float

    def __post_init__(self) -> None:
        for us in (self.us, self.submit_us):
            if not (math.isfinite(us) and us > 0):
                raise ValueError(f"{self.cell}: measured {us} µs, needs a time above 0")


def predict(costs: DirectionCosts, cell: Cell) -> float:
    """Time that a cell should take by the figures of its direction, in microseconds.

    It is the longer of host time and engine time, plus what the first call keeps the other one
    waiting, plus the latency: as the planner predicts it.
    """
    many, calls = float(cell.copies), float(cell.calls)
    byte = cell.width * costs.byte
    if cell.method == "batch":
        host = calls * costs.call_submit + many * costs.copy_submit
        engine = calls * costs.call_engine + many * (costs.copy_engine + byte)
        if cell.copies == 1:
            # A batch of one copy takes longer than the copy by itself.
            host, engine = host + costs.loop_submit, engine + costs.loop_engine
    elif cell.method == "loop":
        host, engine = many * costs.loop_submit, many * (costs.loop_engine + byte)
    elif cell.method == "strided":
        host = many * costs.strided_submit
        engine = many * (costs.strided_engine + cell.rows * (costs.strided_row + byte))
    else:
        raise ValueError(f"method is {cell.method!r}: it is 'batch', 'loop' or 'strided'")
    return max(host, engine) + min(host, engine) / calls + costs.latency


_SMALL, _LARGE, _WHOLE = 512, 64 << 10, 256 << 20
_MANY, _ROWS, _BATCHED = 1024, 64, 4096
#: What is measured each way, at most 256 MiB each: method, width, rows, copies, copies per call.
#: Each figure of `DirectionCosts` is read off one or two of these.
_SHAPES = {
    "one whole": ("loop", _WHOLE, 1, 1, 1),
    "one small": ("loop", _SMALL, 1, 1, 1),
    "small": ("loop", _SMALL, 1, _MANY, 1),
    "large": ("loop", _LARGE, 1, _MANY, 1),
    "strided": ("strided", _SMALL, 1, _MANY, 1),
    "rows": ("strided", _SMALL, _ROWS, _MANY, 1),
    "small by 64": ("batch", _SMALL, 1, _BATCHED, 64),
    "small by 256": ("batch", _SMALL, 1, _BATCHED, 256),
    "large by 64": ("batch", _LARGE, 1, _BATCHED, 64),
    "large by 256": ("batch", _LARGE, 1, _BATCHED, 256),
}


def cells() -> list[Cell]:
    """List what a calibration measures; it takes well below a second on a PCIe 4 link."""
    return [Cell(method, way, *rest) for way in WAYS for method, *rest in _SHAPES.values()]


def fit(samples: Iterable[Sample], device_name: str) -> CostModel:
    """Read the figures of a device off what was measured of `cells`.

    None is negative, and one that was not measured, as where batches cannot be used, is that of
    `builtin`.
    """
    found = {sample.cell: sample for sample in samples}
    start = builtin(device_name)
    return replace(
        start,
        source="calibrated",
        offload=_fit_direction("offload", found, start.offload),
        load=_fit_direction("load", found, start.load),
    )


def _fit_direction(
    way: str, samples: Mapping[Cell, Sample], start: DirectionCosts
) -> DirectionCosts:
    named = {
        name: samples[cell]
        for name, (method, *rest) in _SHAPES.items()
        if (cell := Cell(method, way, *rest)) in samples
    }
    total = {name: sample.us for name, sample in named.items()}
    host = {name: sample.submit_us for name, sample in named.items()}
    found: dict[str, float] = {}
    try:
        # Host times are read off small copies, engine times off large ones: there the engine is
        # the slower of the two.
        byte = found["byte"] = total["one whole"] / _WHOLE
        found["loop_submit"] = host["small"] / _MANY
        found["loop_engine"] = total["large"] / _MANY - _LARGE * byte
        found["latency"] = total["one small"] - found["loop_submit"] - found["loop_engine"]
        found["strided_submit"] = host["strided"] / _MANY
        single, rows = total["strided"] / _MANY, total["rows"] / _MANY
        found["strided_engine"] = single - _SMALL * byte
        found["strided_row"] = (rows - single) / (_ROWS - 1) - _SMALL * byte
        # The same copies in four times as many calls: the difference is the calls'.
        few, more = _BATCHED / 256, _BATCHED / 64 - _BATCHED / 256
        full = host["small by 256"]
        call = found["call_submit"] = max(0.0, host["small by 64"] - full) / more
        found["copy_submit"] = (full - call * few) / _BATCHED
        full = total["large by 256"]
        call = found["call_engine"] = max(0.0, total["large by 64"] - full) / more
        found["copy_engine"] = (full - call * few) / _BATCHED - _LARGE * byte
    except KeyError:
        pass  # not all was measured: the rest stays as it was
    return replace(start, **{name: max(0.0, value) for name, value in found.items()})
