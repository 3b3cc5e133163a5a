"""kvsig's drop-ins beside engines' own functions on one GPU: GB/s, host time, what a GEMM loses.

    PYTHONPATH=. python benchmarks/engines.py --json engines.json
    PYTHONPATH=.:build/sgl python benchmarks/engines.py      # with SGLang's kernels to compare with

SGLang: models by layers and width: A 32 x 1024 bf16 K and V, B 80 x 128 K and V, C 61 x 576 latent;
1, 16 and 64 tokens a page, pages by chance. Offloads of all layers at once; loads layer by layer,
each with its event. ``direct`` is the layout page_first_direct with page numbers on the CPU,
``kernel`` the layout page_first with token numbers on the GPU. "sglang" rows need ``sgl_kernel``: a
folder with its ``kvcacheio.py``, and an ``__init__.py`` that gives its ``common_ops`` library to
``torch.ops.load_library``, is enough.

vLLM: model V, 32 layers in a shared region, blocks of 4 to 32 KiB, scattered or in runs of 16.
"one batch" is the list as vLLM's function gives it to CUDA.

"kvsig, engines" is kvsig with KVSIG_SMS=0. The ways of a row take turns, since CPUs change their
speed; bytes of each are compared first. A row that takes longer than the products beside it says so
by a rate beside them that is near its idle one.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from kvsig import _core, observe
from kvsig.integrations import sglang as integration
from kvsig.integrations.sglang import direct, layered
from kvsig.integrations.vllm import _Exchanged
from kvsig.tools.measuring import SCHEMA
from kvsig.tools.report import provenance, write_json

DEVICE = "cuda"
POOL, MOVED = 1 << 30, 128 << 20
MODELS = {"A": (32, 1024, 2), "B": (80, 128, 2), "C": (61, 576, 1)}
PAGES = (1, 16, 64)
BLOCKS, RUNS, LAYERS = (4, 8, 16, 32), (1, 16), 32
TURNS, GEMMS = 7, 24


class Way(NamedTuple):
    """One way to make a transfer."""

    name: str
    run: Callable[[], None]
    same: Callable[[], bool]


class Row(NamedTuple):
    """What one way came to; `path` and `calls` are kvsig's."""

    model: str
    page: str
    direction: str
    backend: str
    who: str
    gigabytes_per_second: float
    host_ms: float
    beside_gigabytes_per_second: float
    gemm_slowdown: float
    path: str
    calls: int


# --- SGLang -----------------------------------------------------------------------------------


