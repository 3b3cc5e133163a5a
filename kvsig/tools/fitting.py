"""Reads the planner's figures off measured copies: what to measure, and what follows of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from kvsig.planning.costs import CostModel, DirectionCosts, builtin

__all__ = ["Cell", "Sample", "cells", "fit", "predict"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to be measured.

    Parameters
    ----------
    method : {"batch", "loop", "strided"}
        How the bytes are moved.
    direction : {"offload", "load"}
        Which way.
    width : int
        Bytes of one copy, or of one row of a strided copy.
    rows : int
        Rows of a strided copy, otherwise 1.
    copies : int
        Number of copies (of strided copies: operations).
    batch_size : int
        Copies per batch call; 1 for the other methods.
    """

    method: str
    direction: str
    width: int
    rows: int
    copies: int
    batch_size: int

    @property
    def calls(self) -> int:
        """CUDA calls that it takes."""
        return -(-self.copies // self.batch_size)


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured cell.

    Parameters
    ----------
    cell : Cell
        What was measured.
    seconds : float
        From the first call to the arrival of the last byte.
    submit_seconds : float
        From the first call to the return of the last one.
    """

    cell: Cell
    seconds: float
    submit_seconds: float


def predict(costs: DirectionCosts, cell: Cell) -> float:
    """Time that a cell should take.

    Parameters
    ----------
    costs : DirectionCosts
        Figures of the cell's direction.
    cell : Cell
        What is moved, and how.

    Returns
    -------
    float
        Microseconds. The longer of host time and engine time, plus what the first call
        keeps the other one waiting, plus the latency: as the planner predicts it.
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


# What is measured, by direction: each figure of `DirectionCosts` is read off one or two of these.
_SMALL, _LARGE, _WHOLE = 512, 64 << 10, 256 << 20
_MANY, _ROWS = 1024, 64


def cells() -> list[Cell]:
    """List what a calibration measures.

    Returns
    -------
    list of Cell
        Both ways: one large copy; one small one; and of each method, many small and many large
        copies. At most 256 MiB each; together well below a second on a PCIe 4 link.
    """
    found = []
    for direction in ("offload", "load"):
        found += [
            Cell("loop", direction, _WHOLE, 1, 1, 1),
            Cell("loop", direction, _SMALL, 1, 1, 1),
            Cell("loop", direction, _SMALL, 1, _MANY, 1),
            Cell("loop", direction, _LARGE, 1, _MANY, 1),
            Cell("strided", direction, _SMALL, 1, _MANY, 1),
            Cell("strided", direction, _SMALL, _ROWS, _MANY, 1),
        ]
        for width in (_SMALL, _LARGE):
            found += [Cell("batch", direction, width, 1, 4 * _MANY, size) for size in (64, 256)]
    return found


def fit(
    samples: Iterable[Sample], device_name: str, start: CostModel | None = None
) -> CostModel:
    """Read the figures of a device off what was measured.

    Parameters
    ----------
    samples : iterable of Sample
        Of `cells`; where batches cannot be used, without those.
    device_name : str
        Name of the device that they were measured on.
    start : CostModel, optional
        Figures to begin with; those of `builtin` if not given. A figure that was not measured
        keeps its value.

    Returns
    -------
    CostModel
        The figures, with ``source="calibrated"``. None is negative.

    Raises
    ------
    ValueError
        If a time is not positive or a direction is unknown.
    """
    start = builtin(device_name) if start is None else start
    sides: dict[str, dict[Cell, Sample]] = {"offload": {}, "load": {}}
    for sample in samples:
        cell = sample.cell
        for seconds in (sample.seconds, sample.submit_seconds):
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{cell}: measured {seconds} s, needs a time above 0")
        if cell.direction not in sides:
            raise ValueError(f"{cell}: direction is 'offload' or 'load'")
        sides[cell.direction][replace(cell, direction="")] = sample
    return CostModel(
        device_name,
        "calibrated",
        _fit_direction(sides["offload"], start.offload),
        _fit_direction(sides["load"], start.load),
        start.batch_sizes,
    )


def _fit_direction(samples: Mapping[Cell, Sample], start: DirectionCosts) -> DirectionCosts:
    def total(method: str, width: int, rows: int, copies: int, size: int = 1) -> float:
        return samples[Cell(method, "", width, rows, copies, size)].seconds * 1e6

    def host(method: str, width: int, rows: int, copies: int, size: int = 1) -> float:
        return samples[Cell(method, "", width, rows, copies, size)].submit_seconds * 1e6

    found: dict[str, float] = {}
    try:
        # Host times are read off small copies, engine times off large ones: there the engine is
        # the slower of the two.
        byte = found["byte"] = total("loop", _WHOLE, 1, 1) / _WHOLE
        found["loop_submit"] = host("loop", _SMALL, 1, _MANY) / _MANY
        found["loop_engine"] = total("loop", _LARGE, 1, _MANY) / _MANY - _LARGE * byte
        one = total("loop", _SMALL, 1, 1)
        found["latency"] = one - found["loop_submit"] - found["loop_engine"]
        found["strided_submit"] = host("strided", _SMALL, 1, _MANY) / _MANY
        single = total("strided", _SMALL, 1, _MANY) / _MANY
        rows = total("strided", _SMALL, _ROWS, _MANY) / _MANY
        found["strided_engine"] = single - _SMALL * byte
        found["strided_row"] = (rows - single) / (_ROWS - 1) - _SMALL * byte
        # The same copies in four times as many calls: the difference is the calls'.
        many, extra = 4 * _MANY, 4 * _MANY // 64 - 4 * _MANY // 256
        full = host("batch", _SMALL, 1, many, 256)
        call = found["call_submit"] = max(0.0, host("batch", _SMALL, 1, many, 64) - full) / extra
        found["copy_submit"] = (full - call * many / 256) / many
        full = total("batch", _LARGE, 1, many, 256)
        call = found["call_engine"] = max(0.0, total("batch", _LARGE, 1, many, 64) - full) / extra
        found["copy_engine"] = (full - call * many / 256) / many - _LARGE * byte
    except KeyError:
        pass  # not all was measured: the rest stays as it was
    return replace(start, **{name: max(0.0, value) for name, value in found.items()})
