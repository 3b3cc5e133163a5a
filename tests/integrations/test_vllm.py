"""vLLM's copy function through kvsig: its handlers' tests, and how the spec gets in."""

from __future__ import annotations

import functools
import logging
import random
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from standins import Handler, module

from kvsig import kernel, launching, observe
from kvsig.emulated import Control
from kvsig.integrations import vllm as integration

BLOCKS, CHUNKS = 64, 256


class Worker:
    """Handlers in attributes, among others; which ones there are depends on vLLM's version."""

    def __init__(self, handlers: list[Handler]) -> None:
        names = ("_store_handler", "_load_handler", "_expedited_load_handler")
        self._mmap_region = None
        vars(self).update(zip(names, handlers, strict=False))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """A small vLLM whose spec makes the worker that a test has put into it."""
    found = types.SimpleNamespace(calls=[], worker=None)

    class CPUOffloadingSpec:
        def create_worker(self, kv_caches: Any) -> Any:
            return found.worker

    class TieringOffloadingSpec(CPUOffloadingSpec):
        def create_worker(self, kv_caches: Any) -> Any:
            found.calls.append("tiers")
            return super().create_worker(kv_caches)

    def swap(src: Any, dst: Any, sizes: Any, is_src_access_order_any: bool = False) -> None:
        found.calls.append("swap_blocks_batch")

    found.swap = swap
    module(monkeypatch, "vllm", __version__="0.33.0")
    for name in ("v1", "v1.kv_offload", "v1.kv_offload.cpu", "v1.kv_offload.tiering"):
        module(monkeypatch, f"vllm.{name}")
    module(monkeypatch, "vllm.v1.kv_offload.cpu.spec", CPUOffloadingSpec=CPUOffloadingSpec)
    module(
        monkeypatch, "vllm.v1.kv_offload.tiering.spec",
        TieringOffloadingSpec=TieringOffloadingSpec,
    )  # fmt: skip
    for name in integration._SPECS:
        vars(integration).pop(name, None)
    yield found
    for name in integration._SPECS:
        vars(integration).pop(name, None)


def tensors(pages: list[int], per_chunk: int, shared: bool) -> tuple[list[Any], list[Any]]:
    """Make both sides; in a shared region a chunk's row holds other tensors' and ranks' too."""
    gpu = [torch.randint(-99, 99, (BLOCKS, page), dtype=torch.int8) for page in pages]
    if not shared:
        cpu = [torch.randint(-99, 99, (CHUNKS, p * per_chunk), dtype=torch.int8) for p in pages]
        return gpu, cpu
    slot = sum(pages) * per_chunk
    region = torch.randint(-99, 99, (CHUNKS, 2 * slot + 64), dtype=torch.int8)
    cpu, start = [], slot  # the second rank's slot
    for page in pages:
        cpu.append(region[:, start : start + page * per_chunk])
        start += page * per_chunk
    return gpu, cpu


def check(
    handler: Handler, blocks: Any, chunks: Any, skips: Any, control: Control, stream: int
) -> None:
    """Transfer, and compare every byte of both sides, those that stay included."""
    gpu, cpu = handler.src_tensors, handler.dst_tensors
    if not handler.gpu_to_cpu:
        gpu, cpu = cpu, gpu
    wanted_gpu, wanted_cpu = [t.clone() for t in gpu], [t.clone() for t in cpu]
    moved = handler.transfer(blocks, chunks, skips)
    control.synchronize(stream)
    for tensor, block, chunk, at, size in moved:
        page = gpu[tensor].shape[1]
        near = wanted_gpu[tensor][block, :size]
        far = wanted_cpu[tensor][chunk, at * page : at * page + size]
        (far if handler.gpu_to_cpu else near).copy_(near if handler.gpu_to_cpu else far)
    for got, want in zip([*gpu, *cpu], [*wanted_gpu, *wanted_cpu], strict=True):
        assert torch.equal(got, want)
    report = observe.stats()["integrations"]["vllm"]
    assert report["bytes"] == sum(size for *_, size in moved)


