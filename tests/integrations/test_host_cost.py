"""What a call through an integration takes of the host, with CUDA's own part left out.

Bounds are four times the aims, since machines that run tests are shared: 12 µs for a load of one
page of one layer, 20 µs for one of 16, 30 ns for a descriptor of vLLM's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from standins import Handler, filled

from kvsig import streams
from kvsig.emulated import Control
from kvsig.integrations import sglang as integration
from kvsig.integrations.vllm import _Exchanged

STREAM = 0x1000  # stubbed calls take any


@pytest.fixture
def stubbed(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    control.stub()
    monkeypatch.setattr(streams, "current_handle", lambda device: STREAM)


def fastest(call: Callable[[], object], times: int = 300) -> float:
    best = 1.0
    for _ in range(times):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.parametrize(("pages", "bound"), [(1, 48e-6), (16, 80e-6)])
def test_a_load_of_one_layer(
    sglang: SimpleNamespace, stubbed: None, pages: int, bound: float
) -> None:
    integration.install()
    host = [filled(64, 4, 16, 8, seed=i) for i in range(2)]
    device = [filled(1024, 8, seed=i) for i in range(2)]
    src = torch.cat([torch.arange(16) + 16 * (3 * i % 64) for i in range(pages)])
    dst = torch.cat([torch.arange(16) + 16 * (5 * i % 64) for i in range(pages)])
    taken = fastest(
        lambda: sglang.pool.transfer_kv_per_layer_direct_pf_lf(
            src_ptrs=host, dst_ptrs=device, src_indices=src, dst_indices=dst, layer_id=1,
            page_size=16,
        )  # fmt: skip
    )
    assert sglang.calls == [] and taken < bound


def test_a_descriptor_of_vllms(stubbed: None) -> None:
    count = 8192
    gpu, cpu = torch.zeros(1, 8, dtype=torch.int8), torch.zeros(1, 8, dtype=torch.int8)
    handler = Handler([gpu], [cpu], 1, [], True, lambda *_, **__: pytest.fail("not served"))
    swap = _Exchanged(handler._swap_blocks_batch, handler, "vllm.offload")
    src = torch.arange(count) * 4096 + (1 << 40)
    dst, sizes = torch.arange(count) * 4096 + (1 << 41), torch.full((count,), 4096)
    assert fastest(lambda: swap(src, dst, sizes), 50) / count < 120e-9
