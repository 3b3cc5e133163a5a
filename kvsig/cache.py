"""Paged KV caches: pages between per-layer device tensors and a host pool."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsig import _core, _threads, _torch, costs, geometry, planning
from kvsig._core import Report
from kvsig._pack import slowness
from kvsig._submit import Submitter
from kvsig.costs import CostModel
from kvsig.geometry import Planes, Side
from kvsig.planning import Plan

__all__ = ["PagedKVCache"]

LAYOUTS = ("layer_first", "page_first_direct")

I64: TypeAlias = npt.NDArray[np.int64]
Pages: TypeAlias = Sequence[int] | npt.NDArray[Any] | torch.Tensor
Layers: TypeAlias = int | Sequence[int] | None
Group: TypeAlias = torch.Tensor | Sequence[torch.Tensor]


class _Selection(NamedTuple):
    """Some layers of the cache, ready to plan transfers of."""

    layers: tuple[int, ...]
    planes: Planes
    prepared: planning.Prepared


class PagedKVCache(Submitter):
    """A paged KV cache with a host pool, and transfers of pages between the two.

    Everything is validated, and its geometry worked out, once: a transfer only packs
    page numbers.

    Parameters
    ----------
    device : list of Tensor, or pair of such lists
        One tensor per layer on the GPU, each (tokens, ...) with packed rows: one list for
        a latent or for K alone, ``(k_layers, v_layers)`` for K and V, whose widths may
        differ. The number of tokens is a multiple of `page_size`.
    host : Tensor, list of Tensor, or pair of these
        The pool in host memory, for each list in `device`: in "page_first_direct" a tensor
        (pages, layers, page_size, ...); in "layer_first" a tensor (layers, tokens, ...) or
        a list of one (tokens, ...) per layer. For K and V a pair ``(k_pool, v_pool)``, or
        one tensor that has both along a first dimension of 2.
    layout : {"page_first_direct", "layer_first"}, optional
        Layout of the host pool.
    page_size : int, optional
        Tokens per page.
    model : CostModel, optional
        What copies cost, for the choice between methods. By default the figures that
        ``kvsig calibrate`` has left for the device, else those that come with kvsig.
    host_seams : sequence of int, optional
        More addresses where separately registered blocks of the host pool meet. CUDA refuses
        a copy that has rows on both sides of one, so copies are split there. Where the driver
        can be asked for the allocations and blocks that the tensors lie in, it has been.
    threads : int, optional
        Threads that may submit the copies of one transfer, the caller's counted in, 1 to 8; by
        default 2 where there are 8 CPUs or more, and where there are 16, 4 for transfers of up to
        2,048 copies. They are used where the CPU is too slow for the copy engine: others on it
        slow it down, or the model says so. The order of the stream stays. What each number wins,
        and costs others, is in docs/performance.md.

    Attributes
    ----------
    num_layers, device_pages, host_pages, page_size : int
        Sizes; valid page numbers are below `device_pages` and `host_pages`.
    page_bytes : int
        Bytes of one page over all layers, K and V.
    device : torch.device
        Where the layers are.
    layout : str
        Layout of the host pool.
    model : CostModel
        What copies cost.
    pinned : bool
        Whether all of the host pool is page-locked. Pageable memory works too, but is
        slower, and copies from and to it hold up the host.

    Raises
    ------
    TypeError
        If the arguments are not made of tensors as above.
    ValueError
        If tensors do not fit together; the message names the tensor and both values.

    Notes
    -----
    The cache keeps its tensors alive; keep the cache until its transfers have been waited
    for. Methods may be called from many threads.
    """

    def __init__(
        self,
        device: Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]],
        host: Group | Sequence[Group],
        layout: str = "page_first_direct",
        page_size: int = 16,
        *,
        model: CostModel | None = None,
        host_seams: Sequence[int] | npt.NDArray[Any] | None = None,
        threads: int | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be 'layer_first' or 'page_first_direct', not {layout!r}")
        if not isinstance(page_size, int) or isinstance(page_size, bool) or page_size < 1:
            raise ValueError(f"page_size must be an int of at least 1, not {page_size!r}")
        _threads.most(threads)
        groups = _device_groups(device)
        labels = ("K ", "V ") if len(groups) == 2 else ("",)
        layers = len(groups[0])
        named = [
            _Named(f"device {label}layer {i}", tensor)
            for label, group in zip(labels, groups, strict=True)
            for i, tensor in enumerate(group)
        ]
        _check_device(named)
        device_side = _layer_side(named, page_size)
        pools = _host_groups(host, len(groups))
        if layout == "layer_first":
            host_named = _host_layers(pools, labels, layers)
            _check_host(host_named)
            host_side = _layer_side(host_named, page_size)
            per_plane = host_named
        else:
            host_named = _host_pools(pools, labels)
            _check_host(host_named)
            host_side = _pool_side(host_named, layers, page_size)
            per_plane = [pool for pool in host_named for _ in range(layers)]
        _check_alike(named, per_plane, device_side, host_side, page_size)
        _check_apart(named + host_named)

        self.layout = layout
        self.page_size = page_size
        self.num_layers = layers
        self.device = named[0].tensor.device
        self.device_pages = device_side.pages
        self.host_pages = host_side.pages
        self.page_bytes = int(device_side.width.sum())
        self.pinned = all(item.tensor.is_pinned() for item in host_named)
        self._tensors = tuple(item.tensor for item in named + host_named)
        self._names = tuple(item.name for item in named)
        self._index = self.device.index if self.device.type == "cuda" else None
        self._one_device = self.device.type != "cuda" or torch.cuda.device_count() == 1
        self._planes = geometry.join(device_side, host_side, layers)
        given: Iterable[int] = () if host_seams is None else _addresses(host_seams, "host_seams")
        with _torch.device_guard(self.device):
            self._device_seams = _seams(named, ())
            self._host_seams = _seams(host_named, given)
        if model is None:
            model = costs.load(_torch.device_name(self.device))
        self.model = model
        # Tensors were looked at, so the runtime is bound, and stays so.
        self._team = _threads.ALONE
        self._rows = _core.strided_bound()
        self._all = self._select(tuple(range(layers)))
        self._selections = {}

    def __repr__(self) -> str:
        kind = "K and V" if len(self._planes) == 2 * self.num_layers else "one latent"
        return (
            f"PagedKVCache({self.num_layers} layers of {kind}, layout={self.layout!r}, "
            f"page_size={self.page_size}, page_bytes={self.page_bytes}, "
            f"device_pages={self.device_pages} on {self.device}, host_pages={self.host_pages} "
            f"{'pinned' if self.pinned else 'pageable'})"
        )

    def offload(
        self,
        device_pages: Pages,
        host_pages: Pages,
        layers: Layers = None,
        stream: _torch.Stream = None,
        path: str = "auto",
    ) -> Report:
        """Copy pages from the device to the host.

        Parameters
        ----------
        device_pages, host_pages : sequence of int, array or tensor, shape (n,)
            Page ``device_pages[i]`` goes to page ``host_pages[i]``. Lists, ranges, NumPy
            arrays and tensors of any integer type. A CUDA tensor is copied to the CPU
            first, which waits for the work that makes it. No host page may be given twice.
        layers : int or sequence of int, optional
            Layers to copy; by default all.
        stream : None, int, torch.cuda.Stream or object with ``cuda_stream``, optional
            The stream to work on; by default torch's current one of the cache's device.
        path : {"auto", "batch", "strided", "loop"}, optional
            "auto" takes the cheapest way; the others insist on one.

        Returns
        -------
        Report
            The path taken and why, copies, calls and bytes. No pages: path "none".

        Raises
        ------
        TypeError
            If page numbers or layers are not integers, or `stream` is no stream.
        ValueError
            If lengths differ, a page or layer is out of range, a destination or layer is
            given twice, or the stream is another device's. Nothing has been moved then.
        BindError
            If the path asked for cannot be taken, with the reason.
        CudaError
            If CUDA refuses a copy; a note names the tensor and the page.

        Notes
        -----
        The call returns when the work is queued: read the host pool only after the stream
        has been waited for. Page numbers are read before the call returns.
        """
        return self._transfer(device_pages, host_pages, layers, stream, path, False)

    def load(
        self,
        host_pages: Pages,
        device_pages: Pages,
        layers: Layers = None,
        stream: _torch.Stream = None,
        path: str = "auto",
        events: Iterable[Any] | None = None,
    ) -> Report:
        """Copy pages from the host to the device.

        Parameters
        ----------
        host_pages, device_pages : sequence of int, array or tensor, shape (n,)
            Page ``host_pages[i]`` goes to page ``device_pages[i]``, as in `offload`. No
            device page may be given twice.
        layers, stream, path
            As in `offload`.
        events : sequence of torch.cuda.Event, optional
            One for each layer, or any objects with ``record(stream)``. Layers are then
            copied one after the other, in the order of `layers`, and each event is
            recorded behind its layer: computing can begin at the first one.

        Returns
        -------
        Report
            As in `offload`.

        Raises
        ------
        TypeError, ValueError, BindError, CudaError
            As in `offload`; also if `events` are not one for each layer.
        """
        return self._transfer(device_pages, host_pages, layers, stream, path, True, events)

    def plan_offload(
        self,
        device_pages: Pages,
        host_pages: Pages,
        layers: Layers = None,
        stream: _torch.Stream = None,
        path: str = "auto",
    ) -> Plan:
        """Show what `offload` would do by itself, behind no other transfer; nothing is moved.

        Parameters
        ----------
        device_pages, host_pages, layers, stream, path
            As in `offload`.

        Returns
        -------
        Plan
            The copies and calls, their predicted times and the other methods'; printed, a
            table.

        Raises
        ------
        TypeError, ValueError
            As in `offload`.
        """
        return self._plan(device_pages, host_pages, layers, stream, path, "offload")

    def plan_load(
        self,
        host_pages: Pages,
        device_pages: Pages,
        layers: Layers = None,
        stream: _torch.Stream = None,
        path: str = "auto",
    ) -> Plan:
        """Show what `load` would do by itself, behind no other transfer; nothing is moved.

        Parameters
        ----------
        host_pages, device_pages, layers, stream, path
            As in `load`.

        Returns
        -------
        Plan
            As `plan_offload` gives it.

        Raises
        ------
        TypeError, ValueError
            As in `load`.
        """
        return self._plan(device_pages, host_pages, layers, stream, path, "load")

    def _plan(
        self,
        device_pages: Pages,
        host_pages: Pages,
        layers: Layers,
        stream: _torch.Stream,
        path: str,
        direction: str,
    ) -> Plan:
        selection = self._chosen(layers, path)
        device, host = self._converted_pages(device_pages, host_pages)
        self._converted(selection, device, host, direction == "load")
        handle = _torch.stream_handle(stream, self.device)
        batch = path == "batch" or _core.batch_refusal(handle) is None
        return planning.plan(
            selection.prepared, device, host, direction, path, batch=batch, slow=slowness()
        )

    def _with_events(
        self,
        selection: _Selection,
        device_pages: Pages,
        host_pages: Pages,
        stream: _torch.Stream,
        path: str,
        events: Iterable[Any],
    ) -> Report:
        """Load layer by layer, and record an event behind each."""
        events = _checked_events(events, len(selection.layers))
        handle = _torch.stream_handle(stream, self.device)
        with _torch.device_guard(self.device):
            recorder = _torch.event_stream(stream, handle, self.device)
            report = Report()
            pages = self._converted_pages(device_pages, host_pages)
            for layer, event in zip(selection.layers, events, strict=True):
                one = self._selection(layer)
                transfer = self._converted(one, *pages, True)
                report += self._execute(one, transfer, handle, path, True)
                event.record(recorder)
            return report

    def _converted_pages(self, device_pages: Pages, host_pages: Pages) -> tuple[I64, I64]:
        return (
            _page_numbers(device_pages, "device_pages", self.device_pages),
            _page_numbers(host_pages, "host_pages", self.host_pages),
        )

    def _converted(
        self, selection: _Selection, device_pages: Pages, host_pages: Pages, load: bool
    ) -> planning.Transfer:
        """Begin with page numbers of any form; raise for what is wrong with them."""
        device, host = self._converted_pages(device_pages, host_pages)
        transfer = selection.prepared.begin(device, host, load)
        if transfer is None:
            direction = "load" if load else "offload"
            found = selection.prepared.check(device, host, direction)
            raise self._trouble(*found, device, host, direction)
        return transfer

    def _trouble(
        self, code: int, position: int, other: int, device: I64, host: I64, direction: str
    ) -> ValueError:
        """Make the error for what the check has found."""
        if code == planning.CHECK_LENGTHS:
            return ValueError(
                f"device_pages has {len(device)} page numbers and host_pages has {len(host)}: "
                "give as many of each"
            )
        if code == planning.CHECK_REPEATED:
            name, pages = ("device_pages", device) if direction == "load" else ("host_pages", host)
            return ValueError(
                f"{name}[{position}] is page {pages[position]} again, after {name}[{other}]: "
                "a destination page may be given once"
            )
        if code == planning.CHECK_DEVICE_RANGE:
            return _out_of_range("device_pages", position, device[position], self.device_pages)
        return _out_of_range("host_pages", position, host[position], self.host_pages)

    def _explain(
        self, error: _core.CudaError, selection: _Selection, kind: str, arrays: Any, load: bool
    ) -> None:
        """Add to an error of CUDA which page of which tensor it is about."""
        if error.index is None:
            return
        if kind == "strided":
            address = arrays[error.index, 0 if load else 2]
        elif kind == "strided3":
            address = arrays[error.index, 0 if load else 3]
        else:
            address = arrays[0 if load else 1][error.index]
        place = selection.planes.locate(int(address))
        if place is not None:
            name = self._names[self._plane(selection, place[0])]
            error.add_note(f"the copy that failed begins at page {place[1]} of {name}")

    def _plane(self, selection: _Selection, plane: int) -> int:
        """Return the number, in the whole cache, of a plane of a selection."""
        group, position = divmod(plane, len(selection.layers))
        return group * self.num_layers + selection.layers[position]

    def _select(self, layers: tuple[int, ...]) -> _Selection:
        planes = self._planes.select(layers)
        prepared = planning.prepare(
            planes, self.model, self._host_seams, self._device_seams, self._team
        )
        return _Selection(layers, planes, prepared)

    def _selection(self, layers: int | Sequence[int]) -> _Selection:
        """Return the planes of the layers asked for, made once for each choice of layers."""
        kind = type(layers)
        key: Any = layers
        if kind is not int and kind is not range:
            # Checked at each call: 1.0 and True would find the entry of 1.
            key = self._layer_numbers(layers)
        found = self._selections.get(key)
        if found is None:
            found = self._select(self._layer_numbers(layers))
            if len(self._selections) >= 4 * self.num_layers + 64:
                self._selections.clear()  # no caller should grow it without end
            self._selections[key] = found
        return found

    def _layer_numbers(self, layers: int | Sequence[int]) -> tuple[int, ...]:
        count = self.num_layers
        if isinstance(layers, (int, np.integer)):
            wanted, single = [layers], True
        else:
            try:
                wanted, single = list(layers), False
            except TypeError:
                raise TypeError(
                    f"layers must be an int, a sequence of int or None, not {layers!r}"
                ) from None
        seen: dict[int, int] = {}
        for i, value in enumerate(wanted):
            place = "layers" if single else f"layers[{i}]"
            if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
                raise TypeError(f"{place} must be an int, not {value!r}")
            layer = operator.index(value)
            if not 0 <= layer < count:
                raise ValueError(f"{place} is {layer}: the cache has layers 0 to {count - 1}")
            if layer in seen:
                raise ValueError(f"{place} is layer {layer} again, after layers[{seen[layer]}]")
            seen[layer] = i
        return tuple(seen)


class _Named(NamedTuple):
    """A tensor and what to call it in messages."""

    name: str
    tensor: torch.Tensor


def _device_groups(device: Any) -> list[list[torch.Tensor]]:
    """Sort the device's layers into one list, or K's and V's."""
    if isinstance(device, torch.Tensor):
        raise TypeError(
            "device is one tensor: give one tensor per layer, as list(tensor) does, "
            "or a pair of lists for K and V"
        )
    if not isinstance(device, (list, tuple)):
        raise TypeError(
            f"device must be a list of tensors, or a pair of lists, not {type(device).__name__}"
        )
    if not device:
        raise ValueError("device has no layers")
    if all(isinstance(item, torch.Tensor) for item in device):
        return [list(device)]
    if len(device) != 2 or not all(isinstance(item, (list, tuple)) for item in device):
        raise TypeError(
            "device must be a list of tensors, or a pair of lists for K and V; it has "
            f"{len(device)} entries: {', '.join(type(item).__name__ for item in device[:4])}"
        )
    for label, group in zip("KV", device, strict=True):
        for i, tensor in enumerate(group):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"device {label} layer {i} must be a tensor, not {type(tensor).__name__}"
                )
    k, v = device
    if len(k) != len(v):
        raise ValueError(
            f"device has {len(k)} K layers and {len(v)} V layers: give as many of each"
        )
    if not k:
        raise ValueError("device has no layers")
    return [list(k), list(v)]


