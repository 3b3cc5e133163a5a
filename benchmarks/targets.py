"""What is asked of the speed of kvsig, and what results of ``kvsig bench`` say to it.

    python benchmarks/targets.py FILE.json ...

Takes any results of ``--json``: of cells, of ``--compute`` and of ``--host``. Standard library
only. The exit code is 1 if a target was missed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KIB, MIB = 1 << 10, 1 << 20
ALL_LAYERS = {64 * KIB: 0.94, 32 * KIB: 0.87, 16 * KIB: 0.74, 4 * KIB: 0.43}
BY_LAYER = {
    "load": {64 * KIB: 0.93, 32 * KIB: 0.86, 16 * KIB: 0.50},
    "offload": {64 * KIB: 0.87, 32 * KIB: 0.76, 16 * KIB: 0.56},
}
#: Runs of the same calls differ by so much, in the median of their turns.
SAME = 0.98
#: Target, value, limit, whether at least or at most.
Line = tuple[str, float, float, str]


def of_cell(cell: dict[str, Any]) -> Iterator[Line]:
    methods = cell["methods"]
    auto = methods.get("auto")
    if not auto or "gb_s" not in auto:
        return
    size, way, pages = cell["page_bytes"], cell["direction"], cell["pages"]
    place = f"{way}, {size / KIB:g} KiB pages"
    plain = cell["order"] == "random" and cell["spacing"] == "even" and not cell["model"]
    plain = plain and cell["layout"] == "page_first_direct" and cell["layers"] >= 32
    share = auto.get("share")
    if share is not None and plain and way != "both" and cell["section"] in ("sizes", "layers"):
        if cell["scope"] == "all" and size in ALL_LAYERS:
            yield f"all layers in one call, {place}: of the limit", share, ALL_LAYERS[size], ">="
        if cell["scope"] == "layer" and size in BY_LAYER[way]:
            yield f"layer by layer, {place}: of the limit", share, BY_LAYER[way][size], ">="
    runs = cell["order"] != "random" and cell["layout"] == "layer_first"
    if share is not None and runs and size == 16 * KIB:
        yield f"layer_first, {cell['order']}, {place}: of the limit", share, 0.85, ">="
    if share is not None and way == "both" and size >= 64 * KIB:
        yield f"{place}: of two big copies at once", share, 0.88, ">="
    other = methods.get("auto, default stream")
    if other and cell["bytes"] >= 16 * MIB:
        ratio = other["gb_s"] / auto["gb_s"]
        yield f"default stream, {place} x {pages}: of a stream of its own", ratio, 0.95, ">="
    if cell["section"] == "million":
        yield (
            f"{cell['copies']:,} copies, {way}: every byte right",
            float(bool(auto["verified"])),
            1.0,
            ">=",
        )


def of_all(result: dict[str, Any]) -> Iterator[Line]:
    for cell in result["cells"]:
        words = [cell["section"], cell["direction"], f"{cell['page_bytes'] / KIB:g} KiB"]
        words += [f"{cell['pages']} pages", cell["order"], cell["layout"], cell["scope"]]
        words += [f"{cell['model']}, page_size {cell['page_size']}"] if cell["model"] else []
        for name in ("batch", "strided", "loop", "one-call"):
            row, auto = cell["methods"].get(name, {}), cell["methods"].get("auto", {})
            ratio = row.get("auto_ratio")
            if ratio is None and "gb_s" in row and "gb_s" in auto:
                ratio = auto["gb_s"] / row["gb_s"]  # results from before turns were compared
            if ratio is not None:
                least = 0.90 if cell["bytes"] < MIB else 0.95
                if name in ("loop", "one-call"):
                    # Never slower, but for what two runs of one plan differ by.
                    least = SAME
                yield f"auto beside {name}: {', '.join(words)}", ratio, least, ">="


def of_compute(result: dict[str, Any]) -> Iterator[Line]:
    for cell in result["cells"]:
        row = cell["methods"].get("auto", {})
        if "against_one_copy" in row:
            place = f"{cell['direction']}, {cell['page_bytes'] / KIB:g} KiB pages"
            yield (
                f"product beside it, {place}: of beside one copy",
                row["against_one_copy"],
                1.02,
                "<=",
            )


def of_host(result: dict[str, Any]) -> Iterator[Line]:
    small: dict[tuple[Any, ...], float] = {}
    for row in result["plan"]:
        key = (row["layers"], row["page_bytes"], row["direction"], row["method"])
        place = f"{row['layers']} layers, {row['page_bytes']} B, {row['direction']} {row['method']}"
        value = row["ns_per_copy"]
        if row["copies"] < 200_000:
            small[key] = value
            yield f"plan and pack, {place}: ns per copy", value, 15.0, "<="
        elif key in small:
            # Linear, but for caches that a million copies do not fit into.
            yield f"plan and pack a million, {place}: ns per copy", value, 25.0, "<="


def lines(result: dict[str, Any]) -> Iterator[Line]:
    if result["kind"] == "bench":
        for cell in result["cells"]:
            yield from of_cell(cell)
        yield from of_all(result)
    elif result["kind"] == "compute":
        yield from of_compute(result)
    elif result["kind"] == "host":
        yield from of_host(result)
    else:
        raise SystemExit(f"results of kind {result['kind']!r} have no targets here")


def main() -> int:
    missed = 0
    for name in sys.argv[1:]:
        result = json.loads(Path(name).read_text(encoding="utf-8"))
        found = list(lines(result))
        bad = 0
        print(f"{name}:")
        for text, value, limit, sense in found:
            good = value >= limit if sense == ">=" else value <= limit
            bad += not good
            # Of comparisons there are many: the good ones are only counted.
            if not good or not text.startswith(("auto beside", "plan and pack")):
                print(f"  {'ok  ' if good else 'MISS'} {value:>8.3f} {sense} {limit:<6g} {text}")
        print(f"  {len(found) - bad} of {len(found)} targets were met")
        missed += bad
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
