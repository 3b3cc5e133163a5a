"""Ways to issue page copies, tried at the level of C: what could the planner still gain?

Layer by layer, random pages, K and V of one layer of a page-first host pool: how fast are
batches of other sizes, in other orders, on several streams, from several threads, with other
attributes, two-row copies of K and V together, loops over streams, and mixtures? And for all
layers of a page in one call: two- and three-dimensional copies. Everything runs through
c_baseline.c on raw pointers, so that no cost of Python is in the figures; each way is checked
byte by byte once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baseline import FLAG_OVERLAP, ORDER_ANY, Baseline
from common import Clock, Report, Run, in_turn, row_of, say

import kvsig
from kvsig import bench

KIB, MIB = 1 << 10, 1 << 20
SPAN = 1 << 30
LAYERS = 32
WAYS = ("load", "offload")
Ways = dict[str, tuple[Run, int]]


def u64(values: Any) -> Any:
    return np.ascontiguousarray(values, dtype=np.uint64)


class Pools:
    """Device layers evenly spaced, page-first host pool, both of (K and V, ...)."""

    def __init__(self, clock: Clock, seed: int) -> None:
        self.clock = clock
        self.near = torch.empty(SPAN // 8, dtype=torch.int64, device=clock.device)
        self.near.random_(-(2**63), None)
        self.far = torch.empty(SPAN // 8, dtype=torch.int64, pin_memory=True)
        self.far.copy_(self.near)
        self.scratch = torch.empty_like(self.near)
        torch.cuda.synchronize()
        self.rng = np.random.default_rng(seed)

    def addresses(self, width: int, pages: int) -> tuple[Any, Any]:
        """Addresses (kinds, layers, pages) of as many random pages, device and host."""
        pool = SPAN // (2 * LAYERS * width)
        kind = np.arange(2)[:, None, None]
        layer = np.arange(LAYERS)[None, :, None]
        near = self.rng.permutation(pool)[:pages]
        far = self.rng.permutation(pool)[:pages]
        here = self.near.data_ptr() + ((kind * LAYERS + layer) * pool + near) * width
        there = self.far.data_ptr() + ((kind * pool + far) * LAYERS + layer) * width
        return here, there


def check(pools: Pools, way: str, run: Callable[[], Any], dsts: Any, srcs: Any, width: int) -> bool:
    """Whether one run moves the bytes of every copy; compared on the GPU, which is faster."""
    near, far, words = pools.near, pools.far, width // 8
    whole = near.numel() // words * words  # 24 KiB does not divide the buffers
    to, of = (near, far) if way == "load" else (far, near)
    into = torch.from_numpy(((dsts - to.data_ptr()) // width).astype(np.int64)).to(near.device)
    out = torch.from_numpy(((srcs - of.data_ptr()) // width).astype(np.int64)).to(near.device)
    if way == "load":
        near[:whole].view(-1, words).index_fill_(0, into, 0x5A5A)
    else:
        near.add_(0x0123456789ABCDEF)  # what an earlier run has left on the host is wrong now
    torch.cuda.synchronize()
    run()
    torch.cuda.synchronize()
    pools.scratch.copy_(far)
    here, there = (x[:whole].view(-1, words) for x in (near, pools.scratch))
    if way == "load":
        return bool(torch.equal(here[into], there[out]))
    return bool(torch.equal(there[into], here[out]))


def one_layer(pools: Pools, c: Baseline, way: str, width: int, pages: int) -> tuple[Any, Any, Ways]:
    """Ways to move random pages of single layers, K and V: the copies, and how to make them.

    Layers follow each other, so that there are enough copies to time; each call has pages of
    one layer only, as a load layer by layer has.
    """
    h = pools.clock.handles
    here, there = pools.addresses(width, pages)
    # (layers, kinds, pages): the order in which a caller goes through them.
    here, there = (x.transpose(1, 0, 2) for x in (here, there))
    to, of = (here, there) if way == "load" else (there, here)
    count = to.size
    dsts, srcs, sizes = u64(to.ravel()), u64(of.ravel()), np.full(count, width, np.uint64)
    ways: Ways = {}

    def per_layer(d: Any, s: Any, **options: Any) -> Run:
        """Batches that do not cross from one layer to the next."""
        step = count // LAYERS

        def run() -> int:
            return sum(
                c.batch(d[i : i + step], s[i : i + step], sizes[i : i + step], h[:1], **options)
                for i in range(0, count, step)
            )

        return run

    for size in (16, 32, 64, 128, 256, 512):
        ways[f"batch of {size}"] = (
            lambda n=size: c.batch(dsts, srcs, sizes, h[:1], n),
            0,
        )
    ways["batch, a call per layer"] = (per_layer(dsts, srcs, per_call=65536), 0)
    ways["batch, 128, within a layer"] = (per_layer(dsts, srcs, per_call=128), 0)
    for size in (64, 128, 256):
        for streams in (2, 3):
            ways[f"batch of {size}, {streams} streams in turn"] = (
                lambda n=size, k=streams: c.batch(dsts, srcs, sizes, h[:k], n),
                streams - 1,
            )
    for size in (64, 256):
        for threads in (2, 4):
            ways[f"batch of {size}, {threads} threads"] = (
                lambda n=size, k=threads: c.threads(dsts, srcs, sizes, h[:k], n),
                threads - 1,
            )
    ways["batch of 256, PreferOverlapWithCompute"] = (
        lambda: c.batch(dsts, srcs, sizes, h[:1], 256, flags=FLAG_OVERLAP),
        0,
    )
    if way == "load":
        for size in (64, 256):
            ways[f"batch of {size}, source order Any"] = (
                lambda n=size: c.batch(dsts, srcs, sizes, h[:1], n, order=ORDER_ANY),
                0,
            )
    for name, key in (("destination", to), ("source", of)):
        order = np.argsort(key.reshape(LAYERS, -1), axis=1)
        d, s = (u64(np.take_along_axis(x.reshape(LAYERS, -1), order, 1).ravel()) for x in (to, of))
        for size in (128, 256):
            ways[f"batch of {size}, by {name}"] = (
                lambda d=d, s=s, n=size: c.batch(d, s, sizes, h[:1], n),
                0,
            )
    # K of a page, then V of it, not all of K first.
    d, s = (u64(x.transpose(0, 2, 1).ravel()) for x in (to, of))
    ways["batch of 256, K and V in turn"] = (lambda d=d, s=s: c.batch(d, s, sizes, h[:1], 256), 0)

    # K and V of a page as two rows of one copy.
    first = LAYERS * pages
    two = np.empty((first, 6), np.uint64)
    two[:, 0], two[:, 2] = u64(to[:, 0].ravel()), u64(of[:, 0].ravel())
    two[:, 1], two[:, 3] = int(to[0, 1, 0] - to[0, 0, 0]), int(of[0, 1, 0] - of[0, 0, 0])
    two[:, 4], two[:, 5] = width, 2
    for streams in (1, 2, 4):
        ways[f"2-D, K and V, {streams} streams"] = (
            lambda k=streams: c.strided(two, h[:k]),
            streams - 1,
        )
    for streams in (1, 2, 4):
        ways[f"loop, {streams} streams"] = (
            lambda k=streams: c.loop(dsts, srcs, sizes, h[:k]),
            streams - 1,
        )
    for threads in (2, 4):
        ways[f"loop, {threads} threads"] = (
            lambda k=threads: c.threads(dsts, srcs, sizes, h[:k], loop=True),
            threads - 1,
        )

    # A share of the pages by 2-D copies of K and V, between the batches of the others.
    for share in (4, 2):
        picked = np.zeros(first, bool)
        picked[::share] = True
        ops = np.ascontiguousarray(two[picked])
        rest = ~picked.reshape(LAYERS, pages)
        keep = np.broadcast_to(rest[:, None, :], to.shape)
        d, s = u64(to[keep]), u64(of[keep])
        for size in (32, 64, 128):
            # As many between two batches as keep both running out at the same time.
            between = max(1, round(len(ops) / max(1, len(d) / size)))
            for streams in (1, 2):
                ways[f"1/{share} of pages 2-D, batch of {size}, {streams} streams"] = (
                    lambda d=d, s=s, o=ops, n=size, b=between, k=streams: c.mixed(
                        d, s, sizes, o, h[:k], n, b
                    ),
                    streams - 1,
                )
    return dsts, srcs, ways


def all_layers(
    pools: Pools, c: Baseline, way: str, width: int, pages: int
) -> tuple[Any, Any, Ways]:
    """Ways to move all layers of random pages in one call."""
    h = pools.clock.handles
    here, there = pools.addresses(width, pages)
    # (pages, kinds, layers)
    here, there = (x.transpose(2, 0, 1) for x in (here, there))
    to, of = (here, there) if way == "load" else (there, here)
    count = to.size
    dsts, srcs, sizes = u64(to.ravel()), u64(of.ravel()), np.full(count, width, np.uint64)
    pitch = [int(x[0, 0, 1] - x[0, 0, 0]) for x in (to, of)]
    kinds = [int(x[0, 1, 0] - x[0, 0, 0]) for x in (to, of)]
    ways: Ways = {}

    ops = np.empty((pages * 2, 6), np.uint64)
    ops[:, 0], ops[:, 2] = u64(to[:, :, 0].ravel()), u64(of[:, :, 0].ravel())
    ops[:, 1], ops[:, 3] = pitch
    ops[:, 4], ops[:, 5] = width, LAYERS
    for streams in (1, 2):
        ways[f"2-D, layers, {streams} streams"] = (
            lambda k=streams: c.strided(ops, h[:k]),
            streams - 1,
        )
    by_plane = np.ascontiguousarray(ops.reshape(pages, 2, 6).transpose(1, 0, 2)).reshape(-1, 6)
    ways["2-D, layers, all of K first"] = (lambda: c.strided(by_plane, h[:1]), 0)
    for name, column in (("destination", 0), ("source", 2)):
        # Sorted by the side that a TLB or DRAM page might care about.
        sorted_ops = np.ascontiguousarray(by_plane[np.argsort(by_plane[:, column])])
        ways[f"2-D, layers, by {name}"] = (lambda o=sorted_ops: c.strided(o, h[:1]), 0)
    for rows in (8, 16):
        parts = LAYERS // rows
        cut = np.repeat(ops, parts, axis=0)
        step = (np.tile(np.arange(parts), len(ops)) * rows).astype(np.uint64)
        cut[:, 0] += step * cut[:, 1]
        cut[:, 2] += step * cut[:, 3]
        cut[:, 5] = rows
        ways[f"2-D, {rows} layers each"] = (lambda o=cut: c.strided(o, h[:1]), 0)

    three = np.empty((pages, 9), np.uint64)
    three[:, 0], three[:, 3] = u64(to[:, 0, 0]), u64(of[:, 0, 0])
    (three[:, 1], three[:, 4]) = pitch
    (three[:, 2], three[:, 5]) = (kinds[i] // pitch[i] for i in (0, 1))
    three[:, 6], three[:, 7], three[:, 8] = width, LAYERS, 2
    if all(kinds[i] % pitch[i] == 0 for i in (0, 1)):
        for streams in (1, 2):
            ways[f"3-D, layers of K and V, {streams} streams"] = (
                lambda k=streams: c.three_d(three, h[:k]),
                streams - 1,
            )
    for size in (128, 256):
        ways[f"batch of {size}"] = (lambda n=size: c.batch(dsts, srcs, sizes, h[:1], n), 0)
    return dsts, srcs, ways


def limits(pools: Pools, way: str) -> Ways:
    clock = pools.clock
    words = 256 * MIB // 8

    def run() -> None:
        with torch.cuda.stream(clock.stream):
            if way == "load":
                pools.near[:words].copy_(pools.far[:words], non_blocking=True)
            else:
                pools.far[:words].copy_(pools.near[:words], non_blocking=True)

    return {"one copy of 256 MiB": (run, 0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clock = Clock(streams=4)
    report = Report(args.json, "explore")
    c = Baseline()
    if not c.has_batch:
        raise SystemExit("the batch function is not bound here: nothing to explore")
    pools = Pools(clock, args.seed)
    cases = [
        ("one layer", one_layer, way, width * KIB)
        for width in (16, 32, 64, 8, 24, 4)
        for way in WAYS
    ] + [("all layers", all_layers, way, width * KIB) for width in (4, 16, 64) for way in WAYS]
    end = time.monotonic() + args.seconds
    for done, (scope, make, way, width) in enumerate(cases):
        now = time.monotonic()
        if now > end:
            say(f"out of time before {scope}, {way}, {width} B")
            break
        pages = max(8, min(128 * MIB // (2 * LAYERS * width), 16384 // (2 * LAYERS)))
        dsts, srcs, ways = make(pools, c, way, width, pages)
        wrong = {}
        for name, (run, others) in ways.items():
            try:
                right = check(
                    pools, way, lambda r=run, o=others: clock.once(r, o), dsts, srcs, width
                )
            except Exception as error:
                wrong[name] = f"{type(error).__name__}: {error}"
                continue
            if not right:
                wrong[name] = "moved wrong bytes"
        # In turn with the others, but its bytes are its own.
        big = limits(pools, way)
        runs = {name: run for name, run in ways.items() if name not in wrong} | big
        found, failed = in_turn(clock, runs, args.runs, now + (end - now) / (len(cases) - done))
        rows = {
            name: row_of(rows, 256 * MIB if name in big else pages * 2 * LAYERS * width)
            for name, rows in found.items()
        }
        limit = next((rows[name]["gb_s"] for name in big if name in rows), None)
        say()
        say(
            f"{scope}, {way}, {pages} random pages of {bench.size_text(width)}, K and V of "
            f"{LAYERS} layers: {pages * 2 * LAYERS:,} copies"
        )
        say(f"{'GB/s':>8} {'share':>6} {'host us':>9}")
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["gb_s"]):
            share = row["gb_s"] / limit if limit else 0
            row["share"] = round(share, 4)
            say(f"{row['gb_s']:>8.2f} {share:>6.3f} {row['host_us']['median']:>9.0f}  {name}")
        for name, text in {**wrong, **failed}.items():
            say(f"{'failed':>8} {name}: {text}")
        report.add(
            scope=scope,
            direction=way,
            page_bytes=width,
            pages=pages,
            layers=LAYERS,
            kinds=2,
            methods=rows,
            failed={**wrong, **failed},
        )
    kvsig.call("cudaDeviceSynchronize")


if __name__ == "__main__":
    main()
