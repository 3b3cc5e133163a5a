"""What packing and calling cost the host beyond the CUDA calls: they are stubbed here.

    PYTHONPATH=. python benchmarks/overhead.py --json FILE

Runs on the emulated runtime, without a GPU: its functions answer at once, so what is left is
kvsig's own time. Medians, for one plane of random pages, the dearest case for the planner, and for
small calls. Asked of it: at most 15 microseconds per call (10 of one page) and 25 ns per copy. The
exit code is 1 if that is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KVSIG_CUDART"] = "emulated:13.0"

import numpy as np
import torch

import kvsig
from kvsig import _core, emulated
from kvsig.tools.measuring import SCHEMA
from kvsig.tools.report import bytes_text, provenance, table, write_json

KIB = 1 << 10
COPY_NS, CALL_US, PAGE_US = 25, 15, 10


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    control = emulated.Control(str(_core.info()["library"]))
    with emulated.Stream() as stream:
        control.stub()
        copies, calls = per_copy(stream), per_call(stream)
        control.reset()
    missed = sum(row["ns_per_copy"] > COPY_NS + 1e3 * CALL_US / row["copies"] for row in copies)
    missed += sum(row["us"] > (PAGE_US if row["pages"] == 1 else CALL_US) for row in calls)
    rows = [["copies", "page", "call", "ns per copy"]]
    rows += [
        [f"{r['copies']:,}", bytes_text(r["page_bytes"]), r["call"], f"{r['ns_per_copy']:.1f}"]
        for r in copies
    ]
    print("\n".join(table(rows)), end="\n\n")
    rows = [["pages", "path", "call", "µs, one layer"]]
    rows += [[f"{r['pages']}", r["path"], r["call"], f"{r['us']:.1f}"] for r in calls]
    print("\n".join(table(rows)), end="\n\n")
    print(f"{missed} of {len(copies) + len(calls)} figures are above the limit")
    if args.json:
        write_json(
            args.json,
            {"schema": SCHEMA, "kind": "overhead", "provenance": provenance(), "missed": missed,
             "copies": copies, "calls": calls},
        )  # fmt: skip
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