def numbers(kind: str, count: int, below: int) -> list[int]:
    if kind == "runs":
        return list(range(3, 3 + count))
    if kind == "descending":
        return list(range(count + 2, 2, -1))
    return random.Random(count).sample(range(below), count)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("gpu_to_cpu", [True, False])
@pytest.mark.parametrize("kind", ["random", "runs", "descending"])
@pytest.mark.parametrize(("per_chunk", "skip"), [(1, 0), (3, 0), (3, 2)])
def test_blocks_of_four_tensors(
    vllm: types.SimpleNamespace, control: Control, stream: int,
    shared: bool, gpu_to_cpu: bool, kind: str, per_chunk: int, skip: int,
) -> None:  # fmt: skip
    gpu, cpu = tensors([512, 1024, 512, 1024], per_chunk, shared)
    references = [[(t, gpu[t].shape[1]) for t in range(4)]]
    handler = Handler(gpu, cpu, per_chunk, references, gpu_to_cpu, vllm.swap)
    assert integration.exchange(Worker([handler])) == 1
    count = 25
    chunks = -(-(count + skip) // per_chunk)
    check(handler, [numbers(kind, count, BLOCKS)], [numbers(kind, chunks, CHUNKS)], [skip],
          control, stream)  # fmt: skip
    assert vllm.calls == []


@pytest.mark.parametrize("gpu_to_cpu", [True, False])
def test_three_groups_one_empty_one_unaligned_with_pages_that_count_in_part(
    vllm: types.SimpleNamespace, control: Control, stream: int, gpu_to_cpu: bool
) -> None:
    gpu, cpu = tensors([512, 1024, 256], 3, True)
    references = [[(0, 512)], [(1, 1000)], [(1, 1024), (2, 256)]]
    handler = Handler(gpu, cpu, 3, references, gpu_to_cpu, vllm.swap)
    integration.exchange(Worker([handler]))
    blocks = [numbers("runs", 9, BLOCKS), [], [40, 41, 42, 50, 63]]
    check(handler, blocks, [[7, 8, 9], [], [100, 101]], [0, 0, 1], control, stream)


def registered(control: Control, gpu: list[Any], cpu: list[Any]) -> tuple[list[Any], list[Any]]:
    """Let one side be device memory, and the other page-locked as a whole."""
    for tensor in gpu:
        control.mark_device(tensor.data_ptr(), tensor.nbytes)
    wholes = {id(t._base): t._base for t in cpu if t._base is not None}
    for tensor in wholes.values() or cpu:
        control.mark_host(tensor.data_ptr(), tensor.nbytes)
    return gpu, cpu


def small_blocks(vllm: types.SimpleNamespace, control: Control) -> tuple[Handler, Any, Any]:
    """Return a handler of one layer's blocks of 512 bytes that kvsig serves, and its two sides."""
    gpu, cpu = registered(control, *tensors([512], 1, False))
    handler = Handler(gpu, cpu, 1, [[(0, 512)]], True, vllm.swap)
    integration.exchange(Worker([handler]))
    return handler, gpu, cpu


class TestSmallBlocks:
    """By the page-copy kernel, where host memory is mapped and blocks are small and scattered."""

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("gpu_to_cpu", [True, False])
    @pytest.mark.parametrize(("per_chunk", "skip"), [(1, 0), (3, 0), (3, 2)])
    def test_are_launches_one_for_each_size(
        self, vllm: types.SimpleNamespace, control: Control, stream: int, shared: bool,
        gpu_to_cpu: bool, per_chunk: int, skip: int,
    ) -> None:  # fmt: skip
        gpu, cpu = registered(control, *tensors([512, 1024, 512, 1040], per_chunk, shared))
        references = [[(0, 512), (1, 1024)], [(2, 512), (3, 1000)]]
        handler = Handler(gpu, cpu, per_chunk, references, gpu_to_cpu, vllm.swap)
        integration.exchange(Worker([handler]))
        chunks = [numbers("random", -(-(n + skip) // per_chunk), CHUNKS) for n in (40, 31)]
        blocks = [numbers("random", n, BLOCKS) for n in (40, 31)]
        if per_chunk > 1:
            blocks = [b[::-1] for b in blocks]
        check(handler, blocks, chunks, [skip, skip], control, stream)
        paths = observe.stats()["paths"]
        assert list(paths) == ["kernel"] and paths["kernel"]["cuda_calls"] == 3
        assert vllm.calls == []

    @pytest.mark.parametrize("kind", ["runs", "descending"])
    def test_that_are_neighbours_are_one_copy_still(
        self, vllm: types.SimpleNamespace, control: Control, kind: str
    ) -> None:
        gpu, cpu = registered(control, *tensors([512], 1, False))
        handler = Handler(gpu, cpu, 1, [[(0, 512)]], True, vllm.swap)
        integration.exchange(Worker([handler]))
        check(handler, [numbers(kind, 60, 64)], [numbers(kind, 60, CHUNKS)], [0], control, 0)
        assert list(observe.stats()["paths"]) == ["batch"]

    def test_by_launches_in_place_of_the_triton_kernel(
        self, vllm: types.SimpleNamespace, control: Control, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "kvsig")
        gpu, cpu = registered(control, *tensors([512], 1, False))
        handler = Handler(gpu, cpu, 1, [[(0, 512)]], False, functools.partial(vllm.swap))
        assert integration.exchange(Worker([handler])) == 1
        assert "serves load (small blocks by the page-copy kernel)" in caplog.text
        check(handler, [numbers("random", 60, 64)], [list(range(60))], [0], control, 0)
        assert list(observe.stats()["paths"]) == ["kernel"]

    @pytest.mark.parametrize(
        ("why", "said"),
        [
            ("pageable", "host memory is pageable"), ("in part", "host memory is pageable"),
            ("switched off", "KVSIG_SMS is 0"), ("large", "pages are large"),
            ("no NVRTC", "nvrtc is missing"),
        ],
    )  # fmt: skip
    def test_by_copy_engines_where_the_kernel_cannot_be_had(
        self, vllm: types.SimpleNamespace, control: Control, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture, why: str, said: str,
    ) -> None:  # fmt: skip
        caplog.set_level(logging.INFO, "kvsig")
        gpu, cpu = tensors([64 << 10 if why == "large" else 512], 1, False)
        if why == "in part":
            control.mark_host(cpu[0].data_ptr(), cpu[0].nbytes // 2)
        elif why != "pageable":
            registered(control, gpu, cpu)
        if why == "switched off":
            monkeypatch.setenv("KVSIG_SMS", "0")
        if why == "no NVRTC":
            monkeypatch.setattr(kernel, "refusal", lambda: "nvrtc is missing")
        handler = Handler(gpu, cpu, 1, [[(0, gpu[0].shape[1])]], True, vllm.swap)
        assert integration.exchange(Worker([handler])) == 1
        assert f"serves offload (by copy engines alone: {said}" in caplog.text
        check(handler, [numbers("random", 60, 64)], [list(range(60))], [0], control, 0)
        assert "kernel" not in observe.stats()["paths"]

    def test_a_setting_that_is_no_number_is_said_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("KVSIG_SMS", "all of them")
        assert launching.multiprocessors() == launching.multiprocessors() == 4
        (message,) = caplog.messages
        assert "KVSIG_SMS is 'all of them', no number" in message

    def test_of_addresses_that_are_no_rows_go_by_copy_engines(
        self, vllm: types.SimpleNamespace, control: Control
    ) -> None:
        handler, gpu, cpu = small_blocks(vllm, control)
        wanted = cpu[0].clone()
        wanted.view(-1)[7 : 7 + 64 * 512 : 512] = gpu[0].view(-1)[3 :: 512]
        rows = torch.arange(64) * 512
        handler._swap_blocks_batch(
            rows + gpu[0].data_ptr() + 3, rows + cpu[0].data_ptr() + 7, torch.ones_like(rows)
        )
        control.synchronize()
        assert torch.equal(cpu[0], wanted)
        assert "kernel" not in observe.stats()["paths"]

    def test_a_launch_that_fails_is_vllms_to_make(
        self, vllm: types.SimpleNamespace, control: Control
    ) -> None:
        handler, _, _ = small_blocks(vllm, control)
        control.fault("cuLaunchKernelEx", 1)
        handler.transfer([numbers("random", 60, 64)], [list(range(60))], [0])
        assert vllm.calls == ["swap_blocks_batch"]
        (cause,) = observe.stats()["fallbacks"]
        assert cause == "cuLaunchKernelEx answered 1 CUDA_ERROR_INVALID_VALUE"


def test_nothing_to_copy(vllm: types.SimpleNamespace, control: Control) -> None:
    gpu, cpu = tensors([512], 1, False)
    handler = Handler(gpu, cpu, 1, [[(0, 512)]], True, vllm.swap)
    integration.exchange(Worker([handler]))
    assert handler.transfer([[]], [[]], [0]) == []


def test_runs_are_merged_and_even_spacing_is_strided(
    vllm: types.SimpleNamespace, control: Control
) -> None:
    gpu, cpu = tensors([512, 512], 1, False)
    handler = Handler(gpu, cpu, 1, [[(0, 512)], [(1, 512)]], True, vllm.swap)
    integration.exchange(Worker([handler]))
    one = [numbers("runs", 30, 64), []]
    handler.transfer(one, one, [0, 0], control.synchronize)
    assert observe.stats()["integrations"]["vllm"]["copies"] == 1
    observe.clear()
    gpu, cpu = tensors([512, 512], 1, True)
    handler = Handler(gpu, cpu, 1, [[(0, 512)], [(1, 512)]], True, vllm.swap)
    integration.exchange(Worker([handler]))
    both = numbers("runs", 30, 64)
    handler.transfer([both, both], [both, both], [0, 0], control.synchronize)
    assert observe.stats()["paths"]["strided"]["cuda_calls"] == 2


@pytest.mark.known_failure("descriptor-cap")
@pytest.mark.parametrize(("cap", "calls"), [("7", 3), ("0", 1), ("", 1), ("many", 1)])
def test_the_cap_on_descriptors(
    vllm: types.SimpleNamespace, control: Control, monkeypatch: pytest.MonkeyPatch, cap: str,
    calls: int,
) -> None:  # fmt: skip
    monkeypatch.setenv("VLLM_KV_OFFLOAD_MAX_BATCH_DESCRIPTORS", cap)
    gpu, cpu = tensors([512], 1, False)
    handler = Handler(gpu, cpu, 1, [[(0, 512)]], True, vllm.swap)
    integration.exchange(Worker([handler]))
    handler.transfer([numbers("random", 20, 64)], [list(range(0, 40, 2))], [0], control.synchronize)
    assert observe.stats()["integrations"]["vllm"]["cuda_calls"] == calls


class TestWhatIsNotServed:
    def swapped(self, vllm: types.SimpleNamespace) -> Handler:
        gpu, cpu = tensors([512], 1, False)
        handler = Handler(gpu, cpu, 1, [[(0, 512)]], True, vllm.swap)
        integration.exchange(Worker([handler]))
        return handler

    @pytest.mark.known_failure("new-keyword")
    def test_an_unknown_keyword_goes_on_with_the_whole_call(
        self, vllm: types.SimpleNamespace, control: Control
    ) -> None:
        seen = []
        gpu, cpu = tensors([512], 1, False)
        handler = Handler(gpu, cpu, 1, [], True, lambda *a, **k: seen.append((a, k)))
        integration.exchange(Worker([handler]))
        words = torch.zeros(0, dtype=torch.int64)
        handler._swap_blocks_batch(words, words, words, use_batch_api=True)
        ((arguments, keywords),) = seen
        assert all(given is words for given in arguments)
        assert keywords == {"is_src_access_order_any": False, "use_batch_api": True}
        assert "vllm.offload" in observe.stats()["passed_on"]

    @pytest.mark.known_failure("server-down")
    def test_a_failing_kvsig_is_logged_once(
        self, vllm: types.SimpleNamespace, control: Control, caplog: pytest.LogCaptureFixture
    ) -> None:
        handler = self.swapped(vllm)
        for _ in range(3):
            control.fault("cudaMemcpyBatchAsync", 1)
            handler.transfer([[1, 5, 9]], [[7, 5, 3]], [0])
        assert vllm.calls == ["swap_blocks_batch"] * 3
        warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == 1 and "cudaMemcpyBatchAsync answered 1" in warnings[0].message
        (count,) = observe.stats()["fallbacks"].values()
        assert count == 3

    def test_descriptors_of_another_kind(
        self, vllm: types.SimpleNamespace, control: Control
    ) -> None:
        handler = self.swapped(vllm)
        words = torch.zeros(2, dtype=torch.int32)
        handler._swap_blocks_batch(words, words, words)
        assert vllm.calls == ["swap_blocks_batch"]

    def test_small_pages_in_pageable_memory_stay_with_the_triton_kernel(
        self, vllm: types.SimpleNamespace, control: Control, caplog: pytest.LogCaptureFixture
    ) -> None:
        gpu, cpu = tensors([512], 1, False)
        original = functools.partial(vllm.swap)
        handler = Handler(gpu, cpu, 1, [[(0, 512)]], False, original)
        assert integration.exchange(Worker([handler])) == 0
        assert handler._swap_blocks_batch is original
        assert "nothing is served" in caplog.text and "Triton" in caplog.text

    def test_a_gpus_tensors_on_the_emulated_runtime(
        self, vllm: types.SimpleNamespace, control: Control, caplog: pytest.LogCaptureFixture
    ) -> None:
        gpu = types.SimpleNamespace(is_cuda=True)
        handler = Handler([gpu], [torch.zeros(1)], 1, [], True, vllm.swap)
        assert integration.exchange(Worker([handler])) == 0
        assert "unset KVSIG_CUDART" in caplog.text

    def test_a_worker_without_handlers(
        self, vllm: types.SimpleNamespace, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert integration.exchange(Worker([])) == 0
        assert "no handler of Worker is one that kvsig knows" in caplog.text

    def test_twice_is_once(self, vllm: types.SimpleNamespace, control: Control) -> None:
        handler = self.swapped(vllm)
        exchanged = handler._swap_blocks_batch
        assert integration.exchange(Worker([handler])) == 0
        assert handler._swap_blocks_batch is exchanged

    def test_the_switch(
        self, vllm: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KVSIG_DISABLE", "1")
        assert self.swapped(vllm)._swap_blocks_batch is vllm.swap


class TestSpecs:
    @pytest.mark.parametrize("name", ["KvsigOffloadingSpec", "KvsigTieringOffloadingSpec"])
    def test_a_spec_is_vllms_with_the_copy_exchanged(
        self, vllm: types.SimpleNamespace, control: Control, caplog: pytest.LogCaptureFixture,
        name: str,
    ) -> None:  # fmt: skip
        gpu, cpu = tensors([512], 1, False)
        store, load, fast = (
            Handler(gpu, cpu, 1, [[(0, 512)]], to_cpu, vllm.swap) for to_cpu in (True, False, False)
        )
        vllm.worker = Worker([store, load, fast])
        spec = getattr(integration, name)
        assert spec.__module__ == integration.__name__ and spec.__name__ == name
        with caplog.at_level(logging.INFO, "kvsig"):
            assert spec().create_worker(None) is vllm.worker
        for handler in (store, load, fast):
            assert handler._swap_blocks_batch.original is vllm.swap
        assert "vLLM 0.33.0" in caplog.text and "serves offload, load (" in caplog.text
        assert getattr(integration, name) is spec

    def test_without_vllm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "vllm", None)
        vars(integration).pop("KvsigOffloadingSpec", None)
        with pytest.raises(ImportError, match=r"needs vLLM 0\.25 or later"):
            _ = integration.KvsigOffloadingSpec

    def test_a_vllm_that_is_too_old(self, vllm: types.SimpleNamespace) -> None:
        import sys

        sys.modules["vllm.v1.kv_offload.cpu.spec"].CPUOffloadingSpec = type("Old", (), {})
        with pytest.raises(ImportError, match="has no create_worker"):
            _ = integration.KvsigOffloadingSpec

    def test_another_name(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            _ = integration.Nothing
