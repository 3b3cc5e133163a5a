"""Captures and graphs."""

import ctypes

import numpy as np
from raw_runtime import LEGACY, Runtime, at, i32, numbers, u64


class TestCapture:
    def test_copies_land_in_the_graph_and_replay(self, runtime):
        a, b, c, stream = numbers(4, 1), np.zeros(4, np.uint64), np.zeros(4, np.uint64), None
        stream = runtime.stream()
        assert runtime.call("cudaStreamBeginCapture", stream, 0) == 0
        assert runtime.copy(at(b), at(a), 32, stream) == 0
        assert runtime.call("cudaMemcpy2DAsync", at(c), 16, at(b), 16, 8, 2, 4, stream) == 0
        graph = runtime.new("cudaStreamEndCapture", before=[stream])
        runtime.call("cudaStreamSynchronize", stream)
        assert not b.any()
        edges = u64()
        extra = [0] if runtime.version >= 13000 else []
        assert runtime.call("cudaGraphGetEdges", graph, 0, 0, *extra, ctypes.addressof(edges)) == 0
        assert edges.value == 1
        executable = runtime.new("cudaGraphInstantiate", graph, 0)
        assert runtime.call("cudaGraphDestroy", graph) == 0
        for start in (1, 50):
            a[:] = numbers(4, start)
            assert runtime.call("cudaGraphLaunch", executable, stream) == 0
            runtime.call("cudaStreamSynchronize", stream)
            assert (b == a).all() and c.tolist() == [start, 0, start + 2, 0]
        assert runtime.call("cudaGraphExecDestroy", executable) == 0
        assert runtime.call("cudaGraphLaunch", 0, stream) == 1

    def test_capture_info_in_each_form(self, built):
        for version, name, extra in (
            (11080, "cudaStreamGetCaptureInfo", 0),
            (12080, "cudaStreamGetCaptureInfo_v2", 3),
            (13000, "cudaStreamGetCaptureInfo", 4),
        ):
            runtime = Runtime(built(version), version)
            stream, status, number = runtime.stream(), i32(7), u64()
            rest = [u64(77) for _ in range(extra)]
            pointers = [ctypes.addressof(out) for out in (status, number, *rest)]
            assert runtime.call(name, stream, *pointers) == 0
            assert status.value == 0
            runtime.call("cudaStreamBeginCapture", stream, 0)
            assert runtime.call(name, stream, *pointers) == 0
            assert status.value == 1 and number.value > 0
            if rest:
                assert rest[-1].value == 0
            runtime.control.reset()

    def test_waiting_for_a_captured_stream_loses_the_capture(self, runtime):
        stream, status, graph = runtime.stream(), i32(), u64()
        runtime.call("cudaStreamBeginCapture", stream, 0)
        assert runtime.call("cudaStreamSynchronize", stream) == 900
        runtime.call("cudaStreamIsCapturing", stream, ctypes.byref(status))
        assert status.value == 2
        assert runtime.copy(4096, 4096, 8, stream) == 901
        assert runtime.call("cudaStreamEndCapture", stream, ctypes.byref(graph)) == 901
        assert graph.value == 0
        assert runtime.call("cudaStreamSynchronize", stream) == 0

    def test_capture_spans_streams_that_events_join(self, runtime):
        first, second = runtime.stream(), runtime.stream()
        fork, join = runtime.event(), runtime.event()
        a, b = numbers(2, 1), np.zeros(2, np.uint64)
        runtime.call("cudaStreamBeginCapture", first, 0)
        runtime.copy(at(b, 0), at(a, 0), 8, first)
        runtime.call("cudaEventRecord", fork, first)
        assert runtime.call("cudaStreamWaitEvent", second, fork, 0) == 0
        runtime.copy(at(b, 1), at(a, 1), 8, second)
        runtime.call("cudaEventRecord", join, second)
        assert runtime.call("cudaStreamWaitEvent", first, join, 0) == 0
        assert runtime.call("cudaEventQuery", join) == 907
        graph = runtime.new("cudaStreamEndCapture", before=[first])
        executable = runtime.new("cudaGraphInstantiate", graph, 0)
        runtime.call("cudaGraphLaunch", executable, first)
        runtime.call("cudaStreamSynchronize", first)
        assert (a == b).all()

    def test_capture_refuses_what_would_break_it(self, runtime):
        first, second, fork, graph = runtime.stream(), runtime.stream(), runtime.event(), u64()
        a = numbers(2)

        def begin():
            assert runtime.call("cudaStreamBeginCapture", first, 0) == 0

        def end():
            return runtime.call("cudaStreamEndCapture", first, ctypes.byref(graph))

        begin()
        runtime.call("cudaEventRecord", fork, first)
        runtime.call("cudaStreamWaitEvent", second, fork, 0)
        runtime.copy(at(a), at(a, 1), 8, second)
        assert end() == 904
        runtime.call("cudaEventRecord", fork, second)
        begin()
        assert runtime.call("cudaStreamWaitEvent", first, fork, 0) == 905
        assert end() == 901
        begin()
        assert runtime.call("cudaMalloc", ctypes.byref(graph), 8) == 900
        assert end() == 901
        assert end() == 401
        assert runtime.call("cudaStreamBeginCapture", LEGACY, 0) == 900

    def test_legacy_stream_and_captured_blocking_stream_exclude_each_other(self, runtime):
        blocking, status, graph, a = runtime.stream(blocking=True), i32(), u64(), numbers(2)
        runtime.call("cudaStreamBeginCapture", blocking, 2)
        assert runtime.call("cudaStreamIsCapturing", LEGACY, ctypes.byref(status)) == 906
        assert runtime.copy(at(a), at(a, 1), 8, LEGACY) == 906
        assert runtime.call("cudaStreamEndCapture", blocking, ctypes.byref(graph)) == 901
        assert runtime.call("cudaStreamIsCapturing", LEGACY, ctypes.byref(status)) == 0