def _host_groups(host: Any, count: int) -> list[Any]:
    """Sort the host's side by the lists of the device."""
    if count == 1:
        return [host]
    if isinstance(host, torch.Tensor):
        if host.ndim == 0 or host.shape[0] != 2:
            raise ValueError(
                f"host has shape {tuple(host.shape)}: one tensor for K and V needs a first "
                "dimension of 2; otherwise give a pair (k_pool, v_pool)"
            )
        return [host[0], host[1]]
    if not isinstance(host, (list, tuple)):
        raise TypeError(
            f"host must be a tensor or a pair (k_pool, v_pool), not {type(host).__name__}"
        )
    if len(host) != 2:
        raise ValueError(
            f"host has {len(host)} entries, but device has K and V: give a pair (k_pool, v_pool)"
        )
    return list(host)


def _host_layers(pools: list[Any], labels: Sequence[str], layers: int) -> list[_Named]:
    named = []
    for label, pool in zip(labels, pools, strict=True):
        if isinstance(pool, torch.Tensor):
            tensors = list(pool.unbind(0)) if pool.ndim else []
        elif isinstance(pool, (list, tuple)):
            tensors = list(pool)
        else:
            raise TypeError(
                f"host {label}pool must be a tensor or a list of one per layer, "
                f"not {type(pool).__name__}"
            )
        if len(tensors) != layers:
            raise ValueError(
                f"host {label}pool has {len(tensors)} layers, device has {layers}: "
                "layer_first is (layers, tokens, ...), or a list of one (tokens, ...) per layer"
            )
        for i, tensor in enumerate(tensors):
            name = f"host {label}layer {i}"
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
            named.append(_Named(name, tensor))
    return named


