"""States of the whole process: what `info` promises in them, and what an error blames."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import kvsig
from kvsig import _core, emulated, registry

VERSIONS = ["12.6", "12.9", "13.0"]
ROOT = os.path.dirname(os.path.dirname(_core.__file__))


def told(version, state):
    """What `kvsig info` says of copies where the driver is in a state from the beginning."""
    env = {
        **os.environ, "PYTHONPATH": ROOT, "KVSIG_CUDART": f"emulated:{version}",
        "KVSIG_EMULATED_DRIVER": state,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "kvsig", "info", "--json"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["batch"]


@pytest.mark.known_failure("states-of-the-driver")
@pytest.mark.parametrize(
    ("version", "state", "text"),
    [
        ("13.0", "missing", "the driver is missing"),
        ("12.6", "missing", "the driver is missing"),
        ("13.0", "old", "the driver is 12.0, and libcudart 13.0 needs 13.0"),
        ("12.9", "old", "the driver is 11.0, and libcudart 12.9 needs 12.0"),
        ("13.0", "stub", "the driver does not tell its version: "),
        ("12.6", "stub", " answered 34 (CUDA_ERROR_STUB_LIBRARY)"),
        ("13.0", "ready", "cudaMemcpyBatchAsync of 13.0"),
        ("12.6", "ready", "the driver is 12.6, and batches need 12.8"),
    ],
)
def test_info_promises_no_path_where_every_copy_fails(version, state, text):
    batch = told(version, state)
    assert text in batch["why"]
    assert ("no copy can be made" in batch["why"]) == (state != "ready")
    assert (batch["path"] == "none") == (state != "ready")


@pytest.mark.known_failure("states-of-the-driver")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "state", ["missing", "stub", "lost", "uninitialised", 100, 400, 802, 804, 807, 999]
)
@pytest.mark.parametrize("path", ["auto", "loop", "strided"])
def test_a_state_of_the_process_blames_no_page(version, state, path):
    torch = pytest.importorskip("torch")
    _core.rebind(f"emulated:{version}")
    try:
        with emulated.Stream() as stream:
            device = [torch.zeros(64, 8, dtype=torch.uint8) for _ in range(2)]
            host = torch.ones(16, 2, 4, 8, dtype=torch.uint8)
            cache = kvsig.PagedKVCache(device, host, page_size=4)
            stream.control.set_driver(state)
            for move in (cache.load, cache.offload):
                with pytest.raises(kvsig.CudaError) as caught:
                    move([1, 2], [3, 4], stream=stream, path=path)
                error = caught.value
                said = " ".join([str(error), *getattr(error, "__notes__", [])])
                assert " page " not in said and " layer " not in said and " copy " not in said
                assert error.index is None
                if isinstance(state, int):
                    assert error.code == state
            stream.control.reset()
            cache.load([1, 2], [3, 4], stream=stream, path=path)
            stream.synchronize()
            assert all(layer[12:20].all() for layer in device)
    finally:
        _core.rebind(None)


@pytest.mark.known_failure("driver-decides")
@pytest.mark.parametrize(("runtime", "driver"), [("12.9", "13.0"), ("12.8", "13.5")])
def test_the_prototype_follows_the_runtime_and_not_the_driver(runtime, driver):
    torch = pytest.importorskip("torch")
    _core.rebind(f"emulated:{runtime}/{driver}")
    try:
        with emulated.Stream() as stream:
            stream.control.record()
            source, target = torch.arange(64), torch.zeros(64, dtype=torch.int64)
            at = [target.data_ptr() + 8 * i for i in (0, 2)]
            kvsig.copy_batch(at, [source.data_ptr(), source.data_ptr() + 80], 8, stream, "batch")
            stream.synchronize()
            (call,) = stream.control.calls("cudaMemcpyBatchAsync")
            assert len(call["arguments"]) == 9
            select = registry.load().functions["cudaMemcpyBatchAsync"].select
            assert call["variant"] == select(registry.parse_version(runtime)).label
            assert target[:3].tolist() == [0, 0, 10]
    finally:
        _core.rebind(None)
