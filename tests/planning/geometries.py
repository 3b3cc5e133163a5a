"""Geometries, page numbers and models to plan with, and what a plan of them has to move."""

from dataclasses import fields

import numpy as np

from kvsig.planning import Direction, Geometry, Plan, Planes
from kvsig.planning.costs import CostModel, DirectionCosts, builtin
from kvsig.planning.geometry import Seams, grouped

H100 = builtin("NVIDIA H100 80GB HBM3")
DEVICE, HOST = 0x7F00_0000_0000, 0x6000_0000_0000
KIB = 1024


def plan(
    planes, device_pages, host_pages, direction, path="auto", model=None, host_seams=None,
    device_seams=None, **options,
):
    """A whole plan of a geometry, ready or not."""
    if not isinstance(planes, Geometry):
        planes = Geometry(planes, model or builtin(), host_seams, device_seams)
    return Plan(choose(planes, device_pages, host_pages, direction, path, **options))


def groups(planes, host_seams=None, device_seams=None):
    """Of the planes that move together: bytes of a page, slices, planes of a slice."""
    seams = Seams(device_seams, host_seams, planes.device_pages, planes.host_pages)
    return [(part[0][0].width, len(part), len(part[0])) for part in grouped(planes, seams)]


def choose(ready, device_pages, host_pages, direction, path="auto", **options):
    """What is chosen, not packed."""
    near, far = (np.ascontiguousarray(a, np.int64) for a in (device_pages, host_pages))
    return ready.plan(ready.pages(near, far, Direction[direction.upper()]), path, **options)


def flat(result):
    """Strided copies of one slice: dst, dpitch, src, spitch, width, height."""
    return result.strided[result.strided[:, 8] == 1][:, [0, 1, 3, 4, 6, 7]]


def cubes(result):
    """Strided copies of several slices, all nine columns."""
    return result.strided[result.strided[:, 8] > 1]


def planes_of(device_base, device_pitch, host_base, host_pitch, width, pages, layers=None):
    n = len(device_base)

    def column(values):
        return np.array(np.broadcast_to(np.asarray(values, dtype=np.uint64), n), order="C")

    return Planes(
        column(device_base), column(device_pitch), column(width), column(host_base),
        column(host_pitch), column(width), column(width), pages, pages,
        n if layers is None else layers,
    )


