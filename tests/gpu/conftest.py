"""What tests on a GPU begin and end with."""

import pytest

import kvsig
from kvsig import _core


@pytest.fixture
def clean(monkeypatch):
    """Bind torch's own runtime, and leave no error behind."""
    monkeypatch.delenv("KVSIG_CUDART", raising=False)
    monkeypatch.delenv("KVSIG_ROUTE", raising=False)
    import torch

    torch.cuda.init()
    _core.rebind(None)
    yield
    torch.cuda.synchronize()
    assert kvsig.call("cudaPeekAtLastError") == 0
    # torch's own check would raise what was left.
    assert torch.ones(4, device="cuda").sum().item() == 4
    _core.rebind(None)