def _host_pools(pools: list[Any], labels: Sequence[str]) -> list[_Named]:
    for label, pool in zip(labels, pools, strict=True):
        if not isinstance(pool, torch.Tensor):
            raise TypeError(f"host {label}pool must be a tensor, not {type(pool).__name__}")
    return [_Named(f"host {label}pool", pool) for label, pool in zip(labels, pools, strict=True)]


def _check_device(named: list[_Named]) -> None:
    """Check that the layers are where the CUDA runtime in use can reach them."""
    kind = "cpu" if _core.is_emulated() else "cuda"
    first = named[0]
    for name, tensor in named:
        where = tensor.device
        if where.type != kind:
            raise ValueError(
                f"{name} is on {where}, but the emulated CUDA runtime reaches CPU tensors only: "
                "unset KVSIG_CUDART to use the GPU"
                if kind == "cpu"
                else f"{name} is on {where}: device tensors must be on a CUDA device"
            )
        if where != first.tensor.device:
            raise ValueError(
                f"{name} is on {where} and {first.name} on {first.tensor.device}: "
                "a cache has one device; make one for each"
            )
    _check_packed(named)


def _check_host(named: list[_Named]) -> None:
    for name, tensor in named:
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}: the host pool must be in CPU memory")
    _check_packed(named)


