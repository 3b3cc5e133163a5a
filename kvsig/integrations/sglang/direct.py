"""SGLang's direct functions: the copies that HiCache makes with page numbers on the CPU.

Each function here takes what SGLang's takes, and answers with a report, or with the reason why
it leaves a call alone: a text. It raises for nothing that SGLang's would serve. Copy engines make
the copies, or where host memory is page-locked and pages are small and scattered, the page-copy
kernel.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsig import merging, streams
from kvsig._core import Report
from kvsig.integrations.sglang import launches, layered, pools
from kvsig.integrations.sglang.kernel import Place, Request
from kvsig.integrations.sglang.pools import Geometry, Planes, PlanesOf, Tensors, Unserved
from kvsig.launching import multiprocessors
from kvsig.planning import costs, descriptors
from kvsig.planning._plan import kernel_pays

__all__ = [
    "transfer_embedding_ranges_direct",
    "transfer_kv_all_layer_direct_lf_pf",
    "transfer_kv_direct",
    "transfer_kv_per_layer_direct_pf_lf",
]

U64: TypeAlias = npt.NDArray[np.uint64]
I64: TypeAlias = npt.NDArray[np.int64]
#: A report, the reason why a call is left to SGLang, or None for one that is kept for a launch.
Answer: TypeAlias = Report | str | None

UNKNOWN = "an argument that kvsig does not know"
_BAD_INDICES = "indices that are not two int64 tensors of one length"
_BAD_PAGES = "indices that are not whole pages"
_OUTSIDE = "an index outside of a tensor"

_NO_NUMBERS: I64 = np.empty(0, dtype=np.int64)
_names = itertools.count(1)


class Pages:
    """The page numbers of one load or offload: all layers of it bring the same tensors.

    Parameters
    ----------
    src, dst : Tensor
        As SGLang gives them, kept so that no other tensor can have their identity.
    page_size : int
        Tokens of a page.
    kind : {"tokens", "load", "offload"}
        "tokens": each number is a place of its own on both sides. "load": the source counts host
        pages and the destination device tokens, of which a page's first ones are read. "offload":
        the other way.
    """

    def __init__(self, src: torch.Tensor, dst: torch.Tensor, page_size: int, kind: str) -> None:
        self.src, self.dst, self.page_size, self.kind = src, dst, page_size, kind
        self.versions = _versions(src, dst)
        near, far = self._read()
        if self.versions is None:
            self.numbers = near.copy(), far.copy()
        self.aligned = True
        if kind != "tokens":
            size = np.uint64(page_size)
            on_device = far if kind == "load" else near
            self.aligned = page_size == 1 or not (on_device % size).any()
            # Pages that begin anywhere: the device's side counts tokens.
            if self.aligned or kind == "load":
                near = near // size
            if self.aligned or kind == "offload":
                far = far // size
        self.to, self.origin = far, near
        self.runs = descriptors.page_runs(far, near)
        self._patterns: dict[tuple[int, int, int], descriptors.Pattern] = {}
        self._together = 0
        self._listed: dict[int, tuple[I64, I64]] = {}
        self._pays: dict[tuple[int, ...], bool] = {}

    def _read(self) -> tuple[U64, U64]:
        step = 1 if self.kind == "tokens" else self.page_size
        return _numbers(self.src)[::step], _numbers(self.dst)[::step]

    def same(self, src: torch.Tensor, dst: torch.Tensor, page_size: int, kind: str) -> bool:
        """Whether these are the page numbers of such a call."""
        if src is not self.src or dst is not self.dst:
            return False
        if page_size != self.page_size or kind != self.kind:
            return False
        if self.versions is not None:
            return self.versions == _versions(src, dst)
        # Made in inference mode, where writes are not counted: a look at the numbers is cheap.
        near, far = self._read()
        return bool((near == self.numbers[0]).all() and (far == self.numbers[1]).all())

    def pattern(self, planes: Planes) -> descriptors.Pattern:
        """Return the copies of one of some planes that are alike."""
        key = self.pitches(planes)
        found = self._patterns.get(key)
        if found is None:
            found = self._patterns[key] = descriptors.pattern(self.runs, *key)
        return found

    def pitches(self, planes: Planes) -> tuple[int, int, int]:
        """Return the bytes from number to number on both sides, and those of each."""
        dst_pitch, src_pitch, width = planes[2:]
        if not self.aligned:
            row = width // self.page_size
            dst_pitch, src_pitch = (row, src_pitch) if self.kind == "load" else (dst_pitch, row)
        return dst_pitch, src_pitch, width

    def together(self, planes: Planes) -> int:
        """Return how many numbers follow each other wherever one does: one can stand for all then.

        A power of two, and 1 where rows have a pitch of their own.
        """
        if self.kind != "tokens" or not planes.dst_pitch == planes.src_pitch == planes.width:
            return 1
        if not self._together:
            runs = np.concatenate((self.runs.dst, self.runs.src, self.runs.lengths))
            bits = int(np.bitwise_or.reduce(runs))
            self._together = bits & -bits
        return self._together

    def listed(self, together: int) -> tuple[I64, I64]:
        """Return the numbers of destinations and sources for the kernel, one of so many each."""
        found = self._listed.get(together)
        if found is None:
            dst, src = (
                np.ascontiguousarray(side[::together] // np.uint64(together)).view(np.int64)
                for side in (self.to, self.origin)
            )
            found = self._listed[together] = dst, src
        return found

    def pays(
        self, planes: Planes, together: int, layers: int, model: costs.DirectionCosts
    ) -> bool:
        """Whether the kernel is to be preferred to the copies of `pattern`, layer by layer."""
        each = len(planes.dst)
        key = (*self.pitches(planes), together, each, layers, id(model))
        found = self._pays.get(key)
        if found is None:
            copies = self.pattern(planes)
            many = each * layers
            found = self._pays[key] = kernel_pays(
                model,
                multiprocessors(),
                many * len(copies.dsts),
                many * len(copies.rows),
                many * int(copies.rows[:, descriptors.HEIGHT].sum()),
                many * self.runs.pages * planes.width,
                many * self.runs.pages // together,
                min(256, max(1, each * len(copies.dsts))),
            )
        return found


@functools.cache
def _model(device: torch.device) -> costs.CostModel:
    return costs.load(streams.device_name(device))


# The latest page numbers: a load of several pools takes turns between theirs.
_recent: list[Pages] = []
_RECENT = 4


def transfer_kv_direct(
    src_layers: Tensors,
    dst_layers: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
    **more: Any,
) -> Answer:
    """Copy tokens of each source tensor to its destination tensor, by token numbers."""
    if more:
        return UNKNOWN
    return _transfer(
        "tokens", src_layers, dst_layers, src_indices, dst_indices, page_size, 0, pools.token_planes
    )


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Tensors,
    dst_ptrs: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
    **more: Any,
) -> Answer:
    """Copy host pages (pages, layers, page_size, ...) to layers on the device."""
    if more:
        return UNKNOWN
    return _transfer(
        "load", src_ptrs, dst_ptrs, src_indices, dst_indices, page_size, layer_id, pools.load_planes
    )


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Tensors,
    dst_ptrs: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
    **more: Any,
) -> Answer:
    """Copy layers on the device to host pages (pages, layers, page_size, ...)."""
    if more:
        return UNKNOWN
    return _transfer(
        "offload", src_ptrs, dst_ptrs, src_indices, dst_indices, page_size, 0, pools.offload_planes
    )


def transfer_embedding_ranges_direct(
    src: torch.Tensor,
    dst: torch.Tensor,
    src_starts: list[int],
    dst_starts: list[int],
    lengths: list[int],
    **more: Any,
) -> Answer:
    """Copy ranges of rows from one two-dimensional tensor to another."""
    if more:
        return UNKNOWN
    if src.ndim != 2 or dst.ndim != 2 or src.dtype != dst.dtype or src.shape[1] != dst.shape[1]:
        return "tables that are not two-dimensional and alike"
    if not (src.is_contiguous() and dst.is_contiguous()):
        return "a table that is not contiguous"
    try:
        device = pools.device_of(((src, dst),))
    except Unserved as unserved:
        return str(unserved)
    if not len(src_starts) == len(dst_starts) == len(lengths):
        return "ranges that are not of one number"
    near, far, count = (np.array(n, dtype=np.int64) for n in (src_starts, dst_starts, lengths))
    for starts, table in ((near, src), (far, dst)):
        if ((starts < 0) | (count < 0) | (starts + count > table.shape[0])).any():
            return "a range outside of its table"
    row = src.shape[1] * src.element_size()
    found = descriptors.plan(
        (far * row + dst.data_ptr()).view(np.uint64),
        (near * row + src.data_ptr()).view(np.uint64),
        (count * row).view(np.uint64),
    )
    with streams.device_guard(device):
        blocks = pools.memory_blocks((src, dst))
        if seams := pools.seams_of(blocks):
            found = descriptors.split(found, seams)
        return merging.submit(found, streams.current_handle(device))


def _transfer(
    kind: str,
    srcs: Tensors,
    dsts: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
    layer: int,
    planes_of: PlanesOf,
) -> Answer:
    """Serve one call of the first three functions."""
    if type(page_size) is not int or page_size < 1:
        return "a page size that is none"
    try:
        pages = _pages(src_indices, dst_indices, page_size, kind)
        if pages is None:
            return Report()
        geometry = pools.geometry(kind, srcs, dsts, page_size, layer, planes_of)
    except Unserved as unserved:
        return str(unserved)
    limits = geometry.dst_units, geometry.src_units
    if not pages.aligned:
        on_device = 0 if kind == "load" else 1
        tokens = limits[on_device] * page_size - page_size + 1
        limits = (tokens, limits[1]) if on_device == 0 else (limits[0], tokens)
    if pages.runs.top[0] >= limits[0] or pages.runs.top[1] >= limits[1]:
        return _OUTSIDE
    load = layered.current()
    if load is not None:
        request = _request(geometry, pages, limits, load.layers)
        if request is not None and load.takes(request):
            return None
    request = _request(geometry, pages, limits)
    if request is not None:
        answer = launches.serve(request)
        if not isinstance(answer, str):
            return answer
    return _submit(geometry, pages)


def _pages(src: torch.Tensor, dst: torch.Tensor, page_size: int, kind: str) -> Pages | None:
    """Return the page numbers of a call, mostly those of a call before; None for no pages."""
    for pages in _recent:
        if pages.same(src, dst, page_size, kind):
            return pages
    _check_indices(src, dst, page_size)
    if not src.numel():
        return None
    pages = Pages(src, dst, page_size, kind)
    _recent.insert(0, pages)
    del _recent[_RECENT:]
    return pages


def _request(
    geometry: Geometry, pages: Pages, limits: tuple[int, int], layers: int = 1
) -> Request | None:
    """Return the launch that moves the pages of a call, where that is faster than copy engines.

    Parameters
    ----------
    geometry : Geometry
    pages : Pages
    limits : (int, int)
        Page numbers of the destination and of the source are below these.
    layers : int, optional
        How many calls like this one a launch would stand for.
    """
    if geometry.mapped is None or len(geometry.planes) > 1:
        return None
    (planes,) = geometry.planes
    together = pages.together(planes)
    key = together if pages.aligned else 0
    if key not in geometry.requests:
        geometry.requests[key] = _request_of(geometry, pages, limits, together)
    request, load = geometry.requests[key]
    if request is None:
        return None
    model = _model(geometry.device)
    if not pages.pays(planes, together, layers, model.load if load else model.offload):
        return None
    dst, src = pages.listed(together)
    return request._replace(dst_indices=dst, src_indices=src)  # type: ignore[no-any-return]


def _request_of(
    geometry: Geometry, pages: Pages, limits: tuple[int, int], together: int
) -> tuple[Request | None, bool]:
    """Describe launches that move pages of a geometry, and say whether they are loads."""
    (planes,) = geometry.planes
    if launches.refusal() is not None or geometry.mapped is None:
        return None, False
    try:
        load = launches.source_of(planes.src, planes.dst) == 1
    except Unserved:
        return None, False
    dst_pitch, src_pitch, width = (together * size for size in pages.pitches(planes))
    dst_rows, src_rows = (-(-limit // together) for limit in limits)
    return Request(
        tuple(Place(int(address), src_pitch, rows=src_rows) for address in planes.src),
        tuple(Place(int(address), dst_pitch, rows=dst_rows) for address in planes.dst),
        _NO_NUMBERS, _NO_NUMBERS, width, device=geometry.device, name=next(_names),
        blocks=geometry.mapped,
    ), load  # fmt: skip


def _submit(geometry: Geometry, pages: Pages) -> Report:
    with streams.device_guard(geometry.device):
        stream = streams.current_handle(geometry.device)
        report: Report | None = None
        for planes in geometry.planes:
            found = descriptors.place(pages.pattern(planes), planes.dst, planes.src)
            if geometry.seams:
                found = descriptors.split(found, geometry.seams)
            one = merging.submit(found, stream)
            report = one if report is None else report + one
    return Report() if report is None else report


def _check_indices(src: torch.Tensor, dst: torch.Tensor, page_size: int) -> None:
    for indices in (src, dst):
        if indices.dtype is not torch.int64 or indices.ndim != 1:
            raise Unserved(_BAD_INDICES)
    if src.numel() != dst.numel():
        raise Unserved(_BAD_INDICES)
    if src.numel() % page_size:
        raise Unserved(_BAD_PAGES)


def _versions(src: torch.Tensor, dst: torch.Tensor) -> tuple[int, int] | None:
    """How often tensors were written to; None for those that do not count it."""
    if src.is_inference() or dst.is_inference():
        return None
    return src._version, dst._version


def _numbers(indices: torch.Tensor) -> U64:
    """Return numbers on the CPU, as SGLang's function does: those on a GPU are waited for.

    A negative number becomes one that no tensor reaches to.
    """
    return np.ascontiguousarray(indices.detach().cpu().numpy()).view(np.uint64)
