"""The page-copy kernel on a real GPU."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
import torch
from page_cases import PageCase

import kvsig

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean")]

CASES = int(os.environ.get("KVSIG_KERNEL_GPU_CASES", "2000"))
PARTS = 10
MOST, ROOM = 1 << 22, 1 << 26
LAYERS, PAGES, HOST_PAGES, WIDTH = 6, 300, 400, 4096


def on_gpu(values, kind="int64", device="cuda"):
    return torch.from_numpy(np.asarray(values).astype(kind)).to(device)


def busy(stream, seconds=0.1):
    """Keep a stream at work for a while."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(seconds * 2e9))


class Setup:
    """A cache on a GPU, and what both sides should hold."""

    def __init__(self, device="cuda", **options):
        self.near = torch.randint(0, 256, (LAYERS, PAGES, WIDTH), dtype=torch.uint8, device=device)
        shape = HOST_PAGES, LAYERS, 1, WIDTH
        self.far = torch.randint(0, 256, shape, dtype=torch.uint8).pin_memory()
        self.cache = kvsig.PagedKVCache(list(self.near), self.far, page_size=1, **options)
        torch.cuda.synchronize(device)

    def loaded(self, host, device):
        wanted = self.near.cpu()
        wanted[:, torch.as_tensor(device)] = self.far[torch.as_tensor(host), :, 0].transpose(0, 1)
        return wanted

    def offloaded(self, device, host):
        wanted = self.far.clone()
        wanted[torch.as_tensor(host), :, 0] = self.near.cpu()[:, torch.as_tensor(device)].transpose(
            0, 1
        )
        return wanted


def lists(count=50, seed=0):
    """Host pages and device pages, none twice."""
    rng = np.random.default_rng(seed)
    return rng.permutation(HOST_PAGES)[:count], rng.permutation(PAGES)[:count]


class TestRandomTransfers:
    @pytest.fixture(scope="class")
    def memory(self):
        source = torch.from_numpy(np.random.default_rng(0).integers(0, 256, ROOM, dtype=np.uint8))
        return (
            torch.empty(ROOM, dtype=torch.uint8, device="cuda"),
            torch.empty(ROOM, dtype=torch.uint8, pin_memory=True),
            source,
        )

    @pytest.mark.parametrize("part", range(PARTS))
    def test_move_what_plain_copies_move(self, memory, part):
        """Guard bytes around every tensor are compared too."""
        stream = torch.cuda.Stream()
        for seed in range(part, CASES, PARTS):
            case = PageCase(seed, MOST)
            near, far = (
                side[: case.bytes_of(i)].copy_(memory[2][seed % 977 + i :][: case.bytes_of(i)])
                for i, side in enumerate(memory[:2])
            )
            wanted = near.cpu(), far.clone()
            case.expect(*wanted)
            cache = case.cache(near, far)
            torch.cuda.synchronize()
            report, events, kept = case.run(cache, stream, on_gpu, torch.cuda.Event)
            for event in events:
                event.synchronize()
            if events:
                # The layers are there once their events are.
                assert torch.equal(near.cpu(), wanted[0]), case
            stream.synchronize()
            cache.check()
            del kept
            assert report.path == "kernel", case
            assert torch.equal(near.cpu(), wanted[0]), case
            assert torch.equal(far, wanted[1]), case


