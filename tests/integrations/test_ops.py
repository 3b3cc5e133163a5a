"""Transfers as torch operators, in eager programs and in compiled ones."""

from __future__ import annotations

import pytest
import torch
from standins import filled

from kvsig import PagedKVCache, ops
from kvsig.emulated import Control

LAYERS, PAGE = 2, 4


@pytest.fixture
def parts(control: Control) -> tuple[int, list[torch.Tensor], torch.Tensor]:
    layers = [filled(32, 8, seed=i) for i in range(LAYERS)]
    host = filled(10, LAYERS, PAGE, 8, seed=7)
    return ops.register(PagedKVCache(layers, host, page_size=PAGE), layers), layers, host


def pages(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def test_load_and_offload(parts: tuple, control: Control) -> None:
    handle, layers, host = parts
    torch.ops.kvsig.load(handle, layers, pages(1, 9), pages(0, 3))
    control.synchronize()
    for i, layer in enumerate(layers):
        assert torch.equal(layer[:4], host[1, i]) and torch.equal(layer[12:16], host[9, i])
    torch.ops.kvsig.offload(handle, layers, pages(0, 3), pages(5, 6))
    control.synchronize()
    assert torch.equal(host[5], host[1]) and torch.equal(host[6], host[9])


@pytest.mark.parametrize("name", ["load", "offload"])
def test_opcheck(parts: tuple, control: Control, name: str) -> None:
    handle, layers, _ = parts
    operator = getattr(torch.ops.kvsig, name).default
    # The check makes copies of arguments to see what is written; the memory is the cache's own.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    known = ops._caches[handle]
    try:
        ops._known, before = (lambda *_: known[0]), ops._known
        result = torch.library.opcheck(
            operator, (handle, layers, pages(1, 2), pages(3, 4)), test_utils=checks
        )
    finally:
        ops._known = before
        control.synchronize()
    assert result == dict.fromkeys(checks, "SUCCESS")


def test_copies_of_the_tensors_are_refused_by_name(parts: tuple) -> None:
    handle, layers, _ = parts
    with pytest.raises(ValueError, match=r"layers\[1\] is at 0x.* a compiler may have copied it"):
        torch.ops.kvsig.load(handle, [layers[0], layers[1].clone()], pages(1), pages(0))
    with pytest.raises(ValueError, match="layers has 1 tensors, the cache has 2"):
        torch.ops.kvsig.load(handle, layers[:1], pages(1), pages(0))


def test_bad_registrations() -> None:
    with pytest.raises(TypeError, match="must be a PagedKVCache, not int"):
        ops.register(3, [])
    with pytest.raises(ValueError, match="no cache is registered as 99999"):
        ops.unregister(99999)
    with pytest.raises(ValueError, match="no cache is registered as 99999"):
        torch.ops.kvsig.load(99999, [torch.zeros(1)], pages(0), pages(0))


def test_a_compiled_program_keeps_an_offload(parts: tuple, control: Control) -> None:
    """Nothing that it returns depends on an offload, and yet it is made."""
    handle, layers, host = parts
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graph.graph.eliminate_dead_code()
        graph.recompile()
        seen.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def step(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        torch.ops.kvsig.offload(handle, layers, source, target)
        return source + 1

    assert torch.equal(step(pages(2), pages(8)), pages(3)) and len(seen) == 1
    control.synchronize()
    assert torch.equal(host[8, 1], layers[1][8:12])
