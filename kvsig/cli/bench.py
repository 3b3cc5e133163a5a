"""``kvsig bench``: page copies by every path, as tables and JSON."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvsig.cli.arguments import UsageError, existing, many, natural, one_of, output, positive, size
from kvsig.tools import cells, runtimes
from kvsig.tools.cells import CHOICES, LIMIT, PATHS, SECTIONS
from kvsig.tools.models import MODELS
from kvsig.tools.report import bytes_text, count_text, source_text, table, wrap, write_json

__all__ = ["register"]

DESCRIPTION = """\
Moves pages by each of kvsig's paths, and by one big copy, which is the limit: all on
the same data, in turn, each checked byte by byte. Submission (host time) and completion
(CUDA events, on a stream that is not the default one) are kept apart. Without a GPU, and
with KVSIG_CUDART unset, the emulated runtime is used, which has no speeds.

Without selectors a preset of cells is measured. With any of the selectors, every
combination of the values given; values are separated by commas.
"""
METHODS = (*PATHS, LIMIT)
#: Field of a cell -> how a value of its option is read, and the help.
SELECTORS: dict[str, tuple[Callable[[str], Any], str]] = {
    "page_bytes": (size, "such as 256,4K,64K,1.5M"),
    "pages": (positive, "pages that move"),
    "layers": (positive, "default: 32"),
    "kinds": (lambda text: int(one_of("12")(text)), "2: K and V (default), 1: one latent"),
    "model": (one_of(MODELS), ", ".join(MODELS)),
    "page_size": (positive, "tokens per page of --model"),
} | {name: (one_of(values), ", ".join(values)) for name, values in CHOICES.items()}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="measure page copies by every path, beside one big copy",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choose = parser.add_argument_group("selectors")
    for name, (read, text) in SELECTORS.items():
        choose.add_argument(option(name), type=many(read), metavar="LIST", help=text)
    for name, words, text in (("method", METHODS, ""), ("section", SECTIONS, "of the preset: ")):
        text += f"{', '.join(words)} (default: all)"
        parser.add_argument(option(name), type=many(one_of(words)), metavar="LIST", help=text)
    parser.add_argument("--quick", action="store_true", help="a small preset, under a minute")
    parser.add_argument(
        "--seconds", type=positive, help="time for all cells (default: 300, with --quick 45)"
    )
    parser.add_argument(
        "--runs", type=positive, default=15, help="timed runs of each method (default: 15)"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of pages and bytes (default: 0)")
    parser.add_argument(
        "--from",
        dest="source",
        type=existing,
        metavar="FILE",
        help="measure nothing: show a result that --json has written",
    )
    parser.add_argument("--json", type=output, metavar="FILE", help="write the result as JSON")
    parser.set_defaults(run=run)


def option(name: str) -> str:
    """Name the option of a field of a cell."""
    return "--" + name.replace("_", "-")


def run(args: argparse.Namespace) -> int:
    """Measure, or show what was measured; 1 if a method moved wrong bytes or a cell failed."""
    check_together(args)
    if args.source is not None:
        result = read_result(args.source)
    else:
        with runtimes.newest() as preface:
            if preface:
                print(f"{wrap(preface)}\n", flush=True)
            result = measure(args)
    print(text_of(result))
    found = result.get("summary", {})
    return 1 if found.get("errors") or found.get("verified") is False else 0


def check_together(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other."""
    chosen = [option(name) for name in SELECTORS if getattr(args, name)]
    if args.section and (chosen or args.quick):
        raise UsageError(f"--section chooses from the preset: not with {(*chosen, '--quick')[0]}")
    if args.quick and chosen:
        raise UsageError(f"--quick is a preset: not with {chosen[0]}")
    if args.model and (args.page_bytes or args.layers or args.kinds):
        raise UsageError("--model has its own layers, kinds and page bytes; give --page-size")
    if args.page_size and not args.model:
        raise UsageError("--page-size is of a --model; without one, give --page-bytes")


