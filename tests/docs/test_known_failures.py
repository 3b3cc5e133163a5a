"""The page of known failures is what the tests say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import known_failures as known  # noqa: E402


def test_the_page_is_up_to_date() -> None:
    assert known.PAGE.read_text(encoding="utf-8") == known.page(), (
        "run: python tests/known_failures.py"
    )


def test_every_failure_has_a_test_and_every_mark_a_failure() -> None:
    assert set(known.proofs()) == set(known.rows())


def test_there_are_as_many_as_were_promised() -> None:
    assert len(known.rows()) >= 60


def test_words_are_whole() -> None:
    for key, row in known.rows().items():
        assert re.fullmatch(r"[a-z0-9-]+", key)
        assert {"section", "failure", "kvsig"} <= set(row) <= known.COLUMNS, key
        for name in row.get("threads", []):
            assert known.thread(name).startswith("["), key
