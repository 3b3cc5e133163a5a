"""kvsig inside vLLM 0.25 and later: an offloading spec that exchanges the copy function.

vLLM's manager, eviction, ordering, events and metrics stay as they are. A spec is selected by
name::

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
      "kv_connector_extra_config": {"spec_name": "KvsigOffloadingSpec",
        "spec_module_path": "kvsig.integrations.vllm", "cpu_bytes_to_use": 68719476736}}'

Importing this module does not import vLLM: the two specs are made when they are asked for.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from kvsig import _core, memory, merging, observe, streams
from kvsig._core import BindError, CudaError
from kvsig.launching import AddressLaunches, multiprocessors
from kvsig.planning import Direction, descriptors

if TYPE_CHECKING:
    KvsigOffloadingSpec: Any
    KvsigTieringOffloadingSpec: Any

__all__ = ["KvsigOffloadingMixin", "KvsigOffloadingSpec", "KvsigTieringOffloadingSpec", "exchange"]

Swap = Callable[..., None]

_CAP = "VLLM_KV_OFFLOAD_MAX_BATCH_DESCRIPTORS"
_BATCH_SIZE = 256
# What a handler must have to be one that is known here.
_ATTRIBUTES = ("_swap_blocks_batch", "src_tensors", "dst_tensors", "gpu_to_cpu")
_SPECS = {
    "KvsigOffloadingSpec": ("vllm.v1.kv_offload.cpu.spec", "CPUOffloadingSpec"),
    "KvsigTieringOffloadingSpec": ("vllm.v1.kv_offload.tiering.spec", "TieringOffloadingSpec"),
}


class KvsigOffloadingMixin:
    """Put before a spec of vLLM whose ``create_worker`` makes a ``CPUOffloadingWorker``."""

    def create_worker(self, kv_caches: Any) -> Any:
        """Return vLLM's worker, with kvsig to copy for it."""
        worker = super().create_worker(kv_caches)  # type: ignore[misc]
        exchange(worker)
        return worker


