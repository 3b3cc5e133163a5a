"""Cross-builds the wheel for aarch64, and runs its tests under an emulator of that processor.

    python packaging/cross.py             build, repair and test
    python packaging/cross.py --no-tests
    python packaging/cross.py --tests tests/core tests/planning/test_plans.py

On Debian, by a Python of the version that Debian has (so that Cython and setuptools are its own):

    apt-get install gcc-aarch64-linux-gnu qemu-user-static
    cat /usr/lib/binfmt.d/qemu-aarch64.conf > /proc/sys/fs/binfmt_misc/register

The second line tells the kernel of the emulator (as root, once after a start, where that file
system is mounted), so that programs of aarch64 start like others, and tests can start processes.
Headers and interpreter of aarch64 come from Debian's packages, unpacked into build/cross; nothing
else of the machine is changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import wheels

TARGET, DEBIAN = "aarch64-linux-gnu", "arm64"
WORK = wheels.ROOT / "build" / "cross"
SYSTEM = WORK / "system"
PYTHON = f"python3.{sys.version_info.minor}"
#: What tests need beside the wheel. torch is left out: an emulated processor takes minutes for it.
NEEDS = ["numpy", "pytest>=8", "hypothesis>=6.100"]


def fetch_system() -> None:
    """Unpack the interpreter of aarch64, its headers and what they need into `SYSTEM`."""
    apt = WORK / "apt"
    for folder in (apt / "lists/partial", apt / "cache/archives/partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()  # of a machine that has nothing yet
    settings = {
        "APT::Architecture": DEBIAN,
        "APT::Architectures": DEBIAN,
        "APT::Sandbox::User": "root",
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    get = ["apt-get", "-qq", *options]
    wheels.run(*get, "update", quiet=True)
    names = [PYTHON, f"lib{PYTHON}-dev", "libstdc++6"]  # the last is NumPy's
    wheels.run(*get, "install", "--download-only", "--no-install-recommends", *names, quiet=True)
    shutil.rmtree(SYSTEM, ignore_errors=True)
    for name in ("bin", "sbin", "lib"):  # links to /usr, as a package of Debian's would make them
        (SYSTEM / "usr" / name).mkdir(parents=True)
        (SYSTEM / name).symlink_to(f"usr/{name}")
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        tar = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, check=True
        )
        unpack = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", SYSTEM]
        subprocess.run(unpack, input=tar.stdout, check=True)


def build() -> Path:
    """Build the wheel by the cross compiler, and give it its manylinux tag."""
    facts = WORK / "facts"  # what the target's interpreter says of itself
    facts.mkdir(exist_ok=True)
    name = f"_sysconfigdata__{TARGET}"
    shutil.copy(SYSTEM / "usr/lib" / PYTHON / f"{name}.py", facts)
    include = SYSTEM / "usr/include"
    compiler = f"{TARGET}-gcc"
    return wheels.build(
        Path(sys.executable),
        f"cp3{sys.version_info.minor}-{TARGET}",
        CC=compiler,
        LDSHARED=f"{compiler} -shared",
        CFLAGS=f"-I{include / PYTHON} -I{include}",
        PYTHONPATH=str(facts),
        _PYTHON_HOST_PLATFORM="linux-aarch64",
        _PYTHON_SYSCONFIGDATA_NAME=name,
    )


def test(wheel: Path, tests: list[str]) -> None:
    """Install the wheel into an empty environment of the target's interpreter, and run tests."""
    os.environ["QEMU_LD_PREFIX"] = str(SYSTEM)
    os.environ["CC"] = f"{TARGET}-gcc"
    folder = WORK / "empty"
    shutil.rmtree(folder, ignore_errors=True)
    wheels.run(SYSTEM / "usr/bin" / PYTHON, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    place = ["--target", folder / "lib" / PYTHON / "site-packages"]
    tags = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (34, 28, 27, 17)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", *tags, *place]
    wheels.run(*pip, *NEEDS)
    wheels.run(*pip, "--no-deps", wheel)
    outside = wheels.outside(WORK / "outside")
    wheels.run_tests(python, outside / "tests", outside, [outside / name for name in tests])


def main() -> None:
    """Build and test."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--no-tests", action="store_true", help="build and repair only")
    rooms = [f"tests/{room}" for room in wheels.WITHOUT_TORCH]
    parser.add_argument("--tests", nargs="+", default=rooms, help="files or folders of tests")
    arguments = parser.parse_args()
    shutil.rmtree(wheels.WORK / "sdist", ignore_errors=True)
    if not SYSTEM.exists():
        fetch_system()
    wheel = build()
    if not arguments.no_tests:
        test(wheel, arguments.tests)


if __name__ == "__main__":
    main()
