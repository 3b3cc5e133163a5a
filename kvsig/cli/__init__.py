"""The command line: ``kvsig`` and ``python -m kvsig``.

A subcommand is a module of this package with a function ``register(subparsers)``, which adds
its parser and sets ``run``, a function that takes the parsed arguments and returns the exit
code: 0 for success, 1 for a failure that was reported, 2 (argparse's) for wrong arguments.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import TextIO

import kvsig

__all__ = ["COMMANDS", "main"]

#: Modules of this package that are subcommands, in the order of the help text. One that is not
#: part of this installation is left out.
COMMANDS = ("info", "demo", "check", "bench", "calibrate")

EPILOG = """\
environment:
  KVSIG_CUDART    the CUDA runtime to use: a path to a libcudart, or emulated:12.9
                  (or another version) for the emulated runtime, which needs no GPU;
                  unset: the libcudart that torch loads
  KVSIG_ROUTE     where batches go: runtime (libcudart's function), driver (the driver's
                  own) or auto (the default: the driver's where libcudart has none)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; default ``sys.argv[1:]``.

    Returns
    -------
    int
        Exit code.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.run is None:
        parser.print_help()
        return 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            code: int = args.run(args)
        sys.stdout.flush()
        return code
    except ImportError as error:
        # Not built, or built from another registry: nothing but a rebuild helps, and the core's
        # own exceptions cannot be had either.
        if args.traceback or not (error.name or "").startswith("kvsig."):
            raise
        if not isinstance(error, ModuleNotFoundError):
            return fail(args, error)  # it says itself how to rebuild
        return fail(args, f"{error}\nBuild kvsig: python setup.py build_ext --inplace")
    except KeyboardInterrupt:
        if args.traceback:
            raise
        print("\nkvsig: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader has gone (kvsig info | head). Python would complain once more when it
        # flushes stdout at exit, so stdout is pointed elsewhere first.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (kvsig.CudaError, kvsig.BindError, ValueError, OSError) as error:
        if args.traceback:
            raise
        return fail(args, error)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning without the line of source that it comes from."""
    print(f"kvsig: warning: {message}", file=sys.stderr)


def fail(args: argparse.Namespace, what: object) -> int:
    """Say on stderr why a command failed."""
    print(f"kvsig {args.command}: {what}", file=sys.stderr)
    return 1


def build_parser() -> argparse.ArgumentParser:
    """Make the parser with every subcommand that is installed."""
    parser = argparse.ArgumentParser(
        prog="kvsig",
        description="Moves pages of a KV cache between GPU and host memory by batched CUDA copies.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=None, command=None, traceback=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        module_name = f"{__name__}.{name}"
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name:
                raise
            continue
        module.register(subparsers)
    for subparser in dict.fromkeys(subparsers.choices.values()):
        subparser.add_argument(
            "--traceback", action="store_true", help="show Python's traceback of an error"
        )
    return parser


def wrap(text: str, indent: str = "", width: int | None = None) -> str:
    """Wrap a sentence for the terminal, every line but the first behind `indent`."""
    if width is None:
        width = terminal_width()
    return textwrap.fill(
        text,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def terminal_width() -> int:
    """Columns to write for: those of the terminal, between 60 and 100."""
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        columns = 100
    return max(60, min(columns, 100))
