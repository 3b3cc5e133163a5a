"""The soak of stream order: it finds nothing here, and finds what is out of order."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from kvsig import emulated

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/soak.py"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import soak

    return soak


@pytest.mark.known_failure("wrong-bytes")
@pytest.mark.parametrize("version", ["12.6", "12.9", "13.0"])
def test_one_command_and_a_line_of_json(version: str) -> None:
    env = {**os.environ, "KVSIG_CUDART": f"emulated:{version}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--seconds", "1", "--seed", "3"],
        capture_output=True, text=True, env=env, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["mismatches"] == 0 and told["epochs"] > 0 and told["bytes_compared"] > 0
    assert {"round trip", "layered load"} <= set(told["operations"])
    assert len(told["paths"]) > 1


class Astray:
    """A cache whose transfers go to a stream that waits for nobody."""

    def __init__(self, cache, stream) -> None:
        self.cache, self.stream = cache, stream

    def offload(self, *pages, **options):
        return self.cache.offload(*pages[:3], self.stream, **options)

    def load(self, *pages, **options):
        return self.cache.load(*pages[:3], self.stream, **options)


def test_what_is_out_of_order_is_found(soak, emulated_runtime) -> None:
    emulated_runtime("13.0")
    with emulated.Stream() as stream, emulated.Stream() as other:

        def make(shape, rng: random.Random):
            model = soak.OnEmulated(shape, rng, stream)
            model.cache = Astray(model.cache, other)
            return model

        assert soak.soak(20, 1, make).mismatches > 0


def test_one_wrong_byte_is_found(soak, emulated_runtime) -> None:
    emulated_runtime("12.9")
    with emulated.Stream() as stream:

        def make(shape, rng: random.Random):
            model = soak.OnEmulated(shape, rng, stream)
            finish = model.finish

            def spoilt():
                model.pools[0].reshape(-1)[-1] ^= 1
                return finish()

            model.finish = spoilt
            return model

        # The last host page may be overwritten in its turn: then another epoch finds it.
        assert soak.soak(20, 2, make).mismatches > 0
