"""A program that runs with a GPU and without one begins by kvsig.emulated.start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import kvsig  # noqa: E402
from kvsig import _core, emulated  # noqa: E402


@pytest.fixture
def unbound(monkeypatch: pytest.MonkeyPatch):
    """No runtime is named, none is bound, and torch sees no GPU."""
    monkeypatch.delenv("KVSIG_CUDART", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _core.rebind(None)
    yield monkeypatch
    _core.rebind(None)


def moves(device, stream) -> bool:
    source = torch.arange(64, device=device)
    target = torch.zeros_like(source)
    kvsig.copy_batch([target.data_ptr()], [source.data_ptr()], source.nbytes, stream=stream)
    stream.synchronize()
    return torch.equal(source, target)


def test_without_a_gpu(unbound) -> None:
    device, stream = emulated.start()
    assert device == torch.device("cpu")
    assert isinstance(stream, emulated.Stream)
    assert kvsig.info()["emulated"]
    assert moves(device, stream)


def test_what_is_bound_is_kept(unbound) -> None:
    _core.rebind("emulated:12.9")
    first, second = emulated.start()[1], emulated.start()[1]
    assert first.control.path == second.control.path == emulated.resolve("12.9")
    assert first.cuda_stream != second.cuda_stream


def test_what_is_named_is_kept(unbound) -> None:
    unbound.setenv("KVSIG_CUDART", "emulated:12.9")
    assert emulated.start()[1].control.path == emulated.resolve("12.9")


def test_an_emulated_runtime_beside_a_gpu_has_the_cpu(unbound) -> None:
    unbound.setattr(torch.cuda, "is_available", lambda: True)
    unbound.setenv("KVSIG_CUDART", "emulated:13.0")
    assert emulated.start()[0] == torch.device("cpu")


def test_a_real_runtime_without_a_gpu_is_refused(unbound) -> None:
    unbound.setenv("KVSIG_CUDART", "/opt/libcudart.so.13")
    unbound.setattr(_core, "is_emulated", lambda: False)
    with pytest.raises(ValueError, match=r"^KVSIG_CUDART=/opt/libcudart\.so\.13 is a real CUDA"):
        emulated.start()


@pytest.mark.gpu
def test_with_a_gpu() -> None:
    """In a process of its own: nothing is bound there yet."""
    code = (
        "import kvsig; d, s = kvsig.emulated.start(); print(d.type, type(s).__name__, "
        "kvsig.info()['emulated'])"
    )
    clean = {k: v for k, v in os.environ.items() if k != "KVSIG_CUDART"}
    clean["PYTHONPATH"] = str(Path(kvsig.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert done.stdout == "cuda Stream False\n", done.stderr
