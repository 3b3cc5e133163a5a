"""SGLang's functions on CUDA tensors: kvsig's in their place, every byte compared."""

import itertools

import pytest
import torch

from kvsig import observe
from kvsig.integrations.sglang import direct, kernel, launches, layered

pytestmark = pytest.mark.gpu

LAYERS, TOKENS, HEADS, DIM, PAGE = 4, 4096, 8, 64, 16
ITEM = HEADS * DIM * 2


@pytest.fixture(autouse=True)
def counters():
    observe.clear()
    yield
    torch.cuda.synchronize()
    observe.clear()


@pytest.fixture(params=["legacy", "own"])
def stream(request):
    """The current stream: the legacy one, and one of the test's own."""
    if request.param == "legacy":
        yield torch.cuda.default_stream()
        return
    own = torch.cuda.Stream()
    own.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(own):
        yield own


def random(*shape, device="cuda"):
    numbers = torch.randint(-1000, 1000, shape, dtype=torch.int16)
    return numbers.pin_memory() if device == "cpu" else numbers.to(device)


def pages(count, seed):
    order = torch.randperm(TOKENS // PAGE, generator=torch.Generator().manual_seed(seed))[:count]
    return (order[:, None] * PAGE + torch.arange(PAGE)).ravel()


SRC, DST = pages(100, 1), pages(100, 2)


def table(tensors):
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.uint64, device="cuda")


def served(function, *args, **kwargs):
    """Ask kvsig, wait, and return the report; a reason is a failure."""
    made = getattr(direct, function, None)
    if made is not None:
        report = made(*args, **kwargs)
    else:
        request = (kernel.AHEAD_OF_TIME | kernel.JUST_IN_TIME)[function](*args, **kwargs)
        report = launches.serve(request)
    assert not isinstance(report, str), report
    torch.cuda.current_stream().synchronize()
    return report


