"""Paged KV caches: pages between per-layer device tensors and a host pool."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvsig import launching, layouts, memory, planning, streams, tensors
from kvsig._core import Report
from kvsig._counters import now, since
from kvsig._errors import CudaError
from kvsig._transfer import Selection
from kvsig.layouts import LAYOUTS
from kvsig.planning import Direction, Plan, costs
from kvsig.planning.costs import CostModel

__all__ = ["PagedKVCache"]

PATHS = ("auto", "batch", "strided", "loop", "kernel")
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
        (pages, layers, page_size, ...); in "page_first" (tokens, layers, ...); in "page_head"
        (pages, heads, page_size, layers, ...); in "layer_first" (layers, tokens, ...) or a list
        of one (tokens, ...) per layer. For K and V a pair ``(k_pool, v_pool)``, or
        one tensor that has both along a first dimension of 2.
    layout : {"page_first_direct", "layer_first", "page_first", "page_head"}, optional
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
    sms : int, optional
        Multiprocessors that the page-copy kernel may take of a long transfer, 0 to 32; 0: the copy
        engine only. The kernel moves small pages of page-locked pools.
    rate : float, optional
        GB/s that long transfers of the kernel are held to, so that a model that computes
        meanwhile is not held up; 0: not held. By default as `model` has it: loads are not held,
        offloads to 45 on an H100.

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
        sms: int = 4,
        rate: float | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
        page_size = _checked_int("page_size", page_size, 1)
        sms, rate = _checked_int("sms", sms, 0, 32), _checked_rate(rate)
        # Arrays of other libraries are tensors from here on.
        device, host = tensors.arrays(device, "device"), tensors.arrays(host, "host")
        self._near, self._far, self._planes = layouts.read(device, host, layout, page_size)
        groups = 2 if len(self._near) > 1 and self._near[-1].name.startswith("device V") else 1
        self.layout = layout
        self.page_size = page_size
        self.num_layers = len(self._near) // groups
        self.device = self._near[0].tensor.device
        self.device_pages = self._planes.device_pages
        self.host_pages = self._planes.host_pages
        self.page_bytes = self._planes.page_bytes
        self.sms = sms
        self._owners = tensors.owners(host, self._far)
        self._places = {
            id(item.tensor): memory.place_of(item.tensor)
            for item in self._near + self._far + self._owners
        }
        self._given_seams = memory.listed(() if host_seams is None else host_seams, "host_seams")
        self.model = costs.load(streams.device_name(self.device)) if model is None else model
        rates = self.model.load.kernel_rate, self.model.offload.kernel_rate
        self._rates = rates if rate is None else (rate * 1e3, rate * 1e3)
        host_tensors = [item.tensor for item in self._far]
        with streams.device_guard(self.device):
            locked = memory.locked_blocks(host_tensors)
            self.pinned = locked is not None
            self._seams = self._look_for_seams()
            self._launches, self._why_no_kernel = launching.launches_of(
                self._planes, host_tensors, locked, sms, self._rates
            )
        self._selections: dict[Any, Selection] = {}
        self._followers = launching.Followers(self.device)
        self._all = self._select(tuple(range(self.num_layers)))

    def __repr__(self) -> str:
        kind = "K and V" if len(self._near) == 2 * self.num_layers else "one latent"
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
            arrays and tensors of any integer type. A CUDA tensor of int32 or int64 is read by
            the kernel on the GPU, which checks its numbers: nobody waits, and a wrong number moves
            nothing and is told by the next call or by `check`. Where the kernel is not used, it is
            copied to the CPU first, which waits for the work that makes it. No host page may be
            given twice.
        layers : int or sequence of int, optional
            Layers to copy; by default all.
        stream : None, int, torch.cuda.Stream or object with ``cuda_stream``, optional
            The stream to work on; by default torch's current one of the cache's device.
        path : {"auto", "batch", "strided", "loop", "kernel"}, optional
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
        has been waited for. Page numbers in host memory are read before the call returns; CUDA
        tensors that the kernel reads must stay as they are until the stream has come to the end
        of it, as the tensors of any work that is queued.
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
        """Show what `load` would do with these arguments, as `plan_offload` does for `offload`."""
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
        chosen = self._selection(layers)
        if type(path) is not str or path not in PATHS:
            path = _checked_path(path)
        try:
            start = now()
            report = chosen.move(device_pages, host_pages, stream, path, direction)
            return since("load" if direction is LOAD else "offload", report, start)
        except CudaError as error:
            self._explain(error, chosen)
            raise

    def check(self) -> None:
        """Look whether page numbers that were on the GPU have been right so far.

        The kernel checks such numbers before it moves anything: where one is wrong, nothing of its
        transfer has moved. That is told here, or by the next transfer of the cache; wait for the
        stream first to be sure of those before.

        Raises
        ------
        ValueError
            If one was wrong; the message names the list, the place and the number.
        """
        if self._launches is not None:
            self._launches.check()

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
        chosen = self._selection(layers)
        path = _checked_path(path)
        events = _checked_events(events, len(chosen.layers))
        handle = chosen.handle_of(stream)
        recorder = streams.event_stream(stream, handle, self.device)
        start = now()
        try:
            if chosen.launches is not None:
                chosen.launches.check()
            pages = chosen.read(device_pages, host_pages, path, LOAD)
            with streams.device_guard(self.device):
                if pages.count and chosen.layered(pages, handle, path):
                    report, lane, value = chosen.launch(pages, handle, True)
                    self._followers.record(events, lane, value)
                    return since("load", report, start)
                report = Report()
                for layer, event in zip(chosen.layers, events, strict=True):
                    single = self._selection(layer)
                    single.check_places()  # the event before may have moved them
                    report += single.run(pages, handle, path)
                    event.record(recorder)
                return since("load", report, start)
        except CudaError as error:
            self._explain(error, chosen)
            raise

    def _plan(
        self,
        device_pages: Pages,
        host_pages: Pages,
        layers: Layers,
        stream: streams.Stream,
        path: str,
        direction: Direction,
    ) -> Plan:
        chosen = self._selection(layers)
        path = _checked_path(path)
        handle = chosen.handle_of(stream)
        pages = chosen.begin(device_pages, host_pages, direction)
        return Plan(chosen.plan(pages, handle, path))

    def _explain(self, error: CudaError, chosen: Selection) -> None:
        """Note at an error which page it is about, or that memory of the cache has changed."""
        addresses = getattr(error, "addresses", ())
        if addresses:
            with streams.device_guard(self.device):
                seams = self._look_for_seams()
            if not all(map(np.array_equal, seams, self._seams)):
                error.add_note(
                    "memory of the cache has been registered or freed since the cache was made: "
                    "make it anew"
                )
                return
        for address in addresses:
            place = chosen.geometry.planes.locate(int(address))
            if place is not None and place[2]:
                name = self._near[self._plane(chosen, place[0])].name
                error.add_note(f"the copy that failed begins at page {place[1]} of {name}")

    def _look_for_seams(self) -> tuple[U64, U64]:
        """Where allocations and registered blocks meet, on the device and on the host."""
        near = [memory.extent(item.tensor) for item in self._near]
        far = [memory.extent(item.tensor) for item in self._far]
        return memory.seams(near), memory.seams(far, self._given_seams)

    def _plane(self, chosen: Selection, plane: int) -> int:
        """Return the number, in the whole cache, of a plane of a selection."""
        # Rows of a plane, and the planes of K's heads, lie side by side.
        group, position = divmod(plane // self._planes.rows, len(chosen.layers))
        parts = len(self._planes) // len(self._near)
        return group // parts * self.num_layers + chosen.layers[position]

    def _select(self, layers: tuple[int, ...]) -> Selection:
        near_seams, far_seams = self._seams
        planes = self._planes.select(layers)
        ready = planning.Geometry(
            planes.flat(), self.model, far_seams, near_seams, self.sms, self._rates
        )
        groups = len(self._near) // self.num_layers
        planes_used = [g * self.num_layers + i for g in range(groups) for i in layers]
        far = self._far
        if len(far) == len(self._near):
            far = [far[plane] for plane in planes_used]
        used = [self._near[plane] for plane in planes_used] + far + self._owners
        held = tuple(item.tensor for item in used)
        names = tuple(item.name for item in used)
        places = [self._places[id(tensor)] for tensor in held]
        launches, table, first = self._launches, None, layers[0] if layers else 0
        if launches is not None:
            table = launches.planes
            if layers != tuple(range(first, first + len(layers))):
                # The kernel takes layers that are side by side in its table.
                table, first = launching.planes_in_memory(planes, table.unit), 0
        return Selection(
            layers, ready, held, names, places, self.device, launches, table, first,
            self._why_no_kernel,
        )  # fmt: skip

    def _selection(self, layers: Layers) -> Selection:
        """Return the planes of the layers asked for, made once for each choice of layers."""
        if layers is None:
            return self._all
        # What can change is read once, at each call: an iterator is at its end then, and 1.0 and
        # True would find the entry of 1.
        fixed = type(layers) is int or type(layers) is range
        key: Any = layers if fixed else self._layer_numbers(layers)
        found = self._selections.get(key)
        if found is None:
            found = self._select(self._layer_numbers(key))
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


def _checked_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    whole = hasattr(value, "__index__") and not isinstance(value, (bool, np.bool_))
    number = operator.index(value) if whole else low - 1
    if number < low or (high is not None and number > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be an int {bounds}, not {value!r}")
    return number


def _checked_rate(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e4:
        raise ValueError(f"rate must be a number of GB/s from 0 to 1e4, or None, not {value!r}")
    return float(value)


def _checked_path(path: Any) -> str:
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, not {path!r}")
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
