"""Signals that arrive in the middle of a transfer: it ends soon, and says what is queued."""

from __future__ import annotations

import re
import signal
import time

import numpy as np
import pytest
from core_help import BATCH, Copies, strided

from kvsig import _core

SINGLE, ROWS = "cudaMemcpyAsync", "cudaMemcpy3DAsync"


@pytest.fixture
def interrupted():
    """Raise KeyboardInterrupt, as Ctrl-C does, a tenth of a second from now."""

    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)

    def go():
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        return time.monotonic()

    yield go
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def queued(caught):
    """Numbers that the note of an error tells: copies that are queued, and all."""
    (note,) = caught.value.__notes__
    match = re.fullmatch(
        r"kvsig stopped here: the first (\d+) of (\d+) copies are queued and will be made in the"
        r" order of the stream, the others not",
        note,
    )
    assert match, note
    return int(match[1]), int(match[2])


@pytest.mark.known_failure("ctrl-c")
@pytest.mark.parametrize("legacy", [False, True], ids=["own", "legacy"])
@pytest.mark.parametrize(
    ("path", "function", "delay"), [("loop", SINGLE, 1000), ("batch", BATCH, 10_000)]
)
def test_ctrl_c_ends_a_transfer(bind, stream, interrupted, path, function, delay, legacy):
    control, copies = bind("13.0"), Copies(4000)
    on = 0 if legacy else stream().cuda_stream
    _core.copy_batch(*Copies(1).arguments, on)
    control.delay(function, delay)
    begin = interrupted()
    with pytest.raises(KeyboardInterrupt) as caught:
        _core.copy_batch(*copies.arguments, on, path, batch_size=10)
    assert time.monotonic() - begin < 1  # all of them take 4 s
    control.delay(function, 0)
    done, count = queued(caught)
    assert 0 < done < count == 4000
    control.synchronize(on)
    copies.check(made=range(done))
    # What comes next is as ever.
    rest = Copies(9)
    _core.copy_batch(*rest.arguments, on, path)
    control.synchronize(on)
    rest.check()


def test_ctrl_c_ends_strided_copies(bind, stream, interrupted):
    control, on = bind("13.0"), stream()
    source, target = np.arange(1, 9, dtype=np.uint8), np.zeros((4000, 8), np.uint8)
    at = source.ctypes.data
    ops = strided([target.ctypes.data + 8 * i, 8, 1, at, 8, 1, 8, 1, 1] for i in range(4000))
    control.delay(ROWS, 1000)
    begin = interrupted()
    with pytest.raises(KeyboardInterrupt) as caught:
        _core.copy_strided(ops, on.cuda_stream)
    assert time.monotonic() - begin < 1
    control.delay(ROWS, 0)
    done, count = queued(caught)
    on.synchronize()
    assert 0 < done < count == 4000
    assert (target[:done] == source).all() and target[done:].sum() == 0


def test_a_handler_that_raises_nothing_stops_nothing(bind, stream):
    control, on, copies = bind("13.0"), stream(), Copies(300)
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(time.monotonic()))
    control.delay(SINGLE, 1000)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        report = _core.copy_batch(*copies.arguments, on.cuda_stream, "loop")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    end = time.monotonic()
    on.synchronize()
    copies.check()
    assert (report.path, report.copies, report.calls) == ("loop", 300, 300)
    # It was handled in the middle, not only behind the last copy.
    assert seen and seen[0] < end - 0.1
