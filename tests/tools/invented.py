"""A result of the benchmark as a GPU gives it, with invented numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kvsig.tools.cells import Cell
from kvsig.tools.measuring import SCHEMA, summary

SOURCE = {
    "date": "2026-01-01T00:00:00+00:00",
    "commit": "0123456789abcdef",
    "emulated": False,
    "device": "Some GPU",
    "library": "libcudart.so.13",
    "runtime_version": 13000,
    "driver_version": 13010,
    "torch": "2.11.0",
}


def gpu_result(directions: tuple[str, ...] = ("offload", "load")) -> dict[str, Any]:
    """Two page sizes each way; auto has 30 GB/s, batch 40, one big copy 50."""
    cells = []
    for direction in directions:
        for size in (4096, 16384):
            cell = Cell(size, 8, layers=3, direction=direction)
            methods = {
                name: row(cell, speed, name == "one-copy")
                for name, speed in (("auto", 30.0), ("batch", 40.0), ("one-copy", 50.0))
            }
            methods["batch"]["auto_ratio"] = 0.75
            cells.append(
                asdict(cell)
                | {"copies": cell.copies, "bytes": cell.bytes, "methods": methods, "notes": {}}
            )
    result = {"schema": SCHEMA, "kind": "bench", "provenance": SOURCE, "options": {}}
    result |= {"cells": cells, "skipped": []}
    return result | {"summary": summary(result)}


def row(cell: Cell, speed: float, limit: bool) -> dict[str, Any]:
    """What a method gave."""
    numbers = {"median": 1.0, "min": 1.0, "max": 1.0, "p10": 1.0, "p90": 1.0}
    return {
        "runs": 3,
        "path": "batch",
        "reason": None,
        "calls": 1,
        "operations": cell.copies,
        "bytes": cell.bytes,
        "verified": None if limit else True,
        "host_ms": numbers,
        "host_ns_per_copy": 1234.4,
        "ms": numbers,
        "gb_s": speed,
        "share": speed / 50,
    }
