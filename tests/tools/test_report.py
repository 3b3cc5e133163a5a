"""What all tools say alike: sizes, numbers, tables, progress, files, the commit."""

from __future__ import annotations

import io
import json
import sys

import pytest

from kvsig.tools import report


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (3 << 19, "1.5 MiB"),
     (5 << 30, "5 GiB"), (12345, "12.06 KiB")],
)  # fmt: skip
def test_bytes(count, text):
    assert report.bytes_text(count) == text


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(1, "page", "1 page"), (2, "page", "2 pages"), (0, "page", "0 pages"), (1, "copy", "1 copy"),
     (2048, "copy", "2,048 copies"), (3, "layer", "3 layers")],
)  # fmt: skip
def test_counts(count, noun, text):
    assert report.count_text(count, noun) == text


@pytest.mark.parametrize(("us", "text"), [(3.21, "3.21 µs"), (1250.0, "1.25 ms"), (2.5e6, "2.5 s")])
def test_times(us, text):
    assert report.time_text(us) == text


def test_spread():
    found = report.spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert found == {"median": 3.0, "min": 1.0, "p10": 1.0, "p90": 5.0, "max": 5.0}


class TestTable:
    ROWS = (("page", "pages", "auto", "batch"), ("4 KiB", "8", "30.0", "40.0"))

    def test_one_block_where_it_fits(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        assert report.table(self.ROWS) == [" page  pages  auto  batch", "4 KiB      8  30.0   40.0"]

    def test_left_with_a_rule(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        lines = report.table(self.ROWS, left=True, rule=True)
        assert lines == ["page   pages  auto  batch", "-" * 25, "4 KiB  8      30.0  40.0"]

    @pytest.mark.parametrize("width", [16, 20, 24])
    def test_blocks_where_it_does_not(self, monkeypatch, width):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = report.table(self.ROWS, labels=2)
        assert max(map(len, lines)) <= max(width, 19)
        text = "\n".join(lines)
        assert all(text.count(value) == 1 for value in ("auto", "batch", "30.0", "40.0"))
        assert text.count("4 KiB") == 2, "each block says what its rows are about"

    def test_as_wide_as_it_is_where_there_is_no_terminal(self, monkeypatch):
        monkeypatch.delenv("COLUMNS", raising=False)
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        assert len(report.table([["x" * 50] * 5])[0]) == 258


class TestProgress:
    @pytest.mark.parametrize("width", [20, 60, 100])
    def test_one_line_of_the_terminal(self, monkeypatch, width):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        monkeypatch.setattr(report.Progress, "INTERVALS", (0.0, 0.0))
        monkeypatch.setenv("COLUMNS", str(width))
        shown = Terminal()
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", shown)
            with report.Progress("kvsig bench") as progress:
                progress.show(3, 12, "1,024 pages of 4 KiB, llama3-8b page_size 16, 32 layers " * 2)
        first, last = shown.getvalue().split("\r\x1b[K")[1:]
        assert "3/12" in first and last == ""
        assert len(first) < width, "the last column stays free"

    def test_lines_elsewhere(self, monkeypatch, capsys):
        monkeypatch.setattr(report.Progress, "INTERVALS", (0.0, 0.0))
        with report.Progress("kvsig demo") as progress:
            for done in range(2):
                progress.show(done, 2, "filling")
        lines = capsys.readouterr().err.splitlines()
        assert lines == [f"kvsig demo: {i} of 2 after 0 s, filling" for i in (0, 1)]

    def test_not_too_often(self, capsys):
        with report.Progress("kvsig demo") as progress:
            for done in range(1000):
                progress.show(done, 1000, "filling")
        assert capsys.readouterr().err == ""


class TestFiles:
    def test_json_reads_back(self, tmp_path):
        data = {"a": [{"b": {"c": [1, 2]}}, {}], "d": None, "e": "µ", "f": []}
        report.write_json(tmp_path / "x.json", data)
        text = (tmp_path / "x.json").read_text(encoding="utf-8")
        assert json.loads(text) == data
        assert "µ" in text
        assert [path.name for path in tmp_path.iterdir()] == ["x.json"]

    def test_a_failure_leaves_what_was_there(self, tmp_path):
        path = tmp_path / "x.json"
        path.write_text("old")
        with pytest.raises(TypeError):
            report.write_json(path, {"a": object()})
        assert path.read_text() == "old"
        assert [found.name for found in tmp_path.iterdir()] == ["x.json"]


def test_the_commit_is_what_the_environment_says(monkeypatch):
    monkeypatch.delenv("KVSIG_COMMIT", raising=False)
    assert report.versions()["commit"] is None
    monkeypatch.setenv("KVSIG_COMMIT", "0123abc")
    assert report.versions()["commit"] == "0123abc"


def test_versions_bind_no_runtime(monkeypatch):
    import kvsig

    monkeypatch.setattr(kvsig, "info", lambda: pytest.fail("a runtime was bound"))
    found = report.versions()
    assert found["kvsig"] == kvsig.__version__
    assert "library" not in found and "emulated" not in found
