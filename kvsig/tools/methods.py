"""Methods of the benchmark: ways of making the transfer of a cell.

A method is a function that gets a `Job` ready and returns its runner, or raises `Unavailable`. The
table is open: another one is measured as soon as it stands in `METHODS`, which is how scripts
beside the package add other projects' functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kvsig import Report
from kvsig.tools.cells import LIMIT, PATHS
from kvsig.tools.jobs import LIMIT_BYTES, Job

__all__ = ["METHODS", "Method", "Runner", "Unavailable"]

#: Submits a job in one direction on a stream.
Runner = Callable[[str, Any], Report]
Method = Callable[[Job], Runner]


class Unavailable(Exception):
    """A method cannot be used here; the text says why."""


def kvsig_path(path: str) -> Method:
    """Make the method that asks kvsig for a path."""
    return lambda job: partial(job.transfer, path)


def one_copy(job: Job) -> Runner:
    """Make the limit ready: one copy of as many bytes, and of at least 256 MiB."""
    if not job.memory.real:
        raise Unavailable("means nothing on the emulated runtime")
    ways, room = job.cell.ways, job.memory.near.numel()
    count = min(max(job.cell.bytes, LIMIT_BYTES), room) // len(ways)
    part = {way: slice(i * count, (i + 1) * count) for i, way in enumerate(ways)}

    def run(direction: str, stream: Any) -> Report:
        near, far = job.memory.near[part[direction]], job.memory.far[part[direction]]
        to, of = (far, near) if direction == "offload" else (near, far)
        with torch.cuda.stream(stream):
            to.copy_(of, non_blocking=True)
        return Report("one copy", None, 1, 1, count)

    return run


#: Name on the command line -> the method.
METHODS: dict[str, Method] = {path: kvsig_path(path) for path in PATHS} | {LIMIT: one_copy}
