"""What copies cost: the model that the planner predicts times with, and where it is kept."""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

__all__ = [
    "CostModel",
    "DirectionCosts",
    "builtin",
    "cache_path",
    "load",
    "save",
]

# Raised whenever the meaning of a stored figure changes: files of another version are not read.
FORMAT = 2
#: No figure is above it: a second for one copy, in microseconds.
MOST = 1e6
#: A file of figures has 1 KB; a larger one is something else.
LONGEST_FILE = 1 << 16


@dataclass(frozen=True, slots=True)
class DirectionCosts:
    """Costs of one direction, in microseconds.

    Host and copy engine work side by side, so each method has two figures: what a call keeps
    the host busy (*submit*), and what it keeps the copy engine busy (*engine*). The engine
    pays for the bytes as well.

    Parameters
    ----------
    byte : float
        Engine time of one byte.
    loop_submit, loop_engine : float
        One ``cudaMemcpyAsync``.
    call_submit, call_engine : float
        One batch call, whatever it holds.
    copy_submit, copy_engine : float
        One copy inside a batch call.
    strided_submit, strided_engine : float
        One ``cudaMemcpy3DAsync``.
    strided_row : float
        Engine time of one row of it.
    latency : float
        From the last submission to the end, the same for every method of the copy engine.
    kernel_submit : float
        One launch of the page-copy kernel.
    kernel_latency : float
        From the launch to the end, bytes apart.
    kernel_byte : float
        One byte that the kernel moves, with as many multiprocessors as help.
    kernel_block_byte : float
        One byte that one multiprocessor moves by itself.
    kernel_piece : float
        One page of one plane, at the least: the look-up of its address.
    kernel_rate : float
        Bytes a microsecond that long transfers of the kernel are held to, so that a model that
        computes meanwhile is not held up; 0: not held.

    Raises
    ------
    ValueError
        If a figure is no number from 0 to 1e6.
    """

    byte: float
    loop_submit: float
    loop_engine: float
    call_submit: float
    call_engine: float
    copy_submit: float
    copy_engine: float
    strided_submit: float
    strided_engine: float
    strided_row: float
    latency: float
    kernel_submit: float
    kernel_latency: float
    kernel_byte: float
    kernel_block_byte: float
    kernel_piece: float
    kernel_rate: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # A bool is an int, and an int of 400 digits compares well with a float.
            if type(value) not in (int, float) or not 0 <= value <= MOST:
                raise ValueError(f"{field.name} is {_short(value)}, needs a number from 0 to 1e6")


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        return "a very long integer"
    return text if len(text) <= 40 else text[:37] + "..."


@dataclass(frozen=True, slots=True)
class CostModel:
    """What copies cost on one device.

    Parameters
    ----------
    name : str
        Name of the device, as CUDA gives it.
    source : {"built in", "default", "calibrated"}
        Where the figures are from.
    offload, load : DirectionCosts
        Device to host, and host to device.
    batch_sizes : tuple of int
        Numbers of copies per batch call to choose from, eight at most.

    Raises
    ------
    ValueError
        If `batch_sizes` are not one to eight positive integers.
    """

    name: str
    source: str
    offload: DirectionCosts
    load: DirectionCosts
    batch_sizes: tuple[int, ...] = (64, 128, 256)

    def __post_init__(self) -> None:
        sizes = self.batch_sizes
        if not 1 <= len(sizes) <= 8 or not all(type(s) is int and 0 < s < 2**31 for s in sizes):
            raise ValueError(
                f"batch_sizes is {_short(sizes)}, needs one to eight integers from 1 to 2**31 - 1"
            )


# Measured on H100s 80GB HBM3, PCIe 5 x16, driver 580, CUDA 13.0, beside CPUs at full speed.
_H100_LOAD = DirectionCosts(
    byte=1 / 54.8e3,
    loop_submit=2.4,
    loop_engine=2.6,
    call_submit=3.5,
    call_engine=0.8,
    copy_submit=0.4,
    copy_engine=0.06,
    strided_submit=1.9,
    strided_engine=2.87,
    strided_row=0.005,
    latency=7.0,
    kernel_submit=4.5,
    kernel_latency=10.0,
    kernel_byte=1 / 51.1e3,
    kernel_block_byte=1 / 28e3,
    kernel_piece=0.011,
    kernel_rate=0,
)
_H100_OFFLOAD = replace(
    _H100_LOAD,
    byte=1 / 55.1e3,
    loop_engine=2.4,
    call_engine=1.5,
    copy_engine=0.16,
    strided_engine=2.45,
    kernel_latency=9.5,
    kernel_byte=1 / 52.4e3,
    kernel_rate=45e3,
)
# Nothing is known of the device: a slower link, and strided copies only where they win clearly.
_CAREFUL = {"byte": 1 / 25e3, "strided_submit": 3.3, "strided_engine": 3.6, "kernel_byte": 1 / 23e3}
_DEFAULT_LOAD = replace(_H100_LOAD, **_CAREFUL)
_DEFAULT_OFFLOAD = replace(_H100_OFFLOAD, **_CAREFUL, kernel_rate=20e3)


