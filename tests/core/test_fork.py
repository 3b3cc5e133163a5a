"""A forked child: it never waits for a thread of its parent, and is told where CUDA is lost."""

from __future__ import annotations

import pytest
from core_help import python

from kvsig.check import releases

# What each child tells, or how it ended.
PRELUDE = """
import os, signal, threading, time
import numpy as np
import kvsig
from kvsig import _core, registry

source, target = np.arange(1, 65, dtype=np.uint8), np.zeros(64, np.uint8)
dsts, srcs = (np.array([a.ctypes.data], np.uint64) for a in (target, source))

def attempt(work):
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def in_child(work):
    # Prints what a forked child has to say; a child that hangs is ended, and that is said.
    print(end="", flush=True)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        print(attempt(work), flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        print(f"the child ended by {status}")
"""

TOLD = (
    "BindError: process {child} was forked from process {parent}, which had used CUDA: CUDA does"
    " not work in such a child. Start it by the method 'spawn', or fork before CUDA is first used"
)


def cudart():
    """Path of a real libcudart."""
    try:
        return str(releases.library("12.9.79"))
    except releases.ReleaseError as error:
        if "package index cannot be reached" not in str(error):
            raise
        pytest.skip(str(error))


def say(text, **environment):
    return python(text, before=PRELUDE, **{"KVSIG_CUDART": "emulated:13.0", **environment})


@pytest.mark.known_failure("fork-while-binding")
def test_while_another_thread_binds():
    assert say("""
        real, parent, inside = registry.load, os.getpid(), threading.Event()

        def slow():
            if os.getpid() == parent:
                inside.set()
                time.sleep(1)
            return real()

        registry.load = slow
        thread = threading.Thread(target=_core.bind)
        thread.start()
        inside.wait()
        in_child(lambda: _core.info()["runtime_version"])
        thread.join()
        print(_core.info()["runtime_version"])
    """) == "13000\n13000\n"  # fmt: skip


def test_while_another_thread_makes_the_way_around_the_legacy_stream():
    """The lock is taken in there as well; the parent has not copied anything yet."""
    assert say("""
        control = kvsig.emulated.Control(_core.info()["library"])
        control.delay("cudaStreamCreateWithFlags", 1_000_000)
        thread = threading.Thread(target=lambda: _core.copy_batch(dsts, srcs, 64, 0))
        thread.start()
        time.sleep(0.3)
        in_child(lambda: (_core.rebind("emulated:12.9"), _core.runtime_version())[1])
        thread.join()
    """) == "12090\n"  # fmt: skip


@pytest.mark.known_failure("fork-after-use")
@pytest.mark.parametrize(
    "call",
    [
        "_core.copy_batch(dsts, srcs, 64, 2)",
        "_core.copy_batch(dsts, srcs, 64, 2, 'loop')",
        "_core.copy_strided(np.array([[dsts[0], 8, 1, srcs[0], 8, 1, 8, 1, 1]], np.uint64), 2)",
        "_core.batch_refusal(2)",
        "_core.memory_range(4096)",
        "kvsig.call('cudaStreamSynchronize', stream=2)",
    ],
)
def test_of_a_parent_that_has_copied(call):
    """It is told by name before anything is called; asking what is bound still works."""
    text = say(f"""
        with kvsig.emulated.Stream() as on:
            _core.copy_batch(dsts, srcs, 64, on.cuda_stream)
        print(os.getpid())

        def work():
            control = kvsig.emulated.Control(_core.info()["library"])
            control.record()
            told = attempt(lambda: {call})
            return f"{{os.getpid()}}\\n{{told}}\\n{{control.calls()}}\\n{{_core.info()['batch']}}"

        in_child(work)
    """)
    parent, child, told, calls, batch = text.splitlines()
    assert told == TOLD.format(parent=parent, child=child)
    assert calls == "[]"
    why = TOLD.format(parent=parent, child=child).partition(": ")[2]
    assert batch == str({"path": "none", "why": why})


@pytest.mark.known_failure("fork-after-asking")
def test_of_a_parent_that_has_only_asked():
    assert say("""
        print(_core.info()["batch"]["path"])

        def work():
            with kvsig.emulated.Stream() as on:
                report = _core.copy_batch(dsts, srcs, 64, on.cuda_stream)
            return report.path, bool((source == target).all())

        in_child(work)
    """) == "batch\n('batch', True)\n"  # fmt: skip


def test_of_a_child_is_told_as_well():
    text = say("""
        with kvsig.emulated.Stream() as on:
            _core.copy_batch(dsts, srcs, 64, on.cuda_stream)
        in_child(lambda: in_child(lambda: _core.copy_batch(dsts, srcs, 64, 2)))
    """)
    assert "which had used CUDA" in text


def test_what_others_did_with_a_real_runtime_is_seen_by_open_devices():
    """Whoever initialised CUDA, the driver's files are open then; an emulated runtime has none."""
    text = """
        _core.watch_devices("/dev/zero")
        device = open("/dev/zero")
        in_child(lambda: _core.copy_batch(dsts, srcs, 64, 2, 'loop'))
    """
    assert "which had used CUDA" in say(text, KVSIG_CUDART=cudart())
    assert "which had used CUDA" not in say(text)


def test_what_a_child_does_after_the_fork_is_its_own():
    """It may initialise CUDA itself, and use kvsig then for the first time."""
    assert say("""
        _core.bind()
        _core.watch_devices("/dev/zero")

        def work():
            device = open("/dev/zero")
            with kvsig.emulated.Stream() as on:
                return _core.copy_batch(dsts, srcs, 64, on.cuda_stream).path

        in_child(work)
    """) == "batch\n"  # fmt: skip
    real_one = """
        _core.bind()
        _core.watch_devices("/dev/zero")

        def work():
            device = open("/dev/zero")
            return _core.copy_batch(dsts, srcs, 64, 2, "loop")

        in_child(work)
    """
    assert "which had used CUDA" not in say(real_one, KVSIG_CUDART=cudart())
