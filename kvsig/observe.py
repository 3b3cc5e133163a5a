"""What kvsig has done in this process: counters, log lines, and ranges for profilers.

Counting is always on, and takes about a tenth of a microsecond. What is not served, and why, is
counted by reason and logged the first time.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from kvsig import _core, _counters
from kvsig._counters import record

__all__ = [
    "announce",
    "clear",
    "disabled",
    "fell_back",
    "passed_on",
    "prometheus",
    "record",
    "stats",
    "traced",
    "warn_unserved",
]

logger = logging.getLogger("kvsig")

Function = TypeVar("Function", bound=Callable[..., Any])

_passed_on: Counter[tuple[str, str]] = Counter()
_fallbacks: Counter[tuple[str, str]] = Counter()
_FIELDS = ("calls", "copies", "cuda_calls", "bytes", "host_seconds")


def passed_on(what: str, reason: str) -> None:
    """Count a call that an integration left to the engine's own function, and say so once."""
    key = what, reason
    if key not in _passed_on:
        logger.info("kvsig: %s is left to the engine: %s", what, reason)
    _passed_on[key] += 1


def fell_back(what: str, error: BaseException) -> None:
    """Count a call that kvsig could not make and the engine's own function did, warning once.

    Parameters
    ----------
    what : str
        As in `record`.
    error : BaseException
        What went wrong. Counted by its type, and its function and code where it has them.
    """
    code = getattr(error, "code", None)
    cause = type(error).__name__
    if code is not None:
        cause = f"{getattr(error, 'function', cause)} answered {code} {getattr(error, 'name', '')}"
    key = what, cause.strip()
    if key not in _fallbacks:
        logger.warning("kvsig: %s falls back to the engine's own function: %s", what, error)
    _fallbacks[key] += 1


def stats() -> dict[str, Any]:
    """Return what kvsig has done in this process.

    Returns
    -------
    dict
        ``paths``: by path (batch, strided, kernel, loop, none) the numbers ``calls`` (of
        kvsig), ``copies``, ``cuda_calls``, ``bytes`` and ``host_seconds``. ``functions``: the
        same by function. ``integrations``: the same by integration, with ``passed_on`` (calls
        left to the engine) added. ``passed_on``: by function, a dict of reason and number.
        ``fallbacks``: by cause, how often a path other than the one wanted was taken, or an
        engine's own function stood in.

    Notes
    -----
    Counts of the calling process only: an engine's workers have their own.
    """
    paths: dict[str, dict[str, float]] = {}
    functions: dict[str, dict[str, float]] = {}
    integrations: dict[str, dict[str, float]] = {}
    causes: Counter[str] = Counter()
    for (what, path, reason), counter in _counters.counters():
        _add(paths.setdefault(path, {}), counter)
        _add(functions.setdefault(what, {}), counter)
        name, dot, _ = what.partition(".")
        if dot:
            _add(integrations.setdefault(name, {"passed_on": 0}), counter)
        if reason is not None:
            causes[reason] += counter.calls
    reasons: dict[str, dict[str, int]] = {}
    for (what, reason), count in list(_passed_on.items()):
        reasons.setdefault(what, {})[reason] = count
        name = what.partition(".")[0]
        integration = integrations.setdefault(name, {"passed_on": 0, **dict.fromkeys(_FIELDS, 0)})
        integration["passed_on"] += count
    for (_, cause), count in list(_fallbacks.items()):
        causes[cause] += count
    return {
        "paths": paths,
        "functions": functions,
        "integrations": integrations,
        "passed_on": reasons,
        "fallbacks": dict(causes),
    }


def _add(total: dict[str, float], counter: _counters.Counter) -> None:
    for field in _FIELDS:
        more = counter.nanoseconds / 1e9 if field == "host_seconds" else getattr(counter, field)
        total[field] = total.get(field, 0) + more


def clear() -> None:
    """Set all counters to zero; what was logged once is logged again."""
    _counters.clear()
    _passed_on.clear()
    _fallbacks.clear()


def prometheus() -> str:
    """Return the counters in the text form that Prometheus reads."""
    found = stats()
    series: dict[str, dict[str, float]] = {}  # without reasons: label sets have to be distinct
    for (what, path, _), counter in _counters.counters():
        labels = f"function={_label(what)},path={_label(path)}"
        _add(series.setdefault(labels, {}), counter)
    lines = []
    for field in _FIELDS:
        lines.append(f"# TYPE kvsig_{field}_total counter")
        lines += [f"kvsig_{field}_total{{{at}}} {sums[field]}" for at, sums in series.items()]
    lines.append("# TYPE kvsig_passed_on_total counter")
    for what, reasons in found["passed_on"].items():
        for reason, count in reasons.items():
            labels = f"function={_label(what)},reason={_label(reason)}"
            lines.append(f"kvsig_passed_on_total{{{labels}}} {count}")
    lines.append("# TYPE kvsig_fallbacks_total counter")
    for cause, count in found["fallbacks"].items():
        lines.append(f"kvsig_fallbacks_total{{cause={_label(cause)}}} {count}")
    return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")


def disabled() -> bool:
    """Whether KVSIG_DISABLE switches all integrations off."""
    return _flag("KVSIG_DISABLE")


def announce(integration: str, engine: str, served: str, not_served: str) -> None:
    """Say in one line what runs, on what, and what is served.

    Parameters
    ----------
    integration, engine : str
        "sglang", and the engine with its version.
    served, not_served : str
        What kvsig does, and what it leaves alone, for a person to read.
    """
    try:
        found = _core.info()
        runtime = f"CUDA runtime {found['runtime_version']}, {found['library']}"
    except _core.BindError as error:  # it may be loaded later, and is looked for again then
        runtime = str(error)
    logger.info(
        "kvsig %s for %s (%s): %s; serves %s; leaves alone %s",
        sys.modules["kvsig"].__version__,
        integration,
        engine,
        runtime,
        served,
        not_served,
    )


def warn_unserved(integration: str, why: str, configure: str) -> None:
    """Warn that an integration is installed, but that nothing comes to it."""
    logger.warning(
        "kvsig is installed for %s, but nothing is served: %s. To change that: %s",
        integration,
        why,
        configure,
    )


def traced(name: str) -> Callable[[Function], Function]:
    """Mark a function's calls for profilers, where KVSIG_NVTX asked for it at import.

    Parameters
    ----------
    name : str
        Name of the range, for NVTX and ``torch.profiler``.

    Returns
    -------
    decorator
        Gives the function itself back unless KVSIG_NVTX is set: no cost where it is not.
    """

    def decorate(function: Function) -> Function:
        if not _flag("KVSIG_NVTX"):
            return function

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with _range(name):
                return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def _range(name: str) -> ExitStack:
    """Open a range of NVTX, where there is a GPU, and of torch's profiler."""
    import torch

    stack = ExitStack()
    stack.enter_context(torch.profiler.record_function(name))
    if torch.cuda.is_available():
        stack.enter_context(torch.cuda.nvtx.range(name))
    return stack
