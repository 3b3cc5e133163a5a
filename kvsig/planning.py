"""The planner: page numbers and a geometry in, the cheapest set of copies out.

A transfer asks for one copy per page and plane. `Prepared` and `Transfer` (in Cython) find
the runs and the evenly spaced planes, price what can be done with them, and pack the result
piece by piece. `Planner` keeps one `Prepared` per choice of layers, which is what a cache
holds; `plan` gives a whole transfer at once, to look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvsig._pack import (
    CHECK_DEVICE_RANGE,
    CHECK_HOST_RANGE,
    CHECK_LENGTHS,
    CHECK_NOT_PAGES,
    CHECK_OK,
    CHECK_REPEATED,
    Prepared,
    Transfer,
)
from kvsig._threads import ALONE, Team
from kvsig.costs import CostModel, batches, builtin
from kvsig.geometry import Planes

__all__ = [
    "CHECK_DEVICE_RANGE",
    "CHECK_HOST_RANGE",
    "CHECK_LENGTHS",
    "CHECK_NOT_PAGES",
    "CHECK_OK",
    "CHECK_REPEATED",
    "Plan",
    "Planner",
    "Prepared",
    "Transfer",
    "plan",
    "prepare",
]

_U64 = npt.NDArray[np.uint64]

# Choices of layers that a planner keeps ready; a serving engine uses one per layer and all.
_KEPT = 1024


def prepare(
    planes: Planes,
    model: CostModel | None = None,
    host_seams: npt.ArrayLike | None = None,
    device_seams: npt.ArrayLike | None = None,
    team: Team = ALONE,
) -> Prepared:
    """Work out what does not depend on page numbers, once per geometry.

    Parameters
    ----------
    planes : Planes
        Places of every layer's K and V on both sides.
    model : CostModel, optional
        What copies cost; the careful default if not given.
    host_seams, device_seams : array_like of uint64, optional
        Addresses where an allocation, or a block of host memory that was registered by
        itself, begins or ends: CUDA refuses a copy that has rows on both sides of one.
    team : Team, optional
        Threads that may submit the copies of a transfer; by default the caller's alone.

    Returns
    -------
    Prepared
        Its ``transfer`` plans, its ``check`` looks over page numbers.
    """
    chosen = builtin() if model is None else model
    return Prepared(planes, chosen, _seams(host_seams), _seams(device_seams), team)


def _seams(addresses: npt.ArrayLike | None) -> _U64 | None:
    return None if addresses is None else np.asarray(addresses, dtype=np.uint64)


class Planner:
    """A geometry, ready to plan transfers of any choice of its layers.

    Parameters
    ----------
    planes : Planes
        Places of every layer's K and V on both sides.
    model : CostModel, optional
        What copies cost; the careful default if not given.
    host_seams, device_seams : array_like of uint64, optional
        Addresses that no single copy may have on both sides of it.

    Notes
    -----
    Safe to use from many threads at a time: what two threads prepare at once is the same.
    """

    __slots__ = ("_all", "_ready", "_seams", "model", "planes")

    def __init__(
        self,
        planes: Planes,
        model: CostModel | None = None,
        host_seams: npt.ArrayLike | None = None,
        device_seams: npt.ArrayLike | None = None,
    ) -> None:
        self.planes = planes
        self.model = builtin() if model is None else model
        self._seams = _seams(host_seams), _seams(device_seams)
        self._all = Prepared(planes, self.model, *self._seams)
        self._ready: dict[Sequence[int], Prepared] = {}

    def prepared(self, layers: int | Sequence[int] | None = None) -> Prepared:
        """Geometry of some layers, kept for the next time.

        Parameters
        ----------
        layers : int or sequence of int, optional
            One layer, several, or all if not given. Inside the geometry.
        """
        if layers is None:
            return self._all
        chosen: Sequence[int]
        if isinstance(layers, (int, np.integer)):
            chosen = range(layers, layers + 1)
        else:
            chosen = layers if isinstance(layers, range) else tuple(layers)
        ready = self._ready.get(chosen)
        if ready is None:
            ready = Prepared(self.planes.select(chosen), self.model, *self._seams)
            if len(self._ready) >= _KEPT:
                self._ready.clear()
            self._ready[chosen] = ready
        return ready

    def transfer(
        self,
        device_pages: npt.NDArray[np.int64],
        host_pages: npt.NDArray[np.int64],
        direction: str,
        method: str = "auto",
        *,
        layers: int | Sequence[int] | None = None,
        batch: bool = True,
    ) -> Transfer:
        """Plan one transfer, to be packed piece by piece.

        Parameters
        ----------
        device_pages, host_pages : ndarray of int64
            Page numbers, one to one, checked before.
        direction : {"offload", "load"}
            From the device to the host, or back.
        method : {"auto", "batch", "strided", "loop"}
            ``"auto"`` takes what scores best (see `Transfer.scores`), the others force a method.
        layers : int or sequence of int, optional
            Layers to move; all if not given.
        batch : bool
            Whether the batch call can be used now.

        Returns
        -------
        Transfer
            Iterate over it once for ``(kind, arrays)``.
        """
        prepared = self._all if layers is None else self.prepared(layers)
        return prepared.transfer(device_pages, host_pages, direction, method, batch=batch)


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
        ``"batch"``, ``"loop"``, ``"strided"``, ``"strided+batch"`` or ``"strided+loop"``.
    copies_in : int
        Copies of one page of one plane each that were asked for.
    dsts, srcs, sizes : ndarray of uint64
        Plain copies.
    strided : ndarray of uint64, shape (m, 6)
        Strided copies: dst, dpitch, src, spitch, width, height.
    strided3 : ndarray of uint64, shape (k, 9)
        Strided copies of several slices: dst, dpitch, drows, src, spitch, srows, width,
        height, depth; a slice begins drows (srows) rows behind the one before it.
    batch_size : int
        Plain copies per batch call.
    first_size : int
        Plain copies of the first batch call, where each takes as many as are queued already,
        up to `batch_size`; 0 where all are alike.
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
    strided3: _U64 = field(repr=False)
    batch_size: int
    first_size: int
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
        return len(self.dsts) + len(self.strided) + len(self.strided3)

    @property
    def rows(self) -> int:
        """Rows of all strided copies."""
        return int(self.strided[:, 5].sum() + (self.strided3[:, 7] * self.strided3[:, 8]).sum())

    @property
    def calls(self) -> int:
        """CUDA calls."""
        plain = len(self.dsts)
        if self.plain_path == "batch":
            plain = len(self.batches())
        return plain + len(self.strided) + len(self.strided3)

    def batches(self) -> list[int]:
        """Plain copies of each batch call, in order where one thread submits."""
        return batches(len(self.dsts), self.batch_size, self.first_size)

    def pieces(self) -> Iterator[tuple[str, Any]]:
        """Iterate over what to submit, in order, as `Transfer` gives it."""
        if len(self.strided):
            yield "strided", self.strided
        if len(self.strided3):
            yield "strided3", self.strided3
        if len(self.dsts):
            yield self.plain_path, (self.dsts, self.srcs, self.sizes)

    def __str__(self) -> str:
        """Readable table of the plan and of the methods that were considered."""
        plain, flat, cubes = len(self.dsts), self.strided, self.strided3
        # name, copies, rows, calls, bytes of each kind
        kinds = [
            ("strided", len(flat), flat[:, 5], len(flat), flat[:, 4] * flat[:, 5]),
            ("strided 3-D", len(cubes), cubes[:, 7] * cubes[:, 8], len(cubes),
             cubes[:, 6] * cubes[:, 7] * cubes[:, 8]),
            (self.plain_path, plain, None, self.calls - len(flat) - len(cubes), self.sizes),
        ]  # fmt: skip
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
        for name, copies, rows, calls, sizes in kinds:
            if copies:
                shown = "" if rows is None else _count(int(rows.sum()))
                lines.append(
                    f"{name:<12}{_count(copies):>12}{shown:>12}{_count(calls):>10}"
                    f"{_bytes(int(sizes.sum())):>12}"
                )
        lines += ["", f"{'method':<16}{'predicted':>12}{'':>14}"]
        for name, time in sorted(self.candidates.items(), key=lambda item: item[1]):
            mark = "  chosen" if name == self.method else ""
            lines.append(f"{name:<16}{_time(time):>12}{self._rate(time):>14}{mark}")
        lines += ["", f"costs: {self.costs}"]
        return "\n".join(line.rstrip() for line in lines)

    def _rate(self, microseconds: float) -> str:
        return f"{self.bytes / microseconds / 1e3:.2f} GB/s" if microseconds > 0 else "0 GB/s"


def _joined(parts: list[_U64], empty: _U64) -> _U64:
    return np.concatenate(parts) if parts else empty


def plan(
    planes: Planes | Prepared,
    device_pages: npt.ArrayLike,
    host_pages: npt.ArrayLike,
    direction: str,
    method: str = "auto",
    model: CostModel | None = None,
    host_seams: npt.ArrayLike | None = None,
    device_seams: npt.ArrayLike | None = None,
    *,
    batch: bool = True,
    slow: float = 1,
) -> Plan:
    """Plan a whole transfer without moving anything.

    Parameters
    ----------
    planes : Planes or Prepared
        The geometry; one that is prepared carries its model and seams.
    device_pages, host_pages : array_like of int64
        Page numbers, one to one, inside the geometry.
    direction : {"offload", "load"}
        From the device to the host, or back.
    method : {"auto", "batch", "strided", "loop"}
        ``"auto"`` takes what scores best (see `Transfer.scores`), the others force a method.
    model : CostModel, optional
        What copies cost; the careful default if not given.
    host_seams, device_seams : array_like of uint64, optional
        Addresses that no single copy may have on both sides of it.
    batch : bool
        Whether the batch call can be used.
    slow : float
        How many times as long as in the model the CPU needs at the moment.

    Returns
    -------
    Plan
        With arrays of its own; printed, it is a table.
    """
    ready = (
        planes
        if isinstance(planes, Prepared)
        else prepare(planes, model, host_seams, device_seams)
    )
    transfer = ready.transfer(
        np.ascontiguousarray(device_pages, dtype=np.int64),
        np.ascontiguousarray(host_pages, dtype=np.int64),
        direction,
        method,
        batch=batch,
    )
    if slow != 1:
        transfer.decide(method, batch, slow)
    plain: tuple[list[_U64], list[_U64], list[_U64]] = ([], [], [])
    strided: list[_U64] = []
    strided3: list[_U64] = []
    # The buffers of a piece are used again by the next one.
    for piece in transfer:
        if piece[0] == "strided":
            strided.append(piece[1].copy())
        elif piece[0] == "strided3":
            strided3.append(piece[1].copy())
        else:
            for parts, array in zip(plain, piece[1], strict=True):
                parts.append(array.copy())
    none = np.empty(0, np.uint64)
    return Plan(
        direction=transfer.direction,
        method=transfer.method,
        copies_in=transfer.copies_in,
        dsts=_joined(plain[0], none),
        srcs=_joined(plain[1], none),
        sizes=_joined(plain[2], none),
        strided=_joined(strided, np.empty((0, 6), np.uint64)),
        strided3=_joined(strided3, np.empty((0, 9), np.uint64)),
        batch_size=transfer.batch_size,
        first_size=transfer.first_size,
        bytes=transfer.bytes,
        predicted_us=transfer.predicted_us,
        submit_us=transfer.submit_us,
        candidates=transfer.candidates,
        costs=f"{ready.model.name}, {ready.model.source}",
    )
