"""Path "kernel": one launch for all layers, from the arguments of a cache to the bytes."""

import itertools

import numpy as np
import pytest
import torch

import kvsig
from kvsig import _core, emulated, kernel, streams
from kvsig.planning.costs import builtin

LAYERS, PAGES, HOST_PAGES, SIZE, HEADS, DIM = 4, 24, 18, 4, 2, 8
LAYOUTS = ("page_first_direct", "page_first", "page_head", "layer_first")
WAIT, RECORD = "cuStreamWaitValue32", "cudaEventRecord"
CAN_MAP, MAJOR = 19, 75  # cudaDevAttrCanMapHostMemory, cudaDevAttrComputeCapabilityMajor
H100 = builtin("NVIDIA H100 80GB HBM3")


@pytest.fixture(params=["12.9", "13.0"])
def control(request):
    _core.rebind(f"emulated:{request.param}")
    found = emulated.Control(_core.info()["library"])
    found.reset()
    yield found
    found.reset()
    _core.rebind(None)


@pytest.fixture
def stream(control):
    with emulated.Stream() as found:
        yield found


class Numbers:
    """Page numbers in device memory, as another library has them."""

    def __init__(self, values, dtype=np.int64):
        self.array = np.asarray(values, dtype)
        self.__cuda_array_interface__ = {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.array.ctypes.data, False),
            "version": 3,
        }


class Setup:
    """A cache whose pool is page-locked, and what every page of it should hold."""

    def __init__(self, control, layout="page_first_direct", kv=2, dim=DIM, pinned=True, **options):
        self.layout, self.kv = layout, kv
        near = torch.randint(0, 256, (kv, LAYERS, PAGES * SIZE, HEADS, dim), dtype=torch.uint8)
        shape = {
            "page_first_direct": (HOST_PAGES, LAYERS, SIZE, HEADS, dim),
            "page_first": (HOST_PAGES * SIZE, LAYERS, HEADS, dim),
            "page_head": (HOST_PAGES, HEADS, SIZE, LAYERS, dim),
            "layer_first": (LAYERS, HOST_PAGES * SIZE, HEADS, dim),
        }[layout]
        far = torch.randint(0, 256, (kv, *shape), dtype=torch.uint8)
        control.mark_device(near.data_ptr(), near.nbytes)
        if pinned:
            control.mark_host(far.data_ptr(), far.nbytes)
        self.near, self.far, self.dim = near, far, dim
        device = [list(group) for group in near]
        self.cache = kvsig.PagedKVCache(
            device if kv == 2 else device[0], list(far) if kv == 2 else far[0], layout, SIZE,
            model=H100, **options,
        )  # fmt: skip

    def device_page(self, group, layer, page):
        return self.near[group, layer].view(PAGES, SIZE, HEADS, self.dim)[page]

    def host_page(self, group, layer, page):
        pool = self.far[group]
        if self.layout == "page_first_direct":
            return pool[page, layer]
        if self.layout == "page_first":
            return pool.view(HOST_PAGES, SIZE, LAYERS, HEADS, self.dim)[page, :, layer]
        if self.layout == "page_head":
            return pool[page, :, :, layer].transpose(0, 1)
        return pool[layer].view(HOST_PAGES, SIZE, HEADS, self.dim)[page]

    def everything(self):
        return self.near.clone(), self.far.clone()

    def expected(self, device, host, load, layers=range(LAYERS)):
        """Both sides as they should be after a transfer of what they hold now."""
        near, far = self.everything()
        for group, layer in itertools.product(range(self.kv), layers):
            for one, other in zip(device, host, strict=True):
                if load:
                    self.device_page(group, layer, one)[:] = self.host_page(group, layer, other)
                else:
                    self.host_page(group, layer, other)[:] = self.device_page(group, layer, one)
        after = self.everything()
        self.near.copy_(near)
        self.far.copy_(far)
        return after

    def same(self, wanted):
        return all(map(torch.equal, self.everything(), wanted))