def _check_packed(named: list[_Named]) -> None:
    for name, tensor in named:
        if tensor.layout is not torch.strided or not tensor.is_contiguous():
            stride = tuple(tensor.stride()) if tensor.layout is torch.strided else tensor.layout
            raise ValueError(
                f"{name} is not contiguous (shape {tuple(tensor.shape)}, stride {stride}): "
                "its rows must be packed"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{name} is empty (shape {tuple(tensor.shape)})")


def _layer_side(named: list[_Named], page_size: int) -> Side:
    """Work out a side whose tensors are one plane each, (tokens, ...)."""
    first = named[0]
    widths = []
    for name, tensor in named:
        tokens = tensor.shape[0] if tensor.ndim else 0
        pages, rest = divmod(tokens, page_size)
        if rest or not pages:
            raise ValueError(
                f"{name} has {tokens} tokens, {rest} more than {pages} pages of {page_size}: "
                "the number of tokens must be a multiple of page_size"
            )
        if tokens != first.tensor.shape[0]:
            raise ValueError(
                f"{name} has {tokens} tokens, {first.name} has {first.tensor.shape[0]}: "
                "all layers of a side must have as many"
            )
        widths.append(tensor.nbytes // pages)
    bases = [item.tensor.data_ptr() for item in named]
    return geometry.layer_first(bases, widths, first.tensor.shape[0] // page_size)


def _pool_side(named: list[_Named], layers: int, page_size: int) -> Side:
    """Work out a side of pools (pages, layers, page_size, ...)."""
    first = named[0]
    widths = []
    for name, tensor in named:
        shape = tuple(tensor.shape)
        if len(shape) < 3 or shape[1:3] != (layers, page_size):
            raise ValueError(
                f"{name} has shape {shape}: page_first_direct is (pages, layers, page_size, ...), "
                f"here (pages, {layers}, {page_size}, ...)"
            )
        if shape[0] != first.tensor.shape[0]:
            raise ValueError(
                f"{name} has {shape[0]} pages, {first.name} has {first.tensor.shape[0]}: "
                "K and V must have as many"
            )
        widths.append(tensor.nbytes // (shape[0] * layers))
    bases = [item.tensor.data_ptr() for item in named]
    return geometry.page_first_direct(bases, widths, layers, first.tensor.shape[0])


def _check_alike(
    device: list[_Named], host: list[_Named], near: Side, far: Side, page_size: int
) -> None:
    """Check that both sides hold the same tokens."""
    for i, (one, other) in enumerate(zip(device, host, strict=True)):
        if one.tensor.dtype != other.tensor.dtype:
            raise ValueError(
                f"{one.name} is {one.tensor.dtype}, {other.name} is {other.tensor.dtype}: "
                "pages are moved as they are, not converted"
            )
        if near.width[i] != far.width[i]:
            raise ValueError(
                f"{one.name} has {int(near.width[i]) // page_size} bytes per token, "
                f"{other.name} has {int(far.width[i]) // page_size}: both sides must have as many"
            )


def _check_apart(named: list[_Named]) -> None:
    """Check that no two tensors share memory: a copy could write what another one reads."""
    spans = sorted(
        (item.tensor.data_ptr(), item.tensor.data_ptr() + item.tensor.nbytes, item.name)
        for item in named
    )
    for (_, end, one), (start, _, other) in zip(spans, spans[1:], strict=False):
        if end > start:
            raise ValueError(f"{one} and {other} overlap in memory by {end - start} bytes")


def _seams(named: list[_Named], given: Iterable[int]) -> npt.NDArray[np.uint64]:
    """Where the allocations and registered blocks that hold tensors begin and end.

    CUDA refuses a copy whose rows lie in two of them. Where the driver cannot be asked about
    memory of the device, or about page-locked memory, each tensor counts as one of its own.
    """
    found = {int(seam) for seam in given}
    emulated = _core.is_emulated()
    for _, tensor in named:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        limited = not emulated and (tensor.is_cuda or tensor.is_pinned())
        found.update(_blocks(start, end, limited))
    return np.array(sorted(found), dtype=np.uint64)


def _blocks(start: int, end: int, limited: bool) -> Iterator[int]:
    """Bounds of the allocations that a tensor lies in."""
    if _core.memory_range(start) is None and _core.memory_range(end - 1) is None:
        if limited:
            yield from (start, end)
        return
    # Pageable memory between registered blocks has no end that could be asked for.
    step = max(1 << 16, (end - start) >> 16)
    at = start
    while at < end:
        block = _core.memory_range(at)
        if block is None:
            at += step
            continue
        yield from (block[0], block[0] + block[1])
        at = max(block[0] + block[1], at + 1)


def _first_odd(array: npt.NDArray[Any]) -> object:
    """Return the first of some objects that is no page number."""
    fits = (type(item) is int and abs(item) < 2**63 for item in array.flat)
    return next((item for item, fit in zip(array.flat, fits, strict=True) if not fit), None)


def _page_numbers(values: Any, name: str, limit: int) -> I64:
    """Return page numbers as one-dimensional contiguous int64."""
    if type(values) is np.ndarray:
        if values.dtype == np.int64 and values.ndim == 1:
            return np.ascontiguousarray(values)
        array: npt.NDArray[Any] = values
    elif isinstance(values, torch.Tensor):
        array = _torch.integers(values, name)
    elif isinstance(values, range):
        array = np.arange(values.start, values.stop, values.step, dtype=np.int64)
    elif isinstance(values, (list, tuple)) or hasattr(values, "__array__"):
        try:
            array = np.asarray(values)
        except ValueError:
            raise ValueError(f"{name} must be one flat list of page numbers, not nested") from None
        if array.size == 0 and isinstance(values, (list, tuple)):
            array = array.astype(np.int64)  # an empty list has no dtype of its own
    else:
        raise TypeError(
            f"{name} must be a list, range, array or tensor of page numbers, "
            f"not {type(values).__name__}"
        )
    if array.dtype.kind == "O":
        raise TypeError(f"{name} must hold integers below 2**63, not {_first_odd(array)!r}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, not {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, not of shape {array.shape}")
    if array.dtype == np.uint64 and len(array) and array.max() >> np.uint64(63):
        index = int(np.argmax(array >> np.uint64(63)))
        raise _out_of_range(name, index, array[index], limit)
    pages: I64 = np.ascontiguousarray(array, dtype=np.int64)
    return pages


def _out_of_range(name: str, position: int, page: Any, limit: int) -> ValueError:
    side = "the device" if name == "device_pages" else "the host pool"
    return ValueError(f"{name}[{position}] is {page}: {side} has pages 0 to {limit - 1}")


def _addresses(values: Any, name: str) -> npt.NDArray[np.uint64]:
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.uint64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array < 0).any():
        raise ValueError(f"{name} must be a list of addresses, not {values!r}")
    return array.astype(np.uint64)


def _checked_events(events: Iterable[Any], layers: int) -> list[Any]:
    checked = list(events)
    if len(checked) != layers:
        raise ValueError(
            f"events has {len(checked)} entries for {layers} layers: give one for each"
        )
    for i, event in enumerate(checked):
        if not callable(getattr(event, "record", None)):
            raise TypeError(f"events[{i}] has no record(stream): {type(event).__name__}")
    return checked
