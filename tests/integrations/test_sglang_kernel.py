"""SGLang's kernel functions: token numbers on the GPU, moved by the page-copy kernel."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standins import Engine, filled, module

from kvsig import kernel, observe
from kvsig.emulated import Control
from kvsig.integrations import sglang as integration
from kvsig.integrations.sglang import launches, layered

LAYERS, PAGE, HEADS, DIM, TOKENS = 3, 4, 2, 8, 48
ITEM = HEADS * DIM * 2
IO, JIT = "sgl_kernel.kvcacheio", integration._HICACHE[0]
SRC = [8, 9, 10, 11, 40, 41, 42, 43, 3]
DST = [20, 21, 22, 23, 0, 1, 2, 3, 47]


class Gpu(torch.Tensor):
    """Stands for a tensor on the GPU: on the emulated runtime its memory is the host's."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def on_gpu(values: Any, dtype: torch.dtype = torch.int64) -> Any:
    return torch.as_tensor(values, dtype=dtype).as_subclass(Gpu)


def table(tensors: Any) -> torch.Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.uint64)


class Pools:
    """K's and V's layers on the device and a host pool of one layout, with room for every byte."""

    def __init__(self, control: Control, layout: str, kinds: int = 2, registered: bool = True):
        self.layout, self.kinds = layout, kinds
        self.device = [
            [filled(TOKENS, HEADS, DIM, seed=10 * k + i) for i in range(LAYERS)]
            for k in range(kinds)
        ]
        shape = {
            "lf": (LAYERS, TOKENS, HEADS, DIM),
            "pf": (TOKENS, LAYERS, HEADS, DIM),
            "ph": (TOKENS // PAGE, HEADS, PAGE, LAYERS, DIM),
        }[layout]
        self.host = [filled(*shape, seed=90 + k) for k in range(kinds)]
        for tensor in itertools.chain(*self.device):
            control.mark_device(tensor.data_ptr(), tensor.nbytes)
        for tensor in self.host if registered else ():
            control.mark_host(tensor.data_ptr(), tensor.nbytes)

    def rows(self, kind: int, layer: int) -> torch.Tensor:
        """A layer of the host pool as (tokens, heads, dim); for heads apart a copy."""
        pool = self.host[kind]
        if self.layout == "lf":
            return pool[layer]
        if self.layout == "pf":
            return pool[:, layer]
        return pool[:, :, :, layer].transpose(1, 2).reshape(TOKENS, HEADS, DIM)

    def put(self, kind: int, layer: int, rows: torch.Tensor) -> None:
        if self.layout == "ph":
            heads = rows.view(TOKENS // PAGE, PAGE, HEADS, DIM).transpose(1, 2)
            self.host[kind][:, :, :, layer] = heads
        else:
            self.rows(kind, layer)[:] = rows

    def everything(self) -> list[torch.Tensor]:
        return [t.clone() for t in [*itertools.chain(*self.device), *self.host]]

    def same(self, wanted: list[torch.Tensor]) -> bool:
        return all(map(torch.equal, self.everything(), wanted))

    def expected(self, load: bool, layers: Any = range(LAYERS)) -> list[torch.Tensor]:
        before = self.everything()
        for kind, layer in itertools.product(range(self.kinds), layers):
            device, rows = self.device[kind][layer], self.rows(kind, layer).clone()
            if load:
                device[DST] = rows[SRC]
            else:
                rows[DST] = device[SRC]
                self.put(kind, layer, rows)
        after = self.everything()
        for tensor, old in zip([*itertools.chain(*self.device), *self.host], before, strict=True):
            tensor.copy_(old)
        return after

    def load(self, name: str, layer: int) -> dict[str, Any]:
        """Arguments of a load of one layer."""
        device = [kind[layer] for kind in self.device]
        hosts = [pool[layer] if self.layout == "lf" else pool for pool in self.host]
        if "hicache" in name:
            hosts = [self.rows(kind, layer) for kind in range(self.kinds)]
            if self.kinds == 1:
                return {"cache_dst": device[0], "cache_src": hosts[0], "element_dim": HEADS * DIM}
            return {
                "k_cache_dst": device[0], "v_cache_dst": device[1], "k_cache_src": hosts[0],
                "v_cache_src": hosts[1], "element_dim": HEADS * DIM, "page_size": PAGE,
            }  # fmt: skip
        more: dict[str, Any] = {"item_size": ITEM}
        if self.layout != "lf":
            more |= {"layer_id": layer, "src_layout_dim": LAYERS * ITEM}
        if self.layout == "ph":
            more |= {"page_size": PAGE, "head_num": HEADS}
        if self.kinds == 1:
            return {"src": hosts[0], "dst": device[0], **more}
        return {
            "src_k": hosts[0], "dst_k": device[0], "src_v": hosts[1], "dst_v": device[1], **more
        }  # fmt: skip

    def offload(self, name: str) -> dict[str, Any]:
        """Arguments of an offload of all layers."""
        near = [table(kind) for kind in self.device]
        views = [table(self.rows(k, i) for i in range(LAYERS)) for k in range(self.kinds)]
        if "staged" in name:
            staging = torch.zeros(PAGE, LAYERS, HEADS, DIM)
            found: dict[str, Any] = {"page_size": 1}
            if self.kinds == 1:
                return found | {"ptr_src": near[0], "staging": staging, "dst": self.host[0]}
            return found | {
                "k_ptr_src": near[0], "v_ptr_src": near[1], "staging_k": staging,
                "staging_v": staging, "dst_k": self.host[0], "dst_v": self.host[1],
            }  # fmt: skip
        if "hicache" in name:
            far = LAYERS * ITEM if self.layout == "pf" else ITEM
            if self.kinds == 1:
                return {
                    "ptr_dst": views[0], "ptr_src": near[0], "cache_src_stride_bytes": ITEM,
                    "cache_dst_stride_bytes": far, "element_size": ITEM,
                }  # fmt: skip
            return {
                "k_ptr_dst": views[0], "v_ptr_dst": views[1], "k_ptr_src": near[0],
                "v_ptr_src": near[1], "kv_cache_src_stride_bytes": ITEM,
                "kv_cache_dst_stride_bytes": far, "element_size": ITEM,
            }  # fmt: skip
        more: dict[str, Any] = {"item_size": ITEM, "num_layers": LAYERS}
        if self.layout != "lf":
            more["dst_layout_dim"] = LAYERS * ITEM
        if self.layout == "ph":
            more |= {"page_size": PAGE, "head_num": HEADS}
        if self.kinds == 1:
            to = {"dst_layers": views[0]} if self.layout == "lf" else {"dst": self.host[0]}
            return {"src_layers": near[0], **to, **more}
        names = ("dst_k_layers", "dst_v_layers") if self.layout == "lf" else ("dst_k", "dst_v")
        to = dict(zip(names, views if self.layout == "lf" else self.host, strict=True))
        return {"src_k_layers": near[0], "src_v_layers": near[1], **to, **more}


def indices(name: str, src: Any = SRC, dst: Any = DST) -> dict[str, Any]:
    near, far = on_gpu(src), on_gpu(dst)
    if "staged" in name:
        return {"src_indices": near, "dst_indices": torch.tensor(dst)}
    if "hicache" in name:
        return {"indices_src": near, "indices_dst": far}
    return {"src_indices": near, "dst_indices": far}


LOADS = [
    ("transfer_kv_per_layer", "lf", 2), ("transfer_kv_per_layer_pf_lf", "pf", 2),
    ("transfer_kv_per_layer_ph_lf", "ph", 2), ("transfer_kv_per_layer_mla", "lf", 1),
    ("transfer_kv_per_layer_mla_pf_lf", "pf", 1), ("transfer_hicache_one_layer", "lf", 2),
    ("transfer_hicache_one_layer", "pf", 2), ("transfer_hicache_one_layer_mla", "pf", 1),
]  # fmt: skip
OFFLOADS = [
    ("transfer_kv_all_layer", "lf", 2), ("transfer_kv_all_layer_lf_pf", "pf", 2),
    ("transfer_kv_all_layer_lf_ph", "ph", 2), ("transfer_kv_all_layer_mla", "lf", 1),
    ("transfer_kv_all_layer_mla_lf_pf", "pf", 1), ("transfer_hicache_all_layer", "lf", 2),
    ("transfer_hicache_all_layer", "pf", 2), ("transfer_hicache_all_layer_mla", "pf", 1),
    ("transfer_hicache_all_layer_staged_lf_pf", "pf", 2),
    ("transfer_hicache_all_layer_mla_staged_lf_pf", "pf", 1),
]  # fmt: skip


@pytest.fixture
def served(
    sglang: SimpleNamespace, control: Control, stream: int, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """All functions of both modules, with kvsig installed; originals only say that they ran."""

    def original(name: str) -> Any:
        def function(*args: Any, **kwargs: Any) -> None:
            sglang.calls.append(name)

        function.__name__ = name
        return function

    names = {name for name, _, _ in LOADS + OFFLOADS}
    for name in names:
        if name.startswith("transfer_kv"):
            setattr(sglang.io, name, original(name))
    for part in ("sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.kvcache"):
        module(monkeypatch, part)
    jit = {name: original(name) for name in names if "hicache" in name}
    sglang.jit = module(monkeypatch, JIT, **jit)
    sglang.control, sglang.stream = control, stream
    integration.install()
    return sglang


def run(served: SimpleNamespace, name: str, **kwargs: Any) -> None:
    getattr(served.jit if "hicache" in name else served.io, name)(**kwargs)  # kwargs keep numbers
    served.control.synchronize(served.stream)


@pytest.mark.parametrize(("name", "layout", "kinds"), LOADS)
def test_load(served: SimpleNamespace, name: str, layout: str, kinds: int) -> None:
    pools = Pools(served.control, layout, kinds)
    for layer in range(LAYERS):
        wanted = pools.expected(True, [layer])
        run(served, name, **pools.load(name, layer), **indices(name))
        assert served.calls == [], observe.stats()["passed_on"]
        assert pools.same(wanted)
    assert observe.stats()["paths"]["kernel"]["cuda_calls"] == LAYERS


@pytest.mark.parametrize(("name", "layout", "kinds"), OFFLOADS)
def test_offload(served: SimpleNamespace, name: str, layout: str, kinds: int) -> None:
    pools = Pools(served.control, layout, kinds)
    wanted = pools.expected(False)
    for _ in range(2):
        run(served, name, **pools.offload(name), **indices(name))
        assert served.calls == [], observe.stats()["passed_on"]
        assert pools.same(wanted)
    assert observe.stats()["paths"]["kernel"]["cuda_calls"] == 2


NAME = "transfer_kv_per_layer_pf_lf"


class TestNumbers:
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_of_either_width(self, served: SimpleNamespace, dtype: torch.dtype) -> None:
        pools = Pools(served.control, "pf")
        wanted = pools.expected(True, [1])
        given = {"src_indices": on_gpu(SRC, dtype), "dst_indices": on_gpu(DST, dtype)}
        run(served, NAME, **pools.load(NAME, 1), **given, block_quota=8)
        assert pools.same(wanted) and served.calls == []

    def test_are_read_when_the_stream_comes_to_them(self, served: SimpleNamespace) -> None:
        pools = Pools(served.control, "pf")
        wanted = pools.expected(True, [1])
        given = indices(NAME, [0] * len(SRC), DST)
        run(served, NAME, **pools.load(NAME, 1), **indices(NAME, [], []))
        served.control.hold(served.stream)
        served.io.transfer_kv_per_layer_pf_lf(**pools.load(NAME, 1), **given)
        given["src_indices"][:] = torch.tensor(SRC)
        served.control.release(served.stream)
        served.control.synchronize(served.stream)
        assert pools.same(wanted)

    def test_a_wrong_one_moves_nothing_and_the_next_call_says_so(
        self, served: SimpleNamespace
    ) -> None:
        pools = Pools(served.control, "pf")
        before = pools.everything()
        run(served, NAME, **pools.load(NAME, 1), **indices(NAME, [TOKENS], [0]))
        assert pools.same(before)
        with pytest.raises(launches.WrongToken, match=r"token number 0 of the host's side was 48"):
            run(served, NAME, **pools.load(NAME, 1), **indices(NAME))

    def test_in_host_memory_are_looked_at_first(self, served: SimpleNamespace) -> None:
        name = "transfer_hicache_all_layer_staged_lf_pf"
        pools = Pools(served.control, "pf")
        run(served, name, **pools.offload(name), **indices(name, [1], [TOKENS]))
        assert served.calls == [name]
        assert observe.stats()["passed_on"][f"sglang.{name}"] == {
            "an index outside of a tensor": 1
        }


class TestWhatIsLeftAlone:
    def left(self, served: SimpleNamespace, name: str = NAME) -> str:
        assert served.calls == [name]
        ((reason, count),) = observe.stats()["passed_on"][f"sglang.{name}"].items()
        assert count == 1
        return str(reason)

    def test_pageable_pools(self, served: SimpleNamespace) -> None:
        pools = Pools(served.control, "pf", registered=False)
        run(served, NAME, **pools.load(NAME, 0), **indices(NAME))
        assert self.left(served) == "memory that is neither a GPU's nor page-locked"

    def test_a_pool_that_is_registered_no_more(self, served: SimpleNamespace) -> None:
        pools = Pools(served.control, "pf")
        run(served, NAME, **pools.load(NAME, 0), **indices(NAME))
        assert served.calls == []
        for pool in pools.host:
            served.control.unmark(pool.data_ptr())
        run(served, NAME, **pools.load(NAME, 0), **indices(NAME))
        assert self.left(served) == "memory that is neither a GPU's nor page-locked"

    def test_unknown_arguments(self, served: SimpleNamespace) -> None:
        pools = Pools(served.control, "pf")
        run(served, NAME, **pools.load(NAME, 0), **indices(NAME), fast=True)
        assert self.left(served) == "an argument that kvsig does not know"

    def test_large_staged_pages(self, served: SimpleNamespace) -> None:
        name = "transfer_hicache_all_layer_staged_lf_pf"
        pools = Pools(served.control, "pf")
        arguments = pools.offload(name) | {"page_size": 4096}
        run(served, name, **arguments, **indices(name))
        assert "128 KiB or more" in self.left(served, name)

    def test_lists_of_two_lengths(self, served: SimpleNamespace) -> None:
        pools = Pools(served.control, "pf")
        run(served, NAME, **pools.load(NAME, 0), **indices(NAME, [1], [2, 3]))
        assert self.left(served) == "indices that are not of one length"

    def test_without_nvrtc(
        self, served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(kernel, "refusal", lambda: "nvrtcCreateProgram is not bound: no file")
        pools = Pools(served.control, "pf")
        for _ in range(3):
            run(served, NAME, **pools.load(NAME, 0), **indices(NAME))
        assert served.calls == [NAME] * 3
        (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
        assert "nothing is served" in warning and "--hicache-io-backend direct" in warning


class TestLayeredLoads:
    def transfer(self, served: SimpleNamespace, pools: Pools, name: str = NAME) -> Any:
        given = indices(name)
        module = served.jit if "hicache" in name else served.io
        return lambda layer: getattr(module, name)(**pools.load(name, layer), **given)

    @pytest.mark.parametrize(("name", "layout", "kinds"), [LOADS[1], LOADS[4], LOADS[6]])
    def test_are_one_launch_and_events_behind_waits(
        self, served: SimpleNamespace, engine: Any, helpers: list[Any], name: str, layout: str,
        kinds: int,
    ) -> None:  # fmt: skip
        pools = Pools(served.control, layout, kinds)
        for _ in range(2):
            wanted = pools.expected(True)
            done: list[int] = []
            served.control.record()
            # Kept: the engine's record_stream keeps numbers until they have been read.
            transfers = [self.transfer(served, pools, name)]
            answer = engine.submit_host_to_device(
                transfers, transfer_layer_id_max=LAYERS, on_layer_done=done.append
            )
            functions = [call["function"] for call in served.control.calls()]
            assert answer == "completion" and done == list(range(LAYERS))
            assert functions.count("cuLaunchKernelEx") == 1
            assert functions.count("cuStreamWaitValue32") == LAYERS
            helpers[0].synchronize()  # behind all waits: every layer is there
            assert pools.same(wanted) and served.calls == []
            for kind in pools.device:
                for layer in kind:
                    layer.zero_()
        assert observe.stats()["functions"][layered.WHAT]["calls"] == 2
        assert len(helpers) == 1

    def test_of_two_pools_with_their_own_numbers(
        self, served: SimpleNamespace, engine: Any, helpers: list[Any]
    ) -> None:
        pools = [Pools(served.control, "pf"), Pools(served.control, "lf", 1)]
        wanted = [pool.expected(True) for pool in pools]
        names = (NAME, "transfer_kv_per_layer_mla")
        transfers = [self.transfer(served, *pair) for pair in zip(pools, names, strict=True)]
        engine.submit_host_to_device(
            transfers, transfer_layer_id_max=LAYERS, on_layer_done=lambda layer: None
        )
        helpers[0].synchronize()
        assert all(pool.same(want) for pool, want in zip(pools, wanted, strict=True))

    def test_what_cannot_be_launched_is_done_by_the_originals_in_order(
        self, served: SimpleNamespace, engine: Any
    ) -> None:
        pools = Pools(served.control, "pf", registered=False)
        order = served.calls
        engine.submit_host_to_device(
            [self.transfer(served, pools)], transfer_layer_id_max=LAYERS, on_layer_done=order.append
        )
        assert order == [NAME, 0, NAME, 1, NAME, 2]
        assert observe.stats()["passed_on"][layered.WHAT]

    def test_a_launch_that_fails_is_done_by_the_originals(
        self, served: SimpleNamespace, engine: Any
    ) -> None:
        pools, order = Pools(served.control, "pf"), served.calls
        served.control.fault("cuLaunchKernelEx", 1)
        transfers = [self.transfer(served, pools)]
        engine.submit_host_to_device(
            transfers, transfer_layer_id_max=LAYERS, on_layer_done=order.append
        )
        assert order == [NAME, 0, NAME, 1, NAME, 2]
        (cause,) = observe.stats()["fallbacks"]
        assert cause.startswith("cuLaunchKernelEx answered 1")

    def test_without_events_calls_are_served_one_by_one(
        self, served: SimpleNamespace, engine: Any
    ) -> None:
        pools = Pools(served.control, "pf")
        wanted = pools.expected(True)
        transfers = [self.transfer(served, pools)]
        engine.submit_host_to_device(transfers, transfer_layer_id_max=LAYERS)
        served.control.synchronize(served.stream)
        assert pools.same(wanted)
        assert observe.stats()["functions"][f"sglang.{NAME}"]["calls"] == LAYERS

    def test_layers_of_other_pools_keep_their_events_in_time(
        self, served: SimpleNamespace, engine: Any
    ) -> None:
        order: list[Any] = []
        engine.submit_host_to_device(
            [lambda layer: order.append("copy")], transfer_layer_id_max=2,
            on_layer_done=order.append,
        )  # fmt: skip
        assert order == ["copy", 0, "copy", 1]

    def test_uninstall(self, served: SimpleNamespace, engine: Any) -> None:
        assert integration.installed()[f"{layered.OWNER}.{layered.METHOD}"]
        integration.uninstall()
        assert type(engine).submit_host_to_device is Engine.submit_host_to_device