DEVICE, HOST = [5, 0, 23, 7, 11], [17, 3, 0, 9, 4]


class TestMovesPages:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("kv", [1, 2])
    @pytest.mark.parametrize("dim", [8, 6, 5])
    def test_of_every_layout(self, control, stream, layout, kv, dim):
        """Both ways, with units of 16 bytes down to 1."""
        setup = Setup(control, layout, kv, dim)
        for load in (False, True):
            wanted = setup.expected(DEVICE, HOST, load)
            if load:
                report = setup.cache.load(HOST, DEVICE, stream=stream, path="kernel")
            else:
                report = setup.cache.offload(DEVICE, HOST, stream=stream, path="kernel")
            stream.synchronize()
            assert setup.same(wanted)
            assert (report.path, report.calls, report.reason) == ("kernel", 1, None)
            assert report.bytes == len(DEVICE) * setup.cache.page_bytes

    @pytest.mark.parametrize("path", ["auto", "batch", "strided", "loop"])
    @pytest.mark.parametrize("layout", ["page_first", "page_head"])
    def test_of_pages_in_rows_by_the_copy_engine_too(self, control, stream, layout, path):
        setup = Setup(control, layout, sms=0)
        wanted = setup.expected(DEVICE, HOST, True)
        report = setup.cache.load(HOST, DEVICE, stream=stream, path=path)
        stream.synchronize()
        assert setup.same(wanted)
        assert "kernel" not in report.path

    @pytest.mark.parametrize("layers", [2, [1, 2], [3, 0], [0, 2]])
    def test_of_some_layers(self, control, stream, layers):
        setup = Setup(control)
        chosen = [layers] if isinstance(layers, int) else layers
        wanted = setup.expected(DEVICE, HOST, True, chosen)
        setup.cache.load(HOST, DEVICE, layers=layers, stream=stream, path="kernel")
        stream.synchronize()
        assert setup.same(wanted)

    @pytest.mark.parametrize("count", [255, 256, 257])
    def test_of_about_as_many_as_a_launch_carries(self, control, stream, count):
        near = torch.randint(0, 256, (2, 300, 48), dtype=torch.uint8)
        far = torch.zeros(300, 2, 1, 48, dtype=torch.uint8)
        control.mark_device(near.data_ptr(), near.nbytes)
        control.mark_host(far.data_ptr(), far.nbytes)
        cache = kvsig.PagedKVCache(list(near), far, page_size=1, model=H100)
        mine, theirs = (np.random.default_rng(i).permutation(300)[:count] for i in range(2))
        cache.offload(mine, theirs, stream=stream, path="kernel")
        stream.synchronize()
        assert torch.equal(far[theirs, :, 0], near[:, mine].transpose(0, 1))
        assert not far[np.setdiff1d(np.arange(300), theirs)].any()

    def test_of_more_pages_than_a_launch_carries(self, control, stream):
        near = torch.randint(0, 256, (3, 2000, 48), dtype=torch.uint8)
        far = torch.zeros(2000, 3, 1, 48, dtype=torch.uint8)
        control.mark_device(near.data_ptr(), near.nbytes)
        control.mark_host(far.data_ptr(), far.nbytes)
        cache = kvsig.PagedKVCache(list(near), far, page_size=1, model=H100)
        order = np.random.default_rng(0).permutation(2000)
        for _ in range(3):
            far.zero_()
            assert cache.offload(order, np.arange(2000), stream=stream, path="kernel").calls == 1
            stream.synchronize()
            assert torch.equal(far[:, :, 0], near[:, order].transpose(0, 1))

    @pytest.mark.parametrize("load", [True, False])
    @pytest.mark.parametrize("layered", [True, False])
    def test_of_small_pages_in_a_large_pool(self, control, stream, load, layered):
        """They go in the order of windows of the pool, and without events in several launches."""
        layers, width, pages, host_pages, count = 64, 256, 1300, 20_000, 1200
        near = torch.randint(0, 256, (layers, pages, width), dtype=torch.uint8)
        far = torch.zeros(host_pages, layers, 1, width, dtype=torch.uint8)  # mostly never touched
        control.mark_device(near.data_ptr(), near.nbytes)
        control.mark_host(far.data_ptr(), far.nbytes)
        cache = kvsig.PagedKVCache(list(near), far, page_size=1, model=H100)
        rng = np.random.default_rng(load)
        mine, theirs = rng.permutation(pages)[:count], rng.permutation(host_pages)[:count]
        untouched = np.setdiff1d(np.arange(pages), mine)
        far[theirs] = torch.randint(0, 256, (count, layers, 1, width), dtype=torch.uint8)
        before = near.clone()
        options = {"stream": stream, "path": "kernel"}
        events = [Event() for _ in range(layers)] if layered and load else None
        if load:
            report = cache.load(theirs, mine, events=events, **options)
        else:
            report = cache.offload(mine, theirs, **options)
        stream.synchronize()
        assert torch.equal(near[:, mine], far[theirs, :, 0].transpose(0, 1))
        assert torch.equal(near[:, untouched], before[:, untouched])
        if not load:
            assert torch.equal(near, before)
        assert report.calls == (1 if events else 2)
        assert report.copies == count * layers

    def test_on_the_legacy_stream(self, control):
        setup = Setup(control)
        wanted = setup.expected(DEVICE, HOST, True)
        assert setup.cache.load(HOST, DEVICE, stream=0, path="kernel").path == "kernel"
        kvsig.call("cudaStreamSynchronize", stream=0)
        assert setup.same(wanted)

    def test_no_pages(self, control, stream):
        report = Setup(control).cache.load([], [], stream=stream, path="kernel")
        assert report.path == "none"


