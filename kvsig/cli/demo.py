"""``kvsig demo``: the main job, checked byte by byte, as text or JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvsig._commit import commit
from kvsig.models import MODELS, Model

from . import wrap

if TYPE_CHECKING:
    from kvsig.demo import Cache

__all__ = ["register"]

LAYOUTS = ("page_first_direct", "layer_first")
PATHS = ("auto", "batch", "strided", "loop")
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


def natural(text: str, least: int = 0) -> int:
    """Read an argument that has to be a whole number, not negative and not huge."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not least <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"{value} is not from {least} to {(1 << 32) - 1}")
    return value


def positive(text: str) -> int:
    """Read an argument that has to be a whole number of at least 1."""
    return natural(text, least=1)


def run(args: argparse.Namespace) -> int:
    """Run the demo on each runtime there is to run it on.

    Returns
    -------
    int
        0 if every byte is right, else 1.
    """
    from kvsig import _core, demo

    model = MODELS[args.model]
    specs, preface = demo.runtimes()

    def say(text: str = "") -> None:
        if not args.json:
            print(text, flush=True)

    if preface:
        say(wrap(preface))
        say()
    results = []
    try:
        for spec in specs:
            if spec is not None:
                _core.rebind(spec)
            results.append(run_one(args, model, spec, say))
            say()
    finally:
        if specs != [None]:
            _core.rebind(None)
    exact = all(result["bit_exact"] for result in results)
    if args.json:
        print(json.dumps(provenance(args) | {"bit_exact": exact, "runs": results}, indent=2))
    elif exact:
        say(f"Every byte is right{f', on each of {len(specs)} ABIs' if len(specs) > 1 else ''}.")
    else:
        say("Some bytes are WRONG.")
    return 0 if exact else 1


def run_one(
    args: argparse.Namespace, model: Model, spec: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run the demo on the runtime that kvsig is bound to, and tell about it."""
    from kvsig import demo

    runtime = demo.bound_runtime(spec)
    cache = demo.Cache(
        model=model,
        tokens=args.tokens or demo.default_tokens(model, runtime["emulated"]),
        page_size=args.page_size,
        layout=args.layout,
        seed=args.seed,
        emulated=runtime["emulated"],
    )
    say_before(cache, runtime, say)
    with demo.Progress() as progress:
        # The prototype is what is shown here, so its function is called where it can be.
        path = args.path or ("batch" if runtime["batches"] else "auto")
        job = demo.Job(cache, path=path, runs=args.runs, progress=progress)
        result = job.run()
    for direction in ("offload", "load"):
        say_field(say, direction, transfer_text(result, direction))
    wrong = result["wrong"]
    for text in wrong[:LISTED]:
        say_field(say, "WRONG", text)
    if len(wrong) > LISTED:
        say_field(say, "WRONG", f"and {len(wrong) - LISTED:,} more pages")
    if not wrong:
        say_field(
            say,
            "checked",
            f"{cache.pages:,} pages x {len(cache.planes())} tensors are right on the host and "
            f"back on the device; {len(cache.host_spare)} host and {cache.device_spare} device "
            "pages that had no part are untouched",
        )
    return (
        runtime
        | {"tokens": cache.tokens, "pages": cache.pages, "bytes": cache.bytes}
        | result
        | {"wrong": wrong[:LISTED_JSON], "wrong_count": len(wrong), "bit_exact": not wrong}
    )


def say_before(cache: Cache, runtime: dict[str, Any], say: Callable[[str], None]) -> None:
    """Tell what will run, and on what."""
    from kvsig import demo
    from kvsig.registry import format_version

    text = f"CUDA {format_version(runtime['runtime_version'])}"
    if runtime["emulated"]:
        text += ", emulated"
    else:
        driver = format_version(runtime["driver_version"])
        text += f", driver {driver}, {runtime['device']}"
    say_field(say, "runtime", text)
    say_field(say, "library", runtime["library"])
    say_field(say, "function", runtime["function"])
    say_field(say, "model", cache.model.title)
    say_field(
        say,
        "cache",
        f"{cache.tokens:,} tokens in {cache.pages:,} pages of {cache.page_size}, host pool "
        f"{cache.layout}: {demo.size_text(cache.bytes)} each way",
    )


def say_field(say: Callable[[str], None], label: str, text: str) -> None:
    """Print a label and its text, wrapped."""
    say(wrap(f"{label:<10}{text}", " " * 10))


def transfer_text(result: dict[str, Any], direction: str) -> str:
    """Write what a transfer did: path, copies, calls, bytes, and speed on a GPU."""
    from kvsig import demo

    report = result[direction]
    text = (
        f"{report['path']} path: {report['copies']:,} copies in {report['calls']:,} calls, "
        f"{demo.size_text(report['bytes'])}"
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


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Say what made a result: machine, versions, commit and arguments."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "model": args.model,
        "page_size": args.page_size,
        "layout": args.layout,
        "path_asked": args.path or "default",
        "seed": args.seed,
    }
