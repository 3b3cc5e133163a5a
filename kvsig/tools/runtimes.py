"""Which CUDA runtime a command runs on: one rule for ``info``, ``demo`` and ``bench``.

What ``KVSIG_CUDART`` names is used. Where it is unset, the runtime that kvsig finds is used if
there is a GPU; else the emulated runtime, and the command says so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from kvsig import registry

__all__ = ["BATCH", "bound", "choose", "newest", "real_device"]

BATCH = "cudaMemcpyBatchAsync"


def choose() -> tuple[list[str | None], str]:
    """Choose the runtimes that show every prototype of the batch function.

    Returns
    -------
    specs : list of str or None
        Values for ``KVSIG_CUDART``, the oldest first; ``[None]`` is what kvsig finds by itself.
    preface : str
        What there is to say about the choice; empty where the rule did not have to step in.
    """
    if os.environ.get("KVSIG_CUDART"):
        return [None], ""
    import torch

    if torch.cuda.is_available():
        return [None], ""
    if torch.version.cuda is None:
        why = f"this torch ({torch.__version__}) is built without CUDA"
    else:
        why = "torch.cuda.is_available() is False"
    variants = registry.load().functions[BATCH].variants
    return [f"emulated:{registry.format_version(variant.since)}" for variant in variants], (
        f"There is no GPU to run on: {why}. The emulated CUDA runtime, which works in host "
        "memory, is used instead. No speed is reported: emulated. Another runtime can be named"
        " in KVSIG_CUDART."
    )


@contextlib.contextmanager
def bound(spec: str | None) -> Iterator[None]:
    """Bind one of the specs of `choose` for as long as it is needed."""
    from kvsig import _core

    if spec is None:
        yield
        return
    _core.rebind(spec)
    try:
        yield
    finally:
        _core.rebind(None)


@contextlib.contextmanager
def newest() -> Iterator[str]:
    """Bind what `choose` says, the newest where it is several; gives the preface."""
    specs, preface = choose()
    with bound(specs[-1]):
        yield preface


def real_device() -> bool:
    """Whether kvsig is bound to a real runtime, on a GPU that torch sees too.

    Raises
    ------
    ValueError
        If the runtime is a real one and torch sees no GPU.
    """
    import torch

    import kvsig
    from kvsig import _core

    if _core.is_emulated():
        return False
    if not torch.cuda.is_available():
        raise ValueError(
            f"{kvsig.info()['library']} is a real CUDA runtime, but torch sees no CUDA device: run"
            " on a machine with a GPU, or set KVSIG_CUDART=emulated:12.9"
        )
    return True
