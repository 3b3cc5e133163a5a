"""Every example runs, and says that its own result is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

import kvsig

SAYS = {
    "quickstart.py": "the same bytes",
    "prefix_cache.py": "the same tokens; ",
    "layered_load.py": "16 layers, each computed behind its own event: ",
    "new_signature.py": "the same bytes",
    "tensor_parallel.py": "every shard is right (2 ",
}
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_all_are_run() -> None:
    assert sorted(SAYS) == EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example: str, tmp_path: Path) -> None:
    if example == "new_signature.py" and not (ROOT / "setup.py").is_file():
        pytest.skip(f"kvsig's sources are not here: there is no {ROOT / 'setup.py'}")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("KVSIG_")}
    clean |= {"PYTHONPATH": str(Path(kvsig.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / example)]
    if example == "tensor_parallel.py":
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command[1:1] = launch
    done = subprocess.run(
        command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[example] in done.stdout
