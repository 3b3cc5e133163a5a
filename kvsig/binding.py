"""What each function of the registry is bound to, which way batches go, and why.

Decides by what `kvsig.runtime` found and by what libraries tell of themselves; the calls that ask
them are the core's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

from . import _loader
from . import registry as _registry
from . import runtime as _runtime
from ._errors import BindError
from .registry import Function, Variant, format_version
from .runtime import Library

__all__ = ["Binding", "Core", "Row"]

# What any libcudart must have: with these, pages can be copied one by one.
# What the page-copy kernel cannot do without, apart from libcudart's own functions.
KERNEL_NEEDS = (
    "cuModuleLoadData", "cuModuleGetFunction", "cuFuncGetAttribute", "cuLaunchKernelEx",
    "nvrtcGetNumSupportedArchs", "nvrtcGetSupportedArchs", "nvrtcCreateProgram",
    "nvrtcCompileProgram", "nvrtcGetCUBINSize", "nvrtcGetCUBIN", "nvrtcGetPTXSize", "nvrtcGetPTX",
    "nvrtcGetProgramLogSize", "nvrtcGetProgramLog", "nvrtcDestroyProgram",
)  # fmt: skip
CUDART_NEEDS = ("cudaRuntimeGetVersion", "cudaMemcpyAsync")
BATCH, DRIVERS_BATCH = "cudaMemcpyBatchAsync", "cuMemcpyBatchAsync"


class Core(Protocol):
    """The calls of CUDA that a binding needs, as `kvsig._core` makes them."""

    def set_emulated_version(self, setter: int, runtime: int, driver: int) -> None:
        """Call the function of an emulated runtime that sets what it tells."""

    def fill_slot(self, row: Row) -> None:
        """Let the generated callers call what a row is bound to."""

    def ask_version(self, row: Row) -> tuple[int, int]:
        """What a library's version function answers: an error code, and the version."""

    def told(self, code: int, library: str) -> tuple[str, str]:
        """Name and text of an error code of a library."""

    def proc_address(self, symbol: str, version: int) -> tuple[int, int, int]:
        """What the driver's lookup answers: an address, an error code and a status."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one function of the registry is bound to, and why; without an address, why not."""

    function: Function
    status: str
    why: str
    variant: Variant | None = None
    address: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        variant = self.variant
        return {
            "name": self.function.name,
            "library": self.function.library,
            "symbol": variant.symbol if variant else self.function.name,
            "variant": variant.label if variant else None,
            "pinned": format_version(variant.pinned) if variant and variant.pinned else None,
            "address": self.address or None,
            "status": self.status,
            "why": self.why,
        }


def _no_variant(function: Function, version: int) -> Row:
    """The row of a function that has no variant for a version of its library."""
    shown = format_version(version)
    first, last = function.variants[0], function.variants[-1]
    if version < first.since:
        return Row(function, "absent", f"{shown} is older than {format_version(first.since)}")
    if last.before is not None and version >= last.before:
        why = f"{shown} is newer than every range; the last is {last.label}"
        return Row(function, "too new", why)
    return Row(function, "absent", f"no range covers {shown}")


