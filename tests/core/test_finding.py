"""What importing and binding touch, and which library is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from core_help import PACKAGE, REGISTRY, python

from kvsig import _core


class TestImport:
    def test_touches_no_cuda_and_no_torch(self):
        text = python(
            """
            import sys
            import kvsig._core
            from kvsig import runtime
            maps = open("/proc/self/maps").read()
            assert "libcuda" not in maps, maps
            assert "torch" not in sys.modules
            print(runtime.loaded_cudarts())
            """,
            KVSIG_CUDART="/nonexistent/libcudart.so.12",
        )
        assert text == "[]\n"

    @pytest.mark.known_failure("edited-not-built")
    def test_an_edited_registry_says_rebuild(self, tmp_path):
        package = tmp_path / "kvsig"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("_emulated", "*.c"))
        toml = package / "signatures.toml"
        text = toml.read_text()
        edited = text.replace("size_t numAttrs", "unsigned int numAttrs", 1)
        assert edited != text
        toml.write_text(edited)
        done = subprocess.run(
            [sys.executable, "-c", "import kvsig._core"], cwd=tmp_path, text=True,
            capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1] == (
            f"ImportError: {toml} is not the registry that this extension was built from;"
            " rebuild with: python setup.py build_ext --inplace"
            " (or, for an installed package: pip install --force-reinstall --no-deps .)"
        )


class TestFinding:
    @pytest.mark.parametrize(
        ("spec", "text"),
        [
            (
                "/nonexistent/libcudart.so.12",
                "KVSIG_CUDART='/nonexistent/libcudart.so.12': there is no such file; give the path"
                " of a libcudart, or emulated:VERSION, such as emulated:12.9",
            ),
            ("emulated:10.2", "no emulated CUDA runtime serves version 10.2"),
            ("emulated:twelve", "KVSIG_CUDART='emulated:twelve'"),
            ("libm.so.6", "libm.so.6 is no CUDA runtime (KVSIG_CUDART=libm.so.6): it does not have"
             " cudaRuntimeGetVersion"),
            ("libnothing.so", "libnothing.so cannot be loaded (KVSIG_CUDART=libnothing.so):"),
            ("libnothing.so", "; give the path of a libcudart, or emulated:VERSION, such as"
             " emulated:12.9"),
        ],
    )  # fmt: skip
    def test_what_is_no_runtime_is_refused(self, monkeypatch, spec, text):
        _core.rebind(None)
        monkeypatch.setenv("KVSIG_CUDART", spec)
        with pytest.raises(_core.BindError) as caught:
            _core.bind()
        assert text in str(caught.value)

    def test_the_environment_chooses(self):
        text = python(
            "import json, kvsig._core as c; print(json.dumps(c.info()))",
            KVSIG_CUDART="emulated:12.9/13.0",
        )
        info = json.loads(text)
        assert (info["runtime_version"], info["driver_version"]) == (12090, 13000)
        assert info["emulated"] is True and info["found"] == "KVSIG_CUDART=emulated:12.9/13.0"
        assert info["libraries"] == [] and info["warnings"] == []
        assert [row["name"] for row in info["functions"]] == list(REGISTRY.functions)
        for row in info["functions"]:
            if row["status"] == "bound":
                assert row["address"] and row["variant"]
