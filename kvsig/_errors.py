"""Errors that kvsig raises about CUDA."""

from __future__ import annotations

__all__ = ["BindError", "CudaError"]


class BindError(RuntimeError):
    """A CUDA library or function cannot be used here; the message says why."""


class CudaError(RuntimeError):
    """A CUDA call answered an error.

    The calling thread's last error has been cleared.

    Attributes
    ----------
    code : int
        What the call answered.
    name, text : str
        CUDA's name and text of the code.
    function : str
        Function that was called.
    variant : str
        Range of versions of the prototype that it was called by.
    library : str
        Path of the library it came from.
    index : int or None
        Number of the copy that was refused, counted over the whole request, where known. None for
        errors that tell a state of the process, the device or the stream.
    """

    def __init__(
        self,
        code: int,
        name: str,
        text: str,
        function: str,
        variant: str,
        library: str,
        index: int | None = None,
    ) -> None:
        self.code, self.name, self.text = code, name, text
        self.function, self.variant, self.library = function, variant, library
        self.index = index
        place = "" if index is None else f" at copy {index}"
        super().__init__(
            f"{function} answered {code} {name} ({text}){place} [prototype of {variant}, {library}]"
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the fields, and what was noted or set since."""
        fields = (self.code, self.name, self.text, self.function, self.variant, self.library)
        state = {name: list(v) if name == "__notes__" else v for name, v in vars(self).items()}
        return type(self), (*fields, self.index), state


def page_out_of_range(name: str, position: int, page: object, limit: int) -> ValueError:
    """Make the error for a page number that a side does not have."""
    side = "the device" if name == "device_pages" else "the host pool"
    return ValueError(f"{name}[{position}] is {page}: {side} has pages 0 to {limit - 1}")
