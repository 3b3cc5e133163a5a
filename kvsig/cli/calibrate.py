"""``kvsig calibrate``: measure what copies cost on this machine, and keep it for the planner."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvsig.cli.arguments import natural, output, positive
from kvsig.tools.report import bytes_text, provenance, table, time_text, wrap, write_json

if TYPE_CHECKING:
    from kvsig.planning.costs import CostModel
    from kvsig.tools.calibration import Compared

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
    parser.add_argument("--seed", type=natural, default=0, help="of the addresses (default: 0)")
    parser.add_argument(
        "--dry-run", action="store_true", help="measure and print, but keep nothing"
    )
    parser.add_argument(
        "--output",
        type=output(),
        metavar="FILE",
        help="keep it in this file, not in the cache folder",
    )
    parser.add_argument("--json", type=output(), metavar="FILE", help="write measurements as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, fit, print and keep.

    Returns
    -------
    int
        0.
    """
    from kvsig.planning import costs
    from kvsig.tools import calibration, fitting
    from kvsig.tools.measuring import SCHEMA

    name, samples = calibration.measure(args.seconds, args.seed)
    before, after = costs.load(name), fitting.fit(samples, name)
    compared = calibration.compare(samples, before, after)
    print(text_of(before, after, compared), flush=True)
    if args.json is not None:
        head = {"schema": SCHEMA, "kind": "calibrate", "provenance": provenance()}
        cells = [one.as_dict() for one in compared]
        write_json(args.json, head | {"model": asdict(after), "cells": cells})
    path = args.output or costs.cache_path(name)
    if args.dry_run:
        print(wrap(f"nothing was kept; without --dry-run these figures go to {path}"))
    else:
        print(f"kept in {costs.save(after, path)}")
    return 0


def text_of(before: CostModel, after: CostModel, compared: Sequence[Compared]) -> str:
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
    for one in compared:
        cell, us = one.sample.cell, one.sample.seconds * 1e6
        rows.append(
            [cell.direction, cell.method, bytes_text(cell.width), f"{cell.rows}",
             f"{cell.copies:,}", f"{cell.batch_size}",
             *(time_text(value) for value in (us, one.before_us, one.after_us))]
        )  # fmt: skip
        errors = (abs(one.before_us / us - 1), abs(one.after_us / us - 1))
        off.setdefault((cell.direction, cell.method), []).append(errors)
    lines += table(rows, labels=5)
    lines += ["", "predicted times are off by (median, most)", ""]
    rows = [["direction", "path", "old", "new"]]
    rows += [[*key, *map(percents, zip(*errors, strict=True))] for key, errors in off.items()]
    return "\n".join(lines + table(rows, labels=2))


def percents(values: Any) -> str:
    """Median and largest of some shares."""
    return f"{statistics.median(values):.0%}, {max(values):.0%}"