class TestPageNumbersOnTheGpu:
    @pytest.mark.parametrize("kinds", [("int64", "int64"), ("int32", "int32"), ("int32", "int64")])
    def test_nothing_is_waited_for(self, kinds):
        """The call returns while the stream is still busy with what comes before."""
        setup, stream = Setup(), torch.cuda.Stream()
        host, device = lists()
        far, near = on_gpu(host, kinds[0]), on_gpu(device, kinds[1])
        setup.cache.load(far, near, stream=stream)
        torch.cuda.synchronize()
        setup.near.zero_()
        wanted = setup.loaded(host, device)
        torch.cuda.synchronize()
        busy(stream)
        begin = time.perf_counter()
        report = setup.cache.load(far, near, stream=stream)
        took = time.perf_counter() - begin
        assert not stream.query(), f"the stream was waited for: {took * 1e3:.1f} ms"
        assert took < 0.05
        assert report.path == "kernel"
        stream.synchronize()
        setup.cache.check()
        assert torch.equal(setup.near.cpu(), wanted)

    def test_are_read_when_the_stream_comes_to_them(self):
        """They may be made by work that is queued before the transfer."""
        setup, stream = Setup(), torch.cuda.Stream()
        host, device = lists()
        wanted = setup.loaded(host, device)
        ready = on_gpu(host), on_gpu(device)
        made = [torch.full_like(numbers, -1) for numbers in ready]
        torch.cuda.synchronize()
        busy(stream, 0.05)
        with torch.cuda.stream(stream):
            for numbers, values in zip(made, ready, strict=True):
                numbers.copy_(values)
            setup.cache.load(made[0], made[1])
        stream.synchronize()
        setup.cache.check()
        assert torch.equal(setup.near.cpu(), wanted)

    @pytest.mark.parametrize("side", ["device_pages", "host_pages"])
    @pytest.mark.parametrize("wrong", [-1, 10**6])
    @pytest.mark.parametrize("events", [False, True])
    def test_a_wrong_one_moves_nothing_and_is_told(self, side, wrong, events):
        setup, stream = Setup(), torch.cuda.Stream()
        host, device = (values.copy() for values in lists())
        (device if side == "device_pages" else host)[7] = wrong
        before = setup.near.cpu()
        far, near = on_gpu(host), on_gpu(device)
        torch.cuda.synchronize()
        given = [torch.cuda.Event() for _ in range(LAYERS)] if events else None
        setup.cache.load(far, near, stream=stream, events=given)
        for event in given or ():
            event.synchronize()
        stream.synchronize()
        assert torch.equal(setup.near.cpu(), before)
        with pytest.raises(ValueError, match=rf"{side}\[7\] is {wrong}: "):
            setup.cache.check()
        setup.cache.check()
        host, device = lists()
        wanted = setup.loaded(host, device)
        setup.cache.load(on_gpu(host), on_gpu(device), stream=torch.cuda.current_stream())
        torch.cuda.synchronize()
        assert torch.equal(setup.near.cpu(), wanted)


