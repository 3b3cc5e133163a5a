"""Random caches and transfers, and what memory should hold after each; with and without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import kvsig
from kvsig.planning.costs import builtin

LAYOUTS = ("page_first_direct", "page_first", "page_head", "layer_first")
H100 = builtin("NVIDIA H100 80GB HBM3")
#: Bytes between and around tensors at least, which nothing may write to.
GUARD = 32
#: More pages than a launch carries numbers of.
MANY = 400

Groups = list[list[torch.Tensor]]


class PageCase:
    """One cache and one transfer.

    Parameters
    ----------
    seed : int
    most : int
        Bytes of each side, about.
    """

    def __init__(self, seed: int, most: int) -> None:
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        pick = self.rng.integers
        self.layout = LAYOUTS[pick(4)]
        self.groups = int(pick(1, 3))
        self.layers = int(pick(1, 6))
        self.page_size = int(pick(1, 9))
        self.heads = int(pick(1, 4))
        # Bytes of a page of a layer, 1 B to 1 MiB: as likely of any size, and often of a round one.
        width = 2.0 ** self.rng.uniform(0, 20)
        dim = max(1, int(width) // (self.page_size * self.heads))
        if pick(2):
            unit = 1 << int(pick(1, 8))
            dim = max(1, dim // unit) * unit
        # K and V may differ.
        self.dims = [dim, dim if pick(2) else max(1, dim // 2)][: self.groups]
        page = sum(self.page_size * self.heads * dim for dim in self.dims)
        room = max(2, min(most // (page * self.layers), 2 * MANY))
        self.pages = [int(pick(1, room + 1)) for _ in range(2)]
        self.load = bool(pick(2))
        self._choose_places()
        self._choose_transfer()

    def _choose_places(self) -> None:
        """Gaps between tensors: at any byte, or at multiples of something."""
        pick = self.rng.integers
        count = self.groups * self.layers
        step = (1, 2, 4, 8, 16, 256)[pick(6)]
        self.gaps = [
            [GUARD + int(pick(64)) * step for _ in range(count + 1)] for _ in range(2)
        ]  # fmt: skip
        self.step = step
        self.separate = bool(pick(2))

    def _choose_transfer(self) -> None:
        pick = self.rng.integers
        source, target = (1, 0) if self.load else (0, 1)
        count = int(pick(0, min(self.pages[target], MANY) + 1)) or 1
        numbers: list[Any] = [None, None]
        numbers[target] = self.rng.permutation(self.pages[target])[:count]
        numbers[source] = pick(0, self.pages[source], count)  # some of them twice
        self.numbers = numbers
        some = self.rng.permutation(self.layers)[: pick(1, self.layers + 1)].tolist()
        self.chosen = (None, some, int(some[0]))[pick(3)]
        # Of the device's list and of the host's.
        self.kinds = [("host", "int32", "int64")[pick(3)] for _ in range(2)]
        self.events = self.load and bool(pick(3) == 0)
        self.options = {"sms": int(pick(1, 9)), "rate": (None, 0, 20.0)[pick(3)]}

    def __repr__(self) -> str:
        way = "load" if self.load else "offload"
        return (
            f"seed {self.seed}: {way} {len(self.numbers[0])} pages, {self.layout}, "
            f"{self.layers} layers of {self.dims} x {self.heads} heads x {self.page_size} tokens, "
            f"pages {self.pages}, layers={self.chosen}, numbers {self.kinds}, step {self.step}, "
            f"events={self.events}, {self.options}"
        )

    # --- Memory.

    def _host_shape(self, dim: int) -> tuple[int, ...]:
        pages, size, layers, heads = self.pages[1], self.page_size, self.layers, self.heads
        return {
            "page_first_direct": (pages, layers, size, heads, dim),
            "page_first": (pages * size, layers, heads, dim),
            "page_head": (pages, heads, size, layers, dim),
            "layer_first": (layers, pages * size, heads, dim),
        }[self.layout]

    def bytes_of(self, side: int) -> int:
        """Bytes of a side, with gaps."""
        page = sum(self.page_size * self.heads * dim for dim in self.dims)
        return page * self.layers * self.pages[side] + sum(self.gaps[side])

    def _take(self, flat: torch.Tensor, side: int) -> Callable[[tuple[int, ...]], torch.Tensor]:
        """Cut tensors from memory, one behind the other."""
        place, gaps = 0, iter(self.gaps[side])

        def take(shape: tuple[int, ...]) -> torch.Tensor:
            nonlocal place
            place += next(gaps)
            size = int(np.prod(shape))
            place += size
            return flat[place - size : place].view(shape)

        return take

    def device_tensors(self, flat: torch.Tensor) -> Groups:
        take = self._take(flat, 0)
        shape = self.pages[0] * self.page_size, self.heads
        return [[take((*shape, dim)) for _ in range(self.layers)] for dim in self.dims]

    def host_pools(self, flat: torch.Tensor) -> list[Any]:
        take = self._take(flat, 1)
        if self.layout == "layer_first" and self.separate:
            shape = self.pages[1] * self.page_size, self.heads
            return [[take((*shape, dim)) for _ in range(self.layers)] for dim in self.dims]
        return [take(self._host_shape(dim)) for dim in self.dims]

    def cache(self, near: torch.Tensor, far: torch.Tensor, **options: Any) -> kvsig.PagedKVCache:
        """Make the cache on memory of both sides."""
        device, host = self.device_tensors(near), self.host_pools(far)
        single = self.groups == 1
        return kvsig.PagedKVCache(
            device[0] if single else tuple(device), host[0] if single else tuple(host),
            self.layout, self.page_size, model=H100, **(self.options | options),
        )  # fmt: skip

    # --- What should be.

    def _host_page(self, pool: Any, layer: int, page: int) -> torch.Tensor:
        """A page as (tokens, heads, bytes), whatever the layout."""
        rows = slice(page * self.page_size, (page + 1) * self.page_size)
        if self.layout == "page_first_direct":
            found = pool[page, layer]
        elif self.layout == "page_first":
            found = pool[rows, layer]
        elif self.layout == "page_head":
            found = pool[page, :, :, layer].transpose(0, 1)
        else:
            found = pool[layer][rows]
        return found

    def expect(self, near: torch.Tensor, far: torch.Tensor) -> None:
        """Do the transfer, page by page, on copies of both sides in host memory."""
        device, host = self.device_tensors(near), self.host_pools(far)
        size = self.page_size
        for group, layer in itertools.product(range(self.groups), self.layer_list()):
            for one, other in zip(*self.numbers, strict=True):
                here = device[group][layer][one * size : (one + 1) * size]
                there = self._host_page(host[group], layer, int(other))
                (here if self.load else there)[:] = there if self.load else here

    def layer_list(self) -> list[int]:
        if self.chosen is None:
            return list(range(self.layers))
        return [self.chosen] if isinstance(self.chosen, int) else self.chosen

    # --- The transfer.

    def run(
        self,
        cache: kvsig.PagedKVCache,
        stream: Any,
        on_device: Callable[[Any, str], Any],
        event: Callable[[], Any],
    ) -> tuple[kvsig.Report, list[Any], tuple[Any, Any]]:
        """Submit it; `on_device` puts page numbers into device memory.

        They are answered too: whoever calls keeps them until the transfer is done.
        """
        near, far = (
            values if kind == "host" else on_device(values, kind)
            for values, kind in zip(self.numbers, self.kinds, strict=True)
        )
        options = {"layers": self.chosen, "stream": stream, "path": "kernel"}
        if not self.load:
            return cache.offload(near, far, **options), [], (near, far)
        events = [event() for _ in self.layer_list()] if self.events else None
        report = cache.load(far, near, events=events, **options)
        return report, events or [], (near, far)
