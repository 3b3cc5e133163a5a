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


class Engine:
    """A method that loads layer by layer and records events, as SGLang's engine has one."""

    def submit_host_to_device(
        self, transfers: Any, *, transfer_layer_id_max: int, on_layer_done: Any = None
    ) -> str:
        for layer in range(transfer_layer_id_max):
            for transfer in transfers:
                transfer(layer)
            if on_layer_done is not None:
                on_layer_done(layer)
        return "completion"


def filled(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Return a tensor of bytes by chance that are numbers of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


class Handler:
    """Blocks one way between GPU tensors and host tensors of chunks, as vLLM's handlers do it.

    Tensors are int8 (blocks, page) on the GPU and (chunks, blocks a chunk x page) on the host,
    whose rows may have a pitch. A request has groups of blocks; each begins `skip` blocks into
    its first chunk. References say which tensors a group has, and how much of a page counts.
    """

    def __init__(
        self,
        gpu: list[torch.Tensor],
        cpu: list[torch.Tensor],
        per_chunk: int,
        references: list[list[tuple[int, int]]],
        gpu_to_cpu: bool,
        swap: Callable[..., None],
    ) -> None:
        self.gpu_to_cpu = gpu_to_cpu
        self.src_tensors, self.dst_tensors = (gpu, cpu) if gpu_to_cpu else (cpu, gpu)
        self.per_chunk, self.references = per_chunk, references
        self._swap_blocks_batch = swap

    def transfer(
        self,
        blocks: list[list[int]],
        chunks: list[list[int]],
        skips: list[int],
        wait: Callable[[], object] | None = None,
    ) -> list[tuple[int, int, int, int, int]]:
        """Copy, and return (tensor, block, chunk, position in the chunk, bytes) of each block."""
        gpu, cpu = self.src_tensors, self.dst_tensors
        if not self.gpu_to_cpu:
            gpu, cpu = cpu, gpu
        moved = []
        for group, references in enumerate(self.references):
            for tensor, size in references:
                for i, block in enumerate(blocks[group]):
                    chunk, at = divmod(skips[group] + i, self.per_chunk)
                    moved.append((tensor, block, chunks[group][chunk], at, size))
        columns = [[], [], []]  # type: list[list[int]]
        for tensor, block, chunk, at, size in moved:
            page = gpu[tensor].shape[1]
            near = gpu[tensor].data_ptr() + block * gpu[tensor].stride(0)
            far = cpu[tensor].data_ptr() + chunk * cpu[tensor].stride(0) + at * page
            pair = (near, far) if self.gpu_to_cpu else (far, near)
            for column, value in zip(columns, (*pair, size), strict=True):
                column.append(value)
        # Descriptor buffers are larger than what they hold, and are written to afterwards.
        buffers = [torch.empty(len(moved) + 5, dtype=torch.int64) for _ in range(3)]
        for buffer, column in zip(buffers, columns, strict=True):
            buffer[: len(moved)] = torch.tensor(column, dtype=torch.int64)
        if moved:
            slices = [buffer[: len(moved)] for buffer in buffers]
            self._swap_blocks_batch(*slices, is_src_access_order_any=not self.gpu_to_cpu)
        if wait:
            wait()
        for buffer in buffers:
            buffer.fill_(-1)
        return moved