class Binding:
    """The libraries of a process and what functions are bound to.

    Attributes
    ----------
    registry : Registry
    path, found : str
        Of libcudart: the file, and how it was found; or empty, and why there is none.
    emulated : bool
    libraries : dict of Library
        By the registry's names; one that is optional only once it was needed.
    versions : dict of int
        What they tell; 0 where they do not.
    rows : dict of Row
        By name of the function.
    route : {"none", "runtime", "driver"}
        The way of batches.
    why, why_not : str
        The reason of it.
    warnings : list of str
    """

    def __init__(self, core: Core, spec: str) -> None:
        self.core = core
        self.registry = _registry.load()
        self.path = self.found = self.why = self.why_not = ""
        self.emulated = False
        self.libraries: dict[str, Library] = {}
        self.versions: dict[str, int] = {}
        self.untold: dict[str, int] = {}
        self.warnings: list[str] = []
        self.route = "none"
        self.wanted_route = _runtime.route(os.environ)
        self.rows = {name: self._row(f) for name, f in self.registry.functions.items()}
        for row in self.rows.values():
            core.fill_slot(row)
        self._bind(spec)

    @property
    def runtime(self) -> int:
        """Version of libcudart."""
        return self.versions["cudart"]

    @property
    def driver(self) -> int:
        """Version of the driver."""
        return self.versions["cuda"]

    def file(self, library: str) -> str:
        """Path of a library; its name where there is none."""
        found = self.libraries.get(library)
        return found.path if found and found.handle else self.registry.libraries[library].soname

    def _bind(self, spec: str) -> None:
        try:
            cudart = _runtime.cudart(spec, CUDART_NEEDS)
        except BindError as error:
            # Without libcudart the driver's own entry point still moves pages.
            if spec or self.wanted_route == "runtime":
                raise
            cudart = Library(0, "", str(error))
        self._take_in(cudart)
        self.add("cudart", cudart)
        self.add("cuda", self._find_driver())
        if not cudart.handle and not self.libraries["cuda"].handle:
            raise BindError(self.found)
        self.choose_route()
        if self.rows[BATCH].status == "too new":
            shown = format_version(self.runtime)
            self.warnings.append(
                f"libcudart {shown} ({self.path}) is newer than every prototype of"
                " cudaMemcpyBatchAsync that kvsig knows, so pages are copied one by one. Add a"
                f' [[function.cudaMemcpyBatchAsync.variant]] with since = "{shown}" to'
                f" {_registry.PATH} and rebuild"
            )

    def _take_in(self, cudart: Library) -> None:
        self.path, self.found = cudart.path, cudart.found
        setter = 0
        if cudart.handle:
            setter = _loader.symbol(cudart.handle, "kvsig_emulated_set_version")
        self.emulated = bool(setter)
        if cudart.emulate is not None:
            if not setter:
                raise BindError(f"{cudart.path} is no emulated runtime; rebuild kvsig")
            self.core.set_emulated_version(setter, *cudart.emulate)
        if cudart.refused and cudart.handle:
            self.warnings.append(f"not used as CUDA runtime: {'; '.join(cudart.refused)}")

    def _find_driver(self) -> Library:
        cudart = self.libraries["cudart"]
        if self.emulated:
            return Library(cudart.handle, cudart.path, "emulated as well")
        entry = self.registry.libraries["cuda"]
        return _runtime.driver(entry.sonames, entry.version, cudart.handle)

    def add(self, name: str, library: Library) -> None:
        """Take a library in: its version first, then all of its functions."""
        self.libraries[name] = library
        functions = [f for f in self.registry.functions.values() if f.library == name]
        entry = self.registry.functions[self.registry.libraries[name].version]
        row = self._bind_row(entry)
        code, version = self.core.ask_version(row) if row.address else (0, 0)
        if code != 0:
            self.untold[name] = code
        self.versions[name] = max(version, 0) if code == 0 else 0
        # What others are looked up with comes before what is looked up.
        for function in sorted(functions, key=lambda f: any(v.pinned for v in f.variants)):
            if function is not entry:
                self._bind_row(function)

    def _bind_row(self, function: Function) -> Row:
        row = self.rows[function.name] = self._row(function)
        self.core.fill_slot(row)
        return row

    def _row(self, function: Function) -> Row:
        """Its variant by its own library's version, its address from that library."""
        library = self.libraries.get(function.library)
        file = self.file(function.library)
        version = self.versions.get(function.library, 0)
        if library is None:
            return Row(function, "not opened", f"{file} is opened where it is needed")
        if not library.handle:
            return Row(function, "no library", f"{file} is not there")
        variant = function.select(version)
        if version <= 0:
            # The version query failed: only what is the same in every release may be called.
            variant = next((v for v in function.variants if v.open and not v.pinned), None)
            if variant is None:
                return Row(function, "version unknown", f"{file} does not tell its version")
        if variant is None:
            return _no_variant(function, version)
        if variant.pinned:
            return self._looked_up(function, variant, version)
        return self._exported(function, variant, version)

    def _exported(self, function: Function, variant: Variant, version: int) -> Row:
        file, shown = self.file(function.library), format_version(version)
        symbol = variant.symbol
        address = _loader.symbol(self.libraries[function.library].handle, symbol)
        if not address:
            why = f"{file} is {shown}, in the range {variant.label}, but does not have {symbol}"
            return Row(function, "missing", why, variant)
        origin = _loader.address_file(address)
        if os.path.realpath(origin) != os.path.realpath(file):
            # dlsym also looks at what a library depends on: another libcudart, maybe.
            why = f"{symbol} of {shown} comes from {origin or 'no file'}, not from {file}"
            return Row(function, "missing", why, variant)
        return Row(function, "bound", f"exported; {shown} is in the range", variant, address)

    def _looked_up(self, function: Function, variant: Variant, version: int) -> Row:
        """At its pinned version, by the library's own lookup."""
        assert variant.pinned is not None
        wanted = f"{variant.symbol} of {format_version(variant.pinned)}"
        lookup = self.rows["cuGetProcAddress"]
        if not lookup.address:
            why = f"{wanted} cannot be looked up: cuGetProcAddress is not bound: {lookup.why}"
            return Row(function, "missing", why, variant)
        address, code, status = self.core.proc_address(variant.symbol, variant.pinned)
        if not address:
            names = self.registry.enums["CUdriverProcAddressQueryResult"].constants
            label = next((name for name, number in names.items() if number == status), "unknown")
            answer = f"{code} ({self.core.told(code, 'cuda')[0]})"
            why = (
                f"cuGetProcAddress of {self.file(function.library)} does not give {wanted}: it"
                f" answered {answer}, with status {status} ({label})"
            )
            return Row(function, "missing", why, variant)
        why = f"asked of the library's lookup; {format_version(version)} is in the range"
        return Row(function, "bound", why, variant, address)

    def no_driver(self) -> str:
        """What is known of a driver that does not tell a version."""
        code = self.untold.get("cuda")
        if code is not None:
            answer = f"{code} ({self.core.told(code, 'cuda')[0]})"
            return f"the driver does not tell its version: {self.file('cuda')} answered {answer}"
        return "the driver is missing"

    def choose_route(self) -> None:
        """Choose which entry point batches go to; if none, say why."""
        self.route, self.why, self.why_not = "none", "", ""
        runtime, driver = self.rows[BATCH], self.rows[DRIVERS_BATCH]
        shown = format_version(self.runtime)
        # The first driver that has the batch function, whatever libcudart there is.
        needed = driver.function.variants[0].since
        if self.driver < needed:
            seen = f"the driver is {format_version(self.driver)}"
            self.why_not = (
                f"{seen if self.driver else self.no_driver()}, and batches need"
                f" {format_version(needed)}"
            )
            return
        if runtime.address and self.wanted_route != "driver":
            assert runtime.variant is not None
            self.route = "runtime"
            self.why = f"{BATCH} of {shown}, prototype of {runtime.variant.label}"
            return
        absent = runtime.status in ("absent", "no library")
        if driver.address and (self.wanted_route == "driver" or absent):
            if self.wanted_route != "runtime":
                self.route = "driver"
                self.why = self._why_driver(driver)
                return
        if self.wanted_route == "driver":
            self.why_not = f"KVSIG_ROUTE=driver, and {DRIVERS_BATCH} is not bound: {driver.why}"
        elif runtime.status == "too new":
            self.why_not = f"libcudart {runtime.why}"
        elif runtime.status == "absent":
            self.why_not = f"libcudart {shown} has no {BATCH}"
            if self.wanted_route == "auto":
                self.why_not += f", and {driver.why}"
        else:
            self.why_not = f"{BATCH} is not bound: {runtime.why}"

    def _why_driver(self, driver: Row) -> str:
        assert driver.variant is not None and driver.variant.pinned is not None
        text = f"{DRIVERS_BATCH} of the driver, pinned at {format_version(driver.variant.pinned)}"
        if not self.path:
            return f"{text}: there is no libcudart"
        if self.wanted_route == "driver":
            return text
        return f"{text}: libcudart {format_version(self.runtime)} has no batch function"

    def no_kernel(self) -> str | None:
        """Why the page-copy kernel cannot be built here, or None; NVRTC is opened for it."""
        for name in KERNEL_NEEDS:
            row = self.row(name)
            if row.status != "bound":
                return f"{name} is not bound: {row.why}"
        return None

    def no_copies(self, refusal: str | None) -> str | None:
        """Why every copy would fail, or None where nothing says so.

        Parameters
        ----------
        refusal : str or None
            Why there are no batches.
        """
        if not self.driver:
            return f"no copy can be made: {self.no_driver()}"
        first = 1000 * (self.runtime // 1000)
        if self.driver < first:
            return (
                f"no copy can be made: the driver is {format_version(self.driver)}, and libcudart"
                f" {format_version(self.runtime)} needs {format_version(first)}"
            )
        single = self.rows["cudaMemcpyAsync"]
        if refusal is not None and not single.address:
            return f"no copy can be made: {single.why}, and {refusal}"
        return None

    def warnings_now(self) -> list[str]:
        """What to warn of: another libcudart may have been loaded since the last time."""
        if self.emulated or not self.path:
            return list(self.warnings)
        own = os.path.realpath(self.path)
        others = [path for path in _runtime.loaded_cudarts() if os.path.realpath(path) != own]
        if not others:
            return list(self.warnings)
        return [
            *self.warnings,
            f"more than one libcudart is loaded: kvsig uses {self.path}, and beside it there is"
            f" {', '.join(others)}. Version and functions come from the first alone",
        ]

    def look_again(self) -> bool:
        """Take in a driver that was not there before; libcudart may have loaded it meanwhile."""
        names = self.registry.libraries["cuda"].sonames
        if self.libraries["cuda"].handle or not any(
            _loader.open_library(name, only_loaded=True) for name in names
        ):
            return False
        self.add("cuda", self._find_driver())
        self.choose_route()
        return True

    def row(self, function: str) -> Row:
        """The row of a function; a library that is optional is opened for it."""
        name = self.rows[function].function.library
        if name not in self.libraries:
            entry = self.registry.libraries[name]
            if self.emulated:
                own = self.libraries["cudart"]
                library = Library(own.handle, own.path, "emulated as well")
            else:
                library = _runtime.nvrtc(entry.sonames, entry.version, self.path)
            self.add(name, library)
        return self.rows[function]
