"""kvsig beside other projects' ways of moving the same pages.

    PYTHONPATH=. python benchmarks/rivals.py --json FILE

Needs a GPU; measures those of the others that are installed. Each is a method like kvsig's own:
add one by a function that gets a job ready and returns its runner. `plot.py` draws the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvsig import Report, _core
from kvsig.cli.bench import text_of
from kvsig.tools.cells import LIMIT, SECTIONS, preset
from kvsig.tools.jobs import Job
from kvsig.tools.measuring import Bench
from kvsig.tools.methods import METHODS, Runner, Unavailable
from kvsig.tools.report import write_json

U64 = npt.NDArray[np.uint64]
#: Methods that cost microseconds of Python per copy move only so many copies of a cell.
PYTHON_COPIES = 4096


def layer_calls(job: Job) -> list[list[int]]:
    """Layers of each call."""
    layers = list(range(job.cell.layers))
    return [layers] if job.cell.scope == "all" else [[layer] for layer in layers]


def few_pages(job: Job) -> int:
    """Pages of a plane that a slow method moves."""
    return min(job.cell.pages, max(1, PYTHON_COPIES // (job.cell.layers * job.cell.kinds)))


def packed(job: Job, direction: str, layers: list[int], pages: int) -> tuple[U64, U64]:
    """Addresses of the plain list of copies, packed as a NumPy user would."""
    kinds = range(job.cell.kinds)
    near, far = (numbers[:pages].astype(np.uint64) for numbers in job.pages[direction])
    here = [job.near[k][i].data_ptr() for k in kinds for i in layers]
    planes = [job.far_plane(k, i) for k in kinds for i in layers]
    there = [plane.data_ptr() for plane in planes]
    pitch = np.uint64(planes[0].stride(0))
    device = (np.array(here, np.uint64)[:, None] + near * np.uint64(job.cell.page_bytes)).ravel()
    host = (np.array(there, np.uint64)[:, None] + far * pitch).ravel()
    return (host, device) if direction == "offload" else (device, host)


def one_call(job: Job) -> Runner:
    """All copies in a single call of the batch function."""
    refusal = _core.batch_refusal(2)
    if refusal is not None:
        raise Unavailable(refusal)

    def run(direction: str, stream: Any) -> Report:
        whole = Report()
        for layers in layer_calls(job):
            to, of = packed(job, direction, layers, job.cell.pages)
            size, handle = job.cell.page_bytes, stream.cuda_stream
            whole += _core.copy_batch(to, of, size, handle, "batch", len(to))
        return whole

    return run


def torch_copy(job: Job) -> Runner:
    """``Tensor.copy_`` per page, on some of the pages where there are many."""
    pages = few_pages(job)

    def run(direction: str, stream: Any) -> Report:
        near, far = (numbers[:pages].tolist() for numbers in job.pages[direction])
        count = 0
        with torch.cuda.stream(stream):
            for kind, tensors in enumerate(job.near):
                for layer, tensor in enumerate(tensors):
                    rows = job.far_plane(kind, layer)
                    for here, there in zip(near, far, strict=True):
                        if direction == "offload":
                            rows[there].copy_(tensor[here], non_blocking=True)
                        else:
                            tensor[here].copy_(rows[there], non_blocking=True)
                    count += pages
        return Report("torch", None, count, count, count * job.cell.page_bytes)

    return run


class Select:
    """torch's ``index_select`` through a staging buffer: gather, one big copy, scatter."""

    def __init__(self, job: Job) -> None:
        self.job = job
        cell = job.cell
        if cell.page_bytes % 8:
            raise Unavailable("pages are not a multiple of 8 bytes")
        shape = [cell.pages, len(layer_calls(job)[0]), cell.page_bytes // 8]
        if cell.layout == "layer_first":
            shape[:2] = shape[1::-1]
        self.near = torch.empty(shape, dtype=torch.int64, device=job.memory.device)
        self.far = torch.empty(shape, dtype=torch.int64, pin_memory=job.memory.real)
        self.index = {
            way: (torch.from_numpy(near).to(job.memory.device), torch.from_numpy(far))
            for way, (near, far) in job.pages.items()
        }

    def __call__(self, direction: str, stream: Any) -> Report:
        job, calls = self.job, 0
        with torch.cuda.stream(stream):
            for kind in range(job.cell.kinds):
                for layers in layer_calls(job):
                    move = self.offload if direction == "offload" else self.load
                    move(kind, layers, stream)
                    calls += 1
        return Report("torch", None, calls, calls, job.cell.bytes)

    def slots(self, kind: int, layers: list[int]) -> Iterable[tuple[Any, Any]]:
        """Device layers and their places in the staging buffer."""
        job = self.job
        for place, layer in enumerate(layers):
            slot = self.near[place] if job.cell.layout == "layer_first" else self.near[:, place]
            yield job.near[kind][layer].view(torch.int64), slot

    def block(self, kind: int, layers: list[int]) -> tuple[Any, int]:
        """Host pages of some layers, and the dimension that pages are along."""
        job = self.job
        pool = job.far[kind].view(torch.int64)
        part = slice(layers[0], layers[-1] + 1)
        return (pool[part], 1) if job.cell.layout == "layer_first" else (pool[:, part, 0], 0)

    def offload(self, kind: int, layers: list[int], stream: Any) -> None:
        """Gather on the device, copy, wait, and scatter on the host."""
        near, far = self.index["offload"]
        for rows, slot in self.slots(kind, layers):
            slot.copy_(torch.index_select(rows, 0, near))
        self.far.copy_(self.near, non_blocking=True)
        stream.synchronize()
        block, dim = self.block(kind, layers)
        block.index_copy_(dim, far, self.far)

    def load(self, kind: int, layers: list[int], stream: Any) -> None:
        """Gather on the host, copy, and scatter on the device."""
        near, far = self.index["load"]
        block, dim = self.block(kind, layers)
        stream.synchronize()  # the copy before may still read the staging buffer
        torch.index_select(block, dim, far, out=self.far)
        self.near.copy_(self.far, non_blocking=True)
        for rows, slot in self.slots(kind, layers):
            rows.index_copy_(0, near, slot)


def bindings(job: Job) -> Runner:
    """cuda.bindings: lists of ints in, one call of ``cudaMemcpyBatchAsync``."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise Unavailable(f"cuda.bindings is not installed ({error})") from None
    if not hasattr(runtime, "cudaMemcpyBatchAsync"):
        raise Unavailable("this cuda.bindings has no cudaMemcpyBatchAsync")
    attributes = runtime.cudaMemcpyAttributes()
    attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream

    def run(direction: str, stream: Any) -> Report:
        whole = Report()
        for layers in layer_calls(job):
            to, of = packed(job, direction, layers, job.cell.pages)
            count, size = len(to), job.cell.page_bytes
            lists: list[Any] = [to.tolist(), of.tolist(), [size] * count, count]
            answer = runtime.cudaMemcpyBatchAsync(*lists, [attributes], [0], 1, stream.cuda_stream)
            if int(answer[0]) != 0:
                raise Unavailable(f"cuda.bindings cudaMemcpyBatchAsync answered {answer[0]!r}")
            whole += Report("batch", None, count, 1, count * size)
        return whole

    return run


def cuda_core(job: Job) -> Runner:
    """cuda.core: a Buffer for each end of each copy, one call."""
    try:
        from cuda.core import Buffer, Device, Stream
        from cuda.core.utils import copy_batch
    except ImportError as error:
        raise Unavailable(f"cuda.core with copy_batch is not installed ({error})") from None
    Device(torch.cuda.current_device()).set_current()
    pages, size = few_pages(job), job.cell.page_bytes

    def run(direction: str, stream: Any) -> Report:
        own = Stream.from_handle(stream.cuda_stream)
        moved = Report()
        for layers in layer_calls(job):
            ends = packed(job, direction, layers, pages)
            to, of = ([Buffer.from_handle(place, size) for place in end.tolist()] for end in ends)
            copy_batch(own, of, to)
            moved += Report("batch", None, len(to), 1, len(to) * size)
        return moved

    return run


RIVALS = {
    "one call": one_call,
    "torch copy_": torch_copy,
    "torch index_select": Select,
    "cuda.bindings": bindings,
    "cuda.core": cuda_core,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=90)
    args = parser.parse_args()
    if _core.is_emulated() or not torch.cuda.is_available():
        print("rivals are compared on a GPU, with a real CUDA runtime", file=sys.stderr)
        return 1
    METHODS.update(RIVALS)
    cells, methods = preset(False, {"rivals": SECTIONS["sizes"]}), ("auto", *RIVALS, LIMIT)
    result = Bench(cells, methods, runs=9, seconds=args.seconds).run()
    print(text_of(result))
    if args.json:
        write_json(args.json, result)
    return 1 if result["summary"]["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
