"""SGLang's direct functions: each pool layout, both directions, compared by every byte."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standins import Engine, filled

from kvsig import _core, kernel, launching, merging, observe
from kvsig._core import BindError
from kvsig.emulated import Control
from kvsig.integrations import sglang as integration
from kvsig.integrations.sglang import direct, launches, layered, pools

LAYERS, PAGE, PAGES = 3, 4, 24
LOAD, OFFLOAD = "transfer_kv_per_layer_direct_pf_lf", "transfer_kv_all_layer_direct_lf_pf"


@pytest.fixture
def served(sglang: SimpleNamespace, control: Control, stream: int) -> SimpleNamespace:
    """The functions as the engine's own modules see them, with kvsig installed."""
    integration.install()
    sglang.control, sglang.stream = control, stream
    return sglang


def run(served: SimpleNamespace, name: str, *args: Any, **kwargs: Any) -> None:
    getattr(served.pool, name)(*args, **kwargs)
    served.control.synchronize(served.stream)


def tokens(pages: list[int], page: int = PAGE) -> torch.Tensor:
    return torch.tensor([p * page + i for p in pages for i in range(page)], dtype=torch.int64)


def expect(
    served: SimpleNamespace, name: str, srcs: Any, dsts: Any, *args: Any, **kwargs: Any
) -> None:
    """Run a function through kvsig and by the contract: sources stay, destinations are alike."""
    wanted = [t.clone() for t in dsts]
    before = [t.clone() for t in srcs]
    served.functions[name](srcs, wanted, *args, **kwargs)
    served.calls.clear()
    run(served, name, srcs, dsts, *args, **kwargs)
    assert served.calls == [], observe.stats()["passed_on"]
    for got, want in zip([*dsts, *srcs], [*wanted, *before], strict=True):
        assert torch.equal(got, want)


def mark(control: Control, device: list[torch.Tensor], host: list[torch.Tensor]) -> None:
    """Let one side be device memory, and the other page-locked."""
    for tensor in device:
        control.mark_device(tensor.data_ptr(), tensor.nbytes)
    for tensor in host:
        control.mark_host(tensor.data_ptr(), tensor.nbytes)


PAIRS = [([3, 4, 5, 9, 1], [7, 8, 9, 0, 2]), ([5], [6]), (list(range(12)), list(range(2, 14)))]

# The device's rows, the host's pool by (pages, layers): shape of a token, dtype, tokens a page.
POOLS = {
    "MHA": ((4, 16), torch.bfloat16, PAGE, 2),
    "MLA": ((1, 24), torch.bfloat16, PAGE, 1),
    "asymmetric, K alone": ((2, 24), torch.float16, PAGE, 1),
    "indexer": ((132,), torch.uint8, 1, 1),
    "DSv4": ((584,), torch.uint8, 1, 1),
    "Mamba": ((3, 4), torch.float32, 1, 1),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("host_pages", "device_pages"), PAIRS)
class TestPageFirstDirect:
    def sides(self, pool: str) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
        row, dtype, page, kinds = POOLS[pool]
        host = [filled(PAGES, LAYERS, page, *row, dtype=dtype, seed=k) for k in range(kinds)]
        device = [
            filled(PAGES * page, *row, dtype=dtype, seed=9 + i) for i in range(LAYERS * kinds)
        ]
        return host, device, page

    def test_load(
        self, served: SimpleNamespace, pool: str, host_pages: list[int], device_pages: list[int]
    ) -> None:
        host, device, page = self.sides(pool)
        src, dst = tokens(host_pages, page), tokens(device_pages, page)
        for layer in range(LAYERS):
            expect(
                served, LOAD, host, tuple(device[layer::LAYERS]),
                src_indices=src, dst_indices=dst, layer_id=layer, page_size=page,
            )  # fmt: skip

    def test_several_layers_in_one_call(
        self, served: SimpleNamespace, pool: str, host_pages: list[int], device_pages: list[int]
    ) -> None:
        host, device, page = self.sides(pool)
        per_pool = len(device) // len(host)
        chosen = [t for i, t in enumerate(device) if i % per_pool > 0]
        expect(served, LOAD, host, chosen, tokens(host_pages, page), tokens(device_pages, page),
               1, page)  # fmt: skip

    def test_offload(
        self, served: SimpleNamespace, pool: str, host_pages: list[int], device_pages: list[int]
    ) -> None:
        host, device, page = self.sides(pool)
        expect(
            served, OFFLOAD, tuple(device), host,
            src_indices=tokens(device_pages, page), dst_indices=tokens(host_pages, page),
            page_size=page,
        )  # fmt: skip


