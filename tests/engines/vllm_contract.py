"""vLLM's real worker moves blocks through kvsig, on the emulated runtime."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stubs import Failure, Finder, need

from kvsig import observe, streams
from kvsig.emulated import Stream
from kvsig.integrations import vllm as integration

OFFLOAD = "vllm.v1.kv_offload"
REAL = {
    "vllm.utils.math_utils",
    f"{OFFLOAD}.base",
    f"{OFFLOAD}.config",
    f"{OFFLOAD}.cpu.common",
    f"{OFFLOAD}.cpu.gpu_worker",
    f"{OFFLOAD}.cpu.spec",
    f"{OFFLOAD}.tiering.spec",
}
BLOCKS, CHUNKS, PAGES = 64, 256, (512, 1024, 512, 1024)


class EngineStream(Stream):
    """An emulated stream with what vLLM asks of one of torch's."""

    def wait_stream(self, other: Any) -> None:
        if other is not None:
            other.synchronize()

    def wait_event(self, event: Any) -> None:
        event.synchronize()


class Event:
    """An event that is done when its stream is."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.stream: Any = None

    def record(self, stream: Any = None) -> None:
        self.stream = stream

    def query(self) -> bool:
        return bool(self.stream.query())

    def synchronize(self) -> None:
        self.stream.synchronize()

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class Platform:
    """vLLM's platform, of which the current stream counts."""

    current: Any = None
    Stream = EngineStream

    def current_stream(self) -> Any:
        return self.current

    def is_xpu(self) -> bool:
        return False

    is_rocm = is_xpu

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.current, before = stream, self.current
        yield
        self.current = before


def refuse(*args: Any, **kwargs: Any) -> None:
    raise Failure(f"vLLM's own copy function was called with {args} {kwargs}")


def load(folder: Path) -> tuple[Any, Any, Any]:
    platform = Platform()
    given = {
        "vllm": {"__version__": folder.name.rpartition("-")[2]},
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"HAS_TRITON": False},
        "vllm.utils.torch_utils": {"PIN_MEMORY": False},
        "vllm._custom_ops": {"swap_blocks_batch": refuse},
        f"{OFFLOAD}.cpu.swap_blocks_triton": {"THRESHOLD_BYTES": 28672},
        f"{OFFLOAD}.cpu.shared_offload_region": {"SharedOffloadRegion": type("Region", (), {})},
    }
    given[f"{OFFLOAD}.cpu.shared_offload_region"]["SharedOffloadRegion"].BLOCK_SIZE_ALIGNMENT = 4096
    Finder("vllm", folder, REAL, given)
    torch.Event = Event  # type: ignore[assignment,misc]
    streams.current_handle = lambda device: platform.current.cuda_stream  # type: ignore
    base, worker, common = (
        importlib.import_module(f"{OFFLOAD}.{name}")
        for name in ("base", "cpu.gpu_worker", "cpu.common")
    )
    return base, worker, common.CPULoadStoreSpec


def check_names(gpu_worker: Any) -> None:
    for name in ("KvsigOffloadingSpec", "KvsigTieringOffloadingSpec"):
        spec = getattr(integration, name)
        parameters = list(inspect.signature(spec.__mro__[2].create_worker).parameters)
        need(parameters == ["self", "kv_caches"], f"create_worker of {name} takes {parameters}")
    source = inspect.getsource(gpu_worker.SingleDirectionOffloadingHandler)
    need(source.count("self._swap_blocks_batch(") == 1, "_swap_blocks_batch is not called once")
    for name in integration._ATTRIBUTES:
        need(f"self.{name}" in source, f"a handler has no attribute {name}")


def make_worker(base: Any, gpu_worker: Any, per_chunk: int) -> tuple[Any, list[torch.Tensor]]:
    gpu = [torch.randint(-99, 99, (BLOCKS, page), dtype=torch.int8) for page in PAGES]
    tensors = [
        base.CanonicalKVCacheTensor(tensor=t, page_size_bytes=t.shape[1]) for t in gpu
    ]
    # Three groups: one of two tensors, one that will be empty, one whose pages count in part.
    sizes = [[(0, 512), (1, 1024)], [(2, 512)], [(3, 1000)]]
    groups = [
        [base.CanonicalKVCacheRef(tensor_idx=t, page_size_bytes=size) for t, size in group]
        for group in sizes
    ]
    caches = base.CanonicalKVCaches(tensors=tensors, group_data_refs=groups)
    names = list(inspect.signature(gpu_worker.CPUOffloadingWorker).parameters)[1:3]
    values = dict(zip(names, (per_chunk, CHUNKS), strict=True))

    class Spec(integration.KvsigOffloadingMixin, _Maker):  # the spec's own way to the worker
        pass

    return Spec(lambda: gpu_worker.CPUOffloadingWorker(caches, **values)).create_worker(caches), gpu


class _Maker:
    def __init__(self, make: Any) -> None:
        self.make = make

    def create_worker(self, kv_caches: Any) -> Any:
        return self.make()


def check_blocks(base: Any, gpu_worker: Any, cpu_spec: Any, per_chunk: int, skip: int) -> None:
    worker, gpu = make_worker(base, gpu_worker, per_chunk)
    handlers = [h for h in vars(worker).values() if hasattr(h, "_swap_blocks_batch")]
    need(
        all(type(h._swap_blocks_batch).__name__ == "_Exchanged" for h in handlers)
        and len(handlers) >= 2,
        "not every handler copies through kvsig",
    )
    blocks = [[*range(10, 18), 40], [], [30, 29, 28, 60, 3]]
    chunks = [[-(-(len(b) + skip) // per_chunk)] for b in blocks]
    counts = [n[0] if blocks[i] else 0 for i, n in enumerate(chunks)]
    numbers = np.arange(5, 5 + sum(counts)).tolist()
    sizes = [len(b) for b in blocks]
    near = base.GPULoadStoreSpec(sum(blocks, []), group_sizes=sizes, block_indices=[skip] * 3)
    before = [t.clone() for t in gpu]
    need(worker.submit_store(1, near, cpu_spec(numbers)), "submit_store answered no")
    finish(worker, 1)
    for tensor in gpu:
        tensor.zero_()
    need(worker.submit_load(2, cpu_spec(numbers), near), "submit_load answered no")
    finish(worker, 2)
    for group, references in enumerate([[(0, 512), (1, 1024)], [(2, 512)], [(3, 1000)]]):
        for number, size in references:
            wanted = torch.zeros_like(before[number])
            wanted[blocks[group], :size] = before[number][blocks[group], :size]
            need(torch.equal(gpu[number], wanted), f"tensor {number} came back otherwise")
    worker.shutdown()


def finish(worker: Any, job: int) -> None:
    worker.wait({job})
    results = worker.get_finished()
    need([r.job_id for r in results] == [job], f"job {job} is not finished: {results}")
    need(results[0].success and results[0].transfer_size > 0, f"job {job} says {results[0]}")


def main() -> None:
    base, gpu_worker, cpu_spec = load(Path(sys.argv[1]))
    Platform.current = EngineStream()
    check_names(gpu_worker)
    for per_chunk, skip in ((1, 0), (3, 0), (3, 2)):
        check_blocks(base, gpu_worker, cpu_spec, per_chunk, skip)
    served = observe.stats()["integrations"]["vllm"]
    need(served["bytes"] and not served["passed_on"], f"not all was served: {observe.stats()}")
    need(not observe.stats()["fallbacks"], f"something fell back: {observe.stats()}")


if __name__ == "__main__":
    main()
