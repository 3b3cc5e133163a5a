"""``kvsig check``: the registry against NVIDIA's headers."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

from kvsig import registry
from kvsig.check import headers, releases
from kvsig.tools.report import Progress, count_text
from kvsig.tools.report import table as aligned

__all__ = ["markdown", "register", "run"]

KINDS = {"function": "functions", "struct": "structs", "enum": "enums", "alias": "aliases"}
#: Releases, or folders by their version, and what was found in each.
Results = Sequence[tuple[str, list[headers.Result]]]

EPILOG = """\
examples:
  kvsig check /usr/local/cuda/include       the headers of one CUDA toolkit
  kvsig check --releases                    every release that the registry lists as verified
  kvsig check --releases 13.5.37            one release, fetched from the package index
  kvsig check --propose include/            the TOML that a new release needs
  kvsig check --propose include/ cudaMemPoolCreate     and a function that is not there yet

Exit code 1 if anything differs, 2 for arguments that name nothing to check. The C compiler is
$CC, or cc. Releases are kept in
$KVSIG_RELEASES_CACHE, or kvsig/releases in the user's cache folder.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``check`` to the command line."""
    parser = subparsers.add_parser(
        "check",
        help="compare the registry of CUDA prototypes with NVIDIA's headers",
        description="Compares every prototype, struct, constant and type of the registry with"
        " NVIDIA's own headers, by a C compiler; needs no GPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="*", metavar="HEADER_OR_FOLDER",
        help="CUDA headers; with --propose also names of functions",
    )  # fmt: skip
    parser.add_argument(
        "--releases", nargs="*", metavar="V", help="fetch these releases (default: all verified)"
    )
    parser.add_argument(
        "--propose", action="store_true", help="print the TOML that the registry lacks"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--matrix", type=Path, metavar="FILE",
        help="write the table of all releases as Markdown, if nothing differs",
    )  # fmt: skip
    parser.add_argument(
        "--registry", type=Path, metavar="TOML", help="another registry than kvsig's own"
    )
    parser.set_defaults(run=run)


def _wanted(
    args: argparse.Namespace, table: registry.Registry
) -> tuple[list[str], list[str], list[str]]:
    """Releases, folders and names that the arguments ask for, each looked at before any is read."""
    # argparse gives --releases all that follows; what is no release belongs to the rest.
    given: list[str] = args.releases or []
    chosen = [text for text in given if text[:1].isdigit() and not Path(text).is_dir()]
    folders, names = [], []
    for text in [*args.what, *(text for text in given if text not in chosen)]:
        if os.sep in text or Path(text).exists():
            folders.append(text)
        elif args.propose:
            names.append(text)
        elif text in given:
            chosen.append(text)
        else:
            folders.append(text)
    if args.releases is None and not folders:
        roots = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
        folders = [root for root in roots if root and Path(root).is_dir()][:1]
        if not folders:
            raise headers.NoHeaders(
                "no headers to check: give a folder of CUDA headers, set CUDA_HOME,"
                " or use --releases to fetch some"
            )
    for release in chosen:
        releases.package(release)
    for folder in folders:
        headers.locate(folder)
    if args.releases is not None and not chosen:
        chosen = list(table.verified)
    return chosen, folders, names


def _read_all(
    wanted: Sequence[str], folders: Sequence[str], table: registry.Registry
) -> list[tuple[str, headers.Header]]:
    """Headers by the name of their release."""
    if wanted:
        releases.crt()

    def read(item: tuple[str, bool]) -> tuple[str, headers.Header]:
        text, fetched = item
        folder = releases.include(text) if fetched else Path(text)
        own = headers.locate(folder) / headers.COMMON
        header = headers.read(folder, table, [] if own.is_file() else [releases.crt()])
        version = registry.format_version(next(iter(header.versions.values())))
        return (text if fetched else version), header

    items = [(release, True) for release in wanted] + [(path, False) for path in folders]
    found = []
    with Progress("kvsig check") as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, header in pool.map(read, items):
            found.append((name, header))
            progress.show(len(found), len(items), f"read CUDA {name}")
    return found


