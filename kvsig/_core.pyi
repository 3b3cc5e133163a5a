from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from ._errors import BindError as BindError
from ._errors import CudaError as CudaError

__all__ = [
    "BindError",
    "CudaError",
    "Report",
    "batch_refusal",
    "bind",
    "call",
    "copy_batch",
    "copy_strided",
    "copy_strided3",
    "driver_version",
    "info",
    "is_emulated",
    "memory_range",
    "rebind",
    "runtime_version",
    "strided_bound",
]

_Words: TypeAlias = npt.NDArray[np.uint64]

DIGEST: str
DRIVER_WITH_BATCH: int
FUNCTIONS: tuple[str, ...]
PAGE_COPY: bytes
STRUCT_SIZES: dict[str, int]
TORCH_CUDA: Sequence[str]

class Report:
    @property
    def path(self) -> str: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def copies(self) -> int: ...
    @property
    def calls(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def __init__(
        self,
        path: str = "none",
        reason: str | None = None,
        copies: int = 0,
        calls: int = 0,
        bytes: int = 0,
    ) -> None: ...
    def __add__(self, other: Report) -> Report: ...
    def __eq__(self, other: object) -> bool: ...
    def __hash__(self) -> int: ...

def address_file(address: int) -> str: ...
def batch_refusal(stream: int) -> str | None: ...
def bind() -> None: ...
def call(function: str, /, **arguments: Any) -> Any: ...
@overload
def copy_batch(
    dsts: _Words,
    srcs: _Words,
    sizes: _Words | int,
    stream: int,
    path: str = "auto",
    batch_size: int = 256,
    threads: int = 1,
    first_size: int = 0,
    give_up: Literal[False] = False,
) -> Report: ...
@overload
def copy_batch(
    dsts: _Words,
    srcs: _Words,
    sizes: _Words | int,
    stream: int,
    path: str = "auto",
    batch_size: int = 256,
    threads: int = 1,
    first_size: int = 0,
    give_up: bool = False,
) -> Report | None: ...
def copy_strided(ops: _Words, stream: int) -> Report: ...
def copy_strided3(ops: _Words, stream: int) -> Report: ...
def driver_version() -> int: ...
def info() -> dict[str, Any]: ...
def is_emulated() -> bool: ...
def loaded_cudarts() -> list[str]: ...
def loaded_libraries() -> list[str]: ...
def memory_range(address: int) -> tuple[int, int] | None: ...
def rebind(spec: str | None = None) -> None: ...
def runtime_version() -> int: ...
def strided_bound() -> bool: ...
def teams_bound() -> bool: ...

class KernelCode:
    def __init__(self, kernel: Any) -> None: ...
    @property
    def kernel(self) -> Any: ...

class KernelPlanes:
    def __init__(self, table: npt.NDArray[np.uint8], layer_planes: int, unit: int) -> None: ...
    @property
    def planes(self) -> int: ...
    @property
    def layer_planes(self) -> int: ...
    @property
    def unit(self) -> int: ...
    @property
    def regular(self) -> bool: ...

class KernelLane:
    def __init__(self, layers: int, stream: int) -> None: ...
    @property
    def layers(self) -> int: ...
    @property
    def value(self) -> int: ...
    @property
    def stream(self) -> int: ...
    def take_wrong(self) -> tuple[int, int, int] | None: ...
    def wait(self, layer: int, value: int, stream: int) -> None: ...

_Numbers: TypeAlias = npt.NDArray[np.int64] | tuple[int, int, int]

def launch_kernel(
    code: KernelCode,
    planes: KernelPlanes,
    lane: KernelLane,
    device_pages: _Numbers,
    host_pages: _Numbers,
    limits: tuple[int, int],
    source: int,
    first_layer: int = 0,
    layers: int | None = None,
    sms: int = 4,
    rate: float = 0,
    window_pitch: int = 0,
    flags: bool = False,
    recorded: bool = False,
) -> tuple[Report, int]: ...