class TestDirect:
    @pytest.mark.parametrize("indices", ["cpu", "cuda", "mixed"])
    def test_layer_first(self, stream, indices):
        device = [random(TOKENS, HEADS, DIM) for _ in range(LAYERS)]
        host = [random(TOKENS, HEADS, DIM, device="cpu") for _ in range(LAYERS)]
        src = SRC if indices == "cpu" else SRC.cuda()
        dst = DST.cuda() if indices == "cuda" else DST
        want = [t.clone() for t in host]
        for near, far in zip(device, want, strict=True):
            far[DST] = near.cpu()[SRC]
        served("transfer_kv_direct", device, host, src, dst, PAGE)
        assert all(map(torch.equal, host, want))

    @pytest.mark.parametrize("pinned", [True, False])
    def test_page_first_direct(self, stream, pinned):
        device = [random(TOKENS, HEADS, DIM) for _ in range(2 * LAYERS)]
        host = [random(TOKENS // PAGE, LAYERS, PAGE, HEADS, DIM, device="cpu") for _ in range(2)]
        if not pinned:
            host = [t.clone() for t in host]
        want = [t.clone() for t in host]
        for i, near in enumerate(device):
            moved = near.cpu()[SRC].view(-1, PAGE, HEADS, DIM)
            want[i // LAYERS][DST[::PAGE] // PAGE, i % LAYERS] = moved
        served("transfer_kv_all_layer_direct_lf_pf", device, host, SRC, DST, PAGE)
        assert all(map(torch.equal, host, want))
        for layer in range(LAYERS):
            k, v = device[layer], device[LAYERS + layer]
            wanted = [t.clone() for t in (k, v)]
            for near, far in zip(wanted, host, strict=True):
                near[SRC.cuda()] = far[DST[::PAGE] // PAGE, layer].reshape(-1, HEADS, DIM).cuda()
            served("transfer_kv_per_layer_direct_pf_lf", host, [k, v], DST, SRC, layer, PAGE)
            assert torch.equal(k, wanted[0]) and torch.equal(v, wanted[1])

    @pytest.mark.parametrize("to_host", [True, False])
    def test_embedding_ranges(self, stream, to_host):
        src = random(200, 37, device="cuda" if to_host else "cpu")
        dst = random(200, 37, device="cpu" if to_host else "cuda")
        want = dst.clone()
        want[50:60], want[0:3] = src[7:17].to(want.device), src[100:103].to(want.device)
        served("transfer_embedding_ranges_direct", src, dst, [7, 100, 3], [50, 0, 9], [10, 3, 0])
        assert torch.equal(dst, want)


class Pools:
    """Layers on the GPU, and a page-locked host pool of one layout."""

    def __init__(self, layout, kinds):
        self.layout, self.kinds = layout, kinds
        self.device = [[random(TOKENS, HEADS, DIM) for _ in range(LAYERS)] for _ in range(kinds)]
        shape = {
            "lf": (LAYERS, TOKENS, HEADS, DIM),
            "pf": (TOKENS, LAYERS, HEADS, DIM),
            "ph": (TOKENS // PAGE, HEADS, PAGE, LAYERS, DIM),
        }[layout]
        self.host = [random(*shape, device="cpu") for _ in range(kinds)]

    def rows(self, kind, layer):
        pool = self.host[kind]
        if self.layout == "ph":
            return pool[:, :, :, layer].transpose(1, 2).reshape(TOKENS, HEADS, DIM)
        return pool[layer] if self.layout == "lf" else pool[:, layer]

    def load(self, name, layer):
        device = [kind[layer] for kind in self.device]
        if "hicache" in name:
            rows = [self.rows(k, layer) for k in range(self.kinds)]
            words = ("cache_dst", "cache_src") if self.kinds == 1 else (
                "k_cache_dst", "v_cache_dst", "k_cache_src", "v_cache_src")  # fmt: skip
            found = dict(zip(words, device + rows, strict=True), element_dim=HEADS * DIM)
            return found | {"indices_src": SRC.cuda(), "indices_dst": DST.cuda()}
        hosts = [pool[layer] if self.layout == "lf" else pool for pool in self.host]
        words = ("src", "dst") if self.kinds == 1 else ("src_k", "src_v", "dst_k", "dst_v")
        found = dict(zip(words, hosts + device, strict=True), item_size=ITEM)
        found |= {"src_indices": SRC.cuda(), "dst_indices": DST.cuda()}
        if self.layout != "lf":
            found |= {"layer_id": layer, "src_layout_dim": LAYERS * ITEM}
        return found | ({"page_size": PAGE, "head_num": HEADS} if self.layout == "ph" else {})

    def offload(self, name):
        near = [table(kind) for kind in self.device]
        far = [table(self.rows(k, i) for i in range(LAYERS)) for k in range(self.kinds)]
        numbers = {"src_indices": SRC.cuda(), "dst_indices": DST.cuda()}
        if "staged" in name:
            words = ("ptr_src", "staging", "dst") if self.kinds == 1 else (
                "k_ptr_src", "v_ptr_src", "staging_k", "staging_v", "dst_k", "dst_v")  # fmt: skip
            values = [*near, *[None] * self.kinds, *self.host]
            found = dict(zip(words, values, strict=True), page_size=PAGE)
            return found | numbers | {"dst_indices": DST}
        found = {"item_size": ITEM, "num_layers": LAYERS, **numbers}
        if self.layout == "lf":
            words = ("src_layers", "dst_layers") if self.kinds == 1 else (
                "src_k_layers", "src_v_layers", "dst_k_layers", "dst_v_layers")  # fmt: skip
            return found | dict(zip(words, near + far, strict=True))
        words = ("src_layers", "dst") if self.kinds == 1 else (
            "src_k_layers", "src_v_layers", "dst_k", "dst_v")  # fmt: skip
        found |= dict(zip(words, near + self.host, strict=True), dst_layout_dim=LAYERS * ITEM)
        return found | ({"page_size": PAGE, "head_num": HEADS} if self.layout == "ph" else {})


LOADS = [
    ("transfer_kv_per_layer", "lf", 2), ("transfer_kv_per_layer_pf_lf", "pf", 2),
    ("transfer_kv_per_layer_ph_lf", "ph", 2), ("transfer_kv_per_layer_mla", "lf", 1),
    ("transfer_kv_per_layer_mla_pf_lf", "pf", 1), ("transfer_hicache_one_layer", "pf", 2),
    ("transfer_hicache_one_layer_mla", "pf", 1),
]  # fmt: skip
OFFLOADS = [
    ("transfer_kv_all_layer", "lf", 2), ("transfer_kv_all_layer_lf_pf", "pf", 2),
    ("transfer_kv_all_layer_lf_ph", "ph", 2), ("transfer_kv_all_layer_mla", "lf", 1),
    ("transfer_kv_all_layer_mla_lf_pf", "pf", 1),
    ("transfer_hicache_all_layer_staged_lf_pf", "pf", 2),
    ("transfer_hicache_all_layer_mla_staged_lf_pf", "pf", 1),
]  # fmt: skip


class TestKernel:
    @pytest.mark.parametrize(("name", "layout", "kinds"), LOADS)
    def test_load(self, stream, name, layout, kinds):
        pools = Pools(layout, kinds)
        for layer in range(LAYERS):
            want = [kind[layer].cpu() for kind in pools.device]
            for kind in range(kinds):
                want[kind][DST] = pools.rows(kind, layer)[SRC]
            assert served(name, **pools.load(name, layer)).path == "kernel"
            for kind in range(kinds):
                assert torch.equal(pools.device[kind][layer].cpu(), want[kind])

    @pytest.mark.parametrize(("name", "layout", "kinds"), OFFLOADS)
    def test_offload(self, stream, name, layout, kinds, monkeypatch):
        monkeypatch.setattr(launches, "STAGED_BYTES", 1 << 30)
        pools = Pools(layout, kinds)
        want = {}
        for kind, layer in itertools.product(range(kinds), range(LAYERS)):
            want[kind, layer] = pools.rows(kind, layer).clone()
            want[kind, layer][DST] = pools.device[kind][layer].cpu()[SRC]
        assert served(name, **pools.offload(name)).path == "kernel"
        for (kind, layer), rows in want.items():
            assert torch.equal(pools.rows(kind, layer), rows)

    def test_a_wrong_number_moves_nothing(self, stream):
        pools = Pools("pf", 1)
        arguments = pools.load("transfer_kv_per_layer_mla_pf_lf", 0)
        arguments["dst_indices"][5] = TOKENS
        before = pools.device[0][0].clone()
        served("transfer_kv_per_layer_mla_pf_lf", **arguments)
        assert torch.equal(pools.device[0][0], before)
        with pytest.raises(launches.WrongToken, match=f"number 5 of the device.s .* was {TOKENS}"):
            served("transfer_kv_per_layer_mla_pf_lf", **arguments)

    def test_in_a_graph(self):
        name = "transfer_kv_per_layer_pf_lf"
        pools, own = Pools("pf", 2), torch.cuda.Stream()
        arguments = pools.load(name, 1)
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            served(name, **arguments)  # buffers and stream are known from here on
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=own):
            report = launches.serve(kernel.AHEAD_OF_TIME[name](**arguments))
        assert not isinstance(report, str), report
        for pool in pools.host:
            pool += 1
        graph.replay()
        torch.cuda.synchronize()
        for kind in range(2):
            moved = pools.device[kind][1].cpu()[DST]
            assert torch.equal(moved, pools.rows(kind, 1)[SRC])

    def test_layers_of_a_load_are_one_launch(self, stream):
        name, pools = "transfer_kv_per_layer_pf_lf", Pools("pf", 2)
        src, dst = SRC.cuda(), DST.cuda()
        events = [torch.cuda.Event() for _ in range(LAYERS)]

        def submit(*, transfer_layer_id_max, on_layer_done):
            for layer in range(transfer_layer_id_max):
                arguments = pools.load(name, layer) | {"src_indices": src, "dst_indices": dst}
                request = kernel.AHEAD_OF_TIME[name](**arguments)
                layered.current().call = lambda: pytest.fail("not served")
                assert layered.current().takes(request)
                on_layer_done(layer)

        layered.submit(
            submit, transfer_layer_id_max=LAYERS, on_layer_done=lambda layer: events[layer].record()
        )
        reader = torch.cuda.Stream()
        for layer, event in enumerate(events):
            reader.wait_event(event)
            with torch.cuda.stream(reader):
                found = [pools.device[kind][layer].cpu()[DST] for kind in range(2)]
            for kind in range(2):
                assert torch.equal(found[kind], pools.rows(kind, layer)[SRC])
        paths = observe.stats()["functions"][layered.WHAT]
        assert (paths["calls"], paths["cuda_calls"]) == (1, 1)
