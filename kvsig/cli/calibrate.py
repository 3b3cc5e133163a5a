"""``kvsig calibrate``: measure what copies cost on this machine, and keep it for the planner."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvsig.cli.arguments import output, positive
from kvsig.tools.report import bytes_text, provenance, table, time_text, wrap, write_json

if TYPE_CHECKING:
    from kvsig.planning.costs import CostModel

__all__ = ["register"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure what copies cost on this GPU, and keep it for the planner",
        description="Measures a few copies of every path in both directions on the current "
        "GPU and fits the planner's cost model to them. Says which figures change, and what they "
        "predict before and after; then keeps them in the user's cache folder, where every "
        "PagedKVCache of this GPU model finds them.",
    )
    parser.add_argument(
        "--seconds", type=positive, default=12, help="time for measuring (default: 12)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="measure and print, but keep nothing"
    )
    parser.add_argument(
        "--output", type=output, metavar="FILE", help="keep it in this file, not the cache folder"
    )
    parser.add_argument("--json", type=output, metavar="FILE", help="write measurements as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, fit, print and keep."""
    from kvsig.planning import costs
    from kvsig.tools import calibration, fitting
    from kvsig.tools.measuring import SCHEMA

    name, samples = calibration.measure(args.seconds)
    before, after = costs.load(name), fitting.fit(samples, name)
    cells = calibration.compare(samples, before, after)
    print(text_of(before, after, cells), flush=True)
    if args.json is not None:
        head = {"schema": SCHEMA, "kind": "calibrate", "provenance": provenance()}
        write_json(args.json, head | {"model": asdict(after), "cells": cells})
    path = args.output or costs.cache_path(name)
    if args.dry_run:
        print(wrap(f"nothing was kept; without --dry-run these figures go to {path}"))
    else:
        print(f"kept in {costs.save(after, path)}")
    return 0


def text_of(before: CostModel, after: CostModel, cells: Sequence[dict[str, Any]]) -> str:
    """Write what would change, and how far predictions are off before and after."""
    from kvsig.tools.calibration import changes

    lines = [f"{after.name}: figures in µs, old ones {before.source}", ""]
    rows = [["direction", "figure", "old", "new"]]
    rows += [
        [direction, figure, f"{old:.4g}", f"{new:.4g}"]
        for direction, figure, old, new in changes(before, after)
    ]
    lines += table(rows, labels=2) if len(rows) > 1 else ["no figure changes"]
    lines += ["", "times measured, and predicted by the old and the new figures", ""]
    rows = [["direction", "path", "width", "rows", "copies", "batch", "measured", "old", "new"]]
    off: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for cell in cells:
        us, old, new = cell["us"], cell["before_us"], cell["after_us"]
        rows.append(
            [cell["direction"], cell["method"], bytes_text(cell["width"]), f"{cell['rows']}",
             f"{cell['copies']:,}", f"{cell['batch_size']}", *map(time_text, (us, old, new))]
        )  # fmt: skip
        errors = off.setdefault((cell["direction"], cell["method"]), [])
        errors.append((abs(old / us - 1), abs(new / us - 1)))
    lines += table(rows, labels=5)
    lines += ["", "predicted times are off by (median, most)", ""]
    rows = [["direction", "path", "old", "new"]]
    rows += [
        [
            *key,
            *(
                f"{statistics.median(side):.0%}, {max(side):.0%}"
                for side in zip(*errors, strict=True)
            ),
        ]
        for key, errors in off.items()
    ]
    return "\n".join(lines + table(rows, labels=2))