class TestChoice:
    def test_small_pages_go_to_the_kernel_and_large_ones_do_not(self, control, stream):
        order = np.random.default_rng(0).permutation(64)
        for width, path in ((2048, "kernel"), (1 << 20, "batch")):
            near = torch.zeros(2, 64, width, dtype=torch.uint8)
            far = torch.zeros(64, 2, 1, width, dtype=torch.uint8)
            control.mark_device(near.data_ptr(), near.nbytes)
            control.mark_host(far.data_ptr(), far.nbytes)
            cache = kvsig.PagedKVCache(list(near), far, page_size=1, model=H100)
            planned = cache.plan_load(order, order[::-1], layers=1, stream=stream)
            assert planned.method == path, str(planned)
            report = cache.load(order, order[::-1], layers=1, stream=stream)
            assert (report.path, report.calls) == (path, planned.calls)
            stream.synchronize()

    def test_a_plan_of_the_kernel_is_a_table_too(self, control, stream):
        planned = Setup(control).cache.plan_load(HOST, DEVICE, stream=stream, path="kernel")
        assert (planned.method, planned.calls, planned.copies_out) == ("kernel", 1, 0)
        assert "load by kernel: " in str(planned)

    def test_pageable_pools_are_never_its(self, control, stream):
        setup = Setup(control, pinned=False)
        assert setup.cache.load(HOST, DEVICE, stream=stream).path != "kernel"
        stream.synchronize()
        with pytest.raises(kvsig.BindError) as caught:
            setup.cache.load(HOST, DEVICE, stream=stream, path="kernel")
        assert str(caught.value) == (
            "path='kernel' is not possible: the host pool is pageable, and the kernel reads and "
            "writes mapped memory only. Use path='auto', or another one"
        )

    def test_sms_0_is_the_copy_engine(self, control, stream):
        setup = Setup(control, sms=0)
        assert setup.cache.load(HOST, DEVICE, stream=stream).path != "kernel"
        stream.synchronize()
        with pytest.raises(kvsig.BindError, match="made with sms=0: the copy engine only"):
            setup.cache.load(HOST, DEVICE, stream=stream, path="kernel")

    @pytest.mark.parametrize("sms", [-1, 33, True, 1.5, None])
    def test_bad_sms(self, control, sms):
        with pytest.raises(ValueError, match="sms must be an int from 0 to 32, not "):
            Setup(control, sms=sms)

    @pytest.mark.parametrize("rate", [-1, 1e9, True, "fast"])
    def test_bad_rates(self, control, rate):
        with pytest.raises(ValueError, match="rate must be a number of GB/s from 0 to 1e4"):
            Setup(control, rate=rate)

    @pytest.mark.known_failure("paces")
    @pytest.mark.parametrize("rate", [1e-5, 1e-300, 5e-324])
    @pytest.mark.parametrize("load", [True, False])
    def test_rates_slower_than_can_be_said(self, control, stream, rate, load):
        """The pace is a number of 32 bits: nothing that a sanitizer finds fault with."""
        setup = Setup(control, rate=rate, dim=1 << 15)
        wanted = setup.expected(DEVICE, HOST, load)
        move = setup.cache.load if load else setup.cache.offload
        lists = (HOST, DEVICE) if load else (DEVICE, HOST)
        report = move(*lists, stream=stream, path="kernel")
        stream.synchronize()
        assert report.bytes > 8 << 20 and setup.same(wanted)

    @pytest.mark.known_failure("unregistered-later")
    @pytest.mark.parametrize("kind", ["host", "<i8"])
    @pytest.mark.parametrize("what", ["load", "offload", "load with events"])
    @pytest.mark.parametrize("left", [0, 0.5])
    def test_memory_that_is_not_locked_any_more(self, control, stream, kind, what, left):
        """A GPU's fault of the kernel would end the context, and everything in it."""
        setup = Setup(control, pinned=False)
        kvsig.call("cudaHostRegister", ptr=setup.far, size=setup.far.nbytes, flags=0)
        device, host = list(setup.near[0]), setup.far[0]
        cache = kvsig.PagedKVCache(device, host, setup.layout, SIZE, model=H100)
        near, far = (p if kind == "host" else Numbers(p, kind) for p in (DEVICE, HOST))
        events = [Event() for _ in range(LAYERS)] if "events" in what else None
        move = {
            "load": lambda: cache.load(far, near, stream=stream),
            "offload": lambda: cache.offload(near, far, stream=stream),
            "load with events": lambda: cache.load(far, near, stream=stream, events=events),
        }[what]
        assert move().path == "kernel"
        stream.synchronize()
        before = setup.everything()
        kvsig.call("cudaHostUnregister", ptr=setup.far)
        if left:
            size = int(left * setup.far.nbytes)
            kvsig.call("cudaHostRegister", ptr=setup.far, size=size, flags=0)
        with pytest.raises(ValueError, match="were page-locked when the cache was made, and are"):
            move()
        stream.synchronize()
        assert setup.same(before)
        if kind == "host":
            assert cache.load(HOST, DEVICE, stream=stream, path="batch").path == "batch"
            stream.synchronize()
        if left:
            kvsig.call("cudaHostUnregister", ptr=setup.far)

    def test_without_nvrtc(self, control, stream, monkeypatch):
        monkeypatch.setattr(kernel, "refusal", lambda: "nvrtcCreateProgram is not bound: no file")
        setup = Setup(control)
        wanted = setup.expected(DEVICE, HOST, True)
        assert setup.cache.load(HOST, DEVICE, stream=stream).path != "kernel"
        stream.synchronize()
        assert setup.same(wanted)
        with pytest.raises(kvsig.BindError, match="not possible: nvrtcCreateProgram is not bound"):
            setup.cache.load(HOST, DEVICE, stream=stream, path="kernel")


