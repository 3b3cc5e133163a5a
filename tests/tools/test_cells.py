"""Cells of the benchmark."""

from __future__ import annotations

import numpy as np
import pytest

from kvsig.tools import cells
from kvsig.tools.cells import CHOICES, Cell
from kvsig.tools.jobs import page_numbers
from kvsig.tools.models import MODELS


def test_copies_and_bytes():
    cell = Cell(4096, 16, layers=32, kinds=2, direction="load")
    assert (cell.copies, cell.bytes) == (1024, 4 << 20)
    both = Cell(4096, 16, layers=32, kinds=2, direction="both")
    assert (both.copies, both.bytes) == (2048, 8 << 20)


def test_one_page_is_not_pages():
    assert cells.describe(Cell(3 << 19, 1, layers=1)) == (
        "1 page of 1.5 MiB, 1 layer of K and V, load, random pages, page_first_direct,"
        " all layers in one call"
    )


def test_the_preset_has_every_choice():
    found = cells.preset(emulated=False)
    assert {cell.section for cell in found} == set(cells.SECTIONS)
    assert {cell.page_bytes for cell in found} >= {256 << i for i in range(13)}
    for name, values in CHOICES.items():
        assert {getattr(cell, name) for cell in found} == set(values)
    assert {cell.model for cell in found} == {"", *MODELS}
    assert max(cell.pool_bytes for cell in found) <= cells.POOL_BYTES


def test_quick_is_small():
    found = cells.preset(False, cells.QUICK)
    assert len(found) == 16
    assert {cell.scope for cell in found} == {"all", "layer"}
    assert {cell.direction for cell in found} == {"offload", "load"}


def test_the_emulated_preset_is_small():
    assert sum(cell.bytes for cell in cells.preset(emulated=True)) < 1 << 30


def test_sections():
    (section,) = {cell.section for cell in cells.preset(True, {"pages": cells.SECTIONS["pages"]})}
    assert section == "pages"


def test_product_is_every_combination():
    found = cells.product(True, page_bytes=(512, 1024), pages=(4, 8), order=("random", "sorted"))
    assert len(set(found)) == len(found) == 2 * 2 * 2 * 2
    assert {cell.direction for cell in found} == {"offload", "load"}


def test_product_of_models():
    (cell, _) = cells.product(True, model=("deepseek-v3",), page_size=(16,), pages=(4,))
    assert (cell.page_bytes, cell.layers, cell.kinds) == (16 * 1152, 61, 1)


def test_too_large():
    with pytest.raises(ValueError) as caught:
        cells.product(False, page_bytes=(1 << 20,), pages=(64,), direction=("load",))
    assert str(caught.value) == (
        "64 pages of 1 MiB in 32 layers need 8 GiB on each side, twice what moves; a cell may"
        " have 2 GiB: ask for fewer --pages or --layers"
    )


@pytest.mark.parametrize("order", CHOICES["order"])
@pytest.mark.parametrize("pages", [1, 4, 24])
def test_page_numbers(order, pages):
    mine, other = page_numbers(Cell(512, pages, order=order), np.random.default_rng(1))
    assert sorted([*mine, *other]) == list(range(2 * pages))
    steps = np.diff(mine)
    if order == "sorted":
        assert (steps == 1).all()
    elif order == "reversed":
        assert (steps == -1).all()
    elif order == "runs8" and pages == 24:
        assert (steps.reshape(-1)[np.arange(23) % 8 != 7] == 1).all()
