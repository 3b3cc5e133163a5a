"""``kvsig bench``: arguments, tables and files."""

from __future__ import annotations

import json
import os

import pytest
from tools.invented import gpu_result

from kvsig import cli
from kvsig.tools import report

SMALL = ["--page-bytes", "512,2K", "--pages", "8", "--layers", "3", "--runs", "3"]


def main(*args: str) -> int:
    return cli.main(["bench", *args])


@pytest.fixture
def on_emulated(monkeypatch, emulated_runtime):
    monkeypatch.setenv("KVSIG_CUDART", "emulated:13.0")
    emulated_runtime("13.0")


class TestResults:
    def test_json(self, on_emulated, tmp_path, capsys):
        path = tmp_path / "result.json"
        assert main(*SMALL, "--json", str(path)) == 0
        result = json.loads(path.read_text())
        assert (result["schema"], result["kind"]) == (2, "bench")
        source = result["provenance"]
        assert set(source) >= {"date", "device", "driver_version", "runtime_version", "library"}
        assert "/" not in source["library"]
        assert source["commit"] == os.environ.get("KVSIG_COMMIT")
        assert len(result["cells"]) == 4
        out = capsys.readouterr().out
        assert out.count("  calls\n") == out.count("host time per copy, ns") == 2
        assert "emulated: no speeds, only host time and operations" in out
        assert "GB/s" not in out
        assert main("--from", str(path)) == 0

    def test_saved_result_is_shown(self, tmp_path, capsys):
        path = tmp_path / "result.json"
        report.write_json(path, gpu_result())
        assert main("--from", str(path)) == 0
        out = capsys.readouterr().out
        assert "Some GPU, CUDA 13.0, driver 13.1" in out
        assert "GB/s, and auto's share of the limit" in out
        assert "at worst 0.75 of it in 4 cells" in out
        lines = [line.split() for line in out.splitlines()]
        assert ["4", "KiB", "8", "30.0", "40.0", "50.0", "60%"] in lines

    @pytest.mark.parametrize("key", ["errors", "verified"])
    def test_wrong_bytes_and_failed_cells_are_exit_code_1(self, tmp_path, capsys, key):
        result = gpu_result()
        result["summary"][key] = {"errors": ["ValueError: no"], "verified": False}[key]
        report.write_json(tmp_path / "x.json", result)
        assert main("--from", str(tmp_path / "x.json")) == 1
        out = capsys.readouterr().out
        assert {"errors": "FAILED: ValueError: no", "verified": "WRONG"}[key] in out

    def test_cells_that_were_left_out(self, tmp_path, capsys):
        result = gpu_result()
        result["skipped"] = [result["cells"].pop()]
        report.write_json(tmp_path / "x.json", result)
        assert main("--from", str(tmp_path / "x.json")) == 0
        said = "1 cell was left out: --seconds was too short for it\n"
        assert said in capsys.readouterr().out


class TestRefusals:
    @pytest.mark.parametrize(
        ("args", "text"),
        [
            (["--page-bytes", "12Q"], "'12Q' is not a number of bytes up to 1 GiB"),
            (["--order", "random,odd"], "'odd' is not one of: random, runs8, sorted, reversed"),
            (["--model", "gpt"], "'gpt' is not one of: llama3-8b, llama3-70b-tp8, deepseek-v3"),
            (["--kinds", "3"], "'3' is not one of: 1, 2"),
        ],
    )
    def test_wrong_values(self, args, text, capsys):
        with pytest.raises(SystemExit) as caught:
            main(*args)
        assert caught.value.code == 2
        assert text in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("args", "text"),
        [
            (
                ["--section", "sizes", "--order", "sorted"],
                "--section chooses from the preset: not with --order",
            ),
            (
                ["--section", "sizes", "--quick"],
                "--section chooses from the preset: not with --quick",
            ),
            (["--quick", "--layers", "2"], "--quick is a preset: not with --layers"),
            (
                ["--model", "llama3-8b", "--layers", "2"],
                "--model has its own layers, kinds and page bytes; give --page-size",
            ),
            (
                ["--page-size", "16"],
                "--page-size is of a --model; without one, give --page-bytes",
            ),
            (
                ["--page-bytes", "1M", "--pages", "64"],
                "64 pages of 1 MiB in 32 layers need 8 GiB on each side, twice what moves; a cell"
                " may have 2 GiB: ask for fewer --pages or --layers",
            ),
        ],
    )
    def test_what_does_not_go_together(self, on_emulated, args, text, capsys):
        assert main(*args) == 2
        assert capsys.readouterr().err == f"kvsig bench: {text}\n"

    @pytest.mark.parametrize("text", ["{}", "[1]", '{"schema": 1, "kind": "bench"}'])
    def test_what_is_no_result(self, tmp_path, capsys, text):
        path = tmp_path / "other.json"
        path.write_text(text)
        assert main("--from", str(path)) == 2
        assert capsys.readouterr().err == (
            f"kvsig bench: {path} is not a result of this version's kvsig bench --json\n"
        )

    def test_what_is_no_json(self, tmp_path, capsys):
        path = tmp_path / "other.json"
        path.write_text("no")
        assert main("--from", str(path)) == 2
        assert f"{path} is not JSON: " in capsys.readouterr().err