#: Kinds of both lists of which at least one is on the GPU.
KINDS = list(itertools.product(["<i8", "<i4", "host"], repeat=2))[:-1]


class TestPageNumbersOnTheGpu:
    @pytest.mark.parametrize("kinds", KINDS)
    @pytest.mark.parametrize("load", [True, False])
    def test_are_read_where_they_are(self, control, stream, kinds, load):
        setup = Setup(control)
        wanted = setup.expected(DEVICE, HOST, load)
        near, far = (
            pages if kind == "host" else Numbers(pages, kind)
            for kind, pages in zip(kinds, (DEVICE, HOST), strict=True)
        )
        report = (
            setup.cache.load(far, near, stream=stream)
            if load
            else setup.cache.offload(near, far, stream=stream)
        )
        stream.synchronize()
        assert report.path == "kernel"
        assert setup.same(wanted)
        setup.cache.check()

    @pytest.mark.known_failure("described-wrongly")
    @pytest.mark.parametrize("side", [0, 1])
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("shape", (-5,)), ("shape", (5.0,)), ("shape", 5), ("shape", None), ("data", None),
            ("data", (0, False)), ("data", (1, False)), ("data", (-8, False)), ("data", (2**64, 0)),
            ("data", (None, False)), ("mask", 1), ("strides", 8), ("typestr", None),
        ],
    )  # fmt: skip
    def test_a_description_that_cannot_be(self, control, stream, side, key, value):
        """What another library says of its array is looked at before the GPU reads there."""
        setup = Setup(control)
        before = setup.everything()
        lists = [Numbers(DEVICE), Numbers(HOST)]
        lists[side].__cuda_array_interface__[key] = value
        with pytest.raises((TypeError, ValueError), match="(device|host)_pages "):
            setup.cache.load(lists[1], lists[0], stream=stream)
        stream.synchronize()
        assert setup.same(before)

    @pytest.mark.parametrize("side", ["device_pages", "host_pages"])
    @pytest.mark.parametrize("wrong", [-1, 10**6])
    @pytest.mark.parametrize("told", ["check", "load", "offload"])
    def test_a_wrong_one_moves_nothing_and_is_told(self, control, stream, side, wrong, told):
        setup = Setup(control)
        before = setup.everything()
        near, far = list(DEVICE), list(HOST)
        (near if side == "device_pages" else far)[3] = wrong
        setup.cache.load(Numbers(far), Numbers(near), stream=stream)
        stream.synchronize()
        assert setup.same(before)
        limit = ("the device has pages 0 to 23", "the host pool has pages 0 to 17")
        text = f"{side}[3] is {wrong}: {limit[side == 'host_pages']}"
        again = {
            "check": setup.cache.check,
            "load": lambda: setup.cache.load(HOST, DEVICE, stream=stream, path="loop"),
            "offload": lambda: setup.cache.offload(Numbers(DEVICE), Numbers(HOST), stream=stream),
        }[told]
        with pytest.raises(ValueError) as caught:
            again()
        assert str(caught.value) == text
        assert caught.value.__notes__ == [
            "the numbers were on the GPU: nothing of that transfer has moved"
        ]
        stream.synchronize()
        assert setup.same(before), "the transfer that told has not moved either"
        setup.cache.check()  # told once

    @pytest.mark.parametrize("wrong", [None, 7, 599])
    def test_of_a_capture_are_checked_whole(self, control, stream, wrong):
        """What is captured is several launches, of which none moves where one number is wrong."""
        count, width = 600, 32
        near = torch.randint(0, 256, (1, count, width), dtype=torch.uint8)
        far = torch.randint(0, 256, (count, 1, 1, width), dtype=torch.uint8)
        control.mark_device(near.data_ptr(), near.nbytes)
        control.mark_host(far.data_ptr(), far.nbytes)
        cache = kvsig.PagedKVCache(list(near), far, page_size=1, model=H100)
        before, mine = near.clone(), np.arange(count)[::-1].copy()
        theirs = np.arange(count)
        if wrong is not None:
            theirs[wrong] = count
        numbers = Numbers(theirs)
        kvsig.call("cudaStreamBeginCapture", stream=stream, mode="cudaStreamCaptureModeRelaxed")
        report = cache.load(numbers, mine, stream=stream)
        graph = kvsig.call("cudaStreamEndCapture", stream=stream)
        run = kvsig.call("cudaGraphInstantiate", graph=graph)
        kvsig.call("cudaGraphLaunch", graphExec=run, stream=stream)
        stream.synchronize()
        assert (report.path, report.calls) == ("kernel", 3)
        if wrong is None:
            assert torch.equal(near[0], far[:, 0, 0].flip(0))
            cache.check()
        else:
            assert torch.equal(near, before)
            with pytest.raises(ValueError, match=rf"host_pages\[{wrong}\] is 600"):
                cache.check()
        kvsig.call("cudaGraphExecDestroy", graphExec=run)
        kvsig.call("cudaGraphDestroy", graph=graph)

    def test_numbers_of_another_kind_are_copied(self, control, stream):
        setup = Setup(control, sms=0)
        with pytest.raises(TypeError):
            setup.cache.load(Numbers(HOST), Numbers(DEVICE), stream=stream)

    def test_with_gaps_are_refused(self, control, stream):
        numbers = Numbers(HOST)
        numbers.__cuda_array_interface__["strides"] = (16,)
        with pytest.raises(TypeError):
            Setup(control).cache.load(numbers, DEVICE, stream=stream)

    def test_lengths(self, control, stream):
        text = "device_pages has 5 page numbers and host_pages has 2"
        with pytest.raises(ValueError, match=text):
            Setup(control).cache.load(Numbers([1, 2]), Numbers(DEVICE), stream=stream)

    @pytest.mark.parametrize(
        ("host", "text"),
        [
            ([1, 2, 3, 4, 18], "host_pages[4] is 18: the host pool has pages 0 to 17"),
            ([1, 2, 3, 4, 1], "host_pages has a page more than once"),
        ],
    )
    def test_the_list_in_host_memory_is_checked(self, control, stream, host, text):
        with pytest.raises(ValueError) as caught:
            Setup(control).cache.offload(Numbers(DEVICE), host, stream=stream)
        assert text in str(caught.value)


