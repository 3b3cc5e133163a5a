"""Loads that SGLang makes layer by layer, as one launch that tells of each layer.

``L2TransferEngine.submit_host_to_device`` calls a copy function for each layer, and records that
layer's event behind it. While it runs, calls are put together here; at the last layer they become
one launch, and each event is recorded behind a wait for its layer. Where some of the calls have to
be made at once, such as copies of large pages, so are all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch

from kvsig import observe, streams
from kvsig._core import BindError, CudaError, Report
from kvsig._counters import now, since
from kvsig.integrations.sglang import launches
from kvsig.integrations.sglang.kernel import Request
from kvsig.integrations.sglang.launches import Launched
from kvsig.integrations.sglang.pools import Unserved

__all__ = ["METHOD", "OWNER", "Load", "current", "submit"]

#: What is hooked.
OWNER, METHOD = "sglang.srt.mem_cache.l2_transfer.L2TransferEngine", "submit_host_to_device"
WHAT = "sglang.load_in_layers"
#: How the number of layers is called, by versions.
_LAYERS = ("transfer_layer_id_max", "layer_num")

#: Requests, each with the call that makes it SGLang's way; and those of each layer.
Calls: TypeAlias = list[tuple[Request, Callable[[], Any]]]
Held: TypeAlias = list[tuple[int, Calls]]


class _Running(threading.local):
    load: Load | None = None  # of the class: a name that a thread lacks takes a microsecond


_running = _Running()
# Streams on which events are recorded: by device and transfer stream, kept like SGLang's own.
_helpers: dict[tuple[int | None, int], Any] = {}


def current() -> Load | None:
    """Return the load that this thread is putting together, if one is."""
    return _running.load


def submit(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run SGLang's method with the calls of a load put together, where that can be."""
    done = kwargs.get("on_layer_done")
    layers = next((kwargs[name] for name in _LAYERS if name in kwargs), None)
    if done is None or type(layers) is not int or not 1 < layers <= launches.LAYERS:
        observe.passed_on(WHAT, "a load without events of layers")
        return original(*args, **kwargs)
    load = Load(done, layers)
    kwargs["on_layer_done"] = load.layer_done
    _running.load = load
    try:
        answer = original(*args, **kwargs)
    finally:
        _running.load = None
    return answer


class Load:
    """One load: what its layers ask for, until the last one is there.

    Parameters
    ----------
    done : callable
        SGLang's: records the event of a layer on the current stream.
    layers : int
        How many there are.
    """

    def __init__(self, done: Callable[[int], Any], layers: int) -> None:
        self.done, self.layers, self.start = done, layers, 0
        # The call that is being served, as SGLang would make it itself.
        self.call: Callable[[], Any] | None = None
        # Whether a call has been made at once: layers come as those calls do then, and a launch at
        # the end would keep the first of them waiting for the last.
        self.mixed = False
        self.open: Calls = []
        self.held: Held = []

    def takes(self, request: Request) -> bool:
        """Keep the call that is being served for the launch; False if it has to be made at once."""
        if self.mixed or self.call is None or request.layers != 1:
            return False
        if any(place.head for place in request.src + request.dst):
            return False
        self.start = self.start or now()
        self.open.append((request, self.call))
        return True

    def layer_done(self, layer: int) -> None:
        """Note a layer's event; at the last one, launch, and record the events of those noted."""
        if not self.open and not self.held:
            self.done(layer)  # nothing is held back, so the event is due
            return
        self.held.append((layer, self.open))
        self.open = []
        if layer != self.layers - 1 and not self.mixed:
            return
        held, self.held = self.held, []
        try:
            report = self._launched(held)
        except Unserved as unserved:
            observe.passed_on(WHAT, str(unserved))
            self._one_by_one(held)
        except (BindError, CudaError) as error:
            observe.fell_back(WHAT, error)
            self._one_by_one(held)
        else:
            since(WHAT, report, self.start)

    def _one_by_one(self, held: Held) -> None:
        for layer, calls in held:
            for _, original in calls:
                original()
            self.done(layer)

    def _launched(self, held: Held) -> Report:
        first = next(calls for _, calls in held if calls)[0][0]
        device = launches.device_of(first)
        handle = streams.current_handle(device)
        groups = _groups([[request for request, _ in calls] for _, calls in held])
        report, waits = Report(), []
        for numbers, layers in groups:
            launched = launches.launch(layers, handle, flags=True)
            report += launched.report
            waits.append((launched, {number: i for i, number in enumerate(numbers)}))
        helper = _helper(device, handle)
        number = streams.stream_handle(helper, device)
        with _on(helper, device):
            for i, (layer, _) in enumerate(held):
                for launched, places in waits:
                    _wait(launched, places.get(i), number)
                self.done(layer)
        return report


def _wait(launched: Launched, place: int | None, stream: int) -> None:
    if launched.lane is not None and place is not None:
        launched.lane.wait(place, launched.value, stream)


def _groups(layers: list[list[Request]]) -> list[tuple[list[int], list[list[Request]]]]:
    """Sort requests by their token numbers: for each, which layers have some, and which."""
    groups: dict[tuple[int, int], dict[int, list[Request]]] = {}
    for i, requests in enumerate(layers):
        for request in requests:
            key = id(request.src_indices), id(request.dst_indices)
            groups.setdefault(key, {}).setdefault(i, []).append(request)
    return [(list(group), list(group.values())) for group in groups.values()]


def _helper(device: torch.device, handle: int) -> Any:
    found = _helpers.get((device.index, handle))
    if found is None:
        found = _helpers.setdefault((device.index, handle), streams.new_stream(device))
    return found


def _on(stream: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Make a stream torch's current one; on the emulated runtime torch has none."""
    return torch.cuda.stream(stream) if device.type == "cuda" else nullcontext(stream)
