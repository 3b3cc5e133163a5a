"""What copies cost: the model that the planner predicts times with, and where it is kept."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Cell",
    "CostModel",
    "DirectionCosts",
    "Sample",
    "batches",
    "builtin",
    "cache_path",
    "calibrate",
    "cells",
    "fit",
    "load",
    "predict",
    "save",
]

# Raised whenever the meaning of a stored figure changes: files of another version are not read.
FORMAT = 1


@dataclass(frozen=True, slots=True)
class DirectionCosts:
    """Costs of one direction, in microseconds.

    Host and copy engine work side by side, so each method has two figures: what a call keeps
    the host busy (*submit*), and what it keeps the copy engine busy (*engine*). The engine
    pays for the bytes as well.

    Parameters
    ----------
    byte : float
        Engine time of one byte.
    loop_submit, loop_engine : float
        One ``cudaMemcpyAsync``.
    call_submit, call_engine : float
        One batch call, whatever it holds.
    copy_submit, copy_engine : float
        One copy inside a batch call.
    staged_small, staged_large : float
        Host time of a copy that the CPU stages inside the batch call, in place of
        `copy_submit`: the figure at no bytes and the one at `inline_bytes`, with a straight
        line between them.
    inline_bytes : float
        Longest copy that is staged; 0 where none is.
    strided_submit, strided_engine : float
        One ``cudaMemcpy2DAsync`` or ``cudaMemcpy3DAsync``: slices cost no more than rows.
    strided_row : float
        One row of it.
    latency : float
        From the last submission to the end, the same for every method.
    """

    byte: float
    loop_submit: float
    loop_engine: float
    call_submit: float
    call_engine: float
    copy_submit: float
    copy_engine: float
    staged_small: float
    staged_large: float
    inline_bytes: float
    strided_submit: float
    strided_engine: float
    strided_row: float
    latency: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """What copies cost on one device.

    Parameters
    ----------
    name : str
        Name of the device, as CUDA gives it.
    source : {"built in", "default", "calibrated"}
        Where the figures are from.
    offload, load : DirectionCosts
        Device to host, and host to device.
    batch_sizes : tuple of int
        Numbers of copies per batch call to choose from, eight at most.
    """

    name: str
    source: str
    offload: DirectionCosts
    load: DirectionCosts
    batch_sizes: tuple[int, ...] = (64, 128, 256)

    def costs(self, direction: str) -> DirectionCosts:
        """Costs of ``"offload"`` or ``"load"``."""
        if direction == "offload":
            return self.offload
        if direction == "load":
            return self.load
        raise ValueError(f"direction is {direction!r}: it is 'offload' or 'load'")


# Fitted to the tables of tests/test_planning.py: H100s 80GB HBM3 on PCIe 5 x16. The virtual CPUs
# beside them run at one of two speeds, with 0.42 or 0.85 µs per copy in a batch, and change between
# the two within seconds. The figures are of the faster one; the planner looks at the CPU now and
# then, and scales them.
_H100_LOAD = DirectionCosts(
    byte=1 / 54.8e3,
    loop_submit=2.4,
    loop_engine=2.6,
    call_submit=3.5,
    call_engine=0.8,
    copy_submit=0.45,
    copy_engine=0.06,
    staged_small=0.45,
    staged_large=0.33,
    inline_bytes=24576,
    strided_submit=1.9,
    strided_engine=2.87,
    strided_row=0.005,
    latency=7.0,
)
_H100_OFFLOAD = DirectionCosts(
    byte=1 / 55.1e3,
    loop_submit=2.4,
    loop_engine=2.4,
    call_submit=3.5,
    call_engine=1.5,
    copy_submit=0.4,
    copy_engine=0.16,
    staged_small=0.0,
    staged_large=0.0,
    inline_bytes=0,
    strided_submit=1.9,
    strided_engine=2.45,
    strided_row=0.005,
    latency=7.0,
)
# Nothing is known of the device: a slower link, and strided copies only where they win clearly.
_DEFAULT_LOAD = replace(_H100_LOAD, byte=1 / 25e3, strided_submit=3.3, strided_engine=3.6)
_DEFAULT_OFFLOAD = replace(_H100_OFFLOAD, byte=1 / 25e3, strided_submit=3.3, strided_engine=3.6)

# Words that a device name must hold, and the figures it gets. The H200 has the H100's link
# and copy engines.
_BUILTIN: tuple[tuple[str, DirectionCosts, DirectionCosts], ...] = (
    (r"\bH100\b", _H100_OFFLOAD, _H100_LOAD),
    (r"\bH200\b", _H100_OFFLOAD, _H100_LOAD),
)


def builtin(device_name: str | None = None) -> CostModel:
    """Figures that come with kvsig.

    Parameters
    ----------
    device_name : str, optional
        Name of the device, as CUDA gives it.

    Returns
    -------
    CostModel
        Of that device, or a careful default for one that is not known.
    """
    name = device_name or "unknown device"
    for pattern, offload, to_device in _BUILTIN:
        if re.search(pattern, name):
            return CostModel(name, "built in", offload, to_device)
    return CostModel(name, "default", _DEFAULT_OFFLOAD, _DEFAULT_LOAD)


def cache_path(device_name: str) -> Path:
    """Where calibrated figures of a device are kept, in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") or "unknown"
    return folder / "kvsig" / f"costs-{slug}.json"


