from typing import Any

from kvsig._core import Report

PATHS: tuple[str, ...]

class Submitter:
    _all: Any
    _index: int | None
    _selections: dict[Any, Any]
    _one_device: bool
    _rows: bool
    def _transfer(
        self,
        device_pages: Any,
        host_pages: Any,
        layers: Any,
        stream: Any,
        path: str,
        load: bool,
        events: Any = None,
    ) -> Report: ...
    def _chosen(self, layers: Any, path: str) -> Any: ...
    def _execute(
        self, selection: Any, transfer: Any, handle: int, path: str, load: bool
    ) -> Report: ...
