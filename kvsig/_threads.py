"""How fast the CPU is at the moment, and how many threads submit the copies of a transfer.

Submitting a copy costs the CPU 0.4 to 0.9 us, as it runs at full speed or shares its core, and
moving it costs the copy engine its bytes. Where the first is the longer, several threads side by
side are faster than one: two need 0.6 us together and four 0.5, for the driver has locks. Measured
on an H100 beside slow CPUs (benchmarks/results/2026-11-24-h100-2/threads.json): layer by layer,
pages of 16 KiB go from 17 GB/s to 20 and 30 to the device, and from 20 to 29 and 31 to the host.
Beside fast CPUs one is faster.

What four threads cost others differs. Transfers of 2,048 copies, one behind the other, made the
products of another thread no longer; one of 65,536 copies made them take 1.4 to 2.5 times as long,
where two threads cost them nothing. So the number goes by the copies of a transfer.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

__all__ = [
    "ALONE",
    "BEGINS_US",
    "FEW_COPIES",
    "FEWEST",
    "SHARE",
    "SLOWEST",
    "WORTH",
    "AlwaysTeam",
    "Team",
    "look",
    "loop_ns",
    "most",
    "together_us",
]

# Fewer copies than this are submitted before another thread has woken up.
FEWEST = 256
# Up to so many copies a transfer may have all threads that there are for one.
FEW_COPIES = 2048
# Copies in one call of a thread, at most, so that a short piece has a call for each.
SHARE = 64
# What it takes until several threads are at work, and the stream goes on behind them all.
BEGINS_US = 10.0
# Several threads are worth it where one takes so many times as long as they and as the copy engine.
WORTH = 1.03
# From so many CPUs on, two and four threads may submit where nobody has said how many.
CPUS, MANY_CPUS = 8, 16
# Steps of the loop that is looked at: about half a microsecond.
STEPS = 20
# A CPU this much slower than it was at its best counts as slow, and none counts as slower than so.
SLOW, SLOWEST = 1.4, 2.1

# Nanoseconds of that loop at the best that this process has seen.
_best = float("inf")


class Team(NamedTuple):
    """Threads that may submit the copies of a transfer, the caller's counted in."""

    few: int
    """Of a transfer of up to `FEW_COPIES` copies."""
    many: int
    """Of a larger one."""


class AlwaysTeam(Team):
    """Threads that submit whether that is faster or not: for benchmarks, which find out."""

    __slots__ = ()


ALONE = Team(1, 1)


def loop_ns(times: int) -> int:
    """Nanoseconds of a short loop on the CPU at hand: the best of some, for interruptions."""
    best = 1 << 62
    for _ in range(times):
        begin = time.perf_counter_ns()
        total = 0
        for step in range(STEPS):
            total += step
        best = min(best, time.perf_counter_ns() - begin)
    return max(best, 1)


def look() -> float:
    """Return how many times as long as at its best the CPU needs, 1 where it makes no difference.

    The virtual CPUs beside GPUs run at half their speed, each for some time, when others are at
    work on the same core; Python and the driver slow down alike.
    """
    global _best
    # The first ones may find cold caches, which is no slowness either.
    took = loop_ns(4)
    _best = min(_best, took)
    return 1.0 if took < SLOW * _best else min(took / _best, SLOWEST)


def most(threads: int | None) -> Team:
    """Return the threads that may submit: as many as was said, or by how many CPUs there are."""
    if threads is None:
        cpus = len(os.sched_getaffinity(0))
        if cpus < CPUS:
            return ALONE
        return Team(4 if cpus >= MANY_CPUS else 2, 2)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 8:
        raise ValueError(f"threads must be an int from 1 to 8, or None, not {threads!r}")
    return Team(threads, threads)


def together_us(threads: int) -> float:
    """Host time of a copy that several threads submit, its share of a call counted in.

    As measured with calls of `SHARE` copies; 0 where one thread submits.
    """
    return 0.38 + 0.48 / threads if threads > 1 else 0.0
