"""What packing and calling cost the host beyond the CUDA calls: they are stubbed here.

    PYTHONPATH=. python benchmarks/overhead.py --json FILE

Runs on the emulated runtime, without a GPU: its functions answer at once, so what is left is
kvsig's own time. Medians, for one plane of random pages, the dearest case for the planner, and for
small calls. Asked of it: at most 15 microseconds per call (10 of one page) and 25 ns per copy;
through integrations 12 microseconds for a load of one page of one layer, 20 of 16 pages, 30 ns for
a descriptor of vLLM's, and 100 ns for counting a call. The exit code is 1 if that is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["KVSIG_CUDART"] = "emulated:13.0"

import numpy as np
import torch

import kvsig
from kvsig import _core, emulated, observe, streams
from kvsig.integrations import sglang
from kvsig.integrations.vllm import _Exchanged
from kvsig.tools.measuring import SCHEMA
from kvsig.tools.report import bytes_text, provenance, table, write_json

KIB = 1 << 10
COPY_NS, CALL_US, PAGE_US = 25, 15, 10
DESCRIPTOR_NS, COUNT_NS = 30, 100
MOVING = ("cudaMemcpyBatchAsync", "cudaMemcpyAsync", "cuLaunchKernelEx")


def median_us(run: Callable[[], Any], times: int = 300) -> float:
    taken = []
    for _ in range(times):
        begin = time.perf_counter_ns()
        run()
        taken.append(time.perf_counter_ns() - begin)
    return statistics.median(taken) / 1e3


def per_copy(stream: emulated.Stream) -> list[dict[str, Any]]:
    """Nanoseconds per copy of large batches."""
    rows = []
    rng = np.random.default_rng(0)
    for width, count in ((4 * KIB, 8192), (32 * KIB, 8192), (128 * KIB, 2048)):
        pages = max(count, (1 << 28) // width)
        device = torch.empty(pages, width, dtype=torch.uint8)
        host = torch.empty(pages, 1, 1, width, dtype=torch.uint8)
        cache = kvsig.PagedKVCache([device], host, page_size=1)
        here, there = (rng.permutation(pages)[:count] for _ in range(2))
        dsts = np.uint64(device.data_ptr()) + here.astype(np.uint64) * np.uint64(width)
        srcs = np.uint64(host.data_ptr()) + there.astype(np.uint64) * np.uint64(width)
        options: dict[str, Any] = {"stream": stream, "path": "batch"}
        runs: dict[str, Callable[[], Any]] = {
            "core": lambda d=dsts, s=srcs, w=width: _core.copy_batch(
                d, s, w, stream.cuda_stream, "batch"
            ),
            "copy_batch": lambda d=dsts, s=srcs, w=width, o=options: kvsig.copy_batch(
                d, s, w, check=False, **o
            ),
            "load": lambda c=cache, x=there, y=here, o=options: c.load(x, y, **o),
        }
        rows += [
            {"copies": count, "page_bytes": width, "call": name,
             "ns_per_copy": round(1e3 * median_us(run) / count, 1)}
            for name, run in runs.items()
        ]  # fmt: skip
    return rows


def per_call(stream: emulated.Stream) -> list[dict[str, Any]]:
    """Microseconds of calls for one layer."""
    rows = []
    rng = np.random.default_rng(0)
    pair = [[torch.empty(512, 4 * KIB, dtype=torch.uint8) for _ in range(4)] for _ in "kv"]
    pools = [torch.empty(512, 4, 1, 4 * KIB, dtype=torch.uint8) for _ in "kv"]
    cache = kvsig.PagedKVCache((pair[0], pair[1]), pools, page_size=1)
    for pages in (1, 16, 256):
        here, there = (rng.permutation(512)[:pages] for _ in range(2))
        for path in ("auto", "batch"):
            options: dict[str, Any] = {"layers": 2, "stream": stream.cuda_stream, "path": path}
            runs: dict[str, Callable[[], Any]] = {
                "load": lambda x=there, y=here, o=options: cache.load(x, y, **o),
                "offload": lambda x=there, y=here, o=options: cache.offload(y, x, **o),
            }
            rows += [
                {"pages": pages, "path": path, "call": name, "us": round(median_us(run), 2)}
                for name, run in runs.items()
            ]
    return rows


def direct_loads(control: emulated.Control) -> list[dict[str, Any]]:
    """Microseconds of SGLang's direct load of one layer, K and V, through the hook."""
    name = "transfer_kv_per_layer_direct_pf_lf"
    hook = dict(sglang._hooks(sglang._KVCACHEIO))[name]
    rows = []
    for way in ("copy engines", "kernel"):
        host = [torch.zeros(512, 8, 16, 128, dtype=torch.int16) for _ in "kv"]
        device = [torch.zeros(512 * 16, 128, dtype=torch.int16) for _ in "kv"]
        for tensor in (*host, *device) if way == "kernel" else ():
            mark = control.mark_host if tensor.ndim == 4 else control.mark_device
            mark(tensor.data_ptr(), tensor.nbytes)
        for pages, limit in ((1, 12), (16, 20)):
            order = torch.randperm(512)[:pages, None] * 16
            numbers = (order + torch.arange(16)).ravel()

            def run(n: torch.Tensor = numbers, h: Any = host, d: Any = device) -> None:
                hook(
                    None, src_ptrs=h, dst_ptrs=d, src_indices=n, dst_indices=n, layer_id=3,
                    page_size=16,
                )  # fmt: skip

            observe.clear()
            run()
            path = "+".join(observe.stats()["paths"])
            control.synchronize()
            # Where memory is registered is asked in each call, and is to be answered as it was.
            for function in MOVING:
                control.stub(function)
            us = round(median_us(run, 1000), 2)
            control.stub(on=False)
            what = f"SGLang, direct load of {pages} pages, host memory for {way}"
            rows.append({"what": what, "path": path, "figure": us, "unit": "µs", "limit": limit})
    return rows


