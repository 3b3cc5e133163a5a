"""A plan as a person reads it: every copy, the predicted times, and the ways not taken."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvsig.planning import _plan
from kvsig.planning._pack import pieces
from kvsig.planning._plan import Direction, Geometry
from kvsig.planning.costs import CostModel, builtin
from kvsig.planning.geometry import Planes

__all__ = ["Plan", "explain", "plan"]

_U64 = npt.NDArray[np.uint64]


def _count(number: int) -> str:
    return f"{number:,}"


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


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A whole transfer, planned and packed; nothing has been moved.

    Parameters
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

    direction: str
    method: str
    copies_in: int
    dsts: _U64 = field(repr=False)
    srcs: _U64 = field(repr=False)
    sizes: _U64 = field(repr=False)
    strided: _U64 = field(repr=False)
    batch_size: int
    bytes: int
    predicted_us: float
    submit_us: float
    candidates: dict[str, float]
    costs: str

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
        plain = len(self.dsts)
        if self.plain_path == "batch":
            plain = -(-plain // self.batch_size)
        return plain + len(self.strided)

    def __str__(self) -> str:
        """Readable table of the plan and of the methods that were considered."""
        strided = self.strided
        lines = [
            f"{self.direction} by {self.method}: {_bytes(self.bytes)} in {_count(self.calls)} "
            f"CUDA {'call' if self.calls == 1 else 'calls'}, predicted "
            f"{_time(self.predicted_us)} ({self._rate(self.predicted_us)}), of which the host "
            f"submits {_time(self.submit_us)}",
            "",
            f"{'':<12}{'copies':>12}{'rows':>12}{'calls':>10}{'bytes':>12}",
            f"{'asked for':<12}{_count(self.copies_in):>12}{'':>12}{'':>10}"
            f"{_bytes(self.bytes):>12}",
        ]
        if len(strided):
            moved = int((strided[:, 6] * strided[:, 7] * strided[:, 8]).sum())
            lines.append(
                f"{'strided':<12}{_count(len(strided)):>12}{_count(self.rows):>12}"
                f"{_count(len(strided)):>10}{_bytes(moved):>12}"
            )
        if len(self.dsts):
            lines.append(
                f"{self.plain_path:<12}{_count(len(self.dsts)):>12}{'':>12}"
                f"{_count(self.calls - len(strided)):>10}{_bytes(int(self.sizes.sum())):>12}"
            )
        lines += ["", f"{'method':<16}{'predicted':>12}{'':>14}"]
        for name, time in sorted(self.candidates.items(), key=lambda item: item[1]):
            mark = "  chosen" if name == self.method else ""
            lines.append(f"{name:<16}{_time(time):>12}{self._rate(time):>14}{mark}")
        lines += ["", f"costs: {self.costs}"]
        return "\n".join(line.rstrip() for line in lines)

    def _rate(self, microseconds: float) -> str:
        return f"{self.bytes / microseconds / 1e3:.2f} GB/s" if microseconds > 0 else "0 GB/s"


def explain(chosen: _plan.Plan) -> Plan:
    """Pack a plan, and put it into words.

    Parameters
    ----------
    chosen : kvsig.planning._plan.Plan
        As `Geometry.plan` gives it.

    Returns
    -------
    Plan
        With arrays of its own; printed, it is a table.
    """
    plain: tuple[list[_U64], list[_U64], list[_U64]] = ([], [], [])
    strided: list[_U64] = []
    for path, arrays in () if chosen.method == "kernel" else pieces(chosen):
        if path == "strided":
            strided.append(arrays)
        else:
            for parts, array in zip(plain, arrays, strict=True):
                parts.append(array)
    none = np.empty(0, np.uint64)
    dsts, srcs, sizes = (np.concatenate([none, *parts]) for parts in plain)
    model: CostModel = chosen.geometry.model
    return Plan(
        direction=Direction(chosen.pages.direction).name.lower(),
        method=chosen.method,
        copies_in=chosen.copies_in,
        dsts=dsts,
        srcs=srcs,
        sizes=sizes,
        strided=np.concatenate([none.reshape(0, 9), *strided]),
        batch_size=chosen.batch_size,
        bytes=chosen.bytes,
        predicted_us=chosen.predicted_us,
        submit_us=chosen.submit_us,
        candidates=chosen.candidates,
        costs=f"{model.name}, {model.source}",
    )


def plan(
    planes: Planes | Geometry,
    device_pages: npt.ArrayLike,
    host_pages: npt.ArrayLike,
    direction: Direction,
    path: str = "auto",
    model: CostModel | None = None,
    host_seams: npt.ArrayLike | None = None,
    device_seams: npt.ArrayLike | None = None,
    *,
    batch: bool = True,
    kernel: bool = False,
) -> Plan:
    """Plan a whole transfer without moving anything.

    Parameters
    ----------
    planes : Planes or Geometry
        The geometry; one that is prepared carries its model and seams.
    device_pages, host_pages : array_like of int64
        Page numbers, one to one, inside the geometry.
    direction : Direction
        From the device to the host, or back.
    path : {"auto", "batch", "strided", "loop", "kernel"}
        ``"auto"`` takes what is predicted to end first, the others insist on one.
    model : CostModel, optional
        What copies cost; the careful default if not given.
    host_seams, device_seams : array_like of uint64, optional
        Addresses that no single copy may have on both sides of it.
    batch, kernel : bool
        Whether the batch call, and the page-copy kernel, can be used.

    Returns
    -------
    Plan
        With arrays of its own; printed, it is a table.
    """
    if not isinstance(planes, Geometry):
        chosen = builtin() if model is None else model
        planes = Geometry(planes, chosen, host_seams, device_seams)
    pages = planes.pages(
        np.ascontiguousarray(device_pages, dtype=np.int64),
        np.ascontiguousarray(host_pages, dtype=np.int64),
        direction,
    )
    return explain(planes.plan(pages, path, batch=batch, kernel=kernel))
