"""kvsig inside SGLang: the copies of HiCache, by plugin or by a call.

The plugin (SGLang 0.5.11 and later) loads itself in each process of the server. Elsewhere
`install` replaces the functions in the process that calls it, and `uninstall` puts them back.
What kvsig does not serve goes to SGLang's own function, counted with the reason.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from kvsig import observe
from kvsig._counters import now, since
from kvsig.integrations.sglang import direct, kernel, launches, layered
from kvsig.integrations.sglang.direct import Answer
from kvsig.integrations.sglang.launches import WrongToken

__all__ = ["install", "installed", "plugin", "uninstall"]

_KVCACHEIO = "sgl_kernel.kvcacheio"
_HICACHE = ("sglang.kernels.ops.kvcache.hicache", "sglang.jit_kernel.hicache")
_DIRECT: dict[str, Callable[..., Answer]] = {
    name: getattr(direct, name) for name in direct.__all__
}
_CONFIGURE = (
    "start the server with --hicache-io-backend direct (from SGLang 0.5.14 on the layout "
    "page_first_direct follows; before, add --hicache-mem-layout page_first_direct)"
)

# Originals are kept in an object, never as names of a module: whoever rebinds the functions of
# all modules would rebind those too, and the wrapper would call itself for ever.
_lock = threading.Lock()
_originals: dict[tuple[str, str], Callable[..., Any]] = {}
_wrappers: dict[tuple[str, str], Callable[..., Any]] = {}
_warned: list[str] = []


def _targets() -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Give owner, name and hook of each function that this SGLang has."""
    for module in (_KVCACHEIO, *_HICACHE):
        found = _resolved(module)
        for name, hook in _hooks(module):
            if callable(getattr(found, name, None)):
                yield module, name, hook
    if callable(getattr(_resolved(layered.OWNER), layered.METHOD, None)):
        yield layered.OWNER, layered.METHOD, _around_loads()


def _resolved(path: str) -> Any:
    """Return a module, or a class of one; None for what cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        if name[:1].isupper():
            return getattr(importlib.import_module(module), name, None)
        return importlib.import_module(path)
    except Exception as error:  # a compiled part that does not load is not kvsig's trouble
        observe.logger.debug("kvsig: %s cannot be imported: %s", path, error)
        return None


def _hooks(module: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    if module == _KVCACHEIO:
        for name, serve in _DIRECT.items():
            yield name, _around(f"sglang.{name}", serve)
    requests = kernel.AHEAD_OF_TIME if module == _KVCACHEIO else kernel.JUST_IN_TIME
    for name, request in requests.items():
        yield name, _around_kernel(f"sglang.{name}", request)


def _around(what: str, serve: Callable[..., Answer]) -> Callable[..., Any]:
    """Make a hook: it gets the original and the call, and serves it or hands it over."""
    serve = observe.traced(f"kvsig.{what}")(serve)

    def hook(original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        start = now()
        load = layered.current()
        if load is not None:
            load.call = functools.partial(original, *args, **kwargs)
        answer: Answer
        try:
            answer = serve(*args, **kwargs)
        except WrongToken:  # an earlier call's data are not where SGLang takes them to be
            raise
        except Exception as error:  # an exception here ends SGLang's scheduler
            observe.fell_back(what, error)
            answer = ""
        else:
            if isinstance(answer, str):
                observe.passed_on(what, answer)
        if answer is None:
            return None
        if load is not None:
            load.mixed = True
        if isinstance(answer, str):
            return original(*args, **kwargs)
        since(what, answer, start)
        return None

    return hook


def _around_kernel(what: str, request: Callable[..., kernel.Request]) -> Callable[..., Any]:
    """Make a hook of a function whose page numbers are on the GPU."""
    known = kernel.TUNING | set(inspect.signature(request).parameters)

    def serve(*args: Any, **kwargs: Any) -> Answer:
        if not known.issuperset(kwargs):
            return direct.UNKNOWN
        asked = request(*args, **kwargs)
        load = layered.current()
        if load is not None and load.takes(asked):
            return None
        answer = launches.serve(asked)
        if isinstance(answer, str) and not _warned and answer == launches.refusal():
            _warned.append(what)
            why = f"HiCache calls {what.partition('.')[2]}, which needs the page-copy kernel: "
            observe.warn_unserved("sglang", why + answer, _CONFIGURE)
        return answer

    return _around(what, serve)


def _around_loads() -> Callable[..., Any]:
    """Make a hook of SGLang's method that loads layer by layer."""

    def hook(original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return layered.submit(original, *args, **kwargs)

    return hook


def _announce(names: list[str]) -> None:
    why = launches.refusal()
    served = [name for name in names if name in _DIRECT or why is None]
    observe.announce(
        "sglang",
        f"sglang {_version('sglang')}, sgl_kernel {_version('sgl_kernel')}",
        ", ".join(served) or "nothing",
        "torch's own copies" if why is None else f"the kernel backend ({why})",
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
        for owner, name, hook in _targets():
            if (owner, name) in _originals:
                continue
            place = _resolved(owner)
            original = getattr(place, name)
            wrapper = _wrapper(hook, original)
            _originals[owner, name], _wrappers[owner, name] = original, wrapper
            new[id(original)] = original, wrapper
            setattr(place, name, wrapper)
        _rebind(new)
        done = [f"{module}.{name}" for module, name in _originals]
    if not done:
        raise ImportError(
            f"there is nothing to replace: {_KVCACHEIO} is missing, or has none of "
            f"{', '.join(_DIRECT)}"
        )
    if new:
        _announce([name.rpartition(".")[2] for name in done])
    return done


def uninstall() -> None:
    """Put SGLang's functions back; does nothing where `install` was not called."""
    with _lock:
        old: dict[int, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        for (owner, name), wrapper in _wrappers.items():
            original = _originals[owner, name]
            old[id(wrapper)] = wrapper, original
            if getattr(_resolved(owner), name, None) is wrapper:
                setattr(_resolved(owner), name, original)
        _rebind(old)
        _originals.clear()
        _wrappers.clear()
        _warned.clear()


def installed() -> dict[str, bool]:
    """Whether kvsig is asked first, by function "module.name", by plugin or by `install`."""
    found = {}
    for owner, name, _ in _targets():
        found[f"{owner}.{name}"] = _is_ours(getattr(_resolved(owner), name))
    return found


def _wrapper(hook: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Make the function that stands in the original's place; a method's too."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return wrapper


def _is_ours(function: Any) -> bool:
    """Whether a function is a wrapper of `install`, or one of SGLang's around a hook of kvsig's."""
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
