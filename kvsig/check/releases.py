"""Fetches CUDA runtimes of any release: headers and ``libcudart``, kept in a cache folder.

NVIDIA publishes each release as a wheel; ``pip download`` gets it, and only its ``include`` and
``lib`` are unpacked, to ``<cache>/<release>/``, once its SHA-256 is what the registry says. Nothing
is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from kvsig import registry

__all__ = ["NotARelease", "ReleaseError", "cache", "crt", "ensure", "include", "library", "package"]

CRT = "13.5.37"
"""Release of nvidia-cuda-crt whose ``crt/host_defines.h`` serves every runtime's headers."""

_OFFLINE = ("connection broken", "Max retries exceeded", "Failed to establish")
_RELEASE = re.compile(r"([0-9]{1,3})\.[0-9]{1,3}\.[0-9]{1,4}")


class ReleaseError(OSError):
    """A release cannot be fetched, or what is in the cache is not one."""


class NotARelease(ReleaseError):
    """The text names no release."""


def cache() -> Path:
    """Cache folder: ``$KVSIG_RELEASES_CACHE``, or ``kvsig/releases`` in the user's cache."""
    chosen = os.environ.get("KVSIG_RELEASES_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "kvsig/releases"


def package(release: str) -> str:
    """Name of the wheel that holds the runtime of a release.

    Parameters
    ----------
    release : str
        Such as ``"12.8.90"``.

    Raises
    ------
    NotARelease
        If the text is not three numbers.
    """
    match = _RELEASE.fullmatch(release)
    if match is None:
        raise NotARelease(f'{release!r} is not a release; give three numbers, such as "12.8.90"')
    major = int(match[1])
    return f"nvidia-cuda-runtime-cu{major}" if major < 13 else "nvidia-cuda-runtime"


def _platforms() -> list[str]:
    machine = platform.machine()
    tags = ["manylinux2014", "manylinux_2_17", "manylinux_2_28", "manylinux_2_34"]
    return [part for tag in tags for part in ("--platform", f"{tag}_{machine}")]


def _download(name: str, release: str, folder: Path) -> Path:
    """Download one wheel."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input",
        "--only-binary=:all:", "--disable-pip-version-check", "--retries", "2",
        *_platforms(), "--dest", str(folder), f"{name}=={release}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = next((line for line in lines if "ERROR" in line), lines[-1] if lines else "no output")
        if any(sign in done.stderr for sign in _OFFLINE):
            why = (
                "the package index cannot be reached; connect to the network, or unpack the"
                f" wheel's include and lib into {cache() / release}"
            )
        raise ReleaseError(
            f"cannot fetch CUDA runtime {release} (wheel {name}=={release}):"
            f" {why.removeprefix('ERROR: ')}"
        )
    return wheels[0]


def _verify(wheel: Path, hashes: Mapping[str, str]) -> None:
    """Refuse a wheel that is not the one which the registry knows by its name.

    Raises
    ------
    ReleaseError
        Names the wheel and both hashes.
    """
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    wanted = hashes.get(wheel.name)
    if wanted is None:
        print(
            f"kvsig: [sha256] of the registry does not know {wheel.name}; it is {found}",
            file=sys.stderr,
        )
    elif found != wanted:
        raise ReleaseError(
            f"{wheel.name} was refused: its SHA-256 is {found}, and [sha256] of the registry says"
            f" {wanted}; the package index gave another file than the one that was checked"
        )


def _unpack(wheel: Path, target: Path) -> None:
    """Unpack ``nvidia/*/include`` and ``nvidia/*/lib`` of a wheel, without the two levels."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            parts = PurePosixPath(member.filename).parts
            if member.is_dir() or len(parts) < 4 or parts[0] != "nvidia" or ".." in parts:
                continue
            if parts[2] not in ("include", "lib"):
                continue
            path = target.joinpath(*parts[2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(member))


def _fetch(name: str, release: str, folder: str, wanted: str) -> Path:
    """Folder of a wheel in the cache, fetched if it is not there."""
    target = cache() / folder
    if not (target / wanted).exists():
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder}-", dir=cache()) as temp:
            unpacked = Path(temp) / "unpacked"
            wheel = _download(name, release, Path(temp))
            _verify(wheel, registry.load().sha256)
            _unpack(wheel, unpacked)
            if not (unpacked / wanted).exists():
                raise ReleaseError(f"the wheel {name}=={release} has no {wanted}")
            try:
                # One step, so that nobody sees half a release.
                unpacked.rename(target)
            except OSError as error:
                if not (target / wanted).exists():
                    raise ReleaseError(
                        f"{target} is there but has no {wanted}; delete it and run again"
                    ) from error
    return target


def fetch(release: str) -> Path:
    """Folder of one release, fetched if it is not in the cache.

    Returns
    -------
    Path
        A folder with ``include`` and ``lib``.

    Raises
    ------
    ReleaseError
        If it cannot be fetched; names the release.
    """
    return _fetch(package(release), release, release, "include/cuda_runtime_api.h")


def ensure(releases: Iterable[str], done: Callable[[str], object] | None = None) -> dict[str, Path]:
    """Fetch releases that are not in the cache, several at a time.

    Parameters
    ----------
    releases : iterable of str
        Such as ``["12.9.79", "13.0.96"]``.
    done : callable, optional
        Called with each release when it is there.

    Returns
    -------
    dict
        Folder of each release.

    Raises
    ------
    ReleaseError
        If one cannot be fetched; names it.
    """

    def one(release: str) -> Path:
        folder = fetch(release)
        if done is not None:
            done(release)
        return folder

    wanted = list(dict.fromkeys(releases))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(wanted, pool.map(one, wanted), strict=True))


def include(release: str) -> Path:
    """Folder of a release's headers, fetched if need be."""
    return fetch(release) / "include"


def library(release: str) -> Path:
    """Path of a release's ``libcudart.so``, fetched if need be."""
    found = sorted((fetch(release) / "lib").glob("libcudart.so*"))
    if not found:
        raise ReleaseError(f"{cache() / release} has no lib/libcudart.so; delete it and run again")
    return found[0]


def crt() -> Path:
    """Folder that holds ``crt/host_defines.h``, which the runtime's wheels do not."""
    return _fetch("nvidia-cuda-crt", CRT, f"crt-{CRT}", "include/crt/host_defines.h") / "include"
