"""A plan as a person reads it: every copy, the predicted times, and the ways not taken."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvsig.planning import _plan
from kvsig.planning._pack import pieces
from kvsig.planning._plan import Direction

__all__ = ["Plan"]

_U64 = npt.NDArray[np.uint64]


def _count(number: int | str) -> str:
    return number if isinstance(number, str) else f"{number:,}"


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def _time(microseconds: float) -> str:
    if microseconds < 1e3:
        return f"{microseconds:.1f} µs"
    if microseconds < 1e6:
        return f"{microseconds / 1e3:.2f} ms"
    return f"{microseconds / 1e6:.2f} s"


class Plan:
    """A whole transfer, planned and packed; nothing has been moved. Printed, it is a table.

    Parameters
    ----------
    chosen : kvsig.planning._plan.Plan
        As `Geometry.plan` gives it.

    Attributes
    ----------
    direction : {"offload", "load"}
        From the device to the host, or back.
    method : str
        ``"batch"``, ``"loop"``, ``"strided"``, ``"strided+batch"``, ``"strided+loop"``
        or ``"kernel"``, which has no copies of its own.
    copies_in : int
        Copies of one page of one plane each that were asked for.
    dsts, srcs, sizes : ndarray of uint64
        Plain copies.
    strided : ndarray of uint64, shape (m, 9)
        Strided copies: dst, dpitch, drows, src, spitch, srows, width, height, depth; a slice
        begins drows (srows) rows behind the one before it.
    batch_size : int
        Plain copies per batch call.
    bytes : int
        Bytes to be moved.
    predicted_us : float
        Predicted time until the last byte has arrived, in microseconds.
    submit_us : float
        Predicted host time of it, inside the CUDA calls.
    candidates : dict of str to float
        Predicted time of every method that was considered.
    costs : str
        Device that the costs are of, and where they are from.
    """

    def __init__(self, chosen: _plan.Plan) -> None:
        planes, model = chosen.geometry.planes, chosen.geometry.model
        none = np.empty(0, np.uint64)
        plain, strided = [(none, none, none)], [none.reshape(0, 9)]
        for path, arrays in pieces(chosen):
            (strided if path == "strided" else plain).append(arrays)
        self.direction = Direction(chosen.pages.direction).name.lower()
        self.method, self.batch_size = chosen.method, chosen.batch_size
        self.copies_in = chosen.pages.count * len(planes)
        self.bytes = chosen.pages.count * planes.page_bytes
        self.dsts, self.srcs, self.sizes = map(np.concatenate, zip(*plain, strict=True))
        self.strided: _U64 = np.concatenate(strided)
        self.predicted_us, self.submit_us = chosen.predicted_us, chosen.submit_us
        self.candidates = chosen.candidates
        self.costs = f"{model.name}, {model.source}"

    @property
    def plain_path(self) -> str:
        """How plain copies are made: ``"batch"`` or ``"loop"``."""
        return "batch" if self.method.endswith("batch") else "loop"

    @property
    def copies_out(self) -> int:
        """Operations that the copy engine gets: plain copies and strided ones."""
        return len(self.dsts) + len(self.strided)

    @property
    def rows(self) -> int:
        """Rows of all strided copies."""
        return int((self.strided[:, 7] * self.strided[:, 8]).sum())

    @property
    def calls(self) -> int:
        """CUDA calls."""
        if self.method == "kernel":
            return 1
        size = self.batch_size if self.plain_path == "batch" else 1
        return -(-len(self.dsts) // size) + len(self.strided)

    def __str__(self) -> str:
        """Readable table of the plan and of the methods that were considered."""
        plain, strided = len(self.dsts), len(self.strided)
        table: list[tuple[str, int | str, int | str, int | str, str]] = [
            ("", "copies", "rows", "calls", "bytes"),
            ("asked for", self.copies_in, "", "", _bytes(self.bytes)),
        ]
        if strided:
            moved = int(self.strided[:, 6:].prod(axis=1).sum())
            table.append(("strided", strided, self.rows, strided, _bytes(moved)))
        if plain:
            moved = int(self.sizes.sum())
            table.append((self.plain_path, plain, "", self.calls - strided, _bytes(moved)))
        lines = [f"{self!r}, of which the host submits {_time(self.submit_us)}", ""]
        lines += [
            f"{name:<12}{_count(copies):>12}{_count(rows):>12}{_count(calls):>10}{size:>12}"
            for name, copies, rows, calls, size in table
        ]
        lines += ["", f"{'method':<16}{'predicted':>12}"]
        for name, time in sorted(self.candidates.items(), key=lambda item: item[1]):
            mark = "  chosen" if name == self.method else ""
            lines.append(f"{name:<16}{_time(time):>12}{self._rate(time):>14}{mark}")
        lines += ["", f"costs: {self.costs}"]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"{self.direction} by {self.method}: {_bytes(self.bytes)} in {_count(self.calls)} "
            f"CUDA {'call' if self.calls == 1 else 'calls'}, predicted "
            f"{_time(self.predicted_us)} ({self._rate(self.predicted_us)})"
        )

    def _rate(self, microseconds: float) -> str:
        return f"{self.bytes / microseconds / 1e3:.2f} GB/s" if microseconds > 0 else "0 GB/s"