@pytest.mark.parametrize("kinds", [1, 2])
class TestLayerFirst:
    """(2, layers, tokens, ...) and (layers, tokens, 1, width): tokens by number."""

    def test_load_and_offload(self, served: SimpleNamespace, kinds: int) -> None:
        host = filled(kinds, LAYERS, 96, 2, 8)
        device = [filled(120, 2, 8, seed=i) for i in range(kinds * LAYERS)]
        src, dst = tokens([3, 4, 0, 7]), tokens([9, 10, 11, 1])
        for layer in range(LAYERS):
            srcs = [host[k, layer] for k in range(kinds)]
            dsts = [device[k * LAYERS + layer] for k in range(kinds)]
            expect(served, "transfer_kv_direct", srcs, dsts, src, dst, PAGE)
        hosts = [layer for kind in host for layer in kind]
        expect(served, "transfer_kv_direct", device, hosts, dst, src, page_size=PAGE)

    def test_runs_that_are_not_whole_pages(self, served: SimpleNamespace, kinds: int) -> None:
        host = [filled(64, 8, seed=k) for k in range(kinds)]
        device = [filled(64, 8, seed=9 + k) for k in range(kinds)]
        src = torch.tensor([7, 8, 9, 10, 11, 30, 2, 3])
        dst = torch.tensor([1, 2, 3, 50, 51, 52, 53, 9])
        expect(served, "transfer_kv_direct", host, device, src, dst, page_size=PAGE)


@pytest.mark.known_failure("row-pitch")
@pytest.mark.parametrize("side", ["device", "host", "both"])
def test_rows_with_a_pitch(served: SimpleNamespace, side: str) -> None:
    """The unified pool's envelope: rows of one layer lie among those of others."""
    wide = [filled(80, 3, 16, seed=s) for s in range(2)]
    src = wide[0][:, 1] if side != "device" else filled(80, 16, seed=3)
    dst = wide[1][:, 2] if side != "host" else filled(80, 16, seed=4)
    around = wide[1].clone()
    src_tokens = torch.tensor([*range(10, 30), 3, 40, 41])
    dst_tokens = torch.tensor([*range(40, 60), 1, 5, 6])
    expect(served, "transfer_kv_direct", [src], [dst], src_tokens, dst_tokens, page_size=1)
    assert torch.equal(wide[1][:, :2], around[:, :2])
    assert observe.stats()["paths"].keys() & {"strided", "strided+batch", "strided+loop", "loop"}


@pytest.mark.parametrize("page_first", [True, False])
def test_device_pages_that_begin_anywhere(served: SimpleNamespace, page_first: bool) -> None:
    host, device = filled(PAGES, 1, PAGE, 8), filled(PAGES * PAGE, 8, seed=1)
    src, dst = tokens([2, 3, 4, 9]), torch.cat([torch.arange(s, s + PAGE) for s in (1, 5, 9, 40)])
    expect(served, LOAD, [host], [device], src, dst, 0, PAGE)
    expect(served, OFFLOAD, [device], [host], dst, src, PAGE)


@pytest.mark.parametrize("to_host", [True, False])
def test_embedding_ranges(served: SimpleNamespace, to_host: bool) -> None:
    src, dst = filled(50, 37, dtype=torch.float32), filled(60, 37, dtype=torch.float32, seed=1)
    args = ([10, 0, 13, 40, 5], [20, 50, 23, 1, 7], [3, 4, 6, 10, 0])
    wanted = dst.clone()
    served.functions["transfer_embedding_ranges_direct"](src, wanted, *args)
    served.calls.clear()
    run(served, "transfer_embedding_ranges_direct", src, dst, *args)
    assert served.calls == [] and torch.equal(dst, wanted)