def page_first(layers, width, pages, kv=2):
    """Device layers one after the other; every host page holds all layers."""
    n = layers * kv
    return planes_of(
        [DEVICE + i * pages * width for i in range(n)], width,
        [HOST + i // layers * pages * layers * width + i % layers * width for i in range(n)],
        layers * width, width, pages, layers,
    )


def layer_first(layers, width, pages, kv=2):
    """One tensor per layer on both sides."""
    n = layers * kv
    return planes_of(
        [DEVICE + i * pages * width for i in range(n)], width,
        [HOST + i * pages * width for i in range(n)], width, width, pages, layers,
    )


# The property: a plan writes each byte that the plain list writes, once, from the same source.


def random_geometry(rng):
    """Planes that do not overlap on either side, and pages per side."""
    pages, layers, kv = int(rng.integers(1, 33)), int(rng.integers(1, 7)), int(rng.integers(1, 3))
    n = layers * kv
    widths = np.repeat(rng.integers(1, 33, kv), layers)
    if rng.random() < 0.15:
        widths = rng.integers(1, 33, n)

    regular = rng.random() < 0.3
    if regular:
        widths = np.repeat(widths[0], n)

    def side(start):
        kind = rng.integers(5)
        if regular and rng.random() < 0.5:
            # K and V pools, one behind the other, of layers whose distances are regular
            step = int(widths[0]) * pages
            gap = step * int(rng.integers(0, 3))
            base = [i * step + (i >= layers) * gap for i in range(n)]
            return start + np.array(base), widths
        if regular:
            kind = 1
        if kind == 0:
            # all planes of a page side by side
            starts = np.concatenate([[0], np.cumsum(widths)[:-1]])
            pitch = np.full(n, widths.sum() + (rng.integers(9) if rng.random() < 0.3 else 0))
            return start + starts, pitch
        if kind == 1:
            # one pool each for K and V, with the layers of a page side by side
            base, pitch, at = np.zeros(n, np.int64), np.zeros(n, np.int64), 0
            for part in range(kv):
                rows = slice(part * layers, (part + 1) * layers)
                whole = int(widths[rows].sum())
                base[rows] = at + np.concatenate([[0], np.cumsum(widths[rows])[:-1]])
                pitch[rows] = whole
                gap = 16 if rng.random() < 0.5 else whole
                at += pages * whole + int(rng.integers(0, 3)) * gap
            return start + base, pitch
        # a region per plane: evenly spaced, unevenly, or in a random order of layers
        pitch = widths + (rng.integers(0, 9, n) if rng.random() < 0.2 else 0)
        room = int((pitch * pages).max())
        gaps = rng.integers(0, 40, n) * (rng.random(n) < 0.3) if kind == 2 else np.zeros(n, int)
        base = np.arange(n) * room + np.cumsum(gaps)
        if kind == 3:
            base = base[rng.permutation(n)]
        if rng.random() < 0.3:
            base = base[::-1]
        return start + base, pitch

    device_base, device_pitch = side(DEVICE)
    host_base, host_pitch = side(HOST)
    if rng.random() < 0.3 and n > 1:
        order = rng.permutation(n)
        device_base, device_pitch, host_base, host_pitch, widths = (
            array[order] for array in (device_base, device_pitch, host_base, host_pitch, widths)
        )
    return planes_of(device_base, device_pitch, host_base, host_pitch, widths, pages, layers)


def random_pages(rng, pages, direction):
    """Page numbers in every kind of order; the destinations are distinct."""
    n = int(rng.integers(0, pages + 1))

    def order(distinct):
        kind = rng.integers(6)
        if kind == 0 or n == 0:
            return rng.permutation(pages)[:n]
        if kind == 1:
            return np.sort(rng.permutation(pages)[:n])
        if kind == 2:
            return np.sort(rng.permutation(pages)[:n])[::-1]
        if kind == 3:
            # runs, up and down
            parts = np.array_split(np.arange(pages), max(1, pages // int(rng.integers(1, 9))))
            parts = [p[::-1] if rng.random() < 0.4 else p for p in parts]
            return np.concatenate([parts[i] for i in rng.permutation(len(parts))])[:n]
        if kind == 4:
            step = int(rng.integers(1, 4))
            found = np.concatenate([np.arange(first, pages, step) for first in range(step)])
            return (found if rng.random() < 0.5 else found[::-1])[:n]
        return np.arange(n) if distinct else rng.integers(0, pages, n)

    device, host = order(direction == "load"), order(direction == "offload")
    if rng.random() < 0.3 and n:
        # the same order on both sides is what makes long runs
        device = host = order(True)
    return np.ascontiguousarray(device, np.int64), np.ascontiguousarray(host, np.int64)


def random_seams(rng, planes, device):
    """Mostly none; else anywhere, or where the planes of each layer begin and end."""
    base, pitch, pages = (
        (planes.device_base, planes.device_pitch, planes.device_pages)
        if device
        else (planes.host_base, planes.host_pitch, planes.host_pages)
    )
    kind = rng.random()
    if kind < 0.6:
        return None
    if kind < 0.8:
        low, high = int(base.min()), int((base + pitch * np.uint64(pages)).max())
        return rng.integers(low - 8, high + 8, int(rng.integers(1, 9))).astype(np.uint64)
    ends = np.concatenate([base, base + pitch * np.uint64(pages)])
    return ends[rng.random(len(ends)) < rng.choice([0.1, 0.5, 1])]


def random_model(rng):
    """Costs at which any form can be the cheapest."""

    def side():
        figures = {f.name: float(10 ** rng.uniform(-2, 1)) for f in fields(DirectionCosts)}
        figures["byte"] = float(10 ** rng.uniform(-5, -2))
        figures["kernel_byte"] = float(10 ** rng.uniform(-5, -2))
        return DirectionCosts(**figures)

    return CostModel("random", "default", side(), side(), (3, 64) if rng.random() < 0.5 else (256,))


def plain_bytes(planes, device_pages, host_pages):
    """Device and host address of every byte that the plain list moves."""
    device, host = [], []
    for i in range(len(planes)):
        offsets = np.arange(int(planes.width[i]))
        device.append(
            (int(planes.device_base[i]) + device_pages * int(planes.device_pitch[i]))[:, None]
            + offsets
        )
        host.append(
            (int(planes.host_base[i]) + host_pages * int(planes.host_pitch[i]))[:, None] + offsets
        )
    if not device:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return (
        np.concatenate([a.ravel() for a in device]), np.concatenate([a.ravel() for a in host])
    )


def spread(starts, sizes):
    """Every address of ranges."""
    if not len(starts):
        return np.empty(0, np.int64)
    return np.concatenate([np.arange(a, a + s) for a, s in zip(starts, sizes, strict=True)])


def planned_bytes(result):
    """Destination and source address of every byte that a plan moves."""
    plain = [a.astype(np.int64) for a in (result.dsts, result.srcs, result.sizes)]
    dst, src = [spread(plain[0], plain[2])], [spread(plain[1], plain[2])]
    for op in result.strided.astype(np.int64):
        to, to_pitch, to_rows, of, of_pitch, of_rows, width, rows, depth = op
        assert width <= min(to_pitch, of_pitch) and max(to_pitch, of_pitch) < 2**31
        assert rows > 0 and depth > 0 and width > 0 and min(to_rows, of_rows) >= rows
        part, row, byte = np.ogrid[:depth, :rows, :width]
        dst.append((to + (part * to_rows + row) * to_pitch + byte).ravel())
        src.append((of + (part * of_rows + row) * of_pitch + byte).ravel())
    return np.concatenate(dst), np.concatenate(src)


def extents(result, device):
    """First and last byte of every operation of a plan, on the device or on the host."""
    first = (result.direction == "offload") != device
    plain = result.dsts if first else result.srcs
    found = [
        (int(a), int(a + s - np.uint64(1))) for a, s in zip(plain, result.sizes, strict=True)
    ]
    for op in result.strided.astype(np.int64).tolist():
        start, pitch, rows = op[0:3] if first else op[3:6]
        last = (op[8] - 1) * rows + op[7] - 1
        found.append((start, start + last * pitch + op[6] - 1))
    return found
