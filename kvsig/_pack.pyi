from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvsig._threads import Team
from kvsig.costs import CostModel
from kvsig.geometry import Planes

_Copies = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint64]]
_Piece = (
    tuple[Literal["strided", "strided3"], npt.NDArray[np.uint64]]
    | tuple[Literal["batch", "loop"], _Copies]
)

CHECK_OK: int
CHECK_DEVICE_RANGE: int
CHECK_HOST_RANGE: int
CHECK_REPEATED: int
CHECK_LENGTHS: int
CHECK_NOT_PAGES: int
DEFAULT_PIECE: int
METHODS: tuple[str, ...]

def slowness() -> float: ...
def forget() -> None: ...
def none_wrong(values: npt.NDArray[np.uint64], zeros: bool) -> bool: ...

class Prepared:
    def __init__(
        self,
        planes: Planes,
        model: CostModel,
        host_seams: npt.NDArray[np.uint64] | None = None,
        device_seams: npt.NDArray[np.uint64] | None = None,
        team: Team = ...,
    ) -> None: ...
    @property
    def model(self) -> CostModel: ...
    @property
    def plane_groups(self) -> list[tuple[int, int]]: ...
    @property
    def plane_slices(self) -> list[int]: ...
    def transfer(
        self,
        device_pages: Any,
        host_pages: Any,
        direction: str,
        method: str = "auto",
        *,
        batch: bool = True,
    ) -> Transfer: ...
    def begin(self, device_pages: Any, host_pages: Any, load: bool) -> Transfer | None: ...
    def check(
        self, device_pages: Any, host_pages: Any, direction: str
    ) -> tuple[int, int, int]: ...

class Transfer(Iterator[_Piece]):
    @property
    def same_size(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def first_size(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def scores(self) -> dict[str, float]: ...
    @property
    def bytes(self) -> int: ...
    @property
    def candidates(self) -> dict[str, float]: ...
    @property
    def copies_in(self) -> int: ...
    @property
    def direction(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def predicted_calls(self) -> int: ...
    @property
    def predicted_us(self) -> float: ...
    @property
    def submit_us(self) -> float: ...
    def decide(
        self, method: str, batch: bool, slow: float = 1, following: bool = False
    ) -> None: ...
    def decide_now(self, method: str, batch: bool, stream: int) -> None: ...
    def __next__(self) -> _Piece: ...
