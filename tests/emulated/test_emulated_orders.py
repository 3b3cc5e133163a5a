"""Faults, stubs, delays and the record of calls."""

import time

import numpy as np
import pytest
from raw_runtime import Location, at, i32, numbers

from kvsig import registry


class TestOrders:
    def test_fault_strikes_the_nth_call_once(self, runtime):
        runtime.control.fault("cudaDeviceSynchronize", 719, nth=2)
        answers = [runtime.call("cudaDeviceSynchronize") for _ in range(4)]
        assert answers == [0, 719, 0, 0]
        assert runtime.last_error() == 719

    def test_fault_of_every_call(self, runtime):
        runtime.control.fault("cudaRuntimeGetVersion", 3, nth=0)
        assert [runtime.call("cudaRuntimeGetVersion", 0) for _ in range(3)] == [3, 3, 3]
        runtime.control.reset()
        assert runtime.call("cudaRuntimeGetVersion", 0) == 1

    def test_fault_inside_a_batch(self, runtime):
        src, dst, stream = numbers(4, 1), np.zeros(4, np.uint64), runtime.stream()
        runtime.control.fault("cudaMemcpyBatchAsync", 801, nth=1, fail_index=2)
        lists = [at(dst, i) for i in range(4)], [at(src, i) for i in range(4)], [8] * 4
        code, fail = runtime.batch(*lists, stream)
        assert code == 801 and fail in (None, 2)
        runtime.call("cudaStreamSynchronize", stream)
        assert dst.tolist() == [1, 2, 0, 0]
        assert runtime.batch(*lists, stream)[0] == 0
        runtime.call("cudaStreamSynchronize", stream)
        assert dst.tolist() == [1, 2, 3, 4]

    def test_fault_of_a_whole_batch_moves_nothing(self, runtime):
        src, dst, stream = numbers(1, 1), np.zeros(1, np.uint64), runtime.stream()
        runtime.control.fault("cudaMemcpyBatchAsync", 36)
        assert runtime.batch([at(dst)], [at(src)], [8], stream)[0] == 36
        runtime.call("cudaStreamSynchronize", stream)
        assert dst[0] == 0

    def test_stub_takes_any_argument(self, runtime):
        runtime.control.stub("cudaMemcpyAsync")
        runtime.control.record()
        assert runtime.copy(1, 2, 3, 4, kind=9) == 0
        (call,) = runtime.control.calls("cudaMemcpyAsync")
        assert [a["value"] for a in call["arguments"]] == [1, 2, 3, 9, 4]
        runtime.control.stub("cudaMemcpyAsync", on=False)
        assert runtime.copy(1, 2, 3, 4, kind=9) == 21

    def test_delay_keeps_the_caller(self, runtime):
        src, dst = numbers(1, 1), np.zeros(1, np.uint64)

        def took():
            begin = time.perf_counter()
            assert runtime.copy(at(dst), at(src), 8, runtime.stream()) == 0
            return time.perf_counter() - begin

        runtime.control.delay("cudaMemcpyAsync", 300_000)
        runtime.control.delay("cudaMemcpyBatchAsync", 10_000_000)
        assert 0.3 <= took() < 5
        runtime.control.delay("cudaMemcpyAsync", 0)
        assert took() < 0.3
        runtime.control.delay("cudaMemcpyAsync", 10_000_000)
        runtime.control.reset()
        assert took() < 5
        with pytest.raises(ValueError, match="microseconds must be at least 0, not -1"):
            runtime.control.delay("cudaMemcpyAsync", -1)

    def test_record_names_every_argument(self, runtime):
        src, dst, stream = numbers(2, 1), np.zeros(2, np.uint64), runtime.stream()
        runtime.control.record()
        lists = [at(dst), at(dst, 1)], [at(src), at(src, 1)], [8, 8]
        runtime.batch(*lists, stream)
        (call,) = runtime.control.calls()
        assert call["function"] == call["symbol"] == "cudaMemcpyBatchAsync"
        assert call["result"] == 0
        variant = registry.load().functions["cudaMemcpyBatchAsync"].select(runtime.version)
        assert [a["name"] for a in call["arguments"]] == [p.name for p in variant.params]
        values = {a["name"]: a["value"] for a in call["arguments"]}
        assert (values["count"], values["numAttrs"], values["stream"]) == (2, 1, stream)
        observed = call["observed"]
        assert [observed[key] for key in ("dsts", "srcs", "sizes")] == list(lists)
        assert observed["copies"] == 2 and observed["attrsIdxs"] == [0]
        expected = {"srcAccessOrder": 1, "flags": 0, "bytes": "01" + "00" * 23}
        assert observed["attributes"] == [expected]
        runtime.control.record(False)
        runtime.call("cudaDeviceSynchronize")
        assert len(runtime.control.calls()) == 1

    def test_record_shows_structs_and_signs(self, runtime):
        a = numbers(1)
        runtime.control.record()
        where = i32(-1) if runtime.version < 13000 else Location(1, -1)
        runtime.call("cudaMemAdvise", at(a), 8, i32(3), where)
        argument = runtime.control.calls()[0]["arguments"][3]
        if runtime.version < 13000:
            assert argument == {"name": "device", "type": "int", "value": -1}
        else:
            assert argument["name"] == "location"
            assert argument["bytes"] == "01000000ffffffff"

    def test_record_keeps_the_newest(self, runtime):
        runtime.control.record()
        call = runtime.lib.cudaSetDevice
        for device in range(66000):
            call(device)
        calls = runtime.control.calls()
        assert len(calls) == 65536
        assert calls[-1]["arguments"][0]["value"] == 65999
        assert runtime.control.counter("dropped") == 66000 - 65536

    def test_unknown_counter(self, runtime):
        with pytest.raises(ValueError, match="no counter 'copy': there are calls, operations"):
            runtime.control.counter("copy")