def test_an_empty_call_moves_nothing(served: SimpleNamespace) -> None:
    host, device = filled(2, 1, PAGE, 8), filled(8, 8, seed=1)
    none = torch.empty(0, dtype=torch.int64)
    expect(served, LOAD, [host], [device], none, none, 0, PAGE)
    expect(served, "transfer_kv_direct", [device], [device.clone()], none, none, page_size=4)


class TestPageNumbersOfALoad:
    """Layers of a load bring the same tensors; what was written to since is read again."""

    @pytest.mark.known_failure("indices-change")
    @pytest.mark.parametrize("inference", [True, False])
    def test_indices_that_change_in_place(self, served: SimpleNamespace, inference: bool) -> None:
        host, device = filled(PAGES, 1, PAGE, 8), filled(PAGES * PAGE, 8, seed=1)
        with torch.inference_mode(inference):
            src, dst = tokens([1, 2]), tokens([5, 6])
            expect(served, LOAD, [host], [device], src, dst, 0, PAGE)
            src += PAGE
            expect(served, LOAD, [host], [device], src, dst, 0, PAGE)
            dst.numpy()[:] += 2 * PAGE if inference else 0
            expect(served, LOAD, [host], [device], src, dst, 0, PAGE)

    def test_they_are_read_once_for_all_layers(
        self, served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = []
        monkeypatch.setattr(direct, "Pages", _counting(direct.Pages, made))
        host, device = filled(PAGES, LAYERS, PAGE, 8), filled(PAGES * PAGE, 8, seed=1)
        src, dst = tokens([1, 2]), tokens([5, 6])
        for layer in range(LAYERS):
            run(served, LOAD, [host], [device], src, dst, layer, PAGE)
        assert len(made) == 1


def _counting(kind: Callable[..., Any], made: list[Any]) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        made.append(args)
        return kind(*args)

    return make


class TestSmallPages:
    """By the page-copy kernel, where host memory is mapped and pages are small and scattered."""

    HOST_PAGES = random.Random(1).sample(range(64), 24)
    DEVICE_PAGES = random.Random(2).sample(range(64), 24)

    def sides(
        self, served: SimpleNamespace, width: int = 8, kinds: int = 2, page: int = PAGE
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        host = [filled(64, LAYERS, page, width, seed=k) for k in range(kinds)]
        device = [filled(64 * page, width, seed=9 + i) for i in range(LAYERS * kinds)]
        mark(served.control, device, host)
        return host, device

    def check_path(self, name: str = "kernel") -> None:
        assert list(observe.stats()["paths"]) == [name]

    @pytest.mark.parametrize(("kinds", "page"), [(2, PAGE), (1, PAGE), (2, 1)])
    def test_load_and_offload(self, served: SimpleNamespace, kinds: int, page: int) -> None:
        host, device = self.sides(served, kinds=kinds, page=page)
        src, dst = tokens(self.HOST_PAGES, page), tokens(self.DEVICE_PAGES, page)
        for layer in range(LAYERS):
            layers = device[layer::LAYERS]
            expect(served, LOAD, host, layers, src, dst, layer_id=layer, page_size=page)
        expect(served, OFFLOAD, device, host, dst, src, page_size=page)
        assert observe.stats()["paths"]["kernel"]["cuda_calls"] == (4 if kinds == 2 else 1 + LAYERS)
        self.check_path()

    def test_many_of_a_large_pool_in_the_order_of_windows(
        self, served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(launching, "WINDOWED_POOL", 0)
        host = [filled(700, LAYERS, 1, 8)]
        device = [filled(700, 8, seed=9 + i) for i in range(LAYERS)]
        mark(served.control, device, host)
        src, dst = (tokens(random.Random(i).sample(range(700), 600), 1) for i in (1, 2))
        expect(served, LOAD, host, device[:1], src, dst, layer_id=0, page_size=1)
        expect(served, OFFLOAD, device, host, dst, src, page_size=1)
        assert all(known.window_pitch == LAYERS * 16 for known in launches._known.values())
        self.check_path()

    @pytest.mark.parametrize("whole", [True, False])
    def test_layer_first(self, served: SimpleNamespace, whole: bool) -> None:
        host = [filled(256, 8, seed=k) for k in range(2)]
        device = [filled(256, 8, seed=9 + k) for k in range(2)]
        mark(served.control, device, host)
        src, dst = tokens(self.HOST_PAGES), tokens(self.DEVICE_PAGES)
        if not whole:
            src, dst = src[: -PAGE + 1], dst[: -PAGE + 1]
        expect(served, "transfer_kv_direct", host, device, src, dst, page_size=1)
        expect(served, "transfer_kv_direct", device, host, dst, src, page_size=1)
        # As whole pages where they are.
        assert observe.stats()["paths"]["kernel"]["copies"] == 2 * 2 * (24 if whole else len(src))
        self.check_path()

    @pytest.mark.parametrize("side", ["device", "host", "both"])
    def test_rows_with_a_pitch(self, served: SimpleNamespace, side: str) -> None:
        wide = [filled(256, 3, 16, seed=s) for s in range(2)]
        src = wide[0][:, 1] if side != "device" else filled(256, 16, seed=3)
        dst = wide[1][:, 2] if side != "host" else filled(256, 16, seed=4)
        around = wide[1].clone()
        mark(served.control, [dst if dst._base is None else wide[1]],
             [src if src._base is None else wide[0]])  # fmt: skip
        numbers = tokens(self.HOST_PAGES), tokens(self.DEVICE_PAGES)
        expect(served, "transfer_kv_direct", [src], [dst], *numbers, page_size=PAGE)
        assert torch.equal(wide[1][:, :2], around[:, :2])
        self.check_path()

    @pytest.mark.parametrize("name", [LOAD, OFFLOAD])
    def test_device_pages_that_begin_anywhere(self, served: SimpleNamespace, name: str) -> None:
        host, device = self.sides(served, kinds=1)
        pages = tokens(self.HOST_PAGES)
        near = torch.cat([torch.arange(PAGE) + s for s in sorted(5 * p % 251 for p in range(24))])
        if name == LOAD:
            expect(served, LOAD, host, device[:1], pages, near, 0, PAGE)
        else:
            expect(served, OFFLOAD, device, host, near, pages, PAGE)
        self.check_path()

    def test_of_all_layers_are_one_launch_with_events_behind_waits(
        self, served: SimpleNamespace, engine: Engine, helpers: list[Any]
    ) -> None:
        host, device = self.sides(served)
        src, dst = tokens(self.HOST_PAGES), tokens(self.DEVICE_PAGES)
        wanted = [tensor.clone() for tensor in device]
        for layer in range(LAYERS):
            served.functions[LOAD](host, wanted[layer::LAYERS], src, dst, layer, PAGE)
        served.calls.clear()

        def transfer(layer: int) -> None:
            served.pool.transfer_kv_per_layer_direct_pf_lf(
                src_ptrs=host, dst_ptrs=device[layer::LAYERS], src_indices=src, dst_indices=dst,
                layer_id=layer, page_size=PAGE,
            )  # fmt: skip

        done: list[int] = []
        served.control.record()
        engine.submit_host_to_device(
            [transfer], transfer_layer_id_max=LAYERS, on_layer_done=done.append
        )
        functions = [call["function"] for call in served.control.calls()]
        assert done == list(range(LAYERS)) and served.calls == []
        assert functions.count("cuLaunchKernelEx") == 1
        assert functions.count("cuStreamWaitValue32") == LAYERS
        helpers[0].synchronize()
        assert all(map(torch.equal, device, wanted))
        assert observe.stats()["functions"].keys() == {layered.WHAT}

    def test_few_of_each_layer_are_many_in_a_layered_load(
        self, served: SimpleNamespace, engine: Engine, helpers: list[Any]
    ) -> None:
        host, device = self.sides(served)
        src, dst = tokens([3, 40, 7, 9]), tokens([50, 2, 11, 30])

        def transfer(layer: int) -> None:
            served.pool.transfer_kv_per_layer_direct_pf_lf(
                host, device[layer::LAYERS], src, dst, layer, PAGE
            )

        expect(served, LOAD, host, device[::LAYERS], src, dst, 0, PAGE)
        self.check_path("batch")
        observe.clear()
        engine.submit_host_to_device(
            [transfer], transfer_layer_id_max=LAYERS, on_layer_done=lambda layer: None
        )
        helpers[0].synchronize()
        self.check_path("kernel")

    @pytest.mark.parametrize("small_first", [True, False])
    def test_beside_large_ones_in_a_layered_load_no_layer_is_kept_waiting(
        self, served: SimpleNamespace, engine: Engine, small_first: bool
    ) -> None:
        pairs = [self.sides(served), self.sides(served, width=4096, kinds=1)]
        src, dst = tokens(self.HOST_PAGES), tokens(self.DEVICE_PAGES)
        wanted = [[tensor.clone() for tensor in device] for _, device in pairs]
        for layer in range(LAYERS):
            for (host, _), device in zip(pairs, wanted, strict=True):
                served.functions[LOAD](host, device[layer::LAYERS], src, dst, layer, PAGE)
        served.calls.clear()

        def transfer(host: Any, device: Any) -> Any:
            return lambda layer: served.pool.transfer_kv_per_layer_direct_pf_lf(
                host, device[layer::LAYERS], src, dst, layer, PAGE
            )

        launched: list[int] = []

        def done(layer: int) -> None:
            functions = [call["function"] for call in served.control.calls()]
            launched.append(functions.count("cuLaunchKernelEx"))

        served.control.record()
        engine.submit_host_to_device(
            [transfer(*pair) for pair in (pairs if small_first else pairs[::-1])],
            transfer_layer_id_max=LAYERS, on_layer_done=done,
        )  # fmt: skip
        served.control.synchronize(served.stream)
        assert launched == [1, 2, 3] and served.calls == []
        assert all(map(torch.equal, [*pairs[0][1], *pairs[1][1]], sum(wanted, [])))

    @pytest.mark.parametrize("why", ["pageable", "in part", "switched off", "large", "no NVRTC"])
    def test_by_copy_engines_where_the_kernel_cannot_be_had(
        self, served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, why: str
    ) -> None:
        if why == "switched off":
            monkeypatch.setenv("KVSIG_SMS", "0")
        if why == "no NVRTC":
            monkeypatch.setattr(kernel, "refusal", lambda: "nvrtc is missing")
        host, device = self.sides(served, width=8192 if why == "large" else 8)
        for tensor in host if why in ("pageable", "in part") else ():
            served.control.unmark(tensor.data_ptr())
            if why == "in part":
                served.control.mark_host(tensor.data_ptr(), tensor.nbytes // 2)
        src, dst = tokens(self.HOST_PAGES), tokens(self.DEVICE_PAGES)
        expect(served, LOAD, host, device[::LAYERS], src, dst, layer_id=0, page_size=PAGE)
        self.check_path("batch")

    def test_a_pool_that_is_registered_no_more(self, served: SimpleNamespace) -> None:
        host, device = self.sides(served)
        src, dst = tokens(self.HOST_PAGES), tokens(self.DEVICE_PAGES)
        for tensor in host:
            half = tensor.nbytes // 2
            served.control.unmark(tensor.data_ptr())
            served.control.mark_host(tensor.data_ptr(), half)
            served.control.mark_host(tensor.data_ptr() + half, tensor.nbytes - half)
        expect(served, LOAD, host, device[::LAYERS], src, dst, layer_id=0, page_size=PAGE)
        self.check_path()
        served.control.unmark(host[1].data_ptr() + host[1].nbytes // 2)
        observe.clear()
        expect(served, LOAD, host, device[::LAYERS], src, dst, layer_id=0, page_size=PAGE)
        self.check_path("batch")

    def test_a_program_that_does_not_compile_is_tried_once(
        self, served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tried: list[int] = []

        def build(unit: int) -> kernel.Kernel:
            tried.append(unit)
            raise BindError("NVRTC cannot compile it")

        monkeypatch.setattr(kernel, "build", build)
        host, device = self.sides(served)
        src, dst = tokens(self.HOST_PAGES), tokens(self.DEVICE_PAGES)
        for layer in range(LAYERS):
            expect(served, LOAD, host, device[layer::LAYERS], src, dst, layer, PAGE)
        self.check_path("batch")
        assert len(tried) == 1

    def test_a_launch_that_fails_is_the_originals_to_make(self, served: SimpleNamespace) -> None:
        host, device = self.sides(served)
        src, dst = tokens(self.HOST_PAGES), tokens(self.DEVICE_PAGES)
        served.control.fault("cuLaunchKernelEx", 1)
        run(served, LOAD, host, device[::LAYERS], src, dst, 0, PAGE)
        assert served.calls == [LOAD]


@pytest.mark.known_failure("registered-blocks")
def test_a_registered_block_that_ends_within_a_pool(
    served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, device = filled(4, 64, 8), filled(64, 8, seed=1)
    middle = host[0].data_ptr() + 20 * 16 + 8
    blocks = [(host.data_ptr() - 4096, middle), (middle, host.data_ptr() + host.nbytes)]

    def memory_range(address: int) -> tuple[int, int] | None:
        return next(((a, b - a) for a, b in blocks if a <= address < b), None)

    monkeypatch.setattr(_core, "memory_range", memory_range)
    seen: list[Any] = []
    submit = merging.submit
    monkeypatch.setattr(merging, "submit", lambda f, *rest: (seen.append(f), submit(f, *rest))[1])
    moved = torch.arange(10, 40)
    expect(served, "transfer_kv_direct", [host[0]], [device], moved, moved, page_size=1)
    (found,) = seen
    assert middle in found.srcs.tolist() and len(found.srcs) == 2


class TestWhatIsNotServed:
    """The original gets the call, with the reason counted; it alone raises."""

    def check(self, served: SimpleNamespace, reason: str, name: str) -> None:
        assert served.calls == [name]
        assert observe.stats()["passed_on"] == {f"sglang.{name}": {reason: 1}}

    @pytest.mark.known_failure("new-keyword")
    def test_an_unknown_keyword(self, served: SimpleNamespace) -> None:
        a, b = filled(8, 4), filled(8, 4)
        with pytest.raises(TypeError):
            run(served, "transfer_kv_direct", [a], [b], tokens([0]), tokens([1]), 4, fast=True)
        assert observe.stats()["passed_on"] == {
            "sglang.transfer_kv_direct": {"an argument that kvsig does not know": 1}
        }

    def test_what_the_original_raises_for(self, served: SimpleNamespace) -> None:
        a, b = filled(8, 4), filled(8, 4)
        with pytest.raises(RuntimeError, match="page size"):
            run(served, "transfer_kv_direct", [a], [b], tokens([0]), tokens([1]), 3)
        self.check(served, "indices that are not whole pages", "transfer_kv_direct")

    def test_an_index_outside(self, served: SimpleNamespace) -> None:
        a, b = filled(8, 4), filled(8, 4)
        with pytest.raises(IndexError):
            run(served, "transfer_kv_direct", [a], [b], tokens([0]), tokens([2]), 4)
        self.check(served, "an index outside of a tensor", "transfer_kv_direct")

    def test_a_negative_index(self, served: SimpleNamespace) -> None:
        a, b = filled(8, 4), filled(8, 4)
        run(served, "transfer_kv_direct", [a], [b], torch.tensor([-1]), torch.tensor([0]), 1)
        self.check(served, "an index outside of a tensor", "transfer_kv_direct")

    def test_dtypes_that_differ(self, served: SimpleNamespace) -> None:
        a, b = filled(8, 4), filled(8, 4, dtype=torch.float32)
        run(served, "transfer_kv_direct", [a], [b], tokens([0]), tokens([1]), 4)
        self.check(served, "tensors of two dtypes or shapes", "transfer_kv_direct")

    def test_device_rows_with_a_pitch_in_page_first(self, served: SimpleNamespace) -> None:
        host, device = filled(2, 1, PAGE, 4), filled(8, 2, 4)[:, 0]
        run(served, LOAD, [host], [device], tokens([0]), tokens([1]), 0, PAGE)
        self.check(served, "device rows that are not packed", LOAD)


    @pytest.mark.parametrize(("srcs", "indices", "page", "reason"), [
        ([filled(8, 4)] * 2, ([0], [1]), 1, "as many destinations as sources are needed"),
        ([filled(8, 4)[:0]], ([0], [1]), 1, "a tensor without rows"),
        ([filled(4, 8).t()], ([0], [1]), 1, "a tensor whose rows are not in one piece"),
        ([filled(64).as_strided((8, 4), (2, 1))], ([0], [1]), 1, "a tensor whose rows overlap"),
        ([filled(8, 4)], ([0], [1]), 0, "a page size that is none"),
        ([filled(8, 4)], ([0, 1], [1]), 1, direct._BAD_INDICES),
        ([filled(8, 4)], ([[0]], [[1]]), 1, direct._BAD_INDICES),
    ])  # fmt: skip
    def test_other_tensors(
        self, served: SimpleNamespace, srcs: Any, indices: Any, page: int, reason: str
    ) -> None:
        given = [torch.tensor(numbers, dtype=torch.int64) for numbers in indices]
        with suppress(Exception):
            run(served, "transfer_kv_direct", srcs, [filled(8, 4)], *given, page)
        self.check(served, reason, "transfer_kv_direct")

    @pytest.mark.parametrize(("shapes", "layer", "reason"), [
        ([(2, 1, PAGE, 4)] * 3, 0, "one pool, or K's and V's with as many layers of each,"
         " are needed"),
        ([(2, 1, PAGE, 4)], -1, "a layer that is none"),
        ([(2, PAGE)], 0, "a host pool that is not (pages, layers, page_size, ...) in one piece"),
        ([(2, 1, PAGE, 4)], 1, "more layers than the host pool has"),
        ([(2, 1, PAGE, 8)], 0, "layers and host pages of two dtypes or sizes"),
    ])  # fmt: skip
    def test_other_pools(
        self, served: SimpleNamespace, shapes: Any, layer: int, reason: str
    ) -> None:
        host, device = [filled(*shape) for shape in shapes], [filled(8, 4)] * len(shapes)
        with suppress(Exception):
            run(served, LOAD, host, device, tokens([0]), tokens([1]), layer, PAGE)
        self.check(served, reason, LOAD)

    @pytest.mark.parametrize(("src", "ranges", "reason"), [
        (filled(8, 5), ([0], [0], [1]), "tables that are not two-dimensional and alike"),
        (filled(8, 8)[:, :4], ([0], [0], [1]), "a table that is not contiguous"),
        (filled(8, 4), ([0, 1], [0], [1]), "ranges that are not of one number"),
        (filled(8, 4), ([6], [0], [3]), "a range outside of its table"),
        (filled(8, 4), ([0], [-1], [1]), "a range outside of its table"),
        (filled(8, 4), ([4], [4], [-1]), "a range outside of its table"),
    ])  # fmt: skip
    def test_other_ranges(
        self, served: SimpleNamespace, src: torch.Tensor, ranges: Any, reason: str
    ) -> None:
        name = "transfer_embedding_ranges_direct"
        with suppress(Exception):
            run(served, name, src, filled(8, 4), *ranges)
        self.check(served, reason, name)


def test_a_gpus_tensors_on_the_emulated_runtime(control: Control) -> None:
    gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    with pytest.raises(pools.Unserved, match="unset KVSIG_CUDART"):
        pools.device_of([(gpu, torch.zeros(1))])


@pytest.mark.known_failure("server-down")
def test_a_cuda_error_is_the_originals_to_meet(served: SimpleNamespace) -> None:
    host, device = filled(PAGES, 1, PAGE, 8), filled(PAGES * PAGE, 8, seed=1)
    served.control.fault("cudaMemcpyBatchAsync", 1)
    run(served, LOAD, [host], [device], tokens([1, 5]), tokens([5, 2]), 0, PAGE)
    assert served.calls == [LOAD] and torch.equal(device[20:24], host[1, 0])
    (cause,) = observe.stats()["fallbacks"]
    assert cause == "cudaMemcpyBatchAsync answered 1 cudaErrorInvalidValue"
