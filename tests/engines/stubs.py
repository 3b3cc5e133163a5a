"""Modules of an engine, of which some are real and all others stand-ins."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock


class Failure(Exception):
    """What an engine no longer has, or has otherwise."""


def need(condition: Any, what: str) -> None:
    """Check something, also where assertions are switched off."""
    if not condition:
        raise Failure(what)


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of a package: the real ones named, stand-ins for all others.

    Parameters
    ----------
    package : str
        Top-level name.
    folder : Path
        Where its files are.
    real : collection of str
        Modules to load from their files.
    given : dict
        Contents of stand-ins, by module.
    """

    def __init__(
        self, package: str, folder: Path, real: set[str], given: dict[str, dict[str, Any]]
    ) -> None:
        self.package, self.folder, self.real, self.given = package, folder, real, given
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] != self.package:
            return None
        if name in self.real:
            place = self.folder.joinpath(*name.split("."))
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            need(file.exists(), f"{name} is gone")
            search = [str(place)] if place.is_dir() else None
            return importlib.util.spec_from_file_location(
                name, file, submodule_search_locations=search
            )
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        made = _Stub(spec.name)
        made.__path__ = []
        vars(made).update(self.given.get(spec.name, {}))
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        pass
