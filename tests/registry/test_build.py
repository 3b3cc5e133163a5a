"""What the build writes, and what it leaves out of the source distribution."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import kvsig
from kvsig import codegen

ROOT = Path(__file__).resolve().parents[2]


class TestGeneratedText:
    def test_is_written_only_if_it_changed(self, tmp_path):
        file = tmp_path / "folder" / "generated.pxi"
        codegen.write_if_changed(file, "one\n")
        os.utime(file, ns=(1, 1))
        codegen.write_if_changed(file, "one\n")
        assert file.stat().st_mtime_ns == 1
        codegen.write_if_changed(file, "two\n")
        assert file.stat().st_mtime_ns > 1
        assert file.read_text() == "two\n"

    @pytest.mark.checkout
    def test_the_generator_names_no_function_of_the_registry(self):
        text = (ROOT / "kvsig" / "codegen.py").read_text()
        assert [name for name in kvsig.registry.load().functions if name in text] == []

    @pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
    def test_is_not_in_git(self):
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        generated = ("_generated.pxi", "_page_copy.pxi", ".so")
        built = [name for name in listed if name.endswith(generated)]
        built += [name for name in listed if name.startswith("kvsig/") and name.endswith(".c")]
        assert not built
        assert "kvsig/signatures.toml" in listed


@pytest.mark.checkout
def test_sdist_has_sources_only_and_the_version_of_the_package(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools is older than pyproject.toml asks for")
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path),
         "sdist", "--dist-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"kvsig-{kvsig.__version__}.tar.gz"
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert [n for n in names if n.endswith((".pxi", ".so", ".o"))] == ["kvsig/_kernel.pxi"]
    assert {n for n in names if n.endswith(".c") and n.startswith("kvsig/")} == set()
    assert {
        "kvsig/signatures.toml", "kvsig/_core.pyx", "kvsig/_core.pxd", "kvsig/_core.pyi",
        "kvsig/_transfer.pyx", "kvsig/py.typed",
        "csrc/emulated/runtime.h", "csrc/emulated/queues.c", "docs/index.md", "setup.py",
        "tests/registry/test_build.py",
    } <= names  # fmt: skip
