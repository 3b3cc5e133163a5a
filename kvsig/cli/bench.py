"""``kvsig bench``: page copies by every method, as tables, JSON and plots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kvsig.models import MODELS

__all__ = ["register"]

DESCRIPTION = """\
Moves pages by kvsig's methods, by rivals, and by one big copy, which is the limit:
all on the same data, in turn, each checked byte by byte. Submission (host time) and
completion (CUDA events, on a stream that is not the default one) are kept apart.

Without selectors a preset of cells is measured. With any of the selectors, every
combination of the values given; values are separated by commas.
"""

UNITS = {"": 1, "b": 1, "k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20}
PLOTS = (".png", ".svg")
#: Heads of columns; methods that are not here have their own name.
SHORT = {"one-copy": "limit", "auto, default stream": "auto@0"}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    from kvsig.cli.demo import natural, positive

    parser = subparsers.add_parser(
        "bench",
        help="measure page copies by every method, beside rivals and one big copy",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choose = parser.add_argument_group("selectors")
    choose.add_argument(
        "--page-bytes", type=many(read_size), metavar="LIST", help="such as 256,4K,64K,1M"
    )
    choose.add_argument("--pages", type=many(positive), metavar="LIST", help="pages that move")
    choose.add_argument("--layers", type=many(positive), metavar="LIST", help="default: 32")
    choose.add_argument(
        "--kinds", type=many(kinds), metavar="LIST", help="2: K and V (default), 1: one latent"
    )
    for option, values, text in (
        ("--direction", ("offload", "load", "both"), "both: at once"),
        ("--order", ("random", "runs8", "sorted", "reversed"), "order of page numbers"),
        ("--layout", ("page_first_direct", "layer_first"), "layout of the host pool"),
        ("--scope", ("all", "layer"), "all layers in one call, or one call per layer"),
        ("--spacing", ("even", "separate"), "device layers in one tensor, or one by one"),
        ("--stream", ("own", "default"), "default: auto on torch's default stream as well"),
    ):
        choose.add_argument(
            option,
            type=many(one_of(values)),
            metavar="LIST",
            help=f"{', '.join(values)} ({text})",
        )
    choose.add_argument(
        "--model", type=many(one_of(tuple(MODELS))), metavar="LIST", help=", ".join(MODELS)
    )
    choose.add_argument(
        "--page-size", type=many(positive), metavar="LIST", help="tokens per page of --model"
    )
    parser.add_argument(
        "--method",
        type=many(str),
        metavar="LIST",
        help="auto, batch, strided, loop, one-call, torch, select, bindings, cuda.core, one-copy "
        "(default: all)",
    )
    parser.add_argument(
        "--section",
        type=many(str),
        metavar="LIST",
        help="sections of the preset: sizes, layers, orders, layer-first, both, pages, models, "
        "spacing, stream, million (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="a small preset, under a minute")
    parser.add_argument(
        "--seconds", type=positive, help="time for all cells (default: 300, with --quick 45)"
    )
    parser.add_argument(
        "--runs", type=positive, help="timed runs; more where it is noisy (default: 15, --quick 9)"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of pages and bytes (default: 0)")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare bytes before timing"
    )
    parser.add_argument(
        "--any-cpu",
        action="store_true",
        help="time runs on whatever CPU they are on, also where others slow it down",
    )
    parser.add_argument(
        "--threads",
        type=int,
        choices=range(1, 9),
        metavar="1-8",
        help="threads that may submit a transfer of kvsig (default: as PagedKVCache has it)",
    )
    parser.add_argument(
        "--compute",
        action="store_true",
        help="measure instead how much transfers slow a matrix product on another stream",
    )
    parser.add_argument(
        "--host",
        action="store_true",
        help="measure instead what planning and packing costs the host, without CUDA",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument(
        "--plot", type=plot_file, metavar="FILE", help="plot GB/s over page size, .png or .svg"
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="measure nothing: show, and plot, a result that --json has written",
    )
    parser.set_defaults(run=run)


def many(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Make a reader of comma-separated values."""

    def read_many(text: str) -> list[Any]:
        return [read(part.strip()) for part in text.split(",")]

    return read_many


def one_of(values: tuple[str, ...]) -> Callable[[str], str]:
    """Make a reader of one of some words."""

    def read(text: str) -> str:
        if text not in values:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of: {', '.join(values)}")
        return text

    return read


def kinds(text: str) -> int:
    """Read 1 or 2."""
    return int(one_of(("1", "2"))(text))


