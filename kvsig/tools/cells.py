"""Cells of the benchmark: what is transferred, in which shape, order and direction.

Standard library only: the command line reads its choices from here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from kvsig.tools.models import MODELS, Model
from kvsig.tools.report import bytes_text, count_text

__all__ = [
    "CHOICES",
    "LIMIT",
    "PATHS",
    "QUICK",
    "SECTIONS",
    "WAYS",
    "Cell",
    "describe",
    "preset",
    "product",
    "shape_text",
]

#: Field of `Cell` -> the values that it takes: every combination is a cell.
Fields = Mapping[str, Iterable[Any]]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

#: Values of `path=` that are measured. A new path of kvsig is measured when it stands here.
PATHS = ("auto", "batch", "strided", "loop", "kernel")
#: The method that gives the limit: one big copy.
LIMIT = "one-copy"
WAYS = ("offload", "load")
#: Field of `Cell` -> its values, the first one being the default.
CHOICES = {
    "direction": ("offload", "load", "both"),
    "order": ("random", "runs8", "sorted", "reversed"),
    "layout": ("page_first_direct", "layer_first"),
    "scope": ("all", "layer"),
    "spacing": ("even", "separate"),
}
PAGE_BYTES = tuple(256 << i for i in range(13))
QUICK_BYTES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB)
MIDDLE_BYTES = (4 * KIB, 16 * KIB, 64 * KIB)
#: Shapes of models, by tokens per page.
MODEL_FIELDS: dict[str, Iterable[Any]] = {"model": MODELS, "page_size": (1, 16, 64)}
LAYER_BY_LAYER: dict[str, Iterable[Any]] = {"scope": ("layer",)}
#: Section of the preset -> its cells.
SECTIONS: dict[str, list[Fields]] = {
    "sizes": [{"page_bytes": PAGE_BYTES}],
    "layers": [LAYER_BY_LAYER | {"page_bytes": PAGE_BYTES}],
    "orders": [
        {"layout": CHOICES["layout"], "order": CHOICES["order"], "page_bytes": MIDDLE_BYTES}
    ],
    "pages": [{"scope": CHOICES["scope"], "page_bytes": (4 * KIB, 32 * KIB), "pages": (1, 4, 16)}],
    "models": [MODEL_FIELDS, LAYER_BY_LAYER | MODEL_FIELDS | {"direction": ("load",)}],
    "spacing": [{"spacing": ("separate",), "page_bytes": MIDDLE_BYTES}],
    "both": [{"direction": ("both",), "page_bytes": (16 * KIB, 64 * KIB, 256 * KIB)}],
}
#: A few page sizes, each way, all layers in one call and layer by layer.
QUICK: dict[str, list[Fields]] = {
    "sizes": [{"page_bytes": QUICK_BYTES}],
    "layers": [LAYER_BY_LAYER | {"page_bytes": QUICK_BYTES}],
}
#: A cell moves no more than this, unless pages are asked for by number.
MOST_BYTES, MOST_COPIES, EMULATED_BYTES, EMULATED_COPIES = 256 * MIB, 16384, MIB, 2048
#: Cells of a preset that move more are left out on the emulated runtime: they only take time.
EMULATED_MOST = 16 * MIB
#: Bytes of each side of a cell at most.
POOL_BYTES = 2 * GIB


@dataclass(frozen=True, slots=True)
class Cell:
    """One transfer to be measured; `CHOICES` has the values of its words."""

    #: Bytes of one page of one plane (K or V of one layer): of one copy.
    page_bytes: int
    #: Pages that move, of every plane.
    pages: int
    layers: int = 32
    #: 2 for K and V, 1 for a latent.
    kinds: int = 2
    #: "both" is an offload and a load of as many pages at once, on two streams.
    direction: str = "load"
    #: Page numbers: random on both sides; runs of 8 neighbours in random places; ascending or
    #: descending neighbours on both sides.
    order: str = "random"
    #: Of the host pool.
    layout: str = "page_first_direct"
    #: All layers in one call, or one call per layer.
    scope: str = "all"
    #: Device layers as slices of one tensor, or allocated one by one.
    spacing: str = "even"
    #: Of the preset that the cell belongs to.
    section: str = "chosen"
    #: Whose shape it is, and its tokens per page; empty and 0 where it is none's.
    model: str = ""
    page_size: int = 0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Cell:
        """The cell that a row of a result is of."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    @property
    def ways(self) -> tuple[str, ...]:
        """Directions of the transfers that the cell is made of."""
        return WAYS if self.direction == "both" else (self.direction,)

    @property
    def copies(self) -> int:
        """Copies asked for: pages of every plane, both ways where it is both."""
        return self.pages * self.layers * self.kinds * len(self.ways)

    @property
    def bytes(self) -> int:
        """Bytes that move."""
        return self.copies * self.page_bytes

    @property
    def pool_pages(self) -> int:
        """Pages there are on each side."""
        return 2 * self.pages

    @property
    def pool_bytes(self) -> int:
        """Bytes of each side."""
        return self.pool_pages * self.layers * self.kinds * self.page_bytes


