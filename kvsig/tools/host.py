"""What planning and packing costs the host, without any CUDA runtime: ``kvsig bench --host``."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from typing import Any

import numpy as np

from kvsig.planning import Direction, Geometry, pieces
from kvsig.planning.costs import builtin
from kvsig.planning.geometry import Planes, join, layer_first, page_first_direct
from kvsig.tools.cells import PATHS, WAYS, Cell
from kvsig.tools.jobs import page_numbers

__all__ = ["host_costs", "planes_of"]

#: Layers, kinds, page bytes and scope; and copies of each.
SHAPES = ((32, 2, 16384, "all"), (1, 1, 16384, "layer"), (32, 2, 512, "all"))
COPIES = (100_000, 1_000_000)
LEAST_RUNS, MOST_RUNS = 3, 15
#: Invented: nobody follows the addresses.
DEVICE, HOST = 1 << 40, 1 << 44


def planes_of(cell: Cell) -> Planes:
    """Geometry of one call of a cell, at invented addresses."""
    width, pages, count = cell.page_bytes, cell.pool_pages, cell.layers * cell.kinds
    near = [DEVICE + plane * pages * width for plane in range(count)]
    device = layer_first(near, [width] * count, pages)
    if cell.layout == "page_first_direct":
        pools = [HOST + kind * pages * cell.layers * width for kind in range(cell.kinds)]
        host = page_first_direct(pools, [width] * cell.kinds, cell.layers, pages)
    else:
        far = [HOST + plane * pages * width for plane in range(count)]
        host = layer_first(far, [width] * count, pages)
    whole = join(device, host, cell.layers)
    return whole.select((0,)) if cell.scope == "layer" else whole


def host_costs(seconds: float = 20.0, seed: int = 0) -> dict[str, Any]:
    """Measure what planning and packing costs.

    Parameters
    ----------
    seconds : float
        Time for all; every case is timed three times at least.
    seed : int
        Of the page numbers.

    Returns
    -------
    dict
        ``plan`` has a row for each geometry, number of copies, direction and path, with
        nanoseconds per copy: medians of up to 15 runs, in turn.
    """
    rng = np.random.default_rng(seed)
    shuffled = random.Random(seed)
    model = builtin()
    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + seconds
    groups = list(itertools.product(SHAPES, COPIES))
    for done, ((layers, kinds, width, scope), wanted) in enumerate(groups):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        end = time.monotonic() + left / (len(groups) - done)
        cell = Cell(width, wanted // (layers * kinds), layers, kinds, scope=scope)
        ready = Geometry(planes_of(cell), model)
        near, far = (page_numbers(cell, rng)[0] for _ in range(2))
        times: dict[tuple[str, str], list[float]] = {
            case: [] for case in itertools.product(WAYS, PATHS) if case[1] != "kernel"
        }
        planned: dict[tuple[str, str], str] = {}
        for turn in range(1 + MOST_RUNS):
            if turn > LEAST_RUNS and time.monotonic() > end:
                break
            for case in shuffled.sample(list(times), len(times)):
                begin = time.perf_counter()
                pages = ready.pages(near, far, Direction[case[0].upper()])
                chosen = ready.plan(pages, case[1])
                pieces(chosen)
                took = time.perf_counter() - begin
                planned[case] = chosen.method
                if turn:  # the first run is not timed
                    times[case].append(took * 1e9 / cell.copies)
        rows += [
            {
                "copies": cell.copies,
                "layers": layers,
                "kinds": kinds,
                "page_bytes": width,
                "scope": scope,
                "direction": case[0],
                "method": case[1],
                "planned": planned[case],
                "runs": len(found),
                "ns_per_copy": round(statistics.median(found), 2),
                "ns_per_copy_max": round(max(found), 2),
            }
            for case, found in times.items()
        ]
    return {"costs": f"{model.name}, {model.source}", "plan": rows}