def save(model: CostModel, path: Path | None = None) -> Path:
    """Keep the figures of a device for later processes.

    Parameters
    ----------
    model : CostModel
        The figures; `model.name` is the name of the device.
    path : Path, optional
        The file, in place of `cache_path`.

    Returns
    -------
    Path
        The file, replaced as a whole: a reader never sees half of it.
    """
    path = cache_path(model.name) if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **asdict(model)}, indent=2) + "\n"
    descriptor, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def load(device_name: str | None = None, path: Path | None = None) -> CostModel:
    """Figures of a device: the calibrated ones if there are any, else those of `builtin`.

    Parameters
    ----------
    device_name : str, optional
        Name of the device, as CUDA gives it.
    path : Path, optional
        The file of calibrated figures, in place of `cache_path`.

    Returns
    -------
    CostModel
        The figures. A file that cannot be read is reported by a warning and left alone.
    """
    if path is None:
        if device_name is None:
            return builtin()
        path = cache_path(device_name)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return builtin(device_name)
    except (OSError, UnicodeDecodeError) as error:
        return _unreadable(path, str(error), device_name)
    try:
        return _parse(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        return _unreadable(path, str(error), device_name)


def _unreadable(path: Path, why: str, device_name: str | None) -> CostModel:
    model = builtin(device_name)
    warnings.warn(
        f"{path}: calibrated costs cannot be used ({why}); taking the {model.source} figures. "
        "Delete the file or run: python -m kvsig calibrate",
        RuntimeWarning,
        stacklevel=3,
    )
    return model


def _parse(data: Any) -> CostModel:
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    if data.get("format") != FORMAT:
        raise ValueError(f"format is {data.get('format')!r}, this version reads {FORMAT}")
    sizes = data.get("batch_sizes")
    if (
        not isinstance(sizes, list)
        or not 1 <= len(sizes) <= 8
        or not all(type(size) is int and size > 0 for size in sizes)
    ):
        raise ValueError(f"batch_sizes is {sizes!r}, needs one to eight positive integers")
    return CostModel(
        str(data.get("name")),
        str(data.get("source")),
        _parse_direction(data.get("offload"), "offload"),
        _parse_direction(data.get("load"), "load"),
        tuple(sizes),
    )


def _parse_direction(data: Any, place: str) -> DirectionCosts:
    names = [field.name for field in fields(DirectionCosts)]
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        raise ValueError(f"{place} does not hold exactly {', '.join(names)}")
    for name in names:
        value = data[name]
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{place}.{name} is {value!r}, needs a number of at least 0")
    return DirectionCosts(**{name: float(data[name]) for name in names})


# Predicting and fitting. The planner's own arithmetic is in _pack.pyx; the two are the same
# formula, and a test holds them together.


def batches(copies: int, size: int, first: int = 0) -> list[int]:
    """Copies of each batch call.

    Parameters
    ----------
    copies : int
        In all.
    size : int
        In one call, at most.
    first : int
        In the first call, where each takes as many as are queued already; 0 where all are full.
    """
    found: list[int] = []
    done = 0
    while done < copies:
        most = min(size, max(first, done)) if first else size
        found.append(min(most, copies - done))
        done += found[-1]
    return found


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
    first : int
        Copies of the first batch call, where each takes as many as are queued already, up to
        `batch_size`; 0 where all are alike.
    """

    method: str
    direction: str
    width: int
    rows: int
    copies: int
    batch_size: int
    first: int = 0

    def batches(self) -> list[int]:
        """Copies of each call."""
        return batches(self.copies, self.batch_size, self.first)


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured cell.

    Parameters
    ----------
    cell : Cell
        What was measured.
    seconds : float
        From the first call to the arrival of the last byte.
    submit_seconds : float, optional
        From the first call to the return of the last one.
    """

    cell: Cell
    seconds: float
    submit_seconds: float | None = None


# What the fit finds, in this order; inline_bytes is kept.
_FITTED = tuple(f.name for f in fields(DirectionCosts) if f.name != "inline_bytes")


def _counts(cell: Cell, inline_bytes: float) -> tuple[dict[str, float], dict[str, float], float]:
    # How often a cell pays each figure, on the host and on the engine; and its calls.
    copies = float(cell.copies)
    if cell.method == "batch":
        calls = float(len(cell.batches()))
        engine = {"call_engine": calls, "copy_engine": copies, "byte": copies * cell.width}
        host = {"call_submit": calls}
        if cell.width <= inline_bytes:
            share = cell.width / inline_bytes
            host |= {"staged_small": copies * (1 - share), "staged_large": copies * share}
        else:
            host["copy_submit"] = copies
        if cell.copies == 1:
            # A batch of one copy was measured to take longer than the copy by itself.
            host["loop_submit"] = engine["loop_engine"] = 1.0
        return host, engine, calls
    if cell.method == "loop":
        engine = {"loop_engine": copies, "byte": copies * cell.width}
        return {"loop_submit": copies}, engine, copies
    if cell.method == "strided":
        rows = copies * cell.rows
        engine = {"strided_engine": copies, "strided_row": rows, "byte": rows * cell.width}
        return {"strided_submit": copies}, engine, copies
    raise ValueError(f"method is {cell.method!r}: it is 'batch', 'loop' or 'strided'")


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
        keeps the other one waiting, plus the latency.

    Notes
    -----
    Made for batch calls of at most some 500 copies. Longer calls of copies that the CPU
    stages take longer than predicted (up to four times, for 8192 of 16 KiB): the staging
    room runs out.
    """
    host, engine, calls = _counts(cell, costs.inline_bytes)
    submit = sum(getattr(costs, name) * times for name, times in host.items())
    busy = sum(getattr(costs, name) * times for name, times in engine.items())
    first = min(submit, busy) / calls
    if cell.first and cell.method == "batch":
        sizes = cell.batches()
        one, copies = (costs.call_submit, submit) if busy >= submit else (costs.call_engine, busy)
        part = sizes[0] if busy >= submit else sizes[-1]
        first = one + (copies - calls * one) * part / cell.copies
    return float(max(submit, busy) + first + costs.latency)


def _least_squares(
    matrix: npt.NDArray[np.float64], values: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    # Least squares with no negative unknown, by an active set (Lawson and Hanson): unknowns
    # enter one by one where the error falls fastest, and leave where they would turn negative.
    count = matrix.shape[1]
    scale = np.linalg.norm(matrix, axis=0)
    scaled = matrix / np.where(scale > 0, scale, 1)
    found = np.zeros(count)
    free = np.zeros(count, dtype=bool)
    tolerance = 1e-10 * max(float(np.linalg.norm(values)), 1e-30)
    for _ in range(3 * count):
        gradient = scaled.T @ (values - scaled @ found)
        gradient[free | (scale == 0)] = -np.inf
        enter = int(np.argmax(gradient))
        if gradient[enter] <= tolerance:
            break
        free[enter] = True
        while True:
            trial = np.zeros(count)
            trial[free] = np.linalg.lstsq(scaled[:, free], values, rcond=None)[0]
            negative = free & (trial <= 0)
            if not negative.any():
                found = trial
                break
            step = np.min(found[negative] / (found[negative] - trial[negative]))
            found = found + step * (trial - found)
            free &= found > 1e-14
            found[~free] = 0
    result: npt.NDArray[np.float64] = found / np.where(scale > 0, scale, 1)
    return result


def _fit_direction(samples: Sequence[Sample], start: DirectionCosts) -> DirectionCosts:
    # The predicted time is linear in the figures once it is known which of host and engine is
    # the slower one in each sample; that is guessed from the figures at hand, and repeated.
    column = {name: index for index, name in enumerate(_FITTED)}
    costs = start
    seen: set[bytes] = set()
    for _ in range(20):
        rows: list[npt.NDArray[np.float64]] = []
        values: list[float] = []
        slower = bytearray()
        for sample in samples:
            host, engine, calls = _counts(sample.cell, costs.inline_bytes)
            submit = sum(getattr(costs, name) * times for name, times in host.items())
            busy = sum(getattr(costs, name) * times for name, times in engine.items())
            slower.append(submit > busy)
            host_share, engine_share = (1.0, 1 / calls) if submit > busy else (1 / calls, 1.0)
            row = np.zeros(len(_FITTED))
            for name, times in host.items():
                row[column[name]] += times * host_share
            for name, times in engine.items():
                row[column[name]] += times * engine_share
            row[column["latency"]] = 1
            rows.append(row / (sample.seconds * 1e6))
            values.append(1)
            if sample.submit_seconds is not None and sample.submit_seconds > 0:
                # A full queue makes the host wait for the engine: such a time says nothing
                # about the host.
                if sample.submit_seconds < 0.8 * sample.seconds:
                    row = np.zeros(len(_FITTED))
                    for name, times in host.items():
                        row[column[name]] += times
                    rows.append(row / (sample.submit_seconds * 1e6))
                    values.append(1)
        # Figures that no sample speaks of stay where they were.
        for name, index in column.items():
            before = getattr(start, name)
            if before > 0:
                row = np.zeros(len(_FITTED))
                row[index] = 0.02 / before
                rows.append(row)
                values.append(0.02)
        found = _least_squares(np.array(rows), np.array(values))
        costs = replace(costs, **{name: float(found[column[name]]) for name in _FITTED})
        if bytes(slower) in seen:
            break
        seen.add(bytes(slower))
    return costs


def fit(
    samples: Iterable[Sample], device_name: str, start: CostModel | None = None
) -> CostModel:
    """Find the figures that predict measured times best.

    Parameters
    ----------
    samples : iterable of Sample
        Measured cells; relative errors count.
    device_name : str
        Name of the device that they were measured on.
    start : CostModel, optional
        Figures to begin with; those of `builtin` if not given. A figure that no sample
        depends on keeps its value.

    Returns
    -------
    CostModel
        The figures, with ``source="calibrated"``. None is negative.

    Raises
    ------
    ValueError
        If a time is not positive or a method or direction is unknown.
    """
    start = builtin(device_name) if start is None else start
    sides: dict[str, list[Sample]] = {"offload": [], "load": []}
    for sample in samples:
        if not (math.isfinite(sample.seconds) and sample.seconds > 0):
            raise ValueError(f"{sample.cell}: measured {sample.seconds} s, needs a time above 0")
        if sample.cell.direction not in sides:
            raise ValueError(f"{sample.cell}: direction is 'offload' or 'load'")
        sides[sample.cell.direction].append(sample)
    return CostModel(
        device_name,
        "calibrated",
        _fit_direction(sides["offload"], start.offload) if sides["offload"] else start.offload,
        _fit_direction(sides["load"], start.load) if sides["load"] else start.load,
        start.batch_sizes,
    )


def cells() -> list[Cell]:
    """List what a calibration measures: short and long copies of every method, both ways.

    Returns
    -------
    list of Cell
        At most 256 MiB each; together a few seconds on a PCIe 4 link.
    """
    found = []
    for direction in ("offload", "load"):
        for width in (512, 2048, 8192, 16384, 24576, 32768, 65536, 262144):
            copies = min(4096, (256 << 20) // width)
            found += [Cell("batch", direction, width, 1, copies, size) for size in (64, 256)]
            found.append(Cell("loop", direction, width, 1, copies // 4, 1))
        for width in (512, 8192, 32768):
            # One call, in which nothing overlaps; and calls too short to hide their own cost.
            found += [Cell("batch", direction, width, 1, n, n) for n in (1, 16, 64)]
            found.append(Cell("loop", direction, width, 1, 1, 1))
            for rows in (1, 4, 16, 64):
                copies = min(1024, (256 << 20) // (width * rows))
                found.append(Cell("strided", direction, width, rows, copies, 1))
        found.append(Cell("loop", direction, 256 << 20, 1, 1, 1))
    return found


def calibrate(measure: Callable[[Cell], Sample], device_name: str) -> CostModel:
    """Measure a device and fit its figures.

    Parameters
    ----------
    measure : callable
        Takes a `Cell` and returns the `Sample` of it (a median, at scattered addresses, of
        pinned memory, on a stream of its own).
    device_name : str
        Name of the device, as CUDA gives it.

    Returns
    -------
    CostModel
        The figures; `save` keeps them.
    """
    return fit([measure(cell) for cell in cells()], device_name)
