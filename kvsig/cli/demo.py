"""``kvsig demo``: the main job, checked byte by byte, as text or JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from kvsig.cli.arguments import natural, positive
from kvsig.registry import format_version
from kvsig.tools import runtimes
from kvsig.tools.cells import CHOICES, PATHS, WAYS
from kvsig.tools.models import MODELS
from kvsig.tools.report import bytes_text, count_text, versions, wrap

__all__ = ["register"]

LAYOUTS = CHOICES["layout"]
#: Wrong pages that are listed, as text and in JSON; the others are counted.
LISTED, LISTED_JSON = 10, 100

DESCRIPTION = """\
Fills a KV cache of a model's shape with random bytes, offloads random device
pages to random host pages, clobbers them on the device, and loads them to other
device pages. Then every page of both sides is compared, those that had to move
and those that had to stay.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    models = "\n".join(f"  {model.name:<16}{model.title}" for model in MODELS.values())
    parser = subparsers.add_parser(
        "demo",
        help="the main job: a KV cache to host pages and back, compared bit for bit",
        description=DESCRIPTION,
        epilog=f"models:\n{models}\n\nThe exit code is 0 only if every byte is right.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        choices=list(MODELS),
        default="llama3-8b",
        help="shape of the cache (default: llama3-8b)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        help="tokens in the cache, rounded up to whole pages (default: as many as make more "
        "than 1 GiB on a GPU, 512 on the emulated runtime)",
    )
    parser.add_argument(
        "--page-size", type=positive, default=16, help="tokens in a page (default: 16)"
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=LAYOUTS[0],
        help=f"layout of the host pool (default: {LAYOUTS[0]})",
    )
    parser.add_argument(
        "--path",
        choices=PATHS,
        help="path to ask for; auto is what kvsig would plan (default: batch, and auto where"
        " the runtime has no batches)",
    )
    parser.add_argument(
        "--seed", type=natural, default=0, help="seed of the pages and bytes (default: 0)"
    )
    parser.add_argument(
        "--runs", type=positive, default=7, help="timed runs each way, on a GPU (default: 7)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo on each runtime there is to run it on; 0 if every byte is right, else 1."""
    specs, preface = runtimes.choose()

    def say(text: str = "", indent: str = "") -> None:
        if not args.json:
            print(wrap(text, indent), flush=True)

    if preface:
        say(f"{preface} There is one run for each prototype of {runtimes.BATCH}.")
        say()
    results = []
    for spec in specs:
        with runtimes.bound(spec):
            results.append({"spec": spec} | run_one(args, say))
        say()
    exact = all(result["bit_exact"] for result in results)
    if args.json:
        arguments = {name: getattr(args, name) for name in ("model", "page_size", "layout", "seed")}
        arguments |= {"path_asked": args.path or "default", "bit_exact": exact, "runs": results}
        print(json.dumps(versions() | arguments, indent=2))
    elif exact:
        say(f"Every byte is right{f', on each of {len(specs)} ABIs' if len(specs) > 1 else ''}.")
    else:
        say("Some bytes are WRONG.")
    return 0 if exact else 1


def run_one(args: argparse.Namespace, say: Callable[[str, str], None]) -> dict[str, Any]:
    """Run the demo on the runtime that kvsig is bound to, and tell about it."""
    from kvsig.tools import demo

    def tell(label: str, text: str) -> None:
        say(f"{label:<10}{text}", " " * 10)

    model, runtime = MODELS[args.model], demo.bound_runtime()
    tokens = args.tokens or demo.default_tokens(model, runtime["emulated"])
    job = demo.Demo(model, tokens, args.page_size, args.layout, args.seed)
    tell("runtime", runtime_text(runtime))
    tell("library", runtime["library"])
    tell("function", runtime["function"])
    tell("model", model.title)
    tell(
        "cache",
        f"{count_text(job.tokens, 'token')} in {count_text(job.pages, 'page')} of "
        f"{args.page_size}, host pool {args.layout}: {bytes_text(job.bytes)} each way",
    )
    # The prototype is what is shown here, so its function is called where it can be.
    result = job.run(args.path or ("batch" if runtime["batches"] else "auto"), args.runs)
    for direction in WAYS:
        tell(direction, transfer_text(result, direction))
    wrong = result["wrong"]
    for text in wrong[:LISTED]:
        tell("WRONG", text)
    if len(wrong) > LISTED:
        tell("WRONG", f"and {count_text(len(wrong) - LISTED, 'more page')}")
    if not wrong:
        tell(
            "checked",
            f"{count_text(job.pages, 'page')} x {model.layers * model.tensors} tensors are right "
            f"on the host and back on the device; {count_text(job.spare['host'], 'host page')} and "
            f"{count_text(job.spare['device'], 'device page')} that had no part are untouched",
        )
    return (
        runtime
        | {"tokens": job.tokens, "pages": job.pages, "bytes": job.bytes}
        | result
        | {"wrong": wrong[:LISTED_JSON], "wrong_count": len(wrong), "bit_exact": not wrong}
    )


def runtime_text(runtime: dict[str, Any]) -> str:
    """Write versions and device of a runtime."""
    text = f"CUDA {format_version(runtime['runtime_version'])}"
    if runtime["emulated"]:
        return f"{text}, emulated"
    return f"{text}, driver {format_version(runtime['driver_version'])}, {runtime['device']}"


def transfer_text(result: dict[str, Any], direction: str) -> str:
    """Write what a transfer did: path, copies, calls, bytes, and speed on a GPU."""
    report = result[direction]
    text = (
        f"{report['path']} path: {count_text(report['copies'], 'copy')} in "
        f"{count_text(report['calls'], 'call')}, "
        f"{bytes_text(report['bytes'])}"
    )
    if report["reason"]:
        text += f" ({report['reason']})"
    if "gb_per_s" in report:
        most = result["one_copy"][direction]["gb_per_s"]
        text += (
            f"; {report['gb_per_s']:.1f} GB/s, {report['gb_per_s'] / most:.0%} of the "
            f"{most:.1f} GB/s of one big copy; {report['ms']:.2f} ms, of which the call took "
            f"{report['host_ms']:.2f} ms of the host's time"
        )
    return text