def read_size(text: str) -> int:
    """Read a number of bytes, with K or M behind it where it is in KiB or MiB."""
    digits = text.rstrip("bBkKiImM")
    unit = text[len(digits) :].lower()
    if not digits.isdecimal() or unit not in UNITS or not 1 <= int(digits) * UNITS[unit] <= 1 << 30:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of bytes up to 1 GiB, such as 512, 64K or 1M"
        )
    return int(digits) * UNITS[unit]


def plot_file(text: str) -> Path:
    """Read the name of a plot."""
    path = Path(text)
    if path.suffix.lower() not in PLOTS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png or .svg")
    return path


def run(args: argparse.Namespace) -> int:
    """Measure, or show what was measured before.

    Returns
    -------
    int
        0; 1 if a method moved wrong bytes or a cell failed.
    """
    check_files(args)
    if args.source is not None:
        result = read_result(args.source)
    else:
        result = measure(args)
    if result["kind"] == "bench":
        print(text_of(result))
        if args.plot is not None:
            plot(result, args.plot)
        summary = result.get("summary", {})
        return 1 if summary.get("errors") or summary.get("verified") is False else 0
    print(compute_text(result) if result["kind"] == "compute" else host_text(result))
    return 0


def check_files(args: argparse.Namespace) -> None:
    """Find out before measuring whether what comes out can be written."""
    for path in (args.json, args.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.resolve().parent}")
    if args.plot is not None:
        if args.compute or args.host:
            raise ValueError("--plot is of GB/s over page size: not with --compute or --host")
        import_pyplot()
        from kvsig import _core

        if args.source is None and _core.is_emulated():
            raise ValueError("--plot is of GB/s, and the emulated runtime has no speed: use a GPU")


def import_pyplot() -> Any:
    """Import matplotlib, or say how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "--plot needs matplotlib, which is not installed: pip install 'kvsig[plot]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def read_result(path: Path) -> dict[str, Any]:
    """Read what ``--json`` has written."""
    from kvsig import bench

    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict) or result.get("schema") != bench.SCHEMA:
        raise ValueError(f"{path} is not a result of kvsig bench --json")
    if result["kind"] == "bench":
        result["summary"] = bench.summary(result)
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the arguments ask for, writing JSON on the way."""
    from kvsig import _core, bench

    emulated = _core.is_emulated()

    def save(result: dict[str, Any]) -> None:
        if args.json is not None:
            bench.write_json(args.json, result)

    if args.compute or args.host:
        kind = "compute" if args.compute else "host"
        seconds = float(args.seconds or 40)
        if args.compute:
            part = bench.compute(seconds, seed=args.seed, threads=args.threads)
        else:
            part = bench.host_costs(seconds, seed=args.seed, full_speed=not args.any_cpu)
        result = {"schema": bench.SCHEMA, "kind": kind, "provenance": bench.provenance()} | part
        save(result)
        return result
    selectors = {
        "page_bytes": args.page_bytes,
        "pages": args.pages,
        "layers": args.layers,
        "kinds": args.kinds,
        "directions": args.direction,
        "orders": args.order,
        "layouts": args.layout,
        "scopes": args.scope,
        "spacings": args.spacing,
        "streams": args.stream,
        "models": args.model,
        "page_sizes": args.page_size,
    }
    chosen = {name: value for name, value in selectors.items() if value is not None}
    if chosen and args.section:
        raise ValueError("--section chooses from the preset: not with selectors such as --order")
    if args.model and (args.page_bytes or args.layers or args.kinds):
        raise ValueError("--model has its own layers, kinds and page bytes; give --page-size")
    if args.page_size and not args.model:
        raise ValueError("--page-size is of a --model; without one, give --page-bytes")
    cells = (
        bench.product(emulated, **chosen)
        if chosen
        else bench.preset(emulated, args.quick, args.section)
    )
    methods = args.method or list(bench.METHODS)
    for method in methods:
        if method not in bench.METHODS:
            raise ValueError(f"method {method!r} is not one of: {', '.join(bench.METHODS)}")
    options = bench.Options(
        methods=tuple(methods),
        runs=args.runs or (9 if args.quick else 15),
        seconds=float(args.seconds or (45 if args.quick else 300)),
        seed=args.seed,
        verify=not args.no_verify,
        full_speed=not args.any_cpu,
        threads=args.threads,
    )
    return bench.Bench(cells, options, save).run()


# --- Text --------------------------------------------------------------------------------------


def header(result: dict[str, Any]) -> list[str]:
    """Say where a result is from."""
    from kvsig.registry import format_version

    source = result["provenance"]
    runtime = format_version(source["runtime_version"])
    if source["emulated"]:
        where = f"CUDA {runtime}, emulated: no speeds, only host time and operations"
    else:
        driver = format_version(source["driver_version"])
        where = f"{source['device']}, CUDA {runtime}, driver {driver}"
    commit = source["commit"]
    return [
        where,
        f"{source['library']}, torch {source['torch']}, {source['date']}"
        + (f", commit {commit[:12]}" if commit else ""),
    ]


