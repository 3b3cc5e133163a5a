from enum import IntEnum
from typing import Any, Self

import numpy.typing as npt

from kvsig.planning.costs import CostModel, DirectionCosts
from kvsig.planning.geometry import Planes

METHODS: tuple[str, ...]
PATHS: tuple[str, ...]

class Direction(IntEnum):
    LOAD = 0
    OFFLOAD = 1

def kernel_pays(
    costs: DirectionCosts,
    sms: int,
    copies: float,
    strided: float,
    rows: float,
    size: float,
    pieces: float,
    batch_size: float = 256.0,
) -> bool: ...

class Geometry:
    def __new__(
        cls,
        planes: Planes,
        model: CostModel,
        host_seams: npt.ArrayLike | None = None,
        device_seams: npt.ArrayLike | None = None,
        sms: int = 0,
        rates: tuple[float, float] = ...,
    ) -> Self: ...
    @property
    def planes(self) -> Planes: ...
    @property
    def model(self) -> CostModel: ...
    def pages(self, device_pages: Any, host_pages: Any, direction: Direction) -> Pages: ...
    def plan(
        self,
        pages: Pages,
        path: str = "auto",
        batch: bool = True,
        strided: bool = True,
        kernel: bool = False,
    ) -> Plan: ...

class Pages:
    @property
    def count(self) -> int: ...
    @property
    def direction(self) -> Direction: ...

class Plan:
    @property
    def geometry(self) -> Geometry: ...
    @property
    def pages(self) -> Pages: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def same_size(self) -> int: ...
    @property
    def method(self) -> str: ...
    @property
    def predicted_us(self) -> float: ...
    @property
    def submit_us(self) -> float: ...
    @property
    def candidates(self) -> dict[str, float]: ...