class Pools:
    """Layers on the GPU, and one page-locked buffer that is seen in either layout."""

    def __init__(self, model: str, host: torch.Tensor) -> None:
        self.layers, self.width, self.kinds = MODELS[model]
        self.item = 2 * self.width
        self.tokens = POOL // (self.layers * self.kinds * self.item) // 64 * 64
        count = self.layers * self.kinds
        self.device = [
            torch.randint(-99, 99, (self.tokens, self.width), dtype=torch.int16, device=DEVICE)
            for _ in range(count)
        ]
        size = self.tokens * self.layers * self.width
        self.flat = [host[k * size : (k + 1) * size] for k in range(self.kinds)]
        self.tables = [
            torch.tensor([t.data_ptr() for t in group], dtype=torch.uint64, device=DEVICE)
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
        return importlib.import_module(integration._KVCACHEIO)
    except Exception as error:
        print(f"without SGLang's functions: {error}", file=sys.stderr)
        return None


def ours(name: str) -> Callable[..., None]:
    """Return kvsig's function of a name, as an engine calls it; what it leaves alone ends this."""
    hook = dict(integration._hooks(integration._KVCACHEIO))[name]

    def left(*args: Any, **kwargs: Any) -> None:
        sys.exit(f"{name}: {observe.stats()['passed_on']} {observe.stats()['fallbacks']}")

    return lambda **arguments: hook(left, **arguments)


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


def runner(
    pools: Pools,
    direction: str,
    calls: list[tuple[str, dict]],
    get: Callable[[str], Any],
    own: bool,
) -> Callable[[], None]:
    """Return what makes one transfer by the functions that `get` gives."""
    made = [(get(name), arguments) for name, arguments in calls]
    if direction == "offload":
        ((called, given),) = made
        return lambda: called(**given)
    events = [torch.cuda.Event() for _ in calls]

    def layers(*, layer_num: int, on_layer_done: Callable[[int], None]) -> None:
        for layer in range(layer_num):
            called, arguments = made[layer]
            called(**arguments)
            on_layer_done(layer)

    submit = layered.submit if own else lambda function, **rest: function(**rest)
    return lambda: submit(
        layers, layer_num=pools.layers, on_layer_done=lambda i: events[i].record()
    )


def sglang_ways(
    pools: Pools, direction: str, backend: str, page: int, theirs: Any
) -> tuple[list[Way], int]:
    """Return the ways of a row of SGLang's, and the bytes of a transfer."""
    near, far = pools.numbers(page, 1), pools.numbers(page, 2)
    count = len(near) * pools.item * pools.layers * pools.kinds
    a, b = (near.to(DEVICE), far.to(DEVICE)) if backend == "kernel" else (near, far)
    if direction == "offload":
        calls = [offload(pools, backend, page, a, b)]
    else:
        calls = [load(pools, backend, page, layer, a, b) for layer in range(pools.layers)]

    def same() -> bool:
        for i in (0, len(pools.device) - 1):
            kind, layer = divmod(i, pools.layers)
            if backend == "kernel":
                rows = pools.by_token()[kind][:, layer][far]
            else:
                rows = pools.by_page(page)[kind][:, layer][far[::page] // page].flatten(0, 1)
            if not torch.equal(rows, pools.device[i][near.to(DEVICE)].cpu()):
                return False
        return True

    own = runner(pools, direction, calls, ours, True)
    ways = [Way("kvsig", own, same)]
    if backend == "direct":
        ways.append(Way("kvsig, engines", with_engines(own), same))
    if theirs:
        get = partial(getattr, theirs)
        ways.append(Way("sglang", runner(pools, direction, calls, get, False), same))
    return ways, count


def with_engines(run: Callable[[], None]) -> Callable[[], None]:
    """Return the same by copy engines alone, as KVSIG_SMS=0 has it from the start of a process."""

    def other() -> None:
        chosen, direct._request = direct._request, lambda *_: None
        try:
            run()
        finally:
            direct._request = chosen

    return other


# --- vLLM -------------------------------------------------------------------------------------


def vllm_ways(direction: str, kib: int, run: int, host: torch.Tensor) -> tuple[list[Way], int]:
    """Return the ways of a row of vLLM's, and the bytes of a transfer."""
    page = kib << 10
    blocks = POOL // LAYERS // page
    gpu = [
        torch.randint(-99, 99, (blocks, page), dtype=torch.int8, device=DEVICE)
        for _ in range(LAYERS)
    ]
    region = host.view(torch.int8)[: blocks * LAYERS * page].view(blocks, LAYERS * page)
    cpu = [region[:, i * page : (i + 1) * page] for i in range(LAYERS)]
    count = MOVED // LAYERS // page // run
    columns = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randperm(blocks // run, generator=generator)[:count] * run
        columns.append((first[:, None] + torch.arange(run)).ravel())
    near, far = columns
    on_gpu = torch.cat([t.data_ptr() + near * t.stride(0) for t in gpu])
    on_host = torch.cat([t.data_ptr() + far * t.stride(0) for t in cpu])
    src, dst = (on_gpu, on_host) if direction == "offload" else (on_host, on_gpu)
    sizes = torch.full_like(src, page)

    def same() -> bool:
        chosen = near.to(DEVICE)
        return all(torch.equal(gpu[i][chosen].cpu(), cpu[i][far]) for i in (0, LAYERS - 1))

    def left(*args: Any, **kwargs: Any) -> None:
        sys.exit(f"vLLM: {observe.stats()['passed_on']} {observe.stats()['fallbacks']}")

    def handler() -> SimpleNamespace:
        sides = (gpu, cpu) if direction == "offload" else (cpu, gpu)
        return SimpleNamespace(
            src_tensors=sides[0], dst_tensors=sides[1], gpu_to_cpu=direction == "offload"
        )

    swap = _Exchanged(left, handler(), f"vllm.{direction}")
    with variable("KVSIG_SMS", "0"):
        engines = _Exchanged(left, handler(), f"vllm.{direction}")
    words = [t.numpy().view("u8") for t in (dst, src, sizes)]

    def one_batch() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        _core.copy_batch(*words, stream, "batch", len(words[0]))

    return [
        Way("kvsig", lambda: swap(src, dst, sizes), same),
        Way("kvsig, engines", lambda: engines(src, dst, sizes), same),
        Way("one batch", one_batch, same),
    ], len(src) * page


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    yield
    if before is None:
        del os.environ[name]
    else:
        os.environ[name] = before


# --- Measuring --------------------------------------------------------------------------------


def once(run: Callable[[], None], stream: torch.cuda.Stream) -> tuple[float, float]:
    """Return seconds in all and of the host."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream.synchronize()
    start.record(stream)
    began = time.perf_counter()
    run()
    host = time.perf_counter() - began
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1e3, host


class Gemm:
    """A queue of products on a stream of its own."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.a)
        self.seconds()

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
        alone = self.seconds()
        torch.cuda.synchronize()
        start, end = self.queue()
        began, done = time.perf_counter(), 0
        while done == 0 or (not end.query() and time.perf_counter() - began < 2):
            run()
            stream.synchronize()
            done += 1
        seconds = time.perf_counter() - began
        end.synchronize()
        return done / seconds, start.elapsed_time(end) / 1e3 / alone


def way_taken(run: Callable[[], None]) -> tuple[str, int]:
    """Return kvsig's paths and CUDA's calls of a transfer, where kvsig makes it."""
    observe.clear()
    run()
    paths = observe.stats()["paths"]
    return "+".join(sorted(paths)), int(sum(sums["cuda_calls"] for sums in paths.values()))


def measured(
    label: tuple[str, str, str, str], ways: list[Way], count: int, host: torch.Tensor, gemm: Gemm
) -> list[Row]:
    """Compare the bytes of each way, and time them by turns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())
    times: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    taken, rows = {}, []
    with torch.cuda.stream(stream):
        for way in ways:
            host.zero_() if label[2] == "offload" else host.add_(1)
            taken[way.name] = way_taken(way.run)
            torch.cuda.synchronize()
            if not way.same():
                sys.exit(f"{' '.join(label)} {way.name}: wrong bytes")
        for _ in range(TURNS):
            for way in ways:
                times[way.name].append(once(way.run, stream))
        for way in ways:
            total, own = (
                statistics.median(column) for column in zip(*times[way.name], strict=True)
            )
            rate, slower = gemm.beside(way.run, stream)
            rows.append(Row(
                *label, way.name, round(count / total / 1e9, 1), round(own * 1e3, 3),
                round(rate * count / 1e9, 1), round(slower, 2), *taken[way.name],
            ))  # fmt: skip
            print(*rows[-1], sep="\t", flush=True)
    return rows


def measure(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    gemm, theirs = Gemm(), sglang()
    host = torch.zeros(POOL // 2, dtype=torch.int16, pin_memory=DEVICE == "cuda")
    end = time.monotonic() + args.seconds
    for model in args.models:
        pools = Pools(model, host) if model in MODELS else None
        for page, direction in ((p, d) for p in args.pages for d in ("offload", "load")):
            for backend in ("direct", "kernel") if pools else ():
                if time.monotonic() < end:
                    ways, count = sglang_ways(pools, direction, backend, page, theirs)
                    label = model, str(page), direction, backend
                    rows += measured(label, ways, count, host, gemm)
        del pools
        for kib, run in ((k, r) for k in BLOCKS for r in RUNS) if model == "V" else ():
            for direction in ("offload", "load"):
                if time.monotonic() < end:
                    ways, count = vllm_ways(direction, kib, run, host)
                    rows += measured(
                        ("V", f"{kib} KiB x {run}", direction, "vllm"), ways, count, host, gemm
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "V"], default=[*MODELS, "V"])
    parser.add_argument("--pages", nargs="+", type=int, default=list(PAGES))
    parser.add_argument("--seconds", type=float, default=300, help="no row begins after that")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(*Row._fields, sep="\t")
    rows = measure(args)
    if args.json:
        write_json(
            args.json,
            {"schema": SCHEMA, "kind": "engines", "provenance": provenance(),
             "rows": [row._asdict() for row in rows]},
        )  # fmt: skip


if __name__ == "__main__":
    main()
