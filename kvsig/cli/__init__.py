"""The command line: ``kvsig`` and ``python -m kvsig``.

A subcommand is a module of this package with a function ``register(subparsers)``, which adds
its parser and sets ``run``, a function that takes the parsed arguments and returns the exit
code. Exit codes: 0 for success, 1 for a failure that was reported, 2 for wrong arguments, 130
where it was interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence

import kvsig
from kvsig.cli.arguments import UsageError

__all__ = ["COMMANDS", "main"]

#: Modules of this package that are subcommands, in the order of the help text.
COMMANDS = ("info", "demo", "check", "bench", "calibrate")
FAILED, WRONG_ARGUMENTS = 1, 2

EPILOG = """\
environment:
  KVSIG_CUDART    the CUDA runtime to use: a path to a libcudart, or emulated:12.9
                  (or another version) for the emulated runtime, which needs no GPU;
                  unset: the libcudart that torch loads, or where there is no GPU
                  the emulated runtime
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
    open_closed_streams()
    args = argparse.Namespace(command=None, traceback=False)
    try:
        parser = build_parser()
        args = parser.parse_args(argv)
        if args.run is None:
            parser.print_help()
            return 0
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
    except UsageError as error:
        return fail(args, error, WRONG_ARGUMENTS)
    except (kvsig.CudaError, kvsig.BindError, ValueError, OSError) as error:
        if args.traceback:
            raise
        return fail(args, error)


def open_closed_streams() -> None:
    """Point stdout and stderr elsewhere where they were closed (``kvsig info >&-``).

    Python has None for them then, and the next file that is opened would get their number.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))


def show_warning(message: Warning | str, *where: object, **more: object) -> None:
    """Print a warning without the line of source that it comes from."""
    print(f"kvsig: warning: {message}", file=sys.stderr)


def fail(args: argparse.Namespace, what: object, code: int = FAILED) -> int:
    """Say on stderr why a command failed."""
    print(f"kvsig {args.command}: {what}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """Make the parser with every subcommand that is installed."""
    parser = argparse.ArgumentParser(
        prog="kvsig",
        description="Moves pages of a KV cache between GPU and host memory by batched CUDA copies.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvsig {kvsig.__version__}")
    parser.set_defaults(run=None, command=None, traceback=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"{__name__}.{name}").register(subparsers)
    for subparser in subparsers.choices.values():
        subparser.add_argument(
            "--traceback", action="store_true", help="show Python's traceback of an error"
        )
    return parser
