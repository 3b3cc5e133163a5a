"""Moves pages of KV caches between GPU and host memory, on every CUDA runtime.

Importing this package touches neither CUDA nor torch: each public name is imported
when it is first used, and the CUDA runtime is bound at the first call.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsig import emulated as emulated
    from kvsig import observe as observe
    from kvsig import registry as registry
    from kvsig._calls import call  # written by the build: its functions and parameters
    from kvsig._core import Report, info
    from kvsig._errors import BindError, CudaError
    from kvsig.cache import PagedKVCache
    from kvsig.copies import copy_batch
    from kvsig.observe import stats
    from kvsig.registry import RegistryError

__version__ = "0.1.0"

__all__ = [
    "BindError",
    "CudaError",
    "PagedKVCache",
    "RegistryError",
    "Report",
    "__version__",
    "call",
    "copy_batch",
    "emulated",
    "info",
    "observe",
    "registry",
    "stats",
]

# Public name -> the module that has it.
_HOME = {
    "BindError": "_errors",
    "CudaError": "_errors",
    "PagedKVCache": "cache",
    "RegistryError": "registry",
    "Report": "_core",
    "call": "call",
    "copy_batch": "copies",
    "emulated": "emulated",
    "info": "_core",
    "observe": "observe",
    "registry": "registry",
    "stats": "observe",
}

_MODULES = ("emulated", "observe", "registry")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvsig' has no attribute {name!r}")
    home = importlib.import_module(f"kvsig.{_HOME[name]}")
    value = home if name in _MODULES else getattr(home, name)
    globals()[name] = value  # found once, then an ordinary attribute
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
