"""The fuzz targets by hypothesis, a few cases of each; ``make fuzz`` runs them for long."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_targets import TARGETS

from kvsig import _core

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed (extra dev)")
st = pytest.importorskip("hypothesis.strategies")

RUN = Path(__file__).with_name("fuzz_run.py")


@pytest.fixture
def unbound():
    """Leave kvsig as other tests want it."""
    yield
    _core.rebind(None)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", list(TARGETS))
def test_target(name: str, seed: int, unbound: None) -> None:
    target = TARGETS[name](seed)

    @hypothesis.settings(
        max_examples=40,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.randoms(use_true_random=False))
    def case(rng: random.Random) -> None:
        target(rng)

    try:
        case()
    finally:
        target.close()


def run(*args: str) -> subprocess.CompletedProcess[str]:
    root = Path(_core.__file__).parents[1]
    return subprocess.run(
        [sys.executable, str(RUN), *args],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip


def test_the_command_counts() -> None:
    done = run("--seconds", "60", "--executions", "400", "--seed", "5")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["executions"], told["failures"], told["first_seed"]) == (400, 0, 5)


def test_a_wrong_byte_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A model that expects another byte fails: the failure names its seed."""
    import fuzz_run
    import fuzz_targets

    apply = fuzz_targets.Pool.apply

    def spoilt(self, to, dst, src, layers) -> None:
        apply(self, to, dst, src, layers)
        if len(dst) > 2 and layers:
            self.model[to][0][layers[0]][dst[0]] ^= 1

    monkeypatch.setattr(fuzz_targets.Pool, "apply", spoilt)
    try:
        code = fuzz_run.main(["--target", "requests", "--seed", "4", "--seconds", "60"])
    finally:
        _core.rebind(None)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 1 and told["failures"] == 1