def builtin(device_name: str | None = None) -> CostModel:
    """Figures that come with kvsig.

    Parameters
    ----------
    device_name : str, optional
        Name of the device, as CUDA gives it.

    Returns
    -------
    CostModel
        Of that device, or a careful default for one that is not known.
    """
    name = device_name or "unknown device"
    # The H200 has the H100's link and copy engines.
    if re.search(r"\bH[12]00\b", name):
        return CostModel(name, "built in", _H100_OFFLOAD, _H100_LOAD)
    return CostModel(name, "default", _DEFAULT_OFFLOAD, _DEFAULT_LOAD)


# --- The file of calibrated figures -----------------------------------------------------------


def cache_path(device_name: str) -> Path:
    """Where calibrated figures of a device are kept, in the user's cache folder.

    Raises
    ------
    OSError
        If the user has no home directory, and ``XDG_CACHE_HOME`` is not set either.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            raise OSError(
                "there is no home directory to keep calibrated figures in: set XDG_CACHE_HOME"
            )
        root = os.path.join(home, ".cache")
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") or "unknown"
    return Path(root) / "kvsig" / f"costs-{slug}.json"


def save(model: CostModel, path: Path | None = None) -> Path:
    """Keep the figures of a device for later processes.

    Parameters
    ----------
    model : CostModel
        The figures; `model.name` is the name of the device.
    path : Path, optional
        The file, in place of `cache_path`.

    Returns
    -------
    Path
        The file, replaced as a whole: a reader never sees half of it.
    """
    path = cache_path(model.name) if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **asdict(model)}, indent=2) + "\n"
    descriptor, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def load(device_name: str | None = None, path: Path | None = None) -> CostModel:
    """Figures of a device: the calibrated ones if there are any, else those of `builtin`.

    Parameters
    ----------
    device_name : str, optional
        Name of the device, as CUDA gives it.
    path : Path, optional
        The file of calibrated figures, in place of `cache_path`.

    Returns
    -------
    CostModel
        The figures. A file that cannot be read is reported by a warning and left alone.
    """
    model = builtin(device_name)
    if path is None:
        if device_name is None:
            return model
        try:
            path = cache_path(device_name)
        except OSError:
            return model  # nowhere to keep figures, so none are kept
    try:
        return _parse(json.loads(_read(path)))
    except FileNotFoundError:
        return model
    except (OSError, ValueError, TypeError, RecursionError) as error:
        warnings.warn(
            f"{path}: calibrated costs cannot be used ({error}); taking the {model.source} "
            "figures. Delete the file or run: python -m kvsig calibrate",
            RuntimeWarning,
            stacklevel=2,
        )
        return model


def _read(path: Path) -> str:
    """Read a small ordinary file; what else goes by its name is refused, not waited for."""
    # O_NONBLOCK: opening a pipe would wait for somebody to write to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no ordinary file")
        data = file.read(LONGEST_FILE + 1)
    if len(data) > LONGEST_FILE:
        raise ValueError(f"it is longer than {LONGEST_FILE} bytes")
    return data.decode("utf-8")


def _parse(data: Any) -> CostModel:
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    if data.get("format") != FORMAT:
        raise ValueError(f"format is {_short(data.get('format'))}, this version reads {FORMAT}")
    sizes = data.get("batch_sizes")
    if not isinstance(sizes, list):
        raise ValueError(f"batch_sizes is {_short(sizes)}, needs a list")
    return CostModel(
        str(data.get("name")),
        str(data.get("source")),
        _parse_direction(data.get("offload"), "offload"),
        _parse_direction(data.get("load"), "load"),
        tuple(sizes),
    )


def _parse_direction(data: Any, place: str) -> DirectionCosts:
    names = [field.name for field in fields(DirectionCosts)]
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        raise ValueError(f"{place} does not hold exactly {', '.join(names)}")
    try:
        return DirectionCosts(**data)
    except ValueError as error:
        raise ValueError(f"{place}.{error}") from None