def run(args: argparse.Namespace) -> int:
    """Run ``kvsig check``: 2 is answered to arguments that name nothing that can be checked."""
    try:
        table = registry.load(args.registry)
        wanted, folders, names = _wanted(args, table)
    except (headers.NoHeaders, releases.NotARelease, FileNotFoundError) as error:
        print(f"kvsig check: {error}", file=sys.stderr)
        return 2
    found = _read_all(wanted, folders, table)
    if args.propose:
        from kvsig.check import proposals

        print(proposals.propose(table, [header for _, header in found], names).text, end="")
        return 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = list(pool.map(lambda item: headers.check(table, item[1]), found))
    done = [(name, results) for (name, _), results in zip(found, checked, strict=True)]
    bad = sum(result.status == "differs" for _, results in done for result in results)
    if args.json:
        items = [
            {"release": name, "folder": str(header.folder), "versions": header.versions,
             "results": [asdict(result) for result in results]}
            for (name, header), results in zip(found, checked, strict=True)
        ]  # fmt: skip
        print(json.dumps({"differences": bad, "releases": items}, indent=1))
    else:
        print("\n".join(report(done, bad)))
    if args.matrix and not bad:
        args.matrix.write_text(markdown(done))
    return 1 if bad else 0


def cell(result: headers.Result) -> str:
    """What a table says of one entry in one release."""
    if result.status == "agrees":
        return registry.format_version(result.since) if result.since else "yes"
    return {"differs": "DIFFERS", "absent": "-", "unchecked": "?"}.get(result.status, result.status)


def _rows(done: Results, kind: str) -> list[list[str]]:
    names = [r.name for r in done[0][1] if r.kind == kind]
    columns = [{r.name: cell(r) for r in results if r.kind == kind} for _, results in done]
    return [[name, *(column[name] for column in columns)] for name in names]


def report(done: Results, bad: int) -> Iterable[str]:
    """Lines of the table and of every difference."""
    for release, results in done:
        for result in results:
            if result.status == "differs":
                yield from _difference(release, result)
    for kind, title in KINDS.items():
        rows = [[title, *(release for release, _ in done)], *_rows(done, kind)]
        yield from (*aligned(rows, left=True), "")
    yield (
        "A version says where the range of the variant begins that agrees with the header; yes:"
        " agrees in every release."
    )
    yield (
        "-: rightly absent. pinned: an older prototype is asked of the library, whatever this"
        " header says."
    )
    missing = sorted({r.library for _, results in done for r in results if r.status == "unchecked"})
    if missing:
        yield f"?: not checked, since the folder has no header of: {', '.join(missing)}."
    yield f"{count_text(len(done), 'release')} checked: " + (
        f"{count_text(bad, 'difference')}, shown above" if bad else "the registry agrees"
    )


def _difference(release: str, result: headers.Result) -> Iterable[str]:
    since = ""
    if result.kind == "function" and result.since:
        since = f", variant from {registry.format_version(result.since)}"
    yield f"DIFFERS: {result.kind} {result.name} in CUDA {release}{since}"
    yield from (f"  {problem}" for problem in result.problems)
    if result.kind == "function":
        yield from _side_by_side(result.registry, result.header)
    yield ""


def _side_by_side(ours: str, theirs: str) -> Iterable[str]:
    """Two prototypes in two columns, a parameter to a line."""
    left, right = ["registry", *_parts(ours)], ["header", *_parts(theirs)]
    width = max(map(len, left))
    yield f"    {left.pop(0):{width}}  {right.pop(0)}"
    for mine, other in zip_longest(left, right, fillvalue=""):
        yield f"  {' ' if mine == other else '!'} {mine:{width}}  {other}".rstrip()


def _parts(prototype: str) -> list[str]:
    if not prototype:
        return ["(none)"]
    head, _, rest = prototype.partition("(")
    return [f"{head}(", *(f"  {part}" for part in rest.removesuffix(")").split(", "))]


def markdown(done: Results) -> str:
    """The table of all releases as a page of the documentation."""
    lines = [
        "# Releases that the registry was checked against",
        "",
        "Written by `python -m kvsig check --releases --matrix docs/releases.md`, which compares",
        "each entry of `kvsig/signatures.toml` with the headers of each release; not to be edited.",
        "",
        "A version says where the range of the variant begins that agrees with the header; *yes*:",
        "agrees, and the registry has it in every release. *-*: absent, as the registry says.",
        "*pinned*: an older prototype is asked of the library, whatever this header says.",
    ]
    for kind in ("function", "struct", "enum"):
        rows = [[KINDS[kind].capitalize(), *(release for release, _ in done)]]
        rows.append(["---"] * len(rows[0]))
        rows += [[f"`{name}`", *cells] for name, *cells in _rows(done, kind)]
        lines += ["", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"
