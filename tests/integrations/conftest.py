"""Fixtures of the integrations: engines of our own making, and their streams."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
from standins import Hooks, HookType, Originals, module

from kvsig import observe, streams
from kvsig.emulated import Control, Stream


@pytest.fixture(autouse=True)
def counters() -> Iterator[None]:
    """Counters begin at zero in each test."""
    observe.clear()
    yield
    observe.clear()


@pytest.fixture(params=["legacy", "own"])
def stream(
    request: pytest.FixtureRequest, control: Control, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """The current stream of the engine: the legacy one, and one of its own."""
    if request.param == "legacy":
        yield 0
        return
    with Stream(control) as own:
        monkeypatch.setattr(streams, "current_handle", lambda device: own.cuda_stream)
        yield own.cuda_stream


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """A small SGLang: kernels, plugins, and a module that has imported names from the kernels."""
    originals = Originals()
    functions = originals.functions()
    module(monkeypatch, "sgl_kernel", __version__="0.4.10")
    io = module(monkeypatch, "sgl_kernel.kvcacheio", **functions)
    module(monkeypatch, "sglang", __version__="0.5.23")
    for name in ("srt", "srt.plugins", "srt.mem_cache"):
        module(monkeypatch, f"sglang.{name}")
    module(
        monkeypatch, "sglang.srt.plugins.hook_registry", HookRegistry=Hooks, HookType=HookType
    )
    pool = module(monkeypatch, "sglang.srt.mem_cache.memory_pool_host", **functions)
    yield types.SimpleNamespace(
        io=io, pool=pool, calls=originals.calls, functions=functions, hooks=Hooks
    )
    from kvsig.integrations import sglang as integration

    integration.uninstall()
    Hooks.waiting.clear()
