"""What the CPU needs to submit copies, measured as transfers go by, and what follows from it.

Submitting a copy costs the CPU 0.4 to 0.9 us, by the machine and the moment, and moving it costs
the copy engine its bytes. Where the first is the longer, several threads submit side by side.
Measured on an H100 beside slow CPUs (benchmarks/results/2026-11-24-h100/threads.json): layer by
layer 4 KiB pages go from 4.1 to 7.2 GB/s to the device with four threads, those of 32 KiB from 35
to 48. Beside fast CPUs one thread is as fast.

Threads in the driver keep others out of it. Layer by layer no product that another thread launched
took longer; beside one transfer of 65,536 batched copies many took 2.5 times as long (compute.json
there). So several submit only where one has been measured to be the bottleneck.
"""

from __future__ import annotations

import os
import time

__all__ = ["FEWEST", "Pace", "look", "loop_ns"]

# Fewer copies than this are submitted before another thread has woken up.
FEWEST = 256
# Copies in one call of a thread, at most, so that a short piece has a call for each.
SHARE = 64
# One transfer in so many is submitted by one thread alone, to measure the pace anew.
AGAIN = 64
# Nanoseconds per copy of two threads together: the driver has a lock that they share.
FASTEST = 560
# Two threads are worth it from this much more time of the CPU than that or the engine's, and
# four from the next.
WORTH = 1.12
WORTH_MORE = 1.4
# From so many CPUs on, two threads may submit where nobody has said how many.
CPUS = 8
# Steps of the loop that is looked at: about half a microsecond.
STEPS = 20
# A CPU this much slower than it was at its best counts as slow, and none counts as slower than so.
SLOW, SLOWEST = 1.4, 2.1

# Nanoseconds of that loop at the best that this process has seen.
_best = float("inf")


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


class Pace:
    """What submitting costs, measured as transfers go by.

    Parameters
    ----------
    threads : int or None
        The most threads that submit, the caller's counted in; None is 2 where there are 8 CPUs or
        more, and 1 elsewhere.

    Attributes
    ----------
    most : int
        The most threads that submit.
    """

    __slots__ = ("_costs", "most")

    def __init__(self, threads: int | None = None) -> None:
        if threads is None:
            threads = 2 if len(os.sched_getaffinity(0)) >= CPUS else 1
        elif isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 8:
            raise ValueError(f"threads must be an int from 1 to 8, or None, not {threads!r}")
        self.most = threads
        # By direction and size class: nanoseconds per copy, and uses since they were measured.
        self._costs: dict[tuple[bool, int], list[float]] = {}

    @property
    def together_us(self) -> float:
        """Host time of a copy that several threads submit, as measured; 0 where one submits."""
        return 0.38 + 0.48 / self.most if self.most > 1 else 0.0

    def choose(self, load: bool, copies: int, size: int, engine_ns: float) -> int:
        """Threads for a piece of a transfer.

        Parameters
        ----------
        load : bool
            The direction: host to device.
        copies, size : int
            How many copies, and bytes of one.
        engine_ns : float
            What moving one costs the copy engine.
        """
        if copies < FEWEST or self.most == 1:
            return 1
        cost = self._costs.get((load, size.bit_length()))
        if cost is None:
            return 1
        cost[1] += 1
        if cost[1] >= AGAIN:
            return 1
        ratio = cost[0] / max(engine_ns, FASTEST)
        if ratio < WORTH:
            return 1
        return min(self.most, 2 if ratio < WORTH_MORE else 4)

    def note(self, load: bool, copies: int, size: int, took_ns: int) -> None:
        """Learn from a piece that one thread has submitted alone."""
        if copies < FEWEST or self.most == 1:
            return
        key = (load, size.bit_length())
        cost = self._costs.get(key)
        each = took_ns / copies
        # Half old, half new: one interruption is not believed, a machine that slows down is.
        self._costs[key] = [each if cost is None else (cost[0] + each) / 2, 0]
