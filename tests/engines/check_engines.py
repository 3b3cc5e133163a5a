"""The released Python of SGLang, vLLM and LMCache against what kvsig relies on: ``make engines``.

Fetches each wheel once, keeps its Python below build/engines, and looks at it in a process of its
own, with what is compiled or far away stubbed. Run by hand: ``python tests/engines/check_engines.py
[vllm-0.33.0 ...]``. A check that fails is an error that names the engine and what is not as it was.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build/engines"
# Each with the wheels it needs. A wheel of kernels is only read for its Python.
ENGINES = {
    "sglang-0.5.18": ("sglang==0.5.18", "sglang-kernel==0.4.10"),
    "sglang-0.5.23": ("sglang==0.5.23", "sglang-kernel==0.4.10"),
    "vllm-0.25.1": ("vllm==0.25.1",),
    "vllm-0.29.0": ("vllm==0.29.0",),
    "vllm-0.33.0": ("vllm==0.33.0",),
    "lmcache-0.5.6": ("lmcache==0.5.6",),
}
PLATFORMS = ("manylinux_2_35", "manylinux_2_34", "manylinux_2_28", "manylinux2014", "manylinux1")


def unpacked(requirement: str) -> Path:
    """Return the folder with the Python of a wheel, fetching it where it is not there yet."""
    folder = CACHE / requirement.replace("==", "-")
    done = folder / ".complete"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    download += ["--dest", str(folder), "--python-version", "3.12", "--only-binary", ":all:"]
    for platform in PLATFORMS:
        download += ["--platform", f"{platform}_x86_64"]
    subprocess.run([*download, "--platform", "any", requirement], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        python = [name for name in archive.namelist() if name.endswith((".py", ".pyi"))]
        archive.extractall(folder, python)
    wheel.unlink()
    done.touch()
    return folder


def main() -> int:
    wanted = sys.argv[1:] or list(ENGINES)
    failed = []
    for engine in wanted:
        start = time.monotonic()
        folders = [str(unpacked(requirement)) for requirement in ENGINES[engine]]
        script = Path(__file__).with_name(f"{engine.partition('-')[0]}_contract.py")
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "KVSIG_CUDART": "emulated:13.0"}
        # -O: engines assert that tensors are on a GPU; here memory of the host stands for it.
        run = subprocess.run([sys.executable, "-O", str(script), *folders], env=environment)
        took = time.monotonic() - start
        print(f"{engine}: {'FAILED' if run.returncode else 'as kvsig relies on'} ({took:.0f} s)")
        failed += [engine] if run.returncode else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
