"""Where a program runs that is to work with a GPU and without one."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvsig import registry
from kvsig.emulated.control import Stream

if TYPE_CHECKING:
    import torch

__all__ = ["start"]

BATCH = "cudaMemcpyBatchAsync"


def start() -> tuple[torch.device, Any]:
    """Take the GPU; where there is none, bind kvsig to the emulated runtime.

    A runtime that ``KVSIG_CUDART`` names, or that kvsig is bound to already, is kept: with an
    emulated one the device is the CPU beside a GPU, too. Otherwise the emulated runtime is that of
    the newest prototype of cudaMemcpyBatchAsync, for this process.

    Returns
    -------
    device : torch.device
        Where tensors of the device's side belong: torch's current CUDA device, or the CPU.
    stream : torch.cuda.Stream or Stream
        A new one, to be given as ``stream=`` and to be waited for by its ``synchronize``.

    Raises
    ------
    ValueError
        ``KVSIG_CUDART`` names a real CUDA runtime, and torch sees no GPU.
    BindError
        ``KVSIG_CUDART`` names a runtime that cannot be bound.

    Examples
    --------
    >>> import kvsig
    >>> device, stream = kvsig.emulated.start()
    """
    import torch

    core = import_module("kvsig._core")
    gpu = torch.cuda.is_available()
    named = os.environ.get("KVSIG_CUDART")
    if not gpu and not named and not _is_bound_to_one(core):
        newest = registry.load().functions[BATCH].variants[-1].since
        core.rebind(f"emulated:{registry.format_version(newest)}")
    if core.is_emulated():
        return torch.device("cpu"), Stream()
    if not gpu:
        raise ValueError(
            f"KVSIG_CUDART={named} is a real CUDA runtime, but torch sees no CUDA device: unset it,"
            " or set KVSIG_CUDART=emulated:13.0"
        )
    return torch.device("cuda", torch.cuda.current_device()), torch.cuda.Stream()


def _is_bound_to_one(core: Any) -> bool:
    """Whether kvsig has an emulated runtime already; asking binds what there is."""
    try:
        return bool(core.is_emulated())
    except import_module("kvsig._errors").BindError:
        return False
