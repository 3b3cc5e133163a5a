"""Scripts beside the package: those that need no GPU run, the others say that they need one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tools.invented import gpu_result

from kvsig.cli.bench import text_of
from kvsig.tools import report
from kvsig.tools.measuring import summary

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


def script(name: str, *args: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *args],
        capture_output=True,
        text=True,
        env=os.environ | {"KVSIG_CUDART": "emulated:13.0", "PYTHONPATH": search},
        check=False,
    )


def test_rivals_need_a_gpu():
    done = script("rivals")
    assert done.returncode == 1
    assert done.stderr == "rivals are compared on a GPU, with a real CUDA runtime\n"


@pytest.mark.parametrize("name", ["one_call", "torch_copy", "Select"])
@pytest.mark.parametrize("layout", ["page_first_direct", "layer_first"])
@pytest.mark.parametrize("scope", ["all", "layer"])
def test_rivals_move_the_bytes(name, layout, scope, monkeypatch, emulated_runtime):
    """Those that need no other library, with host memory as the device's."""
    from kvsig import emulated
    from kvsig.tools.cells import Cell
    from kvsig.tools.jobs import Job, Memory

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    import rivals

    emulated_runtime("13.0")
    for direction in ("offload", "load"):
        cell = Cell(512, 4, layers=3, direction=direction, layout=layout, scope=scope)
        job = Job(cell, Memory(torch.device("cpu"), cell.pool_bytes, 0), 0)
        job.fill()
        job.expect(direction)
        stream = emulated.Stream()
        report = getattr(rivals, name)(job)(direction, stream)
        stream.synchronize()
        assert (job.wrong(), report.bytes) == ([], cell.bytes)


def test_overhead(tmp_path):
    """Whether its limits are met is the machine's; that every figure is there is not."""
    done = script("overhead", "--json", str(tmp_path / "x.json"))
    assert done.returncode in (0, 1), done.stderr
    result = json.loads((tmp_path / "x.json").read_text())
    figures = [len(result[part]) for part in ("copies", "calls", "engines")]
    assert figures == [9, 12, 13]
    above = f"{result['missed']} of {sum(figures)} figures are above the limit\n"
    assert done.stdout.endswith(above)
    assert done.returncode == bool(result["missed"])


def test_against_itself(tmp_path):
    done = script(
        "against", str(ROOT), "--rounds", "1", "--seconds", "20", "--json", str(tmp_path / "x.json")
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["cells"]
    assert all(cell["host_ms_ratio"] > 0 for cell in result["cells"])
    assert not any("ms_ratio" in cell for cell in result["cells"]), "no speeds without a GPU"
    assert result["verdict"]["small_calls"]["cells"] == 6
    assert "new over old, above 1 is faster" in done.stdout


def test_against_judges_as_it_says(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from dataclasses import asdict

    import against

    from kvsig.tools.cells import Cell

    def row(ratio, page_bytes=65536, scope="all", **values):
        cell = Cell(page_bytes, 8, scope=scope, **values)
        return asdict(cell) | {"ms_ratio": ratio, "host_ms_ratio": ratio}

    small = row(0.1, 4096, "layer")
    for ratios, met in (([0.98, 1.0, 0.93], True), ([0.98, 1.0, 0.91], False),
                        ([0.96, 0.96, 1.2], False)):  # fmt: skip
        found = against.verdict([small, *map(row, ratios)])
        assert found["met"] is met
        assert found["judged"]["cells"] == 3
        assert found["reported"]["worst"] == 0.1, "reported, not judged"


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
class TestPlot:
    @pytest.mark.parametrize("suffix", ["png", "svg"])
    def test_picture(self, suffix, tmp_path):
        report.write_json(tmp_path / "result.json", gpu_result())
        picture = tmp_path / f"speed.{suffix}"
        done = script("plot", str(tmp_path / "result.json"), str(picture))
        assert done.returncode == 0, done.stderr
        assert picture.stat().st_size > 1000
        if suffix == "svg":
            assert "bytes per page" in picture.read_text()

    def test_the_summary_that_is_kept(self, tmp_path):
        picture = tmp_path / "speed.svg"
        summary = BENCHMARKS / "results/h100/summary.json"
        done = script("plot", str(summary), str(picture), "--part", "quick")
        assert done.returncode == 0, done.stderr
        assert "strided" in picture.read_text()

    def test_a_result_without_speeds(self, tmp_path):
        result = gpu_result()
        result["provenance"] = result["provenance"] | {"emulated": True}
        report.write_json(tmp_path / "result.json", result)
        done = script("plot", str(tmp_path / "result.json"), str(tmp_path / "x.svg"))
        assert done.returncode == 1
        assert done.stderr == "there are no GB/s of at least two page sizes in the result\n"


class TestGpuRun:
    @pytest.mark.parametrize(
        ("args", "text"),
        [
            (("none",), "no part none; there are: build, machine, tests"),
            (("quick", "--commit", "main"), "--commit 'main' is no commit"),
            (("quick", "--against", "/no"), "--against /no: there is no kvsig in it"),
        ],
    )
    def test_wrong_arguments(self, tmp_path, args, text):
        done = script("gpu_run", str(tmp_path), *args)
        assert done.returncode == 2
        assert text in done.stderr

    def test_a_part_that_fails_loses_no_other(self, tmp_path):
        done = script("gpu_run", str(tmp_path), "compute,overhead", "--commit", "0123abc")
        assert done.returncode == 1
        path = tmp_path / "summary.json"
        summary = json.loads(path.read_text())
        assert summary["commit"] == "0123abc"
        assert summary["parts"]["compute"]["result"] == "exit code 1"
        assert summary["parts"]["overhead"]["seconds"] > 0
        assert len(summary["overhead"]["calls"]) == 12
        assert path.stat().st_size < 300_000
        assert "computing beside transfers needs a GPU" in (tmp_path / "run.log").read_text()

    def test_the_commit_is_that_of_the_checkout(self, monkeypatch, tmp_path):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        import gpu_run

        for name in ("GIT_DIR", "GIT_WORK_TREE"):
            monkeypatch.delenv(name, raising=False)
        file = tmp_path / "a.py"
        assert gpu_run.commit(tmp_path) is None, "no checkout"

        def git(*args):
            command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *args]
            done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
            return done.stdout.strip()

        git("init", "-q")
        assert gpu_run.commit(tmp_path) is None, "no commit yet"
        file.write_text("1\n")
        git("add", "-A")
        git("commit", "-qm", "one")
        assert gpu_run.commit(tmp_path) == git("rev-parse", "HEAD")
        file.write_text("2\n")
        assert gpu_run.commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"

    def test_results_in_the_tree_are_small(self):
        kept = [path.stat().st_size for path in (BENCHMARKS / "results").rglob("*.json")]
        assert kept and sum(kept) < 300_000

    def test_condensed_keeps_what_tables_need(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        import gpu_run

        result = gpu_result()
        kept = json.loads(gpu_run.compact(gpu_run.condensed(result)))
        assert text_of(kept) == text_of(result)
        assert summary(kept) == result["summary"]

    @pytest.mark.parametrize("part", ["quick", "models"])
    def test_the_summary_that_is_kept_can_be_shown(self, part):
        kept = json.loads((BENCHMARKS / "results/h100/summary.json").read_text())[part]
        assert "every byte was right" in text_of(kept)
        assert summary(kept)["worst"] == kept["summary"]["worst"]
