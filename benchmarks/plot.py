"""GB/s over page size as a picture.

    PYTHONPATH=. python benchmarks/plot.py RESULT.json PICTURE.svg
    PYTHONPATH=. python benchmarks/plot.py SUMMARY.json PICTURE.svg --part quick

RESULT is what `kvsig bench --json` or `rivals.py --json` has written, measured on a GPU; SUMMARY
is that of `gpu_run.py`, and has a result for each part. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

from kvsig.tools.cells import LIMIT
from kvsig.tools.report import bytes_text, source_text

#: Colours and markers, told apart without colour as well; methods take them in this order.
STYLES = (
    ("#0b5fa5", "o"), ("#e07b00", "s"), ("#2a8f4a", "^"), ("#8a8a8a", "v"), ("#c23b3b", "D"),
    ("#8c5bb5", "x"), ("#9c6b4a", "+"), ("#d65fa3", "1"), ("#17a3b5", "2"),
)  # fmt: skip
LABELS = {LIMIT: "limit: one big copy", "auto": "kvsig, as it chooses"}


def panels(result: dict[str, Any]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Cells by what a panel is of, those with several page sizes only."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        scope = "all layers in one call" if cell["scope"] == "all" else "one call per layer"
        names = (cell["model"], cell["direction"], scope, cell["layout"], cell["order"])
        key = (*(name for name in names if name), f"{cell['layers']} layers")
        if cell["spacing"] == "even" and cell["section"] != "pages" and cell["methods"]:
            found.setdefault(key, []).append(cell)
    return {
        key: sorted(cells, key=lambda cell: int(cell["page_bytes"]))
        for key, cells in found.items()
        if len({cell["page_bytes"] for cell in cells}) > 1
    }


def save(result: dict[str, Any], path: Path) -> None:
    """Plot GB/s over page size, a panel for each way of transferring."""
    found = panels(result)
    columns = min(2, len(found))
    lines = -(-len(found) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.4 * columns, 3.8 * lines), squeeze=False, layout="constrained"
    )
    names = dict.fromkeys(n for cells in found.values() for cell in cells for n in cell["methods"])
    methods = [name for name in names if name != LIMIT]
    shown: dict[str, Any] = {}
    for axis, (key, cells) in zip(axes.flat, found.items(), strict=False):
        for name in [*reversed(methods), LIMIT]:
            points = [(c["page_bytes"], c["methods"][name]["gb_s"]) for c in cells
                      if name in c["methods"]]  # fmt: skip
            if not points:
                continue
            if name == LIMIT:
                style = {"color": "#555555", "lw": 1, "ls": "--"}
            else:
                color, marker = STYLES[methods.index(name) % len(STYLES)]
                width = 2.2 if name == "auto" else 1.2
                style = {"color": color, "marker": marker, "ms": 4, "lw": width}
            (shown[name],) = axis.plot(*zip(*points, strict=True), **style)
        draw_frame(axis, [cell["page_bytes"] for cell in cells], key)
    for axis in list(axes.flat)[len(found) :]:
        axis.set_visible(False)
    order = [name for name in (LIMIT, *methods) if name in shown]
    labels = [LABELS.get(name, name) for name in order]
    figure.legend([shown[name] for name in order], labels, loc="outside lower center", ncols=5)
    figure.suptitle(source_text(result["provenance"])[0])
    # Words stay words: smaller, and they can be searched and read aloud.
    with plt.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_frame(axis: Any, sizes: list[int], key: tuple[str, ...]) -> None:
    """Draw everything but the lines."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(set(sizes)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: bytes_text(int(value)).replace("iB", ""))
    )
    axis.tick_params(axis="x", labelsize=8)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.set_xlabel("bytes per page")
    axis.set_ylabel("GB/s")
    axis.set_title(", ".join(key[:2]) + "\n" + ", ".join(key[2:]), fontsize=9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path, help=".png or .svg")
    parser.add_argument("--part", help="of a summary: quick, models, grid or rivals")
    args = parser.parse_args()
    result = json.loads(args.result.read_text(encoding="utf-8"))
    if args.part:
        result = result[args.part]
    if result["provenance"]["emulated"] or not panels(result):
        print("there are no GB/s of at least two page sizes in the result", file=sys.stderr)
        return 1
    save(result, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
