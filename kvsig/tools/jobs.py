"""The data of a cell: device and host memory, page numbers, and what must come out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import kvsig
from kvsig.tools.cells import Cell

__all__ = ["Job", "Memory", "page_numbers"]

I64 = npt.NDArray[np.int64]
#: The one big copy that speeds are compared with moves as much as this.
LIMIT_BYTES = 256 << 20
SIDES = ("device", "host")
OTHER = {"device": "host", "host": "device"}


def page_numbers(cell: Cell, rng: np.random.Generator) -> tuple[I64, I64]:
    """Distinct page numbers of one side: those that move, and those of the other direction."""
    total, count = cell.pool_pages, cell.pages
    order = np.arange(total)
    if cell.order == "runs8":
        run = math.gcd(8, count)  # shorter ones where the pages are not a multiple of 8
        order = (rng.permutation(total // run)[:, None] * run + np.arange(run)).ravel()
    elif cell.order == "random":
        order = rng.permutation(total)
    step = -1 if cell.order == "reversed" else 1
    return order[:count][::step].copy(), order[count:][::step].copy()


class Memory:
    """Device and pinned memory that all cells use in turn, so that it is allocated once.

    The device is the CPU for the emulated runtime.
    """

    def __init__(self, device: torch.device, nbytes: int, seed: int) -> None:
        self.device = device
        self.real = device.type == "cuda"
        nbytes = max(nbytes, LIMIT_BYTES if self.real else 1 << 20)
        self.near = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.far = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.real)
        self.generator = torch.Generator(device).manual_seed(seed)

    def random(self, nbytes: int) -> torch.Tensor:
        """Random bytes on the device."""
        words = torch.empty(-(-nbytes // 8), dtype=torch.int64, device=self.device)
        words.random_(-(2**63), None, generator=self.generator)
        return words.view(torch.uint8)[:nbytes]


class Job:
    """The data of one cell in some memory, and the calls that every method is made of."""

    def __init__(self, cell: Cell, memory: Memory, seed: int) -> None:
        self.cell = cell
        self.memory = memory
        shape = (cell.kinds, cell.layers, cell.pool_pages, cell.page_bytes)
        whole = memory.near[: cell.pool_bytes].view(shape)
        #: Device tensors (pages, bytes), by kind and layer.
        self.near = [list(kind.unbind(0)) for kind in whole.unbind(0)]
        if cell.spacing == "separate":
            self.near = [[torch.empty_like(layer) for layer in kind] for kind in self.near]
        self.far_bytes = memory.far[: cell.pool_bytes]
        pools: tuple[int, ...] = shape
        if cell.layout == "page_first_direct":
            pools = (cell.kinds, cell.pool_pages, cell.layers, 1, cell.page_bytes)
        #: Host pools, by kind.
        self.far = list(self.far_bytes.view(pools).unbind(0))
        two = cell.kinds == 2
        self.cache = kvsig.PagedKVCache(
            device=tuple(self.near) if two else self.near[0],
            host=tuple(self.far) if two else self.far[0],
            layout=cell.layout,
            page_size=1,
        )
        rng = np.random.default_rng(seed)
        near, far = page_numbers(cell, rng), page_numbers(cell, rng)
        other = 1 if cell.direction == "both" else 0
        #: Direction -> device pages and host pages; the two directions share none.
        self.pages = {"offload": (near[0], far[0]), "load": (near[other], far[other])}
        #: Side -> page -> the page of the other side that it must hold.
        self.origin: dict[str, dict[int, int]] = {side: {} for side in SIDES}
        self.drop()

    def by_plane(self, pool: torch.Tensor) -> torch.Tensor:
        """View bytes that lie as the host pools do as (kinds, layers, pages, bytes)."""
        planes = pool.view(self.cell.kinds, *self.far[0].shape)
        if self.cell.layout == "page_first_direct":
            return planes[:, :, :, 0].transpose(1, 2)
        return planes

    def far_plane(self, kind: int, layer: int) -> torch.Tensor:
        """Host pages of one plane, (pages, bytes)."""
        return self.by_plane(self.far_bytes)[kind, layer]

    def transfer(self, path: str, direction: str, stream: Any) -> kvsig.Report:
        """Transfer through the cache, in one call or in one for each layer."""
        near, far = self.pages[direction]
        report = kvsig.Report()
        for layer in [None] if self.cell.scope == "all" else range(self.cell.layers):
            if direction == "offload":
                report += self.cache.offload(near, far, layers=layer, stream=stream, path=path)
            else:
                report += self.cache.load(far, near, layers=layer, stream=stream, path=path)
        return report

    # Verification: the whole of both sides is compared, also what must stay as it was.

    def now(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy both sides to the device, each as (kinds, layers, pages, bytes)."""
        near = torch.stack([torch.stack(kind) for kind in self.near])
        return near, self.by_plane(self.far_bytes.to(self.memory.device, copy=True))

    def fill(self) -> None:
        """Put random bytes on both sides; nothing is expected to move yet."""
        for tensors in self.near:
            for tensor in tensors:
                tensor.copy_(self.memory.random(tensor.numel()).view(tensor.shape))
        self.far_bytes.copy_(self.memory.random(self.far_bytes.numel()))
        self.before = self.now()
        self.after = (self.before[0].clone(), self.before[1].clone())
        self.origin = {side: {} for side in SIDES}

    def expect(self, way: str) -> None:
        """Say that a transfer in this direction comes: what it must leave, and whence."""
        to, of = (1, 0) if way == "offload" else (0, 1)
        target, source = self.after[to], self.after[of]
        arriving, leaving = self.pages[way][to], self.pages[way][of]
        target[:, :, torch.from_numpy(arriving)] = source[:, :, torch.from_numpy(leaving)]
        self.origin[SIDES[to]] |= dict(zip(arriving.tolist(), leaving.tolist(), strict=True))

    def clobber(self, way: str, byte: int) -> None:
        """Write over the device pages of a direction, and expect that they stay so."""
        pages = torch.from_numpy(self.pages[way][0]).to(self.memory.device)
        for tensors in self.near:
            for tensor in tensors:
                tensor.index_fill_(0, pages, byte)
        self.after[0].index_fill_(2, pages, byte)

    def restore(self) -> None:
        """Undo a transfer."""
        near, far = self.before
        for kind, tensors in enumerate(self.near):
            for layer, tensor in enumerate(tensors):
                tensor.copy_(near[kind, layer])
        self.by_plane(self.far_bytes).copy_(far)

    def wrong(self) -> list[str]:
        """Name every page that is not as the transfers must leave it."""
        found = []
        names = ("latent",) if self.cell.kinds == 1 else ("K", "V")
        for side, now, wanted in zip(SIDES, self.now(), self.after, strict=True):
            if torch.equal(now, wanted):
                continue
            for kind, layer, page in (now != wanted).any(3).nonzero().tolist():
                origin = self.origin[side].get(page)
                text = f"layer {layer} {names[kind]}: {side} page {page} "
                held = f"does not hold {OTHER[side]} page {origin}"
                found.append(text + ("was written" if origin is None else held))
        return found

    def drop(self) -> None:
        """Free the copies that verification needs."""
        none = torch.empty(0)
        self.before = self.after = (none, none)
