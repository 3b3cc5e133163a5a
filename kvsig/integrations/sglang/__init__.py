"""kvsig inside SGLang: the copies of HiCache, by plugin or by a call.

The plugin (SGLang 0.5.11 and later) loads itself in each process of the server. Elsewhere
`install` replaces the functions in the process that calls it, and `uninstall` puts them back.
What kvsig does not serve goes to SGLang's own function, counted with the reason.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import Any

from kvsig import observe
from kvsig._core import Report
from kvsig.integrations.sglang import direct, kernel

__all__ = ["install", "installed", "plugin", "uninstall"]

_KVCACHEIO = "sgl_kernel.kvcacheio"
_HICACHE = ("sglang.kernels.ops.kvcache.hicache", "sglang.jit_kernel.hicache")
_DIRECT: dict[str, Callable[..., Report | str]] = {
    name: getattr(direct, name) for name in direct.__all__
}
_NEEDS_KERNEL = "page numbers on the GPU need the page-copy kernel"
_CONFIGURE = (
    "start the server with --hicache-io-backend direct (from SGLang 0.5.14 on the layout "
    "page_first_direct follows; before, add --hicache-mem-layout page_first_direct)"
)

# Answers a request of the kernel functions, once there is a page-copy kernel that takes them.
_kernel_server: Callable[[kernel.Request], Report | str] | None = None

# Originals are kept in an object, never as names of a module: whoever rebinds the functions of
# all modules would rebind those too, and the wrapper would call itself for ever.
_lock = threading.Lock()
_originals: dict[tuple[str, str], Callable[..., Any]] = {}
_wrappers: dict[tuple[str, str], Callable[..., Any]] = {}
_warned: list[str] = []


def _targets() -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Give module, name and hook of each function that this SGLang has."""
    for module in (_KVCACHEIO, *_HICACHE):
        try:
            found = importlib.import_module(module)
        except Exception as error:  # a compiled part that does not load is not kvsig's trouble
            observe.logger.debug("kvsig: %s cannot be imported: %s", module, error)
            continue
        for name, hook in _hooks(module):
            if callable(getattr(found, name, None)):
                yield module, name, hook


def _hooks(module: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    if module == _KVCACHEIO:
        for name, serve in _DIRECT.items():
            yield name, _around(f"sglang.{name}", serve)
    requests = kernel.AHEAD_OF_TIME if module == _KVCACHEIO else kernel.JUST_IN_TIME
    for name, request in requests.items():
        yield name, _around_kernel(f"sglang.{name}", request)


def _around(what: str, serve: Callable[..., Report | str]) -> Callable[..., Any]:
    """Make a hook: it gets the original and the call, and serves it or hands it over."""
    serve = observe.traced(f"kvsig.{what}")(serve)

    def hook(original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        start = perf_counter_ns()
        try:
            answer = serve(*args, **kwargs)
        except Exception as error:  # an exception here ends SGLang's scheduler
            observe.fell_back(what, error)
            return original(*args, **kwargs)
        if isinstance(answer, str):
            observe.passed_on(what, answer)
            return original(*args, **kwargs)
        observe.record(what, answer, perf_counter_ns() - start)
        return None

    return hook


def _around_kernel(what: str, request: Callable[..., kernel.Request]) -> Callable[..., Any]:
    """Make a hook of a function whose page numbers are on the GPU."""

    def serve(*args: Any, **kwargs: Any) -> Report | str:
        assert _kernel_server is not None
        return _kernel_server(request(*args, **kwargs))

    served = _around(what, serve)

    def hook(original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if _kernel_server is not None:
            return served(original, *args, **kwargs)
        if not _warned:
            _warned.append(what)
            observe.warn_unserved("sglang", f"HiCache calls {what.partition('.')[2]}", _CONFIGURE)
        observe.passed_on(what, _NEEDS_KERNEL)
        return original(*args, **kwargs)

    return hook


def _announce(names: list[str]) -> None:
    served = [name for name in names if name in _DIRECT]
    observe.announce(
        "sglang",
        f"sglang {_version('sglang')}, sgl_kernel {_version('sgl_kernel')}",
        ", ".join(served) or "nothing",
        "the kernel backend, whose page numbers are on the GPU",
    )


def _version(package: str) -> str:
    return str(getattr(sys.modules.get(package), "__version__", "of unknown version"))


def plugin() -> None:
    """Register kvsig's hooks: the entry point ``sglang.srt.plugins``, called by SGLang."""
    if observe.disabled():
        observe.logger.info("kvsig for sglang is switched off by KVSIG_DISABLE")
        return
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    names = []
    for module, name, hook in _targets():
        registry.HookRegistry.register(f"{module}.{name}", hook, registry.HookType.AROUND)
        names.append(name)
    if names:
        _announce(names)
    else:
        observe.warn_unserved(
            "sglang", f"{_KVCACHEIO} has none of the functions", "install SGLang's kernels"
        )


def install() -> list[str]:
    """Replace SGLang's functions in this process.

    For tests, engines that run in the caller's process, and versions without plugins. A server
    starts processes of its own, which this does not reach: there the plugin is the way.

    Returns
    -------
    list of str
        The functions that are replaced now, "module.name".

    Raises
    ------
    ImportError
        If there is nothing to replace.
    """
    if observe.disabled():
        observe.logger.info("kvsig for sglang is switched off by KVSIG_DISABLE")
        return []
    with _lock:
        new: dict[int, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        for module, name, hook in _targets():
            if (module, name) in _originals:
                continue
            original = getattr(sys.modules[module], name)
            wrapper = functools.wraps(original)(functools.partial(hook, original))
            _originals[module, name], _wrappers[module, name] = original, wrapper
            new[id(original)] = original, wrapper
        _rebind(new)
        done = [f"{module}.{name}" for module, name in _originals]
    if not done:
        raise ImportError(
            f"there is nothing to replace: {_KVCACHEIO} is missing, or has none of "
            f"{', '.join(_DIRECT)}"
        )
    _announce([name.rpartition(".")[2] for name in done])
    return done


def uninstall() -> None:
    """Put SGLang's functions back; does nothing where `install` was not called."""
    with _lock:
        old: dict[int, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        for place, wrapper in _wrappers.items():
            old[id(wrapper)] = wrapper, _originals[place]
        _rebind(old)
        _originals.clear()
        _wrappers.clear()
        _warned.clear()


def installed() -> dict[str, bool]:
    """Whether kvsig is asked first, by function "module.name", by plugin or by `install`."""
    found = {}
    for module, name, _ in _targets():
        function = getattr(sys.modules[module], name)
        found[f"{module}.{name}"] = _is_ours(function)
    return found


def _is_ours(function: Any) -> bool:
    """Whether a function is a wrapper of `install`, or one of SGLang's around a hook of kvsig's."""
    if isinstance(function, functools.partial):
        function = function.func
    cells = getattr(function, "__closure__", None) or ()
    inner = [cell.cell_contents for cell in cells]
    own = [f for f in [function, *inner] if getattr(f, "__module__", None) == __name__]
    return any(getattr(f, "__name__", "") == "hook" for f in own)


def _rebind(functions: dict[int, tuple[Callable[..., Any], Callable[..., Any]]]) -> None:
    """Exchange functions, given by id as (old, new), under each name of each loaded module.

    Modules that are imported later find the new one where the old one was.
    """
    for module in list(sys.modules.values()):
        if type(module) is not types.ModuleType:
            continue  # lazy ones would import what nobody asked for
        for name, value in list(vars(module).items()):
            pair = functions.get(id(value))
            if pair is not None and pair[0] is value:
                setattr(module, name, pair[1])