class Event:
    """Remembers on which stream it was recorded, and waits for what was queued there before."""

    def __init__(self, handle=0):
        self.handle = handle

    def record(self, stream):
        self.stream = stream


@pytest.fixture
def handles(control, monkeypatch):
    """Of events that exist, as torch's do that were recorded before."""
    monkeypatch.setattr(
        streams, "event_handles", lambda events: np.array([e.handle for e in events], np.uint64)
    )
    made = [int(kvsig.call("cudaEventCreateWithFlags", flags=2)) for _ in range(LAYERS)]
    yield made
    for handle in made:
        kvsig.call("cudaEventDestroy", event=handle)


class TestLayeredLoads:
    @pytest.mark.parametrize("numbers", [list, Numbers])
    @pytest.mark.parametrize("layers", [None, [2, 0, 3]])
    def test_are_one_launch(self, control, stream, numbers, layers):
        setup = Setup(control)
        chosen = range(LAYERS) if layers is None else layers
        wanted = setup.expected(DEVICE, HOST, True, chosen)
        events = [Event() for _ in chosen]
        control.record()
        report = setup.cache.load(
            numbers(HOST), numbers(DEVICE), layers=layers, stream=stream, events=events
        )
        assert (report.path, report.calls) == ("kernel", 1)
        functions = [call["function"] for call in control.calls()]
        assert functions.count("cuLaunchKernelEx") == 1
        assert functions.count("cuStreamWaitValue32") == len(events)
        # The events are behind the waits, on a stream of the cache's own: it is done by then.
        events[-1].stream.synchronize()
        assert setup.same(wanted)

    def test_events_that_exist_are_recorded_by_their_handles(self, control, stream, handles):
        setup = Setup(control)
        wanted = setup.expected(DEVICE, HOST, True)
        control.record()
        setup.cache.load(HOST, DEVICE, stream=stream, events=[Event(handle) for handle in handles])
        calls = [call for call in control.calls() if call["function"] in (WAIT, RECORD)]
        assert [call["function"] for call in calls] == [WAIT, RECORD] * LAYERS
        assert [call["arguments"][0]["value"] for call in calls[1::2]] == handles
        kvsig.call("cudaStreamWaitEvent", stream=stream, event=handles[-1], flags=0)
        stream.synchronize()
        assert setup.same(wanted)

    @pytest.mark.parametrize("function", [WAIT, RECORD])
    def test_an_event_that_cannot_be_recorded_is_told(self, control, stream, handles, function):
        setup = Setup(control)
        control.fault(function, 400, nth=2)
        with pytest.raises(kvsig.CudaError, match=f"{function} answered 400"):
            setup.cache.load(HOST, DEVICE, stream=stream, events=[Event(h) for h in handles])
        stream.synchronize()

    def test_wait_for_what_is_before_them(self, control, stream):
        """Each layer is there once its event is; nothing is told before the launch has run."""
        setup = Setup(control)
        before, wanted = setup.everything(), setup.expected(DEVICE, HOST, True)
        control.hold(stream.cuda_stream)
        events = [Event() for _ in range(LAYERS)]
        setup.cache.load(HOST, DEVICE, stream=stream, events=events)
        assert setup.same(before)
        control.release(stream.cuda_stream)
        events[0].stream.synchronize()
        assert setup.same(wanted)

    def test_again_and_again(self, control, stream):
        setup = Setup(control)
        for turn in range(20):
            setup.far.random_(0, 256)
            wanted = setup.expected(DEVICE, HOST, True)
            events = [Event() for _ in range(LAYERS)]
            setup.cache.load(HOST, DEVICE, stream=stream, events=events)
            events[turn % LAYERS].stream.synchronize()
            assert setup.same(wanted)

    def test_a_wrong_number_keeps_nobody_waiting(self, control, stream):
        setup = Setup(control)
        events = [Event() for _ in range(LAYERS)]
        setup.cache.load(Numbers([99, *HOST[1:]]), Numbers(DEVICE), stream=stream, events=events)
        events[-1].stream.synchronize()
        with pytest.raises(ValueError, match=r"host_pages\[0\] is 99"):
            setup.cache.check()