def __getattr__(name: str) -> Any:
    if name not in _SPECS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, base_name = _SPECS[name]
    try:
        base = getattr(importlib.import_module(module), base_name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{name} needs vLLM 0.25 or later, with {module}.{base_name}: {error}") \
            from error  # fmt: skip
    if not hasattr(base, "create_worker"):
        raise ImportError(
            f"{name} needs vLLM 0.25 or later: {module}.{base_name} has no create_worker"
        )
    contents = {"__module__": __name__, "__doc__": base.__doc__}
    spec = type(name, (KvsigOffloadingMixin, base), contents)
    globals()[name] = spec
    return spec


def exchange(worker: Any) -> int:
    """Let kvsig copy for the handlers of a worker.

    Parameters
    ----------
    worker : vllm.v1.kv_offload.cpu.gpu_worker.CPUOffloadingWorker
        Its handlers are found by what they have, not by name.

    Returns
    -------
    int
        Handlers that kvsig copies for now. Where it is less than vLLM has, the log says why.
    """
    if observe.disabled():
        observe.passed_on("vllm.swap_blocks_batch", "KVSIG_DISABLE is set")
        return 0
    count, left = 0, []
    served: dict[str, list[str]] = {}
    for handler in _handlers(worker):
        direction = "offload" if handler.gpu_to_cpu else "load"
        found = _exchanged(handler, f"vllm.{direction}")
        if isinstance(found, str):
            observe.passed_on(f"vllm.{direction}", found)
            left.append(f"{direction} ({found})")
            continue
        handler._swap_blocks_batch = found
        how = "small blocks by the page-copy kernel"
        if found.launches is None:
            how = f"by copy engines alone: {found.why_not}"
        served.setdefault(how, []).append(direction)
        count += 1
    if served:
        what = "; ".join(f"{', '.join(dict.fromkeys(d))} ({how})" for how, d in served.items())
        observe.announce("vllm", _version(), what, "; ".join(left) or "nothing")
    else:
        observe.warn_unserved(
            "vllm",
            "; ".join(left) or f"no handler of {type(worker).__name__} is one that kvsig knows",
            "use vLLM 0.25 to 0.33 with CPUOffloadingSpec or TieringOffloadingSpec",
        )
    return count


def _version() -> str:
    return f"vLLM {getattr(importlib.import_module('vllm'), '__version__', 'of unknown version')}"


def _handlers(worker: Any) -> Iterator[Any]:
    for value in vars(worker).values():
        if all(hasattr(value, name) for name in _ATTRIBUTES):
            yield value


def _exchanged(handler: Any, what: str) -> _Exchanged | str:
    """Make the function that copies for a handler, or say why the handler is left to vLLM."""
    original = handler._swap_blocks_batch
    if isinstance(original, _Exchanged):
        return "kvsig serves it already"
    if not handler.src_tensors or not handler.dst_tensors:
        return "the handler has no tensors"
    on_gpu = any(tensor.is_cuda for tensor in [*handler.src_tensors, *handler.dst_tensors])
    if on_gpu and _core.is_emulated():
        return "the CUDA runtime in use is the emulated one: unset KVSIG_CUDART"
    found = _Exchanged(original, handler, what)
    if found.launches is None and isinstance(original, functools.partial):
        return (
            "pages are small, vLLM's Triton kernel moves them faster than copy engines, and "
            f"kvsig's kernel cannot be used: {found.why_not}"
        )
    return found


class _Exchanged:
    """The copy function of one handler: vLLM's, but through kvsig.

    Where its memory lies is looked at once: vLLM registers host memory before it makes a handler,
    and gives it back after the handler has been shut down.
    """

    def __init__(self, original: Swap, handler: Any, what: str) -> None:
        self.original, self.what = original, what
        both = [*handler.src_tensors, *handler.dst_tensors]
        self.device = next((t.device for t in both if t.is_cuda), torch.device("cpu"))
        sides, direction = (handler.src_tensors, handler.dst_tensors), Direction.OFFLOAD
        if not handler.gpu_to_cpu:
            sides, direction = sides[::-1], Direction.LOAD
        self.launches: AddressLaunches | None = None
        self.why_not = ""
        with streams.device_guard(self.device):
            self.seams = memory.seams(map(memory.extent, both))
            try:
                self.launches = AddressLaunches(*sides, direction, multiprocessors())
            except (BindError, CudaError) as error:
                self.why_not = str(error)
        cap = os.environ.get(_CAP, "")
        bound = int(cap) if cap.isdigit() else 0
        self.batch_size = min(_BATCH_SIZE, bound) if bound else _BATCH_SIZE

    def __call__(
        self, src: Any, dst: Any, sizes: Any, is_src_access_order_any: bool = False, **more: Any
    ) -> None:
        """Queue copies on the current stream; what cannot be served is the original's."""
        # Reading a source earlier than its turn is allowed, not asked for: stream order serves.
        reason = "an argument that kvsig does not know" if more else None
        if reason is None:
            arrays = [_words(values) for values in (dst, src, sizes)]
            if any(array is None or len(array) != len(src) for array in arrays):
                reason = "descriptors that are not int64 on the CPU"
            else:
                try:
                    return self._copy(*arrays)
                except Exception as error:  # vLLM's worker ends with an exception that it gets
                    observe.fell_back(self.what, error)
        if reason is not None:
            observe.passed_on(self.what, reason)
        self.original(src, dst, sizes, is_src_access_order_any=is_src_access_order_any, **more)

    @observe.traced("kvsig.vllm.swap_blocks_batch")
    def _copy(self, dsts: Any, srcs: Any, sizes: Any) -> None:
        start = perf_counter_ns()
        found = descriptors.plan(dsts, srcs, sizes, self.seams)
        with streams.device_guard(self.device):
            stream = streams.current_handle(self.device)
            report = None
            if self.launches is not None:
                report = self.launches.copy(dsts, srcs, sizes, found, stream)
            if report is None:
                report = merging.submit(found, stream, self.batch_size)
        observe.record(self.what, report, perf_counter_ns() - start)


def _words(values: Any) -> npt.NDArray[np.uint64] | None:
    """Return a tensor's memory as unsigned numbers; None for what is no list of int64."""
    if type(values) is not torch.Tensor or values.dtype is not torch.int64 or not values.is_cpu:
        return None
    if values.ndim != 1 or not values.is_contiguous():
        return None
    return values.numpy().view(np.uint64)