def descriptors(control: emulated.Control) -> list[dict[str, Any]]:
    """Nanoseconds of vLLM's function for each descriptor."""
    rows = []
    rng = np.random.default_rng(0)
    tensor = torch.zeros(1, 8, dtype=torch.int8)
    handler = SimpleNamespace(
        src_tensors=[tensor], dst_tensors=[tensor], gpu_to_cpu=True, _swap_blocks_batch=None
    )
    swap = _Exchanged(sys.exit, handler, "vllm.offload")
    control.stub()
    for count in (2048, 8192):
        order = rng.permutation(count * 4)[:count]
        numbers = {
            "neighbours": np.arange(count),
            "even spacing": np.arange(count) * 2,
            "pairs": np.sort(order).reshape(-1, 2)[rng.permutation(count // 2)].ravel(),
            "scattered": order,
        }
        for kind, pages in numbers.items():
            words = [torch.from_numpy(pages * 4096 + (1 << shift)) for shift in (40, 41)]
            sizes = torch.full((count,), 4096)
            us = median_us(lambda w=words, s=sizes: swap(*w, s))
            rows.append({
                "what": f"vLLM, {count} descriptors, {kind}", "figure": round(1e3 * us / count, 1),
                "unit": "ns each", "limit": DESCRIPTOR_NS,
            })  # fmt: skip
    control.stub(on=False)
    return rows


def counting() -> list[dict[str, Any]]:
    """Nanoseconds of counting a call."""
    report, loops = kvsig.Report(), range(1000)

    def run() -> None:
        for _ in loops:
            observe.record("load", report, 1)

    ns = round(median_us(run), 1)
    return [{"what": "counting a call", "figure": ns, "unit": "ns", "limit": COUNT_NS}]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    control = emulated.Control(str(_core.info()["library"]))
    with emulated.Stream() as stream:
        control.stub()
        copies, calls = per_copy(stream), per_call(stream)
        control.reset()
        streams.current_handle = lambda device: stream.cuda_stream
        engines = [*direct_loads(control), *descriptors(control), *counting()]
        control.reset()
    missed = sum(row["ns_per_copy"] > COPY_NS + 1e3 * CALL_US / row["copies"] for row in copies)
    missed += sum(row["us"] > (PAGE_US if row["pages"] == 1 else CALL_US) for row in calls)
    missed += sum(row["figure"] > row["limit"] for row in engines)
    rows = [["copies", "page", "call", "ns per copy"]]
    rows += [
        [f"{r['copies']:,}", bytes_text(r["page_bytes"]), r["call"], f"{r['ns_per_copy']:.1f}"]
        for r in copies
    ]
    print("\n".join(table(rows)), end="\n\n")
    rows = [["pages", "path", "call", "µs, one layer"]]
    rows += [[f"{r['pages']}", r["path"], r["call"], f"{r['us']:.1f}"] for r in calls]
    print("\n".join(table(rows)), end="\n\n")
    rows = [["engines", "path", "figure", "at most"]]
    rows += [
        [r["what"], r.get("path", ""), f"{r['figure']:.1f} {r['unit']}", f"{r['limit']}"]
        for r in engines
    ]
    print("\n".join(table(rows)), end="\n\n")
    count = len(copies) + len(calls) + len(engines)
    print(f"{missed} of {count} figures are above the limit")
    if args.json:
        write_json(
            args.json,
            {"schema": SCHEMA, "kind": "overhead", "provenance": provenance(), "missed": missed,
             "copies": copies, "calls": calls, "engines": engines},
        )  # fmt: skip
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
