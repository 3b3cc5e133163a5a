import numpy as np
import numpy.typing as npt

_Words = npt.NDArray[np.uint64]

def neighbours(
    dsts: _Words, srcs: _Words, sizes: _Words | None, same: int
) -> tuple[int, int]: ...
def planned(
    dsts: _Words, srcs: _Words, sizes: _Words, seams: _Words, min_rows: int
) -> tuple[_Words, _Words, _Words, _Words]: ...
def placed(offsets: _Words, bases: _Words) -> _Words: ...
