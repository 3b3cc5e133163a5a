"""Stand-ins for engines: packages of our own with the names and seams that count."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
import torch


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> types.ModuleType:
    """Put a module in place until the test ends."""
    made = types.ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    parent, _, child = name.rpartition(".")
    if parent:
        monkeypatch.setattr(sys.modules[parent], child, made, raising=False)
    else:
        made.__path__ = []  # type: ignore[attr-defined]
    return made


class HookType(Enum):
    AROUND = "around"


class Hooks:
    """A registry of hooks that rebinds every module's name of the original, as SGLang's does."""

    waiting: list[tuple[str, Callable[..., Any]]] = []

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
        assert hook_type is HookType.AROUND
        cls.waiting.append((target, hook))

    @classmethod
    def apply(cls) -> None:
        for target, hook in cls.waiting:
            place, _, name = target.rpartition(".")
            original = getattr(sys.modules[place], name)

            wrapper = _closed(hook, original)
            for loaded in list(sys.modules.values()):
                for key, value in list(vars(loaded).items()) if loaded else []:
                    if value is original:
                        setattr(loaded, key, wrapper)
        cls.waiting.clear()


def _closed(hook: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return wrapper


class Originals:
    """SGLang's functions by their contract, with torch alone, and how often each was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def functions(self) -> dict[str, Callable[..., Any]]:
        calls = self.calls

        def transfer_kv_direct(
            src_layers: Any, dst_layers: Any, src_indices: Any, dst_indices: Any, page_size: int
        ) -> None:
            calls.append("transfer_kv_direct")
            if page_size <= 0 or src_indices.numel() % page_size:
                raise RuntimeError("page size")
            for src, dst in zip(src_layers, dst_layers, strict=True):
                dst[dst_indices] = src[src_indices].to(dst.dtype)

        def transfer_kv_per_layer_direct_pf_lf(
            src_ptrs: Any, dst_ptrs: Any, src_indices: Any, dst_indices: Any, layer_id: int,
            page_size: int,
        ) -> None:  # fmt: skip
            calls.append("transfer_kv_per_layer_direct_pf_lf")
            count = len(dst_ptrs) // len(src_ptrs)
            for i, dst in enumerate(dst_ptrs):
                pool = src_ptrs[i // count]
                for s, d in zip(src_indices[::page_size], dst_indices[::page_size], strict=True):
                    page = pool[s // page_size, layer_id + i % count]
                    dst[d : d + page_size] = page.reshape(dst[d : d + page_size].shape)

        def transfer_kv_all_layer_direct_lf_pf(
            src_ptrs: Any, dst_ptrs: Any, src_indices: Any, dst_indices: Any, page_size: int
        ) -> None:
            calls.append("transfer_kv_all_layer_direct_lf_pf")
            count = len(src_ptrs) // len(dst_ptrs)
            for i, src in enumerate(src_ptrs):
                pool = dst_ptrs[i // count]
                for s, d in zip(src_indices[::page_size], dst_indices[::page_size], strict=True):
                    page = pool[d // page_size, i % count]
                    page.copy_(src[s : s + page_size].reshape(page.shape))

        def transfer_embedding_ranges_direct(
            src: Any, dst: Any, src_starts: Any, dst_starts: Any, lengths: Any
        ) -> None:
            calls.append("transfer_embedding_ranges_direct")
            for s, d, n in zip(src_starts, dst_starts, lengths, strict=True):
                if s + n > len(src) or d + n > len(dst):
                    raise RuntimeError("range")
                dst[d : d + n] = src[s : s + n]

        def transfer_kv_per_layer(*args: Any, **kwargs: Any) -> None:
            calls.append("transfer_kv_per_layer")

        return {
            f.__name__: f
            for f in (
                transfer_kv_direct,
                transfer_kv_per_layer_direct_pf_lf,
                transfer_kv_all_layer_direct_lf_pf,
                transfer_embedding_ranges_direct,
                transfer_kv_per_layer,
            )
        }


def filled(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Return a tensor of bytes by chance that are numbers of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)