def read_result(path: Path) -> dict[str, Any]:
    """Read what ``--json`` has written."""
    from kvsig.tools.measuring import SCHEMA

    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    known = isinstance(result, dict) and result.get("schema") == SCHEMA
    if not known or result["kind"] != "bench":
        raise UsageError(f"{path} is not a result of this version's kvsig bench --json")
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the cells that the arguments choose, writing JSON on the way."""
    from kvsig.tools.measuring import Bench

    emulated = not runtimes.real_device()
    chosen = {name: getattr(args, name) for name in SELECTORS if getattr(args, name)}
    if chosen:
        try:
            wanted = cells.product(emulated, **chosen)
        except ValueError as error:
            raise UsageError(error) from None
    elif args.quick:
        wanted = cells.preset(emulated, cells.QUICK)
    else:
        sections = args.section or SECTIONS
        wanted = cells.preset(emulated, {name: SECTIONS[name] for name in sections})
    methods, seconds = args.method or METHODS, float(args.seconds or (45 if args.quick else 300))
    bench = Bench(wanted, methods, args.runs, seconds, args.seed)
    if args.json is not None:
        bench.save = functools.partial(write_json, args.json)
    return bench.run()


# --- Text --------------------------------------------------------------------------------------


def text_of(result: dict[str, Any]) -> str:
    """Write a result as tables, one for the cells that are alike but in pages."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        tables.setdefault(cells.shape_text(cells.Cell.of(cell)), []).append(cell)
    lines = source_text(result["provenance"])
    for head, alike in tables.items():
        lines += ["", wrap(head)]
        if result["provenance"]["emulated"]:
            lines += block(alike, "calls", "calls", ",")
        else:
            lines += block(alike, "GB/s, and auto's share of the limit", "gb_s", ".1f")
        lines += block(alike, "host time per copy, ns", "host_ns_per_copy", ",.0f")
    return "\n".join([*lines, "", *summary_text(result)])


def block(alike: list[dict[str, Any]], head: str, figure: str, form: str) -> list[str]:
    """Write one figure of each method in each cell; with GB/s also what auto reaches."""
    names = list(dict.fromkeys(name for cell in alike for name in cell["methods"]))
    share = ["of limit"] if figure == "gb_s" else []
    rows = [["page", "pages", *("limit" if name == LIMIT else name for name in names), *share]]
    for cell in alike:
        methods = cell["methods"]
        row = [bytes_text(cell["page_bytes"]), f"{cell['pages']:,}"]
        row += [f"{methods[name][figure]:{form}}" if name in methods else "-" for name in names]
        if share:
            reached = methods.get("auto", {}).get("share")
            row.append("-" if reached is None else f"{reached:.0%}")
        rows.append(row)
    return [f"  {head}", *table(rows, labels=2, indent="  ")]


def summary_text(result: dict[str, Any]) -> list[str]:
    """Write what the cells say together."""
    found = result.get("summary", {})
    lines = []
    if found.get("verified"):
        lines.append(f"every byte was right in {count_text(found['verifications'], 'comparison')}")
    elif found.get("verified") is False:
        lines.append("some bytes were WRONG")
    lines += [f"FAILED: {error}" for error in found.get("errors", [])]
    if found.get("compared"):
        lines.append(
            f"auto against the fastest path that could be forced: at worst {found['worst']:.2f} of"
            f" it in {count_text(found['compared'], 'cell')}, under 0.95 in {len(found['behind'])}"
        )
        lines += [
            f"  {item['ratio']:.2f} of {item['best']}: {item['cell']}"
            for item in found["behind"][:20]
        ]
    if result["skipped"]:
        count = len(result["skipped"])
        were, them = ("was", "it") if count == 1 else ("were", "them")
        left = f"{count_text(count, 'cell')} {were} left out"
        lines.append(f"{left}: --seconds was too short for {them}")
    notes = dict.fromkeys(
        f"not measured: {name}: {text}"
        for cell in result["cells"]
        for name, text in cell.get("notes", {}).items()
    )
    return [wrap(line, "  ") for line in [*lines, *notes]]
