"""The page of troubleshooting has an entry for each error and warning, and none for others."""

from __future__ import annotations

import re

import pytest
from pages import ROOT
from texts import entries, texts, without_entry, without_text

if not (ROOT / "kvsig").is_dir():
    pytest.skip(f"kvsig's sources are not here: no {ROOT / 'kvsig'}", allow_module_level=True)


def test_texts_are_found() -> None:
    found = {text.text for text in texts()}
    assert len(found) > 100
    assert any(text.startswith("no CUDA runtime: ") for text in found)  # of Python or Cython
    assert any("prototype of ..." in text for text in found)


def test_each_text_has_an_entry() -> None:
    assert [f"{text.place}: {text.text}" for text in without_entry()] == []


def test_each_entry_has_a_text() -> None:
    assert without_text() == []


def test_entries_are_told_apart() -> None:
    """An entry has words enough to be about something, and stands once."""
    assert [entry for entry in entries() if len(re.findall(r"[A-Za-z]{2,}", entry)) < 2] == []
    assert len(entries()) == len(set(entries()))
