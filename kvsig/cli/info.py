"""``kvsig info``: which CUDA runtime is used, and which prototype and address each function has."""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

import kvsig
from kvsig.registry import format_version
from kvsig.tools.report import table, wrap
from kvsig.tools.runtimes import newest

__all__ = ["register"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "info",
        help="the CUDA runtime, its functions, and the path copies take",
        description="Says which CUDA runtime kvsig uses and how it was found, which prototype "
        "and address each function has, and which path page copies will take and why. Without "
        "a GPU, and with KVSIG_CUDART unset, that is the emulated runtime.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what kvsig is bound to; 1 where no CUDA runtime can be used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are a part of what is printed
            with newest() as preface:
                info = kvsig.info()
    except kvsig.BindError as error:
        if not args.json:
            raise
        print(json.dumps({"library": None, "error": str(error)}, indent=2))
        return 1
    if args.json:
        print(json.dumps(info | {"note": preface or None}, indent=2))
    else:
        if preface:
            print(f"{wrap(preface)}\n")
        print(describe(info))
    return 0


def describe(info: dict[str, Any]) -> str:
    """Write :func:`kvsig.info` as text for people."""
    version = info["runtime_version"]
    runtime = format_version(version) if version else "of unknown version"
    if not info["library"]:
        runtime = "none"
    if info["emulated"]:
        runtime += ", emulated: host memory stands in for the GPU's"
    batch, kernel = info["batch"], info["kernel"]
    functions = info["functions"]
    bound = sum(function["status"] == "bound" for function in functions)
    rows = [
        ("CUDA runtime", runtime),
        ("library", info["library"] or "none"),
        ("found", info["found"]),
        ("driver", format_version(info["driver_version"]) if info["driver_version"] else "none"),
        ("page copies", f"{batch['path']}: {batch['why']}"),
        ("small pages", "kernel" if kernel["available"] else f"no kernel: {kernel['why']}"),
        ("functions", f"{bound} of {len(functions)} bound"),
    ]
    others = [path for path in info["libraries"] if path != info["library"]]
    rows += [("also loaded", path) for path in others]
    margin = max(len(label) for label, _ in rows) + 2
    lines = [wrap(f"{label:<{margin}}{text}", " " * margin) for label, text in rows]
    lines += ["", *function_table(functions)]
    notes: dict[str, list[str]] = {}
    for function in functions:
        if function["status"] != "bound":
            notes.setdefault(function["why"], []).append(function["name"])
    if notes:
        lines += ["", "not bound:"]
        lines += [wrap(f"  {why}: {', '.join(names)}", "    ") for why, names in notes.items()]
    if info["warnings"]:
        lines += [""]
        lines += [wrap(f"warning: {warning}", "    ") for warning in info["warnings"]]
    return "\n".join(lines)


def function_table(functions: list[dict[str, Any]]) -> list[str]:
    """Write one line per function: name, range of the prototype, address, status.

    The symbol is named where it is not the function's own name; "..." stands for that name.
    """
    rows = [("function", "prototype of", "address", "status")]
    for function in functions:
        status, symbol = function["status"], function["symbol"]
        if symbol and symbol != function["name"]:
            status += f" as {symbol.replace(function['name'], '...')}"
        address = f"{function['address']:#x}" if function["address"] else "-"
        rows.append((function["name"], function["variant"] or "-", address, status))
    return table(rows, left=True, rule=True)
