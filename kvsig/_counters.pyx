# cython: language_level=3
"""The counters of transfers: adding to them runs no Python, so no other thread comes between."""

from libc.stdint cimport int64_t


cdef class Counter:
    """Sums of the transfers of one function that took one path for one reason.

    Attributes
    ----------
    calls : int
        Transfers.
    copies, cuda_calls, bytes : int
        As their reports say.
    nanoseconds : int
        Host time.
    """

    cdef readonly int64_t calls, copies, cuda_calls, bytes, nanoseconds


cdef dict table = {}


def record(str what not None, report not None, int64_t nanoseconds):
    """Count one transfer.

    Parameters
    ----------
    what : str
        "offload", "load", "copy_batch", or "integration.function". Few different ones: each
        has counters of its own.
    report : Report
        What the transfer came to.
    nanoseconds : int
        Host time, by ``time.perf_counter_ns``.
    """
    cdef tuple key = (what, report.path, report.reason)
    cdef int64_t copies = report.copies, calls = report.calls, size = report.bytes
    cdef Counter counter = table.get(key)
    if counter is None:
        counter = table.setdefault(key, Counter())
    counter.calls += 1
    counter.copies += copies
    counter.cuda_calls += calls
    counter.bytes += size
    counter.nanoseconds += nanoseconds


def counters():
    """Return ((what, path, reason), Counter) of every counter."""
    return list(table.items())


def clear():
    """Forget all counters."""
    table.clear()
