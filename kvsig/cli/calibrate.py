"""``kvsig calibrate``: measure what copies cost on this machine, and keep it for the planner."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsig.calibration import Measured
    from kvsig.costs import CostModel

__all__ = ["register"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    from kvsig.cli.demo import natural, positive

    parser = subparsers.add_parser(
        "calibrate",
        help="measure what copies cost on this GPU, and keep it for the planner",
        description="Measures a few copies of every method in both directions on the current "
        "GPU, fits the planner's cost model to them, and keeps it in the user's cache folder, "
        "where every PagedKVCache of this GPU model finds it.",
    )
    parser.add_argument(
        "--seconds", type=positive, default=12, help="time for measuring (default: 12)"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of the addresses (default: 0)")
    parser.add_argument(
        "--dry-run", action="store_true", help="measure and print, but keep nothing"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="keep it in this file, not in the cache folder"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write measurements as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, fit, print and keep.

    Returns
    -------
    int
        0.
    """
    from kvsig import bench, calibration, costs

    for path in (args.json, args.output):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.resolve().parent}")
    bar = bench.Bar(calibration.MOST_RUNS, "kvsig calibrate")

    def tell(done: int, total: int) -> None:
        bar.show(done, f"rounds, at most {total}")

    try:
        model, measured = calibration.calibrate(args.seconds, args.seed, tell)
    finally:
        bar.close()
    print(text_of(model, measured))
    if args.json is not None:
        bench.write_json(
            args.json,
            {
                "schema": bench.SCHEMA,
                "kind": "calibrate",
                "provenance": bench.provenance(),
                "model": asdict(model),
                "cells": [one.as_dict() for one in measured],
            },
        )
    if not args.dry_run:
        print(f"kept in {costs.save(model, args.output)}")
    return 0


def text_of(model: CostModel, measured: list[Measured]) -> str:
    """Write measured and predicted times as a table, and how far apart they are."""
    from kvsig.bench import size_text
    from kvsig.cli.bench import table

    rows = []
    errors: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for one in measured:
        cell, us = one.sample.cell, one.sample.seconds * 1e6
        bytes_moved = cell.copies * cell.rows * cell.width
        rows.append(
            [
                cell.direction,
                cell.method,
                size_text(cell.width),
                str(cell.rows) if cell.method == "strided" else "-",
                f"{cell.copies:,}",
                str(cell.batch_size) if cell.method == "batch" else "-",
                f"{us:,.1f}",
                f"{bytes_moved / us / 1e3:.2f}",
                f"{one.after_us:,.1f}",
                f"{one.after_us / us - 1:+.0%}",
                f"{one.before_us / us - 1:+.0%}",
            ]
        )
        errors.setdefault((cell.direction, cell.method), []).append(
            (abs(one.after_us / us - 1), abs(one.before_us / us - 1))
        )
    head = ["direction", "method", "width", "rows", "copies", "batch", "µs", "GB/s", "predicted"]
    lines = [f"{model.name}: measured and predicted", ""]
    lines += table([*head, "off by", "before"], rows)
    lines += ["", "predicted times are off by (median, most), and were before:"]
    summary: list[list[str]] = []
    for (direction, method), found in errors.items():
        after, before = zip(*found, strict=True)
        summary.append([direction, method, *(percents(part) for part in (after, before))])
    lines += table(["direction", "method", "now", "before"], summary)
    return "\n".join(lines)


def percents(values: Any) -> str:
    """Median and largest of some shares."""
    return f"{statistics.median(values):.0%}, {max(values):.0%}"
