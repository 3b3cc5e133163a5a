"""Holds the stubs of the compiled modules against the modules, by mypy's stubtest."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: To these no module belongs: they are for type checkers alone.
NO_MODULE = {"kvsig._calls"}
#: What Cython adds to modules and classes, and one that no caller can make.
ALLOWED = r"""
.*\.__test__
.*\.__pyx_\w+
.*\.__reduce_cython__
.*\.__setstate_cython__
.*\.__setstate__
.*\.__reduce__
.*\.__radd__
kvsig\.planning\._plan\.Pages\.__init__
"""


def main() -> int:
    """Check every module that has a stub."""
    stubs = sorted((ROOT / "kvsig").rglob("*.pyi"))
    modules = {".".join(stub.relative_to(ROOT).with_suffix("").parts) for stub in stubs}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as allowed:
        allowed.write(ALLOWED)
        allowed.flush()
        command = [sys.executable, "-m", "mypy.stubtest", *sorted(modules - NO_MODULE)]
        command += ["--mypy-config-file", "pyproject.toml", "--concise"]
        command += ["--allowlist", allowed.name, "--ignore-unused-allowlist"]
        # Every class of a compiled module is one, and no type checker needs to know.
        command += ["--ignore-disjoint-bases"]
        return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
