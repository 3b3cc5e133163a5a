"""Methods of the benchmark: ways of making the transfer of a cell.

A method is a function that gets a `Job` ready and returns its runner, or raises `Unavailable`. The
table is open: another one is measured as soon as it stands in `METHODS`, which is how scripts
beside the package add other projects' functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvsig.tools.cells import LIMIT, PATHS
from kvsig.tools.jobs import LIMIT_BYTES, Job

__all__ = ["METHODS", "Method", "Outcome", "Runner", "Unavailable"]


class Unavailable(Exception):
    """A method cannot be used here; the text says why."""


@dataclass(slots=True)
class Outcome:
    """What one submission of a method was made of.

    Parameters
    ----------
    copies, calls, bytes : int
        That were submitted.
    path : str
        That was taken.
    reason : str or None
        Why kvsig took another path than the one asked for.
    whole : bool
        Whether it was the whole cell, and can be verified.
    """

    copies: int = 0
    calls: int = 0
    bytes: int = 0
    path: str = ""
    reason: str | None = None
    whole: bool = True

    def add(self, other: Outcome) -> None:
        """Count another submission in."""
        self.copies += other.copies
        self.calls += other.calls
        self.bytes += other.bytes
        self.path, self.reason = other.path, other.reason
        self.whole &= other.whole


#: Submits a job in one direction on a stream.
Runner = Callable[[Job, str, Any], Outcome]
Method = Callable[[Job], Runner]


def kvsig_path(path: str) -> Method:
    """Make the method that asks kvsig for a path."""

    def run(job: Job, direction: str, stream: Any) -> Outcome:
        outcome = Outcome()
        for report in job.kvsig(direction, path, stream):
            outcome.add(
                Outcome(report.copies, report.calls, report.bytes, report.path, report.reason)
            )
        return outcome

    return lambda job: run


def one_copy(job: Job) -> Runner:
    """Make the limit ready: one copy of as many bytes, and of at least 256 MiB."""
    if not job.memory.real:
        raise Unavailable("means nothing on the emulated runtime")
    ways, room = job.cell.ways, job.memory.near.numel()
    count = min(max(job.cell.bytes, LIMIT_BYTES), room) // len(ways)
    part = {way: slice(i * count, (i + 1) * count) for i, way in enumerate(ways)}

    def run(job: Job, direction: str, stream: Any) -> Outcome:
        near, far = job.memory.near[part[direction]], job.memory.far[part[direction]]
        with torch.cuda.stream(stream):
            if direction == "offload":
                far.copy_(near, non_blocking=True)
            else:
                near.copy_(far, non_blocking=True)
        return Outcome(1, 1, count, "one copy", whole=False)

    return run


#: Name on the command line -> the method.
METHODS: dict[str, Method] = {path: kvsig_path(path) for path in PATHS} | {LIMIT: one_copy}
