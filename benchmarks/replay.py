"""What the planner would choose in the cells of results, and what that choice was measured to cost.

    python benchmarks/replay.py FILE.json ...

Takes results of ``kvsig bench --json``. Needs no GPU: in every cell that has the times of a whole
plan by batches, by strided copies and one by one, the planner chooses anew with the figures it has
now, for a CPU of full and of half speed, and its choice is compared with the fastest of the three.
A change of the cost model shows here first. The exit code is 1 if a choice is below 0.95 at both
speeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvsig import bench, costs, planning
from kvsig._threads import SLOWEST, Team

METHODS = ("batch", "strided", "loop")
LEAST = 0.95


def choices(result: dict[str, Any], slow: float) -> Iterator[tuple[bench.Cell, str, str, float]]:
    """Cell, the planner's choice, the fastest method, and GB/s of the first over the second's."""
    model = costs.builtin(result["provenance"]["device"])
    # Results that do not say so are of up to four threads; older ones have one number for all.
    threads = result["options"].get("threads", 4)
    team = Team(threads, threads) if isinstance(threads, int) else Team(*threads)
    for row in result["cells"]:
        cell = bench.Cell(**{name: row[name] for name in bench.Cell.__dataclass_fields__})
        measured = row["methods"]
        auto = measured.get("auto", {})
        # By turns where that is known: medians of few runs differ by what the link did meanwhile.
        speeds = {
            name: auto["gb_s"] / measured[name]["auto_ratio"]
            if "auto_ratio" in measured[name]
            else measured[name]["gb_s"]
            for name in METHODS
            if name in measured
        }
        if auto.get("planned") in speeds and auto["runs"] > measured[auto["planned"]]["runs"]:
            # The same plan, measured better: slow methods are run three times only.
            speeds[auto["planned"]] = auto["gb_s"]
        # Where layers were allocated one by one is not in the results, nor is who had the link.
        if cell.spacing == "separate" or cell.direction == "both" or len(speeds) < len(METHODS):
            continue
        rng = np.random.default_rng(0)
        near, far = (bench.page_numbers(cell, rng)[0] for _ in range(2))
        ready = planning.prepare(bench.planes_of(cell), model, team=team)
        transfer = ready.transfer(near, far, cell.direction)
        # Layer by layer, all calls but the first follow another one.
        transfer.decide("auto", True, slow, cell.scope == "layer")
        if transfer.method in speeds:  # a mixture was not measured by itself
            best = max(speeds, key=lambda name: speeds[name])
            yield cell, transfer.method, best, speeds[transfer.method] / speeds[best]


def main() -> int:
    missed = 0
    for name in sys.argv[1:]:
        result = json.loads(Path(name).read_text(encoding="utf-8"))
        found = [list(choices(result, slow)) for slow in (1.0, SLOWEST)]
        print(f"{name}: {len(found[0])} cells")
        behind: list[set[bench.Cell]] = []
        for speed, rows in zip(("full", "half"), found, strict=True):
            behind.append({cell for cell, _, _, ratio in rows if ratio < LEAST})
            for cell, chosen, best, ratio in rows:
                if ratio < LEAST:
                    print(f"  {speed} speed: {chosen} at {ratio:.2f} of {best}", end=", ")
                    print(f"{cell.section}: {bench.describe(cell)}")
        missed += len(behind[0] & behind[1])
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
