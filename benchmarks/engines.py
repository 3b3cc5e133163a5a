"""kvsig's drop-ins beside SGLang's functions on one GPU: GB/s, host time, and what a GEMM loses.

    python benchmarks/engines.py --out engines.json
    PYTHONPATH=build/sgl python benchmarks/engines.py      # with SGLang's kernels to compare with

Models by layers and width: A 32 x 1024 bf16 K and V, B 80 x 128 K and V, C 61 x 576 latent; 1, 16
and 64 tokens a page, pages by chance. Offloads of all layers at once; loads layer by layer, each
with its event. ``direct`` is the layout page_first_direct with page numbers on the CPU, ``kernel``
the layout page_first with token numbers on the GPU. "sglang" rows need ``sgl_kernel``: a folder
with its ``kvcacheio.py``, and an ``__init__.py`` that gives its ``common_ops`` library to
``torch.ops.load_library``, is enough. Bytes of each row are compared once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvsig.integrations.sglang import direct, kernel, launches, layered

POOL, MOVED = 1 << 30, 128 << 20
MODELS = {"A": (32, 1024, 2), "B": (80, 128, 2), "C": (61, 576, 1)}
PAGES = (1, 16, 64)
REPEATS, GEMMS = 5, 24


class Row(NamedTuple):
    """One measured function."""

    model: str
    page: int
    direction: str
    backend: str
    who: str
    gigabytes_per_second: float
    host_ms: float
    beside_gigabytes_per_second: float
    gemm_slowdown: float


class Pools:
    """Layers on the GPU, and one page-locked buffer that is seen in either layout."""

    def __init__(self, model: str, host: torch.Tensor) -> None:
        self.layers, self.width, self.kinds = MODELS[model]
        self.item = 2 * self.width
        self.tokens = POOL // (self.layers * self.kinds * self.item) // 64 * 64
        count = self.layers * self.kinds
        self.device = [
            torch.randint(-99, 99, (self.tokens, self.width), dtype=torch.int16, device="cuda")
            for _ in range(count)
        ]
        size = self.tokens * self.layers * self.width
        self.flat = [host[k * size : (k + 1) * size] for k in range(self.kinds)]
        self.tables = [
            torch.tensor([t.data_ptr() for t in group], dtype=torch.uint64, device="cuda")
            for group in (self.device[: self.layers], self.device[self.layers :])
            if group
        ]

    def by_token(self) -> list[torch.Tensor]:
        return [flat.view(self.tokens, self.layers, self.width) for flat in self.flat]

    def by_page(self, page: int) -> list[torch.Tensor]:
        return [flat.view(-1, self.layers, page, self.width) for flat in self.flat]

    def numbers(self, page: int, seed: int) -> torch.Tensor:
        count = min(MOVED // (self.layers * self.kinds * self.item * page), self.tokens // page)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.tokens // page, generator=generator)[:count]
        return (order[:, None] * page + torch.arange(page)).ravel()


def sglang() -> Any:
    """Return SGLang's module of copy functions, or None."""
    try:
        return importlib.import_module("sgl_kernel.kvcacheio")
    except Exception as error:
        print(f"without SGLang's functions: {error}", file=sys.stderr)
        return None


def ours(name: str) -> Callable[..., None]:
    """Return kvsig's function of a name; what it leaves alone is an error here."""

    def call(**arguments: Any) -> None:
        if name in direct.__all__:
            answer = getattr(direct, name)(**arguments)
        else:
            request = kernel.AHEAD_OF_TIME[name](**arguments)
            load = layered.current()
            if load is not None and load.takes(request, lambda: sys.exit(f"{name}: not served")):
                return
            answer = launches.serve(request)
        if isinstance(answer, str):
            sys.exit(f"{name}: {answer}")

    return call


def offload(pools: Pools, backend: str, page: int, near: Any, far: Any) -> tuple[str, dict]:
    if backend == "direct":
        return "transfer_kv_all_layer_direct_lf_pf", {
            "src_ptrs": pools.device, "dst_ptrs": pools.by_page(page), "src_indices": near,
            "dst_indices": far, "page_size": page,
        }  # fmt: skip
    more = {
        "src_indices": near, "dst_indices": far, "item_size": pools.item,
        "dst_layout_dim": pools.layers * pools.item, "num_layers": pools.layers,
    }  # fmt: skip
    host = pools.by_token()
    if pools.kinds == 1:
        sides = {"src_layers": pools.tables[0], "dst": host[0]}
        return "transfer_kv_all_layer_mla_lf_pf", sides | more
    sides = {
        "src_k_layers": pools.tables[0], "dst_k": host[0], "src_v_layers": pools.tables[1],
        "dst_v": host[1],
    }  # fmt: skip
    return "transfer_kv_all_layer_lf_pf", sides | more


