"""Two checkouts of kvsig beside each other, on one machine, in turn.

    PYTHONPATH=. python benchmarks/against.py /path/to/old/checkout --json FILE

Both must be built in place. Each runs in a process of its own, which does its part of every cell
while the other waits; a cell is measured in rounds, the order another each time. Says the ratio new
over old for each cell: of GB/s, and of the host's time. Without a GPU only the latter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvsig.tools.cells import QUICK, SECTIONS, Cell, describe, preset
from kvsig.tools.measuring import SCHEMA
from kvsig.tools.report import Progress, count_text, table, write_json

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).resolve().parent / "worker.py"
ROUNDS, RUNS, SMALL_RUNS = 6, 5, 200
KIB = 1 << 10
#: Calls so small that they are all overhead, of one layer and few pages; then what is judged.
CELLS = {
    "small calls": [{"layers": (1,), "pages": (1, 16, 256), "page_bytes": (4 * KIB,)}],
    **QUICK,
    "models": SECTIONS["models"],
}
#: What the new one must not be slower than, of cells of all layers in one call and 64 KiB pages.
MEDIAN, EACH = 0.97, 0.92


class Side:
    """One checkout, in a process of its own."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        paths = [str(checkout), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONSAFEPATH": "1",  # not the folder of the script
        }
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, cell: Cell, runs: int) -> dict[str, Any]:
        """Run a cell so many times."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"cell": asdict(cell), "runs": runs}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.checkout}: ended with {self.process.wait()}, see above")
        answer: dict[str, Any] = json.loads(line)
        if Path(answer["kvsig"]).parents[1] != self.checkout:
            raise RuntimeError(f"{self.checkout}: {answer['kvsig']} was imported instead")
        if answer["wrong"]:
            raise RuntimeError(f"{self.checkout}: {answer['wrong']:,} bytes are wrong in {cell}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def measure(old: Side, new: Side, cell: Cell, rounds: int, runs: int) -> dict[str, Any]:
    """Measure a cell on both sides, in turn."""
    found: dict[Side, list[dict[str, Any]]] = {old: [], new: []}
    for turn in range(rounds):
        for side in (old, new) if turn % 2 else (new, old):
            found[side].append(side.ask(cell, runs))
    row: dict[str, Any] = asdict(cell)
    for name in ("ms", "host_ms"):
        if name not in found[old][0]:
            continue
        before, after = (
            [statistics.median(answer[name]) for answer in found[side]] for side in (old, new)
        )
        row[f"old_{name}"] = round(statistics.median(before), 5)
        row[f"new_{name}"] = round(statistics.median(after), 5)
        # Above 1 the new one is faster; rounds are compared that stood side by side.
        pairs = zip(before, after, strict=True)
        row[f"{name}_ratio"] = round(statistics.median(b / a for b, a in pairs), 4)
    return row


def verdict(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What the cells say together: those that are judged, the others, and small calls."""
    key = "ms_ratio" if any("ms_ratio" in cell for cell in cells) else "host_ms_ratio"
    large = [c for c in cells if c["section"] != "small calls"]
    groups = {
        # Pages of 64 KiB and more, and every page size where all layers go in one call.
        "judged": [c for c in large if c["page_bytes"] >= 64 * KIB or c["scope"] == "all"],
        "reported": [c for c in large if c["page_bytes"] < 64 * KIB and c["scope"] == "layer"],
    }
    found: dict[str, Any] = {"ratio_of": key.removesuffix("_ratio")}
    for name, rows in groups.items():
        if rows:
            worst = min(rows, key=lambda row: float(row[key]))
            found[name] = {
                "cells": len(rows),
                "median": round(statistics.median(row[key] for row in rows), 4),
                "worst": worst[key],
                "worst_cell": describe(Cell.of(worst)),
            }
    small = [c for c in cells if c["section"] == "small calls"]
    if small:
        found["small_calls"] = {
            "cells": len(small),
            "median": round(statistics.median(c["host_ms_ratio"] for c in small), 4),
            "worst": min(c["host_ms_ratio"] for c in small),
        }
    judged = found.get("judged")
    found["met"] = bool(judged is None or (judged["median"] >= MEDIAN and judged["worst"] >= EACH))
    return found


def text_of(result: dict[str, Any]) -> str:
    """Write all cells, and what they say together."""
    rows = [["cell", "old ms", "new ms", "new/old", "host old µs", "host new µs", "host"]]
    for row in result["cells"]:
        times = [f"{row[k]:.3f}" if k in row else "-" for k in ("old_ms", "new_ms")]
        times += [f"{row['ms_ratio']:.3f}" if "ms_ratio" in row else "-"]
        times += [f"{1e3 * row[k]:.1f}" for k in ("old_host_ms", "new_host_ms")]
        rows.append([describe(Cell.of(row)), *times, f"{row['host_ms_ratio']:.3f}"])
    lines = table(rows, left=True)
    lines += ["", "new over old, above 1 is faster"]
    for name in ("judged", "reported", "small_calls"):
        if name in result["verdict"]:
            said = result["verdict"][name]
            lines.append(
                f"{name.replace('_', ' ')}: {count_text(said['cells'], 'cell')}, median"
                f" {said['median']:.3f}, worst {said['worst']:.3f}"
                + (f" ({said['worst_cell']})" if "worst_cell" in said else "")
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path, help="the other checkout, built in place")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each cell, at most")
    args = parser.parse_args()
    sides = [Side(path.resolve()) for path in (args.old, ROOT)]
    old, new = sides
    emulated = os.environ.get("KVSIG_CUDART", "").startswith("emulated")
    cells = preset(emulated, CELLS)
    result: dict[str, Any] = {"schema": SCHEMA, "kind": "against", "cells": [], "skipped": 0}
    deadline = time.monotonic() + args.seconds
    with Progress("against") as progress:
        for done, cell in enumerate(cells):
            progress.show(done, len(cells), describe(cell))
            left = deadline - time.monotonic()
            if left <= 0:
                result["skipped"] = len(cells) - done
                break
            small = cell.section == "small calls"
            runs = SMALL_RUNS if small else RUNS
            result["cells"].append(measure(old, new, cell, args.rounds, runs))
    for side in sides:
        side.close()
    result["verdict"] = verdict(result["cells"])
    print(text_of(result))
    if result["skipped"]:
        print(f"{count_text(result['skipped'], 'cell')} left out: --seconds was too short")
    if args.json:
        write_json(args.json, result)
    return 0 if result["verdict"]["met"] or emulated else 1


if __name__ == "__main__":
    sys.exit(main())
