# cython: language_level=3
"""The counters of transfers: adding to them runs no Python, so no other thread comes between."""

from libc.stdint cimport int64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from kvsig._core cimport Report


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
# Of the last transfer: most are like it, and texts that are the same object need no look-up.
cdef object last_what = None
cdef object last_path = None
cdef object last_reason = None
cdef Counter last = None


cdef Counter counter_of(str what, Report report):
    global last, last_what, last_path, last_reason
    if what is last_what and report.path is last_path and report.reason is last_reason:
        return last
    cdef tuple key = (what, report.path, report.reason)
    cdef Counter counter = table.get(key)
    if counter is None:
        counter = table.setdefault(key, Counter())
    last_what, last_path, last_reason, last = what, report.path, report.reason, counter
    return counter


cdef inline int64_t clock() noexcept:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


def record(str what not None, Report report not None, int64_t nanoseconds):
    """Count one transfer.

    Parameters
    ----------
    what : str
        "offload", "load", "copy_batch", or "integration.function". Few different ones: each
        has counters of its own.
    report : Report
        What the transfer came to.
    nanoseconds : int
        Host time.
    """
    cdef Counter counter = counter_of(what, report)
    counter.calls += 1
    counter.copies += report.copies
    counter.cuda_calls += report.calls
    counter.bytes += report.bytes
    counter.nanoseconds += nanoseconds


def now():
    """Return the time in nanoseconds, to be given to `since`."""
    return clock()


def since(str what not None, Report report not None, int64_t start):
    """Count one transfer that began at `start`, which `now` gave; returns its report."""
    record(what, report, clock() - start)
    return report


def counters():
    """Return ((what, path, reason), Counter) of every counter."""
    return list(table.items())


def clear():
    """Forget all counters."""
    global last, last_what, last_path, last_reason
    last, last_what, last_path, last_reason = None, None, None, None
    table.clear()