def shape_text(cell: Cell) -> str:
    """Write all of a cell but its pages."""
    planes = "K and V" if cell.kinds == 2 else "one latent"
    words = [f"{count_text(cell.layers, 'layer')} of {planes}"]
    words += [cell.direction, f"{cell.order} pages", cell.layout]
    words.append("all layers in one call" if cell.scope == "all" else "one call per layer")
    if cell.spacing == "separate":
        words.append("layers allocated separately")
    return (f"{cell.model}: " if cell.model else "") + ", ".join(words)


def describe(cell: Cell) -> str:
    """Write a cell in one line."""
    return f"{count_text(cell.pages, 'page')} of {bytes_text(cell.page_bytes)}, {shape_text(cell)}"


def auto_pages(cell: Cell, emulated: bool) -> int:
    """Pages that a cell moves where no number is given."""
    most_bytes = EMULATED_BYTES if emulated else MOST_BYTES
    most_copies = EMULATED_COPIES if emulated else MOST_COPIES
    pages = min(most_bytes // cell.page_bytes, most_copies) // (cell.layers * cell.kinds)
    return max(2, pages // 8 * 8 if pages >= 8 else pages)


def shape_of(model: Model, page_size: int) -> dict[str, Any]:
    """Fields of `Cell` that follow from a model."""
    return {
        "page_bytes": model.plane_token_bytes * page_size,
        "layers": model.layers,
        "kinds": model.tensors,
        "model": model.name,
        "page_size": page_size,
    }


def make(emulated: bool, **values: Any) -> Cell:
    """Make a cell; pages and the shape of a model are filled in where they are not said."""
    if "model" in values:
        values |= shape_of(MODELS[values["model"]], values.get("page_size", 16))
    cell = Cell(**{"pages": 0} | values)
    return cell if cell.pages else replace(cell, pages=auto_pages(cell, emulated))


def product(emulated: bool, **values: Iterable[Any]) -> list[Cell]:
    """Every combination of the values given; a dimension that is not given has its default.

    Parameters
    ----------
    emulated : bool
        Small transfers, where ``pages`` is not given.
    **values : iterable
        By fields of `Cell`. ``model`` and ``page_size`` take the place of ``page_bytes``,
        ``layers`` and ``kinds``.

    Raises
    ------
    ValueError
        If a cell needs more memory than a cell may have.
    """
    given: dict[str, Iterable[Any]] = {"direction": WAYS}
    if "model" not in values:
        given["page_bytes"] = PAGE_BYTES
    given |= values
    cells = [
        make(emulated, **dict(zip(given, chosen, strict=True)))
        for chosen in itertools.product(*given.values())
    ]
    for cell in cells:
        if cell.pool_bytes > POOL_BYTES:
            raise ValueError(
                f"{count_text(cell.pages, 'page')} of {bytes_text(cell.page_bytes)} in"
                f" {count_text(cell.layers, 'layer')} need {bytes_text(cell.pool_bytes)} on each"
                f" side, twice what moves; a cell may have {bytes_text(POOL_BYTES)}: ask for"
                " fewer --pages or --layers"
            )
    return cells


def preset(emulated: bool, sections: Mapping[str, list[Fields]] = SECTIONS) -> list[Cell]:
    """Cells of some sections; small ones only on the emulated runtime."""
    return [
        cell
        for section, parts in sections.items()
        for part in parts
        for cell in product(emulated, section=(section,), **part)
        if not emulated or cell.bytes <= EMULATED_MOST
    ]