def groups(cells: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Cells by everything that is said above a table."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        shape = () if cell["model"] else (cell["layers"], cell["kinds"])
        key = (
            cell["section"],
            cell["model"],
            cell["direction"],
            cell["layout"],
            cell["order"],
            cell["scope"],
            cell["spacing"],
            cell["stream"],
            shape,
        )
        found.setdefault(key, []).append(cell)
    return found


def title(cell: dict[str, Any]) -> str:
    """What the cells of one table have in common."""
    words = [cell["direction"], cell["order"] + " pages", cell["layout"]]
    words.append("all layers in one call" if cell["scope"] == "all" else "one call per layer")
    if cell["spacing"] != "even":
        words.append("layers allocated separately")
    shape = f"{cell['layers']} layers of {'K and V' if cell['kinds'] == 2 else 'one latent'}"
    return ", ".join([f"{cell['model'] + ': ' if cell['model'] else ''}{shape}", *words])


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Write rows under heads, columns aligned to the right."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *rows]
    ]


def text_of(result: dict[str, Any]) -> str:
    """Write a result as tables."""
    from kvsig import bench

    emulated = result["provenance"]["emulated"]
    lines = header(result)
    notes: dict[str, set[str]] = {}
    for cells in groups(result["cells"]).values():
        names = list(dict.fromkeys(name for cell in cells for name in cell["methods"]))
        lines += ["", title(cells[0])]
        labels = [[bench.size_text(cell["page_bytes"]), f"{cell['pages']:,}"] for cell in cells]
        heads = [SHORT.get(name, name) for name in names]
        if not emulated:
            lines += ["  GB/s, and auto's share of the limit"]
            rows = []
            for label, cell in zip(labels, cells, strict=True):
                row = list(label)
                for name in names:
                    found = cell["methods"].get(name)
                    row.append(f"{found['gb_s']:.1f}" if found else "-")
                auto = cell["methods"].get("auto", {})
                row.append(f"{auto['share']:.0%}" if "share" in auto else "-")
                rows.append(row)
            lines += ["  " + line for line in table(["page", "pages", *heads, "auto"], rows)]
        lines += ["  host time per copy, ns"]
        rows = [
            label + [host_text_of(cell["methods"].get(name)) for name in names]
            for label, cell in zip(labels, cells, strict=True)
        ]
        lines += ["  " + line for line in table(["page", "pages", *heads], rows)]
        if emulated:
            lines += ["  operations (in calls)"]
            rows = [
                label + [operations_of(cell["methods"].get(name)) for name in names]
                for label, cell in zip(labels, cells, strict=True)
            ]
            lines += ["  " + line for line in table(["page", "pages", *heads], rows)]
        for cell in cells:
            for name, text in cell.get("notes", {}).items():
                notes.setdefault(f"{name}: {text}", set()).add(cell["section"])
    lines += ["", *summary_text(result)]
    lines += [f"not measured: {text}" for text in notes]
    return "\n".join(lines)


def host_text_of(row: dict[str, Any] | None) -> str:
    """Host time of one method in one cell."""
    return f"{row['host_ns_per_copy']:,.0f}" if row else "-"


def operations_of(row: dict[str, Any] | None) -> str:
    """Operations of one method in one cell."""
    return f"{row['operations']:,} ({row['calls']:,})" if row else "-"


def summary_text(result: dict[str, Any]) -> list[str]:
    """Write what the cells say together."""
    summary = result.get("summary", {})
    lines = []
    if summary.get("verified") is not None:
        lines.append(
            f"every byte was right in {summary['verifications']} comparisons"
            if summary["verified"]
            else "some bytes were WRONG"
        )
    lines += [f"FAILED: {error}" for error in summary.get("errors", [])]
    if summary.get("compared"):
        lines.append(
            f"auto against the best single method: at worst {summary['worst']:.2f} of it in "
            f"{summary['compared']} cells, behind (under 0.95; 0.90 below 1 MiB in all) in "
            f"{len(summary['behind'])}"
        )
        lines += [
            f"  {item['ratio']:.2f} of {item['best']}: {item['cell']}"
            f" ({item['auto_gb_s']:.1f} and {item['best_gb_s']:.1f} GB/s)"
            for item in summary["behind"][:20]
        ]
    if result["skipped"]:
        lines.append(
            f"{len(result['skipped'])} cells were left out: --seconds was too short for them"
        )
    return lines


