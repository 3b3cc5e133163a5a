"""What a call through an integration asks of CUDA once it is warm, which is what it costs the host.

`benchmarks/overhead.py` has the figures, in microseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from standins import Handler, filled

from kvsig import streams
from kvsig.emulated import Control, Stream
from kvsig.integrations import sglang as integration
from kvsig.integrations.vllm import _Exchanged

BATCH, LAUNCH = "cudaMemcpyBatchAsync", "cuLaunchKernelEx"
#: Asked in each call: whether memory is what it was, and whether the stream is being captured.
ASKED = {"cuPointerGetAttribute", "cudaStreamIsCapturing", "cudaStreamGetId"}


@pytest.fixture
def own(control: Control, monkeypatch: pytest.MonkeyPatch) -> Stream:
    found = Stream(control)
    monkeypatch.setattr(streams, "current_handle", lambda device: found.cuda_stream)
    return found


def asked_when_warm(control: Control, call: Callable[[], object]) -> Counter[str]:
    """Return how often each function that does something is called, the second time."""
    call()
    control.record()
    call()
    functions = Counter(made["function"] for made in control.calls())
    return Counter({name: n for name, n in functions.items() if name not in ASKED})


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("pages", [1, 16])
def test_a_load_of_one_layer(
    sglang: SimpleNamespace, control: Control, own: Stream, pages: int, registered: bool
) -> None:
    integration.install()
    host = [filled(64, 4, 16, 8, seed=i) for i in range(2)]
    device = [filled(1024, 8, seed=i) for i in range(2)]
    for tensor in host if registered else ():
        control.mark_host(tensor.data_ptr(), tensor.nbytes)
    for tensor in device:
        control.mark_device(tensor.data_ptr(), tensor.nbytes)
    src = torch.cat([torch.arange(16) + 16 * (3 * i % 64) for i in range(pages)])
    dst = torch.cat([torch.arange(16) + 16 * (5 * i % 64) for i in range(pages)])
    asked = asked_when_warm(
        control,
        lambda: sglang.pool.transfer_kv_per_layer_direct_pf_lf(
            src_ptrs=host, dst_ptrs=device, src_indices=src, dst_indices=dst, layer_id=1,
            page_size=16,
        ),
    )  # fmt: skip
    own.synchronize()
    assert asked == {LAUNCH if registered and pages > 1 else BATCH: 1} and sglang.calls == []


@pytest.mark.parametrize("registered", [False, True])
def test_a_list_of_vllms(control: Control, own: Stream, registered: bool) -> None:
    gpu, cpu = filled(400, 64, dtype=torch.int8), filled(400, 64, dtype=torch.int8)
    control.mark_device(gpu.data_ptr(), gpu.nbytes)
    if registered:
        control.mark_host(cpu.data_ptr(), cpu.nbytes)
    handler = Handler([gpu], [cpu], 1, [], True, lambda *_, **__: pytest.fail("not served"))
    swap = _Exchanged(handler._swap_blocks_batch, handler, "vllm.offload")
    order = [torch.randperm(400, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    src, dst = (n * 64 + t.data_ptr() for n, t in zip(order, (gpu, cpu), strict=True))
    sizes = torch.full_like(src, 64)
    asked = asked_when_warm(control, lambda: swap(src, dst, sizes))
    own.synchronize()
    assert torch.equal(cpu[order[1]], gpu[order[0]])
    if registered:  # the list of block numbers goes ahead of its launch
        assert asked[LAUNCH] == 1 and asked.keys() <= {LAUNCH, "cudaMemcpyAsync"}
    else:
        assert asked == {BATCH: 2}
