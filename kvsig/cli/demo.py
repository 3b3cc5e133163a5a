"""``kvsig demo``: the main job, checked byte by byte.

A KV cache of a real model's shape is filled with random bytes, offloaded from random device
pages to random host pages, clobbered on the device, and loaded to other device pages. Then
every page of both sides is compared: those that had to move, and those that had to stay.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

import kvsig
from kvsig import _core, registry
from kvsig.models import MODELS, Model

from . import version_text, wrap

__all__ = ["register"]

BATCH = "cudaMemcpyBatchAsync"
LAYOUTS = ("page_first_direct", "layer_first")
PATHS = ("auto", "batch", "strided", "loop")
EMULATED_TOKENS = 512
GPU_TOKENS = 16384
GPU_BYTES = 1 << 30
#: Written over the offloaded device pages, and found in host pages before anything moves.
CLOBBER, VACANT = 0x5A, 0xA5
#: At most so many bytes are moved by the single copy that speeds are compared with.
ONE_COPY_BYTES = 1 << 30

T = TypeVar("T")
Stream = Any  # torch.cuda.Stream or kvsig.emulated.Stream


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    models = "\n".join(f"  {model.name:<16}{model.title}" for model in MODELS.values())
    parser = subparsers.add_parser(
        "demo",
        help="the main job: a KV cache to host pages and back, compared bit for bit",
        description=__doc__.split("\n", 2)[2] if __doc__ else None,
        epilog=f"models:\n{models}\n\nThe exit code is 0 only if every byte is right.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", choices=MODELS, default="llama3-8b", help="shape of the cache (llama3-8b)"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        help="tokens in the cache, rounded up to whole pages (default: "
        f"{GPU_TOKENS} or more, for at least 1 GiB, on a GPU; {EMULATED_TOKENS} without)",
    )
    parser.add_argument(
        "--page-size", type=positive, default=16, help="tokens in a page (default: 16)"
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=LAYOUTS[0],
        help=f"layout of the host pool (default: {LAYOUTS[0]})",
    )
    parser.add_argument(
        "--path", choices=PATHS, default="auto", help="path to ask for (default: auto)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of pages and bytes (default: 0)")
    parser.add_argument(
        "--runs", type=positive, default=7, help="timed runs each way, on a GPU (default: 7)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def positive(text: str) -> int:
    """Read an argument that has to be a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the demo on each runtime there is to run it on.

    Returns
    -------
    int
        0 if every byte is right, else 1.
    """
    model = MODELS[args.model]
    specs, preface = runtimes()
    say = (lambda text="": None) if args.json else print
    if preface:
        say(wrap(preface))
        say()
    results = []
    try:
        for spec in specs:
            if spec is not None:
                _core.rebind(spec)
            results.append(run_one(args, model, spec, say))
            say()
    finally:
        if specs != [None]:
            _core.rebind(None)
    exact = all(result["bit_exact"] for result in results)
    if args.json:
        print(json.dumps(provenance(args, model) | {"bit_exact": exact, "runs": results}, indent=2))
    elif exact:
        print("Every byte is right" + (f" on all {len(specs)} ABIs." if len(specs) > 1 else "."))
    else:
        print("Some bytes are WRONG.")
    return 0 if exact else 1


def runtimes() -> tuple[list[str | None], str]:
    """Choose the runtimes to run on; None is the one that kvsig finds.

    Returns
    -------
    specs : list of str or None
        One per run.
    preface : str
        What there is to say about the choice; empty on a GPU.
    """
    if os.environ.get("KVSIG_CUDART"):
        return [None], ""
    if torch.cuda.is_available():
        return [None], ""
    if torch.version.cuda is None:
        why = f"this torch ({torch.__version__}) is built without CUDA"
    else:
        why = "torch.cuda.is_available() is False"
    variants = registry.load().functions[BATCH].variants
    specs: list[str | None] = [f"emulated:{version_text(variant.since)}" for variant in variants]
    return specs, (
        f"There is no GPU to run on: {why}. The emulated CUDA runtime, which works in host "
        f"memory, is used instead, once for each prototype of {BATCH}. "
        "No speed is reported: emulated."
    )


@dataclass
class Cache:
    """A KV cache on both sides, with the pages that will move.

    `device` and `host` hold one list per kind (K and V, or the latent): the layers' tensors on
    the device, and the pool on the host.
    """

    model: Model
    page_size: int
    layout: str
    seed: int
    pages: int
    target: torch.device
    device: list[list[torch.Tensor]] = field(default_factory=list)
    host: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Choose the pages: all at random, sources and destinations disjoint, some spare."""
        spare = max(1, self.pages // 16)
        self.device_count = 2 * self.pages + spare
        self.host_count = self.pages + spare
        rng = np.random.default_rng(self.seed)
        device_order = rng.permutation(self.device_count)
        self.sources: npt.NDArray[np.int64] = device_order[: self.pages]
        self.destinations: npt.NDArray[np.int64] = device_order[self.pages : 2 * self.pages]
        host_order = rng.permutation(self.host_count)
        self.host_pages: npt.NDArray[np.int64] = host_order[: self.pages]
        self.host_spare: npt.NDArray[np.int64] = host_order[self.pages :]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in one tensor of one layer."""
        return self.page_size * self.model.plane_token_bytes

    @property
    def bytes(self) -> int:
        """Bytes that move, each way."""
        return self.pages * self.page_size * self.model.token_bytes

    def check_memory(self) -> None:
        """Refuse a cache that does not fit, before anything is allocated."""
        plane = self.device_count * self.page_bytes
        device = plane * self.model.layers * self.model.tensors + 3 * plane
        pool = self.host_count * self.page_bytes * self.model.layers
        if self.target.type == "cuda":
            # torch rounds pinned blocks up to a power of two.
            host = (1 << (pool - 1).bit_length()) * self.model.tensors
            device += min(self.bytes, ONE_COPY_BYTES)
            free = torch.cuda.mem_get_info(self.target)[0]
            if device > free:
                raise ValueError(
                    f"the cache needs {size(device)} of GPU memory and {size(free)} is free; "
                    f"ask for fewer than --tokens {self.pages * self.page_size}"
                )
        else:
            host = pool * self.model.tensors + device
        free = available_memory()
        if free is not None and host > free:
            raise ValueError(
                f"the cache needs {size(host)} of host memory and {size(free)} is free; "
                f"ask for fewer than --tokens {self.pages * self.page_size}"
            )

    def allocate(self, progress: Progress) -> None:
        """Make the tensors: random bytes on the device, a fixed byte on the host."""
        model, slots = self.model, self.device_count * self.page_size
        pinned = self.target.type == "cuda"
        shape: tuple[int, ...] = (model.layers, self.host_count * self.page_size)
        if self.layout == "page_first_direct":
            shape = (self.host_count, model.layers, self.page_size)
        shape += (model.heads, model.width)
        for _ in progress.through(range(model.tensors), "allocating host memory"):
            pool = torch.empty(shape, dtype=torch.bfloat16, pin_memory=pinned)
            pool.view(torch.uint8).fill_(VACANT)
            self.host.append(pool)
        self.device = [
            [
                torch.empty(
                    (slots, model.heads, model.width), dtype=torch.bfloat16, device=self.target
                )
                for _ in range(model.layers)
            ]
            for _ in range(model.tensors)
        ]
        for number, _, tensor in progress.through(self.planes(), "filling the cache"):
            self.words(tensor).copy_(self.reference(number))

    def planes(self) -> list[tuple[int, str, torch.Tensor]]:
        """List number, name and device tensor of each plane: each layer's K, V or latent."""
        kinds = ("latent",) if self.model.latent else ("K", "V")
        return [
            (kind * self.model.layers + layer, f"layer {layer} {kinds[kind]}", tensor)
            for kind, tensors in enumerate(self.device)
            for layer, tensor in enumerate(tensors)
        ]

    def words(self, tensor: torch.Tensor) -> torch.Tensor:
        """View a plane as 8-byte words, one row per page."""
        return tensor.view(torch.int64).view(-1, self.page_bytes // 8)

    def host_words(self, number: int) -> torch.Tensor:
        """View a plane of the host pool as 8-byte words, one row per page."""
        kind, layer = divmod(number, self.model.layers)
        words = self.host[kind].view(torch.int64)
        if self.layout == "page_first_direct":
            return words.view(self.host_count, self.model.layers, -1)[:, layer]
        return words.view(self.model.layers, self.host_count, -1)[layer]

    def reference(self, number: int) -> torch.Tensor:
        """Make the random bytes of a plane, the same at each call, as :meth:`words` has them."""
        generator = torch.Generator(self.target).manual_seed(self.seed * 1_000_003 + number)
        words = torch.empty(
            (self.device_count, self.page_bytes // 8), dtype=torch.int64, device=self.target
        )
        return words.random_(-(2**63), None, generator=generator)

    def index(self, pages: npt.NDArray[np.int64]) -> torch.Tensor:
        """Put page numbers where the device's tensors are."""
        return torch.from_numpy(pages).to(self.target)

    def clobber(self) -> None:
        """Overwrite the device pages that were offloaded."""
        sources = self.index(self.sources)
        for _, _, tensor in self.planes():
            self.words(tensor).index_fill_(0, sources, repeated(CLOBBER))

    def check_host(self, progress: Progress) -> list[str]:
        """Compare every host page with what an offload must leave there.

        Returns
        -------
        list of str
            What is wrong.
        """
        sources = self.index(self.sources)
        taken, spare = torch.from_numpy(self.host_pages), torch.from_numpy(self.host_spare)
        wrong = []
        for number, name, _ in progress.through(self.planes(), "comparing host pages"):
            expected = self.reference(number)[sources]
            words = self.host_words(number)
            arrived = words.index_select(0, taken).to(self.target)
            for row in differing(arrived, expected):
                wrong.append(
                    f"{name}: host page {self.host_pages[row]} does not hold "
                    f"device page {self.sources[row]}"
                )
            untouched = words.index_select(0, spare)
            for row in differing(untouched, torch.full_like(untouched, repeated(VACANT))):
                wrong.append(f"{name}: host page {self.host_spare[row]} was written")
        return wrong

    def check_device(self, progress: Progress) -> list[str]:
        """Compare every device page with what offload, clobbering and load must leave there.

        Returns
        -------
        list of str
            What is wrong.
        """
        sources, destinations = self.index(self.sources), self.index(self.destinations)
        came_from = dict(zip(self.destinations.tolist(), self.sources.tolist(), strict=True))
        wrong = []
        for number, name, tensor in progress.through(self.planes(), "comparing device pages"):
            expected = self.reference(number)
            moved = expected[sources]
            expected[destinations] = moved
            expected.index_fill_(0, sources, repeated(CLOBBER))
            for page in differing(self.words(tensor), expected):
                if page in came_from:
                    wrong.append(
                        f"{name}: device page {page} does not hold what page {came_from[page]} held"
                    )
                else:
                    wrong.append(f"{name}: device page {page} was written")
        return wrong


def repeated(byte: int) -> int:
    """Repeat a byte over a signed 8-byte word."""
    return int.from_bytes(bytes([byte]) * 8, "little", signed=True)


def differing(actual: torch.Tensor, expected: torch.Tensor) -> list[int]:
    """Rows in which two tensors differ."""
    if torch.equal(actual, expected):
        return []
    rows: list[int] = (actual != expected).any(dim=1).nonzero().flatten().tolist()
    return rows


def run_one(
    args: argparse.Namespace, model: Model, spec: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run the demo on the runtime that kvsig is bound to."""
    info = kvsig.info()
    emulated: bool = info["emulated"]
    if not emulated and not torch.cuda.is_available():
        raise ValueError(
            f"KVSIG_CUDART names a real CUDA runtime ({info['library']}), but torch sees no CUDA "
            "device; run on a machine with a GPU, or set KVSIG_CUDART=emulated:12.9"
        )
    target = torch.device("cpu") if emulated else torch.device("cuda", torch.cuda.current_device())
    tokens = args.tokens or default_tokens(model, emulated)
    pages = math.ceil(tokens / args.page_size)
    cache = Cache(model, args.page_size, args.layout, args.seed, pages, target)
    cache.check_memory()

    batch = next(f for f in info["functions"] if f["name"] == BATCH)
    known = registry.load().functions[BATCH].select(info["runtime_version"])
    parameters = len(known.params) if known else None
    say(f"{model.title}")
    say(
        f"{pages * args.page_size:,} tokens in {pages:,} pages of {args.page_size}, "
        f"host pool {args.layout}: {size(cache.bytes)} each way"
    )
    say(
        f"  runtime   CUDA {version_text(info['runtime_version'])}"
        + (", emulated" if emulated else f", driver {version_text(info['driver_version'])}")
        + ("" if emulated else f", {torch.cuda.get_device_name(target)}")
    )
    say(wrap(f"  library   {info['library']}", " " * 12))
    if batch["status"] == "bound":
        say(f"  function  {BATCH}, prototype of {batch['variant']}, {parameters} parameters")
    else:
        say(wrap(f"  function  {BATCH}: {batch['status']}: {batch['why']}", " " * 12))

    result: dict[str, Any] = {
        "spec": spec or os.environ.get("KVSIG_CUDART"),
        "library": info["library"],
        "found": info["found"],
        "emulated": emulated,
        "runtime_version": info["runtime_version"],
        "driver_version": info["driver_version"],
        "variant": batch["variant"],
        "parameters": parameters,
        "tokens": pages * args.page_size,
        "pages": pages,
        "bytes": cache.bytes,
    }
    with Progress() as progress:
        job = Job(cache, args, emulated, progress)
        result |= job.run()
    for direction in ("offload", "load"):
        say(wrap(f"  {direction:<10}{transfer_text(result, direction)}", " " * 12))
    wrong = result["wrong"]
    if not wrong:
        say(
            wrap(
                f"  checked   {pages:,} pages x {len(cache.planes())} tensors are right on the "
                f"host and back on the device; {len(cache.host_spare)} host and "
                f"{cache.device_count - 2 * pages} device pages that had no part are untouched",
                " " * 12,
            )
        )
    for text in wrong[:10]:
        say(f"  WRONG     {text}")
    if len(wrong) > 10:
        say(f"  WRONG     ... and {len(wrong) - 10:,} more")
    result["wrong_count"] = len(wrong)
    result["wrong"] = wrong[:100]
    result["bit_exact"] = not wrong
    return result


class Job:
    """One offload and load of one cache, timed where there is a GPU."""

    def __init__(
        self, cache: Cache, args: argparse.Namespace, emulated: bool, progress: Progress
    ) -> None:
        self.cache = cache
        self.args = args
        self.emulated = emulated
        self.progress = progress

    def run(self) -> dict[str, Any]:
        """Fill, offload, clobber, load, and compare.

        Returns
        -------
        dict
            ``offload`` and ``load``, each with the report and the timings; ``wrong``, a list
            of texts.
        """
        cache = self.cache
        cache.allocate(self.progress)
        single = cache.model.latent
        paged = kvsig.PagedKVCache(
            device=cache.device[0] if single else tuple(cache.device),
            host=cache.host[0] if single else tuple(cache.host),
            layout=cache.layout,
            page_size=cache.page_size,
        )
        stream = self.make_stream()
        one_copy = {} if self.emulated else self.one_copy(stream)
        options = {"stream": stream, "path": self.args.path}
        offload = self.transfer(
            "offload", stream, lambda: paged.offload(cache.sources, cache.host_pages, **options)
        )
        wrong = cache.check_host(self.progress)
        cache.clobber()
        load = self.transfer(
            "load", stream, lambda: paged.load(cache.host_pages, cache.destinations, **options)
        )
        wrong += cache.check_device(self.progress)
        return {"offload": offload, "load": load, "one_copy": one_copy, "wrong": wrong}

    def make_stream(self) -> Stream:
        """Make a stream of the kind that batch copies can run on: not the default one."""
        if self.emulated:
            from kvsig import emulated

            return emulated.Stream()
        return torch.cuda.Stream(self.cache.target)

    def transfer(self, name: str, stream: Stream, call: Callable[[], Any]) -> dict[str, Any]:
        """Run a transfer, once where it is not timed, and wait for it."""
        if self.emulated:
            report = call()
            stream.synchronize()
            return report_dict(report)
        report, timing = self.time(name, stream, call)
        return report_dict(report) | timing | {"gb_per_s": rate(report.bytes, timing["ms"])}

    def time(
        self, name: str, stream: torch.cuda.Stream, call: Callable[[], T]
    ) -> tuple[T, dict[str, float]]:
        """Call once to warm up, then several times, and take medians.

        Returns
        -------
        result
            Of the last call.
        timing : dict
            ``ms`` from the first to the last work on the stream, and ``host_ms`` until the call
            had returned.
        """
        torch.cuda.synchronize(self.cache.target)
        result = call()
        stream.synchronize()
        elapsed, submitted = [], []
        for _ in self.progress.through(range(self.args.runs), name):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record(stream)
            begin = time.perf_counter()
            result = call()
            submitted.append((time.perf_counter() - begin) * 1e3)
            end.record(stream)
            end.synchronize()
            elapsed.append(start.elapsed_time(end))
        return result, {
            "ms": round(statistics.median(elapsed), 4),
            "host_ms": round(statistics.median(submitted), 4),
        }

    def one_copy(self, stream: torch.cuda.Stream) -> dict[str, Any]:
        """Time one big copy each way, the most that the link can give."""
        pool = self.cache.host[0].view(torch.uint8).view(-1)
        pinned = pool[: min(pool.numel(), ONE_COPY_BYTES)]
        scratch = torch.full_like(pinned, VACANT, device=self.cache.target)
        result: dict[str, Any] = {"bytes": scratch.numel()}
        for direction, destination, source in (
            ("offload", pinned, scratch),
            ("load", scratch, pinned),
        ):

            def call(to: torch.Tensor = destination, of: torch.Tensor = source) -> None:
                with torch.cuda.stream(stream):
                    to.copy_(of, non_blocking=True)

            _, timing = self.time(f"one copy ({direction})", stream, call)
            result[direction] = timing | {"gb_per_s": rate(scratch.numel(), timing["ms"])}
        return result


def report_dict(report: Any) -> dict[str, Any]:
    """Turn a transfer's report into JSON."""
    return {name: getattr(report, name) for name in ("path", "reason", "copies", "calls", "bytes")}


def rate(count: int, ms: float) -> float:
    """Bytes in milliseconds as GB/s."""
    return round(count / ms / 1e6, 2)


def transfer_text(result: dict[str, Any], direction: str) -> str:
    """Write what a transfer did: path, copies, calls, bytes, and speed on a GPU."""
    report = result[direction]
    text = (
        f"{report['path']} path: {report['copies']:,} copies in {report['calls']:,} calls, "
        f"{size(report['bytes'])}"
    )
    if "gb_per_s" in report:
        most = result["one_copy"][direction]["gb_per_s"]
        text += (
            f"; {report['gb_per_s']:.1f} GB/s, {report['gb_per_s'] / most:.0%} of one big copy's "
            f"{most:.1f} GB/s; {report['ms']:.2f} ms, the call returned after "
            f"{report['host_ms']:.2f} ms"
        )
    if report["reason"]:
        text += f"; {report['reason']}"
    return text


def default_tokens(model: Model, emulated: bool) -> int:
    """Choose the tokens where none are asked for."""
    if emulated:
        return EMULATED_TOKENS
    tokens = GPU_TOKENS
    while tokens * model.token_bytes < GPU_BYTES:
        tokens *= 2
    return tokens


def size(count: int) -> str:
    """Write a number of bytes for people."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def available_memory() -> int | None:
    """Bytes of host memory that can be taken without swapping, where Linux tells."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def provenance(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """Say what made a result: machine, versions, commit and arguments."""
    gpu = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if gpu else None,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "model": model.name,
        "page_size": args.page_size,
        "layout": args.layout,
        "path_asked": args.path,
        "seed": args.seed,
    }


def commit() -> str | None:
    """Name the commit that kvsig runs from, with ``-dirty`` behind a changed one, if it does."""
    root = Path(kvsig.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class Progress:
    """Progress on stderr: one line that is rewritten on a terminal, else a line now and then."""

    #: Seconds between two updates, on a terminal and elsewhere.
    INTERVALS = (0.1, 10.0)

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.interval = self.INTERVALS[0 if self.terminal else 1]
        self.last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def through(self, steps: range | list[Any], text: str) -> Iterator[Any]:
        """Iterate over steps and tell how many are done."""
        for done, step in enumerate(steps):
            now = time.monotonic()
            if now - self.last >= self.interval:
                self.last = now
                line = f"{text}: {done} of {len(steps)}"
                if self.terminal:
                    print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
                else:
                    print(f"kvsig demo: {line}", file=sys.stderr, flush=True)
            yield step