class TestFaults:
    def test_a_launch_that_is_refused_is_told(self, control, stream):
        setup = Setup(control)
        before = setup.everything()
        control.fault("cuLaunchKernelEx", 1)
        with pytest.raises(kvsig.CudaError, match="cuLaunchKernelEx answered 1"):
            setup.cache.load(HOST, DEVICE, stream=stream, path="kernel")
        stream.synchronize()
        assert setup.same(before)

    @pytest.mark.parametrize(
        ("order", "told"),
        [
            (lambda c: c.fault("cuModuleLoadData", 209), "the page-copy kernel cannot be loaded"),
            (lambda c: c.fault("nvrtcCompileProgram", 6),
             "NVRTC cannot compile the page-copy kernel: .*nvrtcCompileProgram answered 6"
             " NVRTC_ERROR_COMPILATION"),
            (lambda c: c.set_attribute(CAN_MAP, 0), "the device cannot map host memory"),
            (lambda c: c.set_attribute(MAJOR, 2),
             "NVRTC has no architecture for compute capability 2.0: its oldest is "),
        ],
        ids=["load", "compile", "map", "old"],
    )  # fmt: skip
    def test_a_cache_is_made_without_it_where_it_cannot_be_had(self, control, stream, order, told):
        kernel._built.clear()
        order(control)
        setup = Setup(control)
        wanted = setup.expected(DEVICE, HOST, True)
        assert setup.cache.load(HOST, DEVICE, stream=stream).path != "kernel"
        stream.synchronize()
        assert setup.same(wanted)
        with pytest.raises(kvsig.BindError, match=told):
            setup.cache.load(HOST, DEVICE, stream=stream, path="kernel")
        kernel._built.clear()