def compute_text(result: dict[str, Any]) -> str:
    """Write slowdowns of the matrix product as a table."""
    from kvsig import bench

    lines = [*header(result), "", f"{result['product']} beside transfers on another stream"]
    rows = []
    for cell in result["cells"]:
        for name, row in cell["methods"].items():
            rows.append(
                [
                    bench.size_text(cell["page_bytes"]),
                    cell["direction"],
                    cell["scope"],
                    name,
                    f"{row['ms']['median']:.3f}",
                    f"{row['slowdown'] - 1:+.1%}",
                    f"{row['against_one_copy'] - 1:+.1%}" if "against_one_copy" in row else "-",
                    f"{row['gb_s_meanwhile']:.1f}",
                ]
            )
    head = ["page", "direction", "scope", "transfer", "ms", "slower", "than one copy"]
    head.append("GB/s meanwhile")
    return "\n".join(lines + table(head, rows))


def host_text(result: dict[str, Any]) -> str:
    """Write the costs of planning as a table."""
    from kvsig import bench

    lines = [*header(result), "", f"planning and packing; costs of {result['costs']}"]
    rows = []
    for row in result["plan"]:
        grown = row["memory_grown_bytes"]
        rows.append(
            [
                f"{row['copies']:,}",
                f"{row['layers']} x {row['kinds']}",
                bench.size_text(row["page_bytes"]),
                row["direction"],
                row["method"],
                row["planned"],
                f"{row['ns_per_copy']:.1f}",
                f"{row['ns_per_copy_max']:.1f}",
                "-" if grown is None else f"{grown / (1 << 20):.1f}",
            ]
        )
    head = ["copies", "planes", "page", "direction", "method", "planned", "ns/copy", "at most"]
    return "\n".join(lines + table([*head, "memory MiB"], rows))


# --- Plot --------------------------------------------------------------------------------------

#: Method -> colour and marker; told apart without colour as well.
STYLES = {
    "auto": ("#0b5fa5", "o"),
    "batch": ("#e07b00", "s"),
    "strided": ("#2a8f4a", "^"),
    "loop": ("#8a8a8a", "v"),
    "one-call": ("#c23b3b", "D"),
    "torch": ("#8c5bb5", "x"),
    "select": ("#9c6b4a", "+"),
    "bindings": ("#d65fa3", "1"),
    "cuda.core": ("#17a3b5", "2"),
}


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot GB/s over page size, a panel for each way of transferring."""
    pyplot = import_pyplot()
    from matplotlib.ticker import FuncFormatter, NullLocator

    from kvsig import bench

    panels = {
        key: sorted(cells, key=lambda cell: int(cell["page_bytes"]))
        for key, cells in groups(result["cells"]).items()
        if len({cell["page_bytes"] for cell in cells if cell["methods"]}) > 1
    }
    if not panels or result["provenance"]["emulated"]:
        raise ValueError("--plot needs GB/s of at least two page sizes, and this result has none")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(6.4 * columns, 4.0 * lines), squeeze=False, layout="constrained"
    )
    shown: dict[str, Any] = {}
    for axis, cells in zip(axes.flat, panels.values(), strict=False):
        limits = [(c["page_bytes"], c["limit_gb_s"]) for c in cells if c.get("limit_gb_s")]
        if limits:
            (line,) = axis.plot(*zip(*limits, strict=True), color="black", lw=1, ls="--")
            shown.setdefault("limit: one big copy", line)
        for name, (color, marker) in reversed(STYLES.items()):
            points = [
                (cell["page_bytes"], cell["methods"][name]["gb_s"])
                for cell in cells
                if name in cell["methods"]
            ]
            if points:
                width = 2.2 if name == "auto" else 1.2
                (line,) = axis.plot(
                    *zip(*points, strict=True), color=color, marker=marker, ms=4, lw=width
                )
                shown.setdefault(name, line)
        axis.set_xscale("log", base=2)
        ticks = sorted({cell["page_bytes"] for cell in cells})
        axis.set_xticks(ticks)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: bench.size_text(int(value)).replace("iB", ""))
        )
        axis.tick_params(axis="x", labelsize=8)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.set_xlabel("bytes per page")
        axis.set_ylabel("GB/s")
        words = title(cells[0]).split(", ")
        axis.set_title(", ".join(words[:3]) + "\n" + ", ".join(words[3:]), fontsize=9)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    order = ["limit: one big copy", *STYLES]
    named = [name for name in order if name in shown]
    figure.legend([shown[n] for n in named], named, loc="outside lower center", ncols=5)
    figure.suptitle(header(result)[0])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
