"""Paged KV caches: pages between per-layer device tensors and a host pool."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsig import planning, streams, tensors
from kvsig._core import Report
from kvsig._errors import CudaError
from kvsig._transfer import Selection, TensorMoved
from kvsig.planning import Direction, Plan, costs, geometry
from kvsig.planning.costs import CostModel

__all__ = ["PagedKVCache"]

LAYOUTS = ("layer_first", "page_first_direct")
PATHS = ("auto", "batch", "strided", "loop")
# Looked up once: an attribute of an enumeration costs more than the rest of a call.
LOAD, OFFLOAD = Direction.LOAD, Direction.OFFLOAD

U64: TypeAlias = npt.NDArray[np.uint64]
Pages: TypeAlias = Sequence[int] | npt.NDArray[Any] | torch.Tensor
Layers: TypeAlias = int | Sequence[int] | None
Group: TypeAlias = torch.Tensor | Sequence[torch.Tensor]


class PagedKVCache:
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
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be 'layer_first' or 'page_first_direct', not {layout!r}")
        page_size = _checked_page_size(page_size)
        near, labels = tensors.device_layers(device)
        layers = len(near) // len(labels)
        near_places = tensors.layer_places(near, page_size)
        device_side = geometry.layer_first(*near_places)
        if layout == "layer_first":
            far = tensors.host_layers(host, labels, layers)
            places = tensors.layer_places(far, page_size)
            host_side, planes_of = geometry.layer_first(*places), 1
        else:
            far = tensors.host_pools(host, labels)
            places = tensors.pool_places(far, layers, page_size)
            host_side = geometry.page_first_direct(
                places.bases, places.page_bytes, layers, places.pages
            )
            planes_of = layers
        tensors.check_alike(
            near,
            [item for item in far for _ in range(planes_of)],
            near_places.page_bytes,
            [size for size in places.page_bytes for _ in range(planes_of)],
            page_size,
        )
        tensors.check_apart(near + far)

        self.layout = layout
        self.page_size = page_size
        self.num_layers = layers
        self.device = near[0].tensor.device
        self.device_pages = device_side.pages
        self.host_pages = host_side.pages
        self.page_bytes = int(device_side.width.sum())
        self._near, self._far = near, far
        self._owners = tensors.owners(host, far)
        self._places = {
            id(item.tensor): item.tensor.data_ptr() for item in near + far + self._owners
        }
        self._planes = geometry.join(device_side, host_side, layers)
        self._given_seams = [] if host_seams is None else tensors.addresses(
            host_seams, "host_seams"
        ).tolist()
        with streams.device_guard(self.device):
            self.pinned = all(tensors.page_locked(item.tensor) for item in far)
            self._seams = self._look_for_seams()
        self.model = costs.load(streams.device_name(self.device)) if model is None else model
        self._selections: dict[Any, Selection] = {}
        self._all = self._select(tuple(range(layers)))

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
        stream: streams.Stream = None,
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
        return self._move(device_pages, host_pages, layers, stream, path, OFFLOAD)

    def load(
        self,
        host_pages: Pages,
        device_pages: Pages,
        layers: Layers = None,
        stream: streams.Stream = None,
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
        if events is not None:
            return self._move_in_layers(device_pages, host_pages, layers, stream, path, events)
        return self._move(device_pages, host_pages, layers, stream, path, LOAD)

    def plan_offload(
        self,
        device_pages: Pages,
        host_pages: Pages,
        layers: Layers = None,
        stream: streams.Stream = None,
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
        return self._plan(device_pages, host_pages, layers, stream, path, OFFLOAD)

    def plan_load(
        self,
        host_pages: Pages,
        device_pages: Pages,
        layers: Layers = None,
        stream: streams.Stream = None,
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
        return self._plan(device_pages, host_pages, layers, stream, path, LOAD)

    def _move(
        self,
        device_pages: Pages,
        host_pages: Pages,
        layers: Layers,
        stream: streams.Stream,
        path: str,
        direction: Direction,
    ) -> Report:
        chosen = self._all if layers is None else self._selection(layers)
        if type(path) is not str or path not in PATHS:
            path = _checked_path(path)
        try:
            return chosen.move(device_pages, host_pages, stream, path, direction)
        except (CudaError, TensorMoved) as error:
            raise self._explained(error, chosen) from None

    def _move_in_layers(
        self,
        device_pages: Pages,
        host_pages: Pages,
        layers: Layers,
        stream: streams.Stream,
        path: str,
        events: Iterable[Any],
    ) -> Report:
        """Load layer by layer, and record an event behind each."""
        chosen = self._all if layers is None else self._selection(layers)
        path = _checked_path(path)
        events = _checked_events(events, len(chosen.layers))
        handle = chosen.handle_of(stream)
        recorder = streams.event_stream(stream, handle, self.device)
        report = Report()
        try:
            pages = chosen.begin(device_pages, host_pages, LOAD)
            with streams.device_guard(self.device):
                for layer, event in zip(chosen.layers, events, strict=True):
                    single = self._selection(layer)
                    single.check_places()  # the event before may have moved them
                    report += single.run(pages, handle, path)
                    event.record(recorder)
        except (CudaError, TensorMoved) as error:
            raise self._explained(error, chosen) from None
        return report

    def _plan(
        self,
        device_pages: Pages,
        host_pages: Pages,
        layers: Layers,
        stream: streams.Stream,
        path: str,
        direction: Direction,
    ) -> Plan:
        chosen = self._all if layers is None else self._selection(layers)
        path = _checked_path(path)
        handle = chosen.handle_of(stream)
        try:
            pages = chosen.begin(device_pages, host_pages, direction)
        except TensorMoved as error:
            raise self._explained(error, chosen) from None
        return planning.explain(chosen.plan(pages, handle, path))

    def _explained(self, error: Exception, chosen: Selection) -> Exception:
        """Say what an error is about: a page, a tensor that moved, or memory that has changed."""
        if isinstance(error, TensorMoved):
            tensor, before, now = error.args
            known = self._near + self._far + self._owners
            name = next(name for name, other in known if other is tensor)
            return ValueError(
                f"{name} was at {before:#x} when the cache was made, and is at {now:#x} now: "
                "a cache's tensors must stay where they are; make the cache anew"
            )
        addresses = getattr(error, "addresses", ())
        if addresses:
            with streams.device_guard(self.device):
                seams = self._look_for_seams()
            if not all(map(np.array_equal, seams, self._seams)):
                error.add_note(
                    "memory of the cache has been registered or freed since the cache was made: "
                    "make it anew"
                )
                return error
        for address in addresses:
            place = chosen.geometry.planes.locate(int(address))
            if place is not None and place[2]:
                name = self._near[self._plane(chosen, place[0])].name
                error.add_note(f"the copy that failed begins at page {place[1]} of {name}")
        return error

    def _look_for_seams(self) -> tuple[U64, U64]:
        """Where allocations and registered blocks meet, on the device and on the host."""
        return tensors.seams(self._near, ()), tensors.seams(self._far, self._given_seams)

    def _plane(self, chosen: Selection, plane: int) -> int:
        """Return the number, in the whole cache, of a plane of a selection."""
        group, position = divmod(plane, len(chosen.layers))
        return group * self.num_layers + chosen.layers[position]

    def _select(self, layers: tuple[int, ...]) -> Selection:
        near, far = self._seams
        ready = planning.Geometry(self._planes.select(layers), self.model, far, near)
        groups = len(self._near) // self.num_layers
        used = [self._near[g * self.num_layers + i].tensor for g in range(groups) for i in layers]
        if len(self._far) == len(self._near):
            far_used = [self._far[g * self.num_layers + i] for g in range(groups) for i in layers]
        else:
            far_used = self._far
        used += [item.tensor for item in far_used + self._owners]
        places = [self._places[id(tensor)] for tensor in used]
        return Selection(layers, ready, tuple(used), places, self.device)

    def _selection(self, layers: int | Sequence[int]) -> Selection:
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


def _checked_page_size(value: Any) -> int:
    size = operator.index(value) if hasattr(value, "__index__") else 0
    if isinstance(value, (bool, np.bool_)) or size < 1:
        raise ValueError(f"page_size must be an int of at least 1, not {value!r}")
    return size


def _checked_path(path: Any) -> str:
    if path not in PATHS:
        raise ValueError(f"path must be 'auto', 'batch', 'strided' or 'loop', not {path!r}")
    # Of an enumeration, say, whose members are strings.
    return path if type(path) is str else PATHS[PATHS.index(path)]


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
