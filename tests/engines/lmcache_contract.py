"""LMCache's planner of direct copies moves chunks through kvsig as LMCache's torch code does."""

from __future__ import annotations

import ast
import ctypes
import importlib
import math
import sys
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from stubs import Finder, need

from kvsig import _core, observe
from kvsig.emulated import Control
from kvsig.integrations import lmcache as integration

PLATFORM, FORMATS = "lmcache.v1.platform", "lmcache.v1.gpu_connector.kv_format"
PLANNER, REFERENCE = "lmcache.v1.multiprocess.object_group_transfer", "torch_ops.mp_mem_kernels"
LAYERS, BLOCKS, BLOCK, HEADS, DIM, CHUNK = 3, 32, 4, 2, 8, 16
#: What kvsig takes each number for, and the shape of its paged buffers.
LAYOUTS = {
    0: ("NB_NL_TWO_BS_NH_HS", [(BLOCKS, LAYERS, 2, BLOCK, HEADS, DIM)]),
    1: ("NL_X_TWO_NB_BS_NH_HS", [(2, BLOCKS, BLOCK, HEADS, DIM)] * LAYERS),
    2: ("NL_X_NB_TWO_BS_NH_HS", [(BLOCKS, 2, BLOCK, HEADS, DIM)] * LAYERS),
    3: ("NL_X_NB_BS_HS", [(BLOCKS, BLOCK, DIM)] * LAYERS),
    4: ("TWO_X_NL_X_NBBS_NH_HS", [(BLOCKS * BLOCK, HEADS, DIM)] * 2 * LAYERS),
    5: ("NL_X_NBBS_ONE_HS", [(BLOCKS * BLOCK, 1, DIM)] * LAYERS),
    9: ("TWO_X_NL_X_NB_BS_NH_HS", [(BLOCKS, BLOCK, HEADS, DIM)] * 2 * LAYERS),
}


def enums(stub: Path) -> dict[str, type[IntEnum]]:
    """Read the enumerations of a stub file."""
    found = {}
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ClassDef) and any(
            getattr(base, "id", "") == "IntEnum" for base in node.bases
        ):
            values = {
                line.targets[0].id: ast.literal_eval(line.value)  # type: ignore[attr-defined]
                for line in node.body
                if isinstance(line, ast.Assign)
            }
            found[node.name] = IntEnum(node.name, values)  # type: ignore[misc]
    return found


def refuse(*args: Any) -> None:
    raise RuntimeError(f"LMCache's own function was called with {args}: {observe.stats()}")


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Any:
    """Stand in for what makes tensors of addresses, which is LMCache's device's."""
    size = math.prod(shape) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def load(folder: Path) -> tuple[Any, Any, Any]:
    specs = folder / "lmcache/v1/gpu_connector/kv_format/specs"
    real = {f"{FORMATS}.specs.{file.stem}" for file in specs.glob("*.py")}
    real -= {f"{FORMATS}.specs.__init__"}
    real |= {f"{PLATFORM}.torch_ops.{name}" for name in ("mp_mem_kernels", "_kv_format")}
    real |= {f"{FORMATS}.types", PLANNER}
    native = enums(folder / "lmcache/lmcache_native.pyi")
    ops = SimpleNamespace(
        DirectCopyGroupSpec=refuse, DirectCopyObject=refuse, execute_direct_copy_transfer=refuse,
        batch_memcpy_supported=lambda: True,
    )  # fmt: skip
    given = {
        "lmcache": {"__version__": folder.name.rpartition("-")[2], "device_ops": ops},
        "lmcache.lmcache_native": {**native, "PageBufferShapeDesc": SimpleNamespace},
        "lmcache.v1.memory_allocators.lazy_memory_allocator": {
            "LazyMemoryAllocator": SimpleNamespace(PIN_CHUNK_SIZE=1 << 12)
        },
        f"{PLATFORM}.torch_ops._tensor_from_ptr": {"_tensor_from_ptr": tensor_at},
        "lmcache.v1.memory_management": {"GDSMemoryObject": type("GDS", (), {})},
    }
    Finder("lmcache", folder, real, given)
    planner = importlib.import_module(PLANNER)
    reference = importlib.import_module(f"{PLATFORM}.{REFERENCE}")
    return planner, reference.multi_layer_block_kv_transfer, native