def load(
    pools: Pools, backend: str, page: int, layer: int, near: Any, far: Any
) -> tuple[str, dict]:
    device = pools.device[layer :: pools.layers]
    if backend == "direct":
        return "transfer_kv_per_layer_direct_pf_lf", {
            "src_ptrs": pools.by_page(page), "dst_ptrs": device, "src_indices": far,
            "dst_indices": near, "layer_id": layer, "page_size": page,
        }  # fmt: skip
    host = pools.by_token()
    more = {
        "src_indices": far, "dst_indices": near, "layer_id": layer, "item_size": pools.item,
        "src_layout_dim": pools.layers * pools.item,
    }  # fmt: skip
    if pools.kinds == 1:
        return "transfer_kv_per_layer_mla_pf_lf", {"src": host[0], "dst": device[0], **more}
    sides = {"src_k": host[0], "dst_k": device[0], "src_v": host[1], "dst_v": device[1]}
    return "transfer_kv_per_layer_pf_lf", sides | more


def job(
    pools: Pools, direction: str, backend: str, page: int, function: Callable[[str], Any], own: bool
) -> tuple[Callable[[], None], Callable[[], bool], int]:
    """Return what makes one transfer, what compares its bytes, and how many those are."""
    near, far = pools.numbers(page, 1), pools.numbers(page, 2)
    count = len(near) * pools.item * pools.layers * pools.kinds
    a, b = (near.cuda(), far.cuda()) if backend == "kernel" else (near, far)

    def same() -> bool:
        for i in (0, len(pools.device) - 1):
            kind, layer = divmod(i, pools.layers)
            if backend == "kernel":
                rows = pools.by_token()[kind][:, layer][far]
            else:
                rows = pools.by_page(page)[kind][:, layer][far[::page] // page].flatten(0, 1)
            if not torch.equal(rows, pools.device[i][near.cuda()].cpu()):
                return False
        return True

    if direction == "offload":
        name, arguments = offload(pools, backend, page, a, b)
        called = function(name)
        return lambda: called(**arguments), same, count
    calls = [load(pools, backend, page, layer, a, b) for layer in range(pools.layers)]
    made = [(function(name), arguments) for name, arguments in calls]
    events = [torch.cuda.Event() for _ in calls]

    def layers(*, layer_num: int, on_layer_done: Callable[[int], None]) -> None:
        for layer in range(layer_num):
            called, arguments = made[layer]
            called(**arguments)
            on_layer_done(layer)

    def run() -> None:
        submit = layered.submit if own and backend == "kernel" else lambda f, **rest: f(**rest)
        submit(layers, layer_num=pools.layers, on_layer_done=lambda i: events[i].record())

    return run, same, count


def idle(run: Callable[[], None], stream: torch.cuda.Stream) -> tuple[float, float]:
    """Return the medians of seconds in all and of the host."""
    totals, hosts = [], []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream.synchronize()
        start.record(stream)
        began = time.perf_counter()
        run()
        hosts.append(time.perf_counter() - began)
        end.record(stream)
        end.synchronize()
        totals.append(start.elapsed_time(end) / 1e3)
    return statistics.median(totals), statistics.median(hosts)


class Gemm:
    """A queue of products on a stream of its own."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.a)
        self.alone = min(self.seconds() for _ in range(3))

    def queue(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            start.record()
            for _ in range(GEMMS):
                torch.mm(self.a, self.a, out=self.out)
            end.record()
        return start, end

    def seconds(self) -> float:
        start, end = self.queue()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def beside(self, run: Callable[[], None], stream: torch.cuda.Stream) -> tuple[float, float]:
        """Return transfers a second while products run, and how much longer those take."""
        torch.cuda.synchronize()
        start, end = self.queue()
        began, done = time.perf_counter(), 0
        while not end.query() and time.perf_counter() - began < 2:
            run()
            stream.synchronize()
            done += not end.query()
        seconds = time.perf_counter() - began
        end.synchronize()
        return done / seconds, start.elapsed_time(end) / 1e3 / self.alone


def measure(args: argparse.Namespace) -> list[Row]:
    rows, stream, gemm, theirs = [], torch.cuda.Stream(), Gemm(), sglang()
    host = torch.zeros(POOL // 2, dtype=torch.int16, pin_memory=True)
    for model in args.models:
        pools = Pools(model, host)
        for page in args.pages:
            for direction in ("offload", "load"):
                for backend in ("direct", "kernel"):
                    for who in ("kvsig", "sglang") if theirs else ("kvsig",):
                        get = ours if who == "kvsig" else lambda name: getattr(theirs, name)
                        stream.wait_stream(torch.cuda.default_stream())
                        with torch.cuda.stream(stream):
                            run, same, count = job(
                                pools, direction, backend, page, get, who == "kvsig"
                            )
                            host.zero_() if direction == "offload" else host.add_(1)
                            run()
                            torch.cuda.synchronize()
                            if not same():
                                sys.exit(f"{model}{page} {direction} {backend} {who}: wrong bytes")
                            total, own = idle(run, stream)
                            rate, slower = gemm.beside(run, stream)
                        row = Row(
                            model, page, direction, backend, who, round(count / total / 1e9, 1),
                            round(own * 1e3, 3), round(rate * count / 1e9, 1), round(slower, 2),
                        )  # fmt: skip
                        print(*row, sep="\t", flush=True)
                        rows.append(row)
        del pools
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pages", nargs="+", type=int, default=list(PAGES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(*Row._fields, sep="\t")
    rows = measure(args)
    if args.out:
        found = {"gpu": torch.cuda.get_device_name(), "rows": [row._asdict() for row in rows]}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