class TestGraphs:
    def test_one_graph_serves_changing_pages(self):
        setup, stream = Setup(), torch.cuda.Stream()
        far, near = (on_gpu(values) for values in lists())
        setup.cache.load(far, near, stream=stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        before = setup.near.cpu()
        with torch.cuda.graph(graph, stream=stream):
            report = setup.cache.load(far, near)
        torch.cuda.synchronize()
        assert report.path == "kernel"
        assert torch.equal(setup.near.cpu(), before), "recorded, not run"
        for seed in (1, 2, 3):
            host, device = lists(seed=seed)
            far.copy_(torch.from_numpy(host))
            near.copy_(torch.from_numpy(device))
            setup.near.random_(0, 256)
            wanted = setup.loaded(host, device)
            graph.replay()
            torch.cuda.synchronize()
            setup.cache.check()
            assert torch.equal(setup.near.cpu(), wanted)

    @pytest.mark.parametrize("count", [50, 290], ids=["in one launch", "in two"])
    def test_numbers_in_host_memory_are_replayed_as_they_were(self, count):
        setup, stream = Setup(), torch.cuda.Stream()
        host, device = lists(count)
        given = host.copy(), device.copy()
        setup.cache.load(*given, stream=stream, path="kernel")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            report = setup.cache.load(*given, path="kernel")
        assert report.path == "kernel"
        for values in given:
            values[:] = 0  # the graph has a copy
        for _ in range(2):
            setup.far.random_(0, 256)
            setup.near.zero_()
            wanted = setup.loaded(host, device)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(setup.near.cpu(), wanted)

    def test_events_in_a_graph(self):
        """Layers one after the other, an event behind each, all of it recorded."""
        setup, stream, other = Setup(), torch.cuda.Stream(), torch.cuda.Stream()
        far, near = (on_gpu(values) for values in lists())
        out = torch.zeros_like(setup.near)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        events = [torch.cuda.Event() for _ in range(LAYERS)]
        with torch.cuda.graph(graph, stream=stream):
            setup.cache.load(far, near, events=events)
            for layer, event in enumerate(events):
                other.wait_event(event)
                with torch.cuda.stream(other):
                    out[layer].copy_(setup.near[layer])
            stream.wait_stream(other)
        wanted = setup.loaded(*lists())
        graph.replay()
        torch.cuda.synchronize()
        setup.cache.check()
        assert torch.equal(out.cpu(), wanted)


class TestStreams:
    @pytest.mark.parametrize("stream", [0, 1, 2], ids=["default", "legacy", "per-thread"])
    def test_special_streams(self, stream):
        setup = Setup()
        host, device = lists()
        wanted = setup.loaded(host, device)
        assert setup.cache.load(host, device, stream=stream, path="kernel").path == "kernel"
        torch.cuda.synchronize()
        assert torch.equal(setup.near.cpu(), wanted)

    def test_order_holds_before_and_after(self):
        """Nothing is waited for in between: a transfer out of order takes a wrong number along."""
        setup, rounds = Setup(), 64
        host, device = lists(PAGES)
        kept = torch.empty((rounds, LAYERS, PAGES), dtype=torch.uint8, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for i in range(rounds):
                setup.near.fill_(i)
                setup.cache.offload(device, host, path="kernel")
                setup.near.fill_(255)
                setup.cache.load(host, device, path="kernel")
                kept[i].copy_(setup.near[:, :, -1])
        stream.synchronize()
        wanted = torch.arange(rounds, dtype=torch.uint8)[:, None, None]
        assert torch.equal(kept.cpu(), wanted.expand_as(kept))

    def test_both_ways_at_once(self):
        setups = [Setup(), Setup()]
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        host, device = lists(PAGES)
        wanted = setups[0].loaded(host, device), setups[1].offloaded(device, host)
        for _ in range(10):
            setups[0].cache.load(host, device, stream=streams[0], path="kernel")
            setups[1].cache.offload(device, host, stream=streams[1], path="kernel")
        torch.cuda.synchronize()
        assert torch.equal(setups[0].near.cpu(), wanted[0])
        assert torch.equal(setups[1].far, wanted[1])

    def test_threads_share_a_cache(self):
        """Each on a stream and on pages of its own."""
        setup, failures = Setup(), []
        host, device = lists(PAGES)
        wanted = setup.loaded(host, device)
        setup.near[:, torch.as_tensor(device)] = 0
        torch.cuda.synchronize()

        def work(part):
            try:
                stream = torch.cuda.Stream()
                for _ in range(20):
                    setup.cache.load(host[part::4], device[part::4], stream=stream, path="kernel")
                stream.synchronize()
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert torch.equal(setup.near.cpu(), wanted)


class TestLayeredLoads:
    @pytest.mark.parametrize("numbers", ["host", "int64"])
    @pytest.mark.parametrize("layers", [None, [4, 0, 2]])
    def test_a_layer_is_there_when_its_event_is(self, numbers, layers):
        """Another stream waits for each event, and takes what it finds then."""
        setup, stream, other = Setup(), torch.cuda.Stream(), torch.cuda.Stream()
        host, device = lists(PAGES)
        chosen = list(range(LAYERS)) if layers is None else layers
        out = torch.zeros_like(setup.near)
        given = (on_gpu(host), on_gpu(device)) if numbers != "host" else (host, device)
        for turn in range(20):
            setup.far.random_(0, 256)
            wanted = setup.loaded(host, device)
            setup.near.fill_(turn)
            torch.cuda.synchronize()
            if turn % 2:
                busy(stream, 0.002)
            events = [torch.cuda.Event() for _ in chosen]
            report = setup.cache.load(
                *given, layers=layers, stream=stream, path="kernel", events=events
            )
            for layer, event in zip(chosen, events, strict=True):
                other.wait_event(event)
                with torch.cuda.stream(other):
                    out[layer].copy_(setup.near[layer])
            other.synchronize()
            assert (report.path, report.calls) == ("kernel", 1)
            assert torch.equal(out.cpu()[chosen], wanted[chosen])

    def test_an_event_waits_for_what_the_stream_had_before(self):
        setup, stream = Setup(), torch.cuda.Stream()
        torch.cuda.synchronize()
        busy(stream)
        events = [torch.cuda.Event() for _ in range(LAYERS)]
        setup.cache.load(*lists(), stream=stream, path="kernel", events=events)
        assert not any(event.query() for event in events)
        events[-1].synchronize()


@pytest.fixture
def two():
    if torch.cuda.device_count() < 2:
        pytest.skip("torch sees one GPU only")
    yield
    torch.cuda.set_device(0)


@pytest.mark.usefixtures("two")
class TestTwoGpus:
    @pytest.mark.parametrize("current", [0, 1])
    @pytest.mark.parametrize("path", ["auto", "kernel", "batch"])
    @pytest.mark.parametrize("numbers", ["host", "device"])
    def test_tensors_of_the_device_that_is_not_current(self, current, path, numbers):
        device = f"cuda:{1 - current}"
        torch.cuda.set_device(current)
        setup = Setup(device)
        host, pages = lists()
        given = (host, pages)
        if numbers == "device":
            given = tuple(on_gpu(values, device=device) for values in given)
        wanted = setup.loaded(host, pages)
        setup.cache.load(*given, path=path)
        torch.cuda.synchronize(device)
        assert torch.equal(setup.near.cpu(), wanted)
        wanted = setup.offloaded(pages, host)
        setup.cache.offload(given[1], given[0], path=path)
        torch.cuda.synchronize(device)
        assert torch.equal(setup.far, wanted)
        events = [torch.cuda.Event() for _ in range(LAYERS)]
        setup.cache.load(*given, path=path, events=events)
        events[-1].synchronize()
        setup.cache.check()
        assert torch.cuda.current_device() == current

    def test_threads_on_both_at_once(self):
        failures = []

        def work(index):
            try:
                torch.cuda.set_device(index)
                setup, stream = Setup(f"cuda:{index}"), torch.cuda.Stream(index)
                for seed in range(50):
                    host, device = lists(seed=seed)
                    wanted = setup.loaded(host, device)
                    setup.cache.load(host, device, stream=stream, path="kernel")
                    stream.synchronize()
                    assert torch.equal(setup.near.cpu(), wanted), (index, seed)
                    wanted = setup.offloaded(device, host)
                    setup.cache.offload(device, host, stream=stream, path="kernel")
                    stream.synchronize()
                    assert torch.equal(setup.far, wanted), (index, seed)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    def test_a_stream_of_the_other_device_is_refused_by_name(self):
        setup = Setup("cuda:0")
        with pytest.raises(ValueError, match="stream is on cuda:1, but the device tensors are on"):
            setup.cache.load(*lists(), stream=torch.cuda.Stream(1))

    @pytest.mark.parametrize("side", [0, 1])
    def test_numbers_on_the_other_device_are_refused_by_name(self, side):
        setup = Setup("cuda:0")
        given = [on_gpu(values, device="cuda:0") for values in lists()]
        given[side] = given[side].to("cuda:1")
        name = ("host_pages", "device_pages")[side]
        with pytest.raises(ValueError, match=f"{name}.*cuda:1.*cuda:0"):
            setup.cache.load(*given)

    def test_layers_on_two_devices_are_refused_by_name(self):
        near = [torch.zeros(8, 64, dtype=torch.uint8, device=f"cuda:{i}") for i in (0, 1)]
        far = torch.zeros(8, 2, 1, 64, dtype=torch.uint8).pin_memory()
        with pytest.raises(ValueError, match="cuda:1"):
            kvsig.PagedKVCache(near, far, page_size=1)