def context(buffers: list[torch.Tensor], shape: Any, layout: Any, blocks: list[int]) -> Any:
    """Return what the planner asks of LMCache's cache context."""
    groups = SimpleNamespace(
        object_groups=[SimpleNamespace(kernel_group_indices=[0])],
        get_subchunk_sw_size_tokens=lambda group: CHUNK,
        get_attn_desc=lambda: SimpleNamespace(is_full_attention=lambda group: True),
    )
    return SimpleNamespace(
        lmcache_tokens_per_chunk=CHUNK, kv_layer_groups_manager=groups, device=torch.device("cpu"),
        calculate_num_blocks=lambda tokens, group: tokens // BLOCK,
        get_kernel_group_kv_pointer_list=lambda group: [b.data_ptr() for b in buffers],
        get_shape_desc=lambda group: shape, get_engine_kv_format=lambda group: layout,
        get_slots_per_chunk_in_sw=lambda group: CHUNK,
        get_kernel_group_offset_in_object=lambda objects, group: 0,
    )  # fmt: skip


def check_layout(planner: Any, reference: Any, native: Any, number: int) -> None:
    name, shapes = LAYOUTS[number]
    layout = native["EngineKVFormat"](number)
    need(layout.name == name, f"layout {number} is {layout.name}, not {name}")
    kinds, heads = (1, 1) if number in (3, 5) else (2, HEADS)
    shape = SimpleNamespace(
        kv_size=kinds, nl=LAYERS, nb=BLOCKS, bs=BLOCK, nh=heads, hs=DIM, element_size=2,
        block_stride_elems=0, dtype=torch.int16,
    )  # fmt: skip
    buffers = [torch.randint(-99, 99, each, dtype=torch.int16) for each in shapes]
    blocks = [9, 2, 3, 4, 30, 11, 0, 17]
    sizes = (2, kinds * LAYERS * CHUNK * heads * DIM)
    host, wanted = torch.zeros(sizes, dtype=torch.int16), torch.zeros(sizes, dtype=torch.int16)
    pointers = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.int64)
    objects = [
        SimpleNamespace(
            raw_tensor=row, data_ptr=row.data_ptr(), meta=SimpleNamespace(address=i * row.nbytes),
            get_size=lambda row=row: row.nbytes,
        )
        for i, row in enumerate(host)
    ]  # fmt: skip
    there, back = native["TransferDirection"].D2H, native["TransferDirection"].H2D
    given = context(buffers, shape, layout, blocks)
    planner.run_direct_transfer(given, [blocks], objects, 0, 0, there)
    wait()
    rows = [row.data_ptr() for row in wanted]
    reference(pointers, rows, blocks, "cpu", there, shape, CHUNK, layout, 0)
    need(torch.equal(host, wanted), f"{name}: objects are not as LMCache's own")
    before = [b.clone() for b in buffers]
    for buffer in buffers:
        buffer.zero_()
    planner.run_direct_transfer(given, [blocks], objects, 0, 2 * BLOCK, back)
    wait()
    got = [b.clone() for b in buffers]
    for buffer in buffers:
        buffer.zero_()
    reference(pointers, rows, blocks, "cpu", back, shape, CHUNK, layout, 2)
    need(all(map(torch.equal, got, buffers)), f"{name}: blocks are not as LMCache's own")
    need(any(b.any() for b in got) and not all(map(torch.equal, got, before)), "nothing was moved")


def wait() -> None:
    Control(_core.info()["library"]).synchronize()


def main() -> None:
    planner, reference, native = load(Path(sys.argv[1]))
    need(len(integration.install()) == 3, "LMCache's functions are not replaced")
    directions = {d.name: int(d) for d in native["TransferDirection"]}
    need(directions == {"H2D": 0, "D2H": 1}, f"directions are {directions}")
    for number in LAYOUTS:
        check_layout(planner, reference, native, number)
    served = observe.stats()["integrations"]["lmcache"]
    need(served["calls"] == 2 * len(LAYOUTS) and not served["passed_on"], f"{observe.stats()}")


if __name__ == "__main__":
    main()
