"""Counters, the text form, log lines and ranges; and what other libraries give for arguments."""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvsig import Report, interop, observe


class TestStats:
    def test_sums_by_path_function_integration_and_cause(self) -> None:
        observe.record("load", Report("batch", None, 10, 2, 1000), 5_000)
        observe.record("load", Report("loop", "no batch function", 3, 3, 30), 7_000)
        observe.record("vllm.load", Report("batch", None, 1, 1, 1), 1_000)
        observe.passed_on("vllm.load", "small pages")
        observe.passed_on("vllm.load", "small pages")
        observe.fell_back("vllm.load", ValueError("odd"))
        found = observe.stats()
        assert found["paths"]["batch"] == {
            "calls": 2, "copies": 11, "cuda_calls": 3, "bytes": 1001,
            "host_seconds": pytest.approx(6e-6),
        }  # fmt: skip
        assert found["functions"]["load"]["calls"] == 2
        assert found["integrations"]["vllm"]["calls"] == 1
        assert found["integrations"]["vllm"]["passed_on"] == 2
        assert found["passed_on"] == {"vllm.load": {"small pages": 2}}
        assert found["fallbacks"] == {"no batch function": 1, "ValueError": 1}

    def test_threads_lose_nothing(self) -> None:
        def work() -> None:
            for _ in range(5000):
                observe.record("load", Report("batch", None, 1, 1, 2), 3)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert observe.stats()["functions"]["load"]["bytes"] == 40_000

    def test_cheap_enough_to_be_always_on(self) -> None:
        report = Report("batch", None, 10, 2, 1000)
        best = 1.0
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(1000):
                observe.record("load", report, 5)
            best = min(best, (time.perf_counter() - start) / 1000)
        assert best < 1e-6  # ten times the aim, for machines that are shared

    def test_the_text_form_escapes_and_has_each_series_once(self) -> None:
        observe.record("load", Report("loop", "why", 1, 1, 8), 5)
        observe.record("load", Report("loop", 'an "odd"\nreason', 1, 1, 8), 5)
        lines = observe.prometheus().splitlines()
        assert 'kvsig_bytes_total{function="load",path="loop"} 16' in lines
        assert 'kvsig_fallbacks_total{cause="an \\"odd\\"\\nreason"} 1' in lines
        series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
        assert len(series) == len(set(series))


def test_reasons_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kvsig"):
        for _ in range(3):
            observe.passed_on("sglang.f", "a reason")
    assert caplog.messages == ["kvsig: sglang.f is left to the engine: a reason"]


@pytest.mark.parametrize(("value", "off"), [("1", True), ("0", False), ("", False), ("no", False)])
def test_the_switch(monkeypatch: pytest.MonkeyPatch, value: str, off: bool) -> None:
    monkeypatch.setenv("KVSIG_DISABLE", value)
    assert observe.disabled() is off


class TestRanges:
    def test_none_unless_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KVSIG_NVTX", raising=False)

        def function() -> None: ...

        assert observe.traced("name")(function) is function

    def test_in_torchs_profiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KVSIG_NVTX", "1")
        traced = observe.traced("kvsig.test")(lambda x: x + 1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert traced(2) == 3
        assert "kvsig.test" in [event.name for event in profile.events()]


class TestStreams:
    @pytest.mark.parametrize(
        "stream",
        [
            7,
            np.uint64(7),
            np.int32(7),
            SimpleNamespace(cuda_stream=7),
            SimpleNamespace(ptr=7),
            SimpleNamespace(__cuda_stream__=(0, 7)),
            SimpleNamespace(__cuda_stream__=lambda: (0, 7)),
        ],
    )
    def test_forms(self, stream: object) -> None:
        assert interop.stream_number(stream) == 7
        assert type(interop.stream_number(stream)) is int

    @pytest.mark.parametrize("thing", [True, np.True_, "7", 7.0, SimpleNamespace(ptr="7")])
    def test_what_is_none(self, thing: object) -> None:
        assert interop.stream_number(thing) is None

    def test_another_version_of_the_protocol(self) -> None:
        with pytest.raises(ValueError, match="is of version 1: kvsig knows 0"):
            interop.stream_number(SimpleNamespace(__cuda_stream__=(1, 7)))


class TestArrays:
    def test_numpy_and_dlpack_share_memory(self) -> None:
        array = np.arange(6, dtype=np.float32)
        tensor = torch.arange(6)

        class Other:
            def __dlpack__(self, **arguments: object) -> object:
                return tensor.__dlpack__(**arguments)

            def __dlpack_device__(self) -> object:
                return tensor.__dlpack_device__()

        assert interop.tensor_of(array, "a").data_ptr() == array.ctypes.data
        assert interop.tensor_of(Other(), "a").data_ptr() == tensor.data_ptr()
        assert interop.tensor_of(tensor, "a") is tensor

    def test_refusals(self) -> None:
        with pytest.raises(TypeError, match=r"host must be a tensor, .* not list"):
            interop.tensor_of([1], "host")
        array = np.arange(3)
        array.flags.writeable = False
        with pytest.raises(TypeError, match="host is a read-only array"):
            interop.tensor_of(array, "host")


class TestNumbers:
    @pytest.mark.parametrize("value", [16, np.int32(16), np.uint64(16), np.array(16)])
    def test_integers(self, value: object) -> None:
        found = interop.page_number(value, "page_size", 1)
        assert found == 16 and type(found) is int

    @pytest.mark.parametrize("value", [True, np.True_, 16.0, np.float64(16), "16", None])
    def test_others(self, value: object) -> None:
        with pytest.raises(TypeError, match="page_size must be an int, not"):
            interop.page_number(value, "page_size", 1)

    def test_the_least(self) -> None:
        with pytest.raises(ValueError, match="page_size must be at least 1, not 0"):
            interop.page_number(np.int64(0), "page_size", 1)
