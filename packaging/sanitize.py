"""The core and the emulated runtime under AddressSanitizer and UBSan: ``make sanitize``.

A copy of the tree is built with the sanitizers in ``build/sanitize``, the tests of the compiled
parts run there with the sanitizer's library loaded first, and a short run of the fuzz targets
looks for leaks. A report of a sanitizer ends a process, so that its test fails.

Leaks count where kvsig's own compiled code asked for the memory. CPython, NumPy and torch keep
memory until the process ends, by design (interned strings, type objects, thread pools), and are
no business of kvsig's: their reports are counted and left out.

``--quick``, which CI runs, leaves out tests that start processes of their own.

``--thread`` builds the emulated runtime alone with ThreadSanitizer, and runs
``tests/emulated/threads.c`` on it, which needs no Python.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/sanitize"
PARTS = ("kvsig", "csrc", "tests", "benchmarks", "docs", "examples", "packaging")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md",
         "CONTRIBUTING.md", "Makefile")  # fmt: skip
FLAGS = (
    "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
    " -fno-omit-frame-pointer -g -O1"
)
#: The folders whose tests run compiled code: two halves, for two processors.
HALVES = (
    ("tests/cache", "tests/kernel"),
    ("tests/planning", "tests/call", "tests/core", "tests/emulated"),
)
#: What ``--quick`` leaves out: each of these tests starts processes of its own or compiles a
#: library, which takes ten times as long as what it runs of kvsig.
SLOW = (
    "tests/core/test_states.py", "tests/core/test_fallbacks.py", "tests/core/test_fork.py",
    "tests/core/test_driver_only.py", "tests/core/test_skew.py",
    "tests/emulated/test_emulated_libraries.py", "tests/emulated/test_emulated_process.py",
    "tests/emulated/test_start.py",
)  # fmt: skip
#: What is left out in any case, and why.
LEFT_OUT = (
    # Time limits and shares of time, which the sanitizers change.
    "thirty_nanoseconds or many_copies_are_cheap or delay_keeps_the_caller"
    # Interpreters and compilers of their own, loaded without or with another malloc: the
    # subject is which library is found, and no code of kvsig's that handles memory.
    " or two_runtimes or test_libraries or real_libraries or test_finding"
)
OURS = re.compile(r"#[0-2] .*(kvsig/\w+(/\w+)?\.cpython|libcudart-emulated)")


def compiler() -> list[str]:
    """The C compiler."""
    return shlex.split(os.environ.get("CC", "gcc"))


def library(name: str) -> str:
    """Path of a sanitizer's library, as the compiler knows it."""
    out = subprocess.run(
        [*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    path = out.stdout.strip()
    if not os.path.isabs(path):
        sys.exit(f"{name} is not there: install the compiler's sanitizers (gcc has them on Debian)")
    return os.path.realpath(path)


def copy_tree(folder: Path) -> None:
    """Copy what the build and the tests need; what was built there stays, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    built = ("*.so", "__pycache__", "_emulated", "generated")
    for part in PARTS:
        for old in (folder / part).rglob("*.py*"):
            if not (ROOT / old.relative_to(folder)).exists() and "__pycache__" not in old.parts:
                old.unlink()
        if (ROOT / part).exists():
            # The C text of the build in place is another one.
            ignore = shutil.ignore_patterns(*built, *(["*.c"] if part == "kvsig" else []))
            shutil.copytree(ROOT / part, folder / part, ignore=ignore, dirs_exist_ok=True)
    for file in FILES:
        shutil.copy2(ROOT / file, folder / file)


def run(*commands: list[str], **variables: str) -> int:
    """Run commands in the copy, side by side, and say how long they took."""
    begin, used = time.monotonic(), sum(os.times()[2:4])
    env = {**os.environ, "PYTHONPATH": str(BUILD), **variables}
    running = [subprocess.Popen(command, cwd=BUILD, env=env) for command in commands]
    codes = [process.wait() for process in running]
    took, used = time.monotonic() - begin, sum(os.times()[2:4]) - used
    for code, command in zip(codes, commands, strict=True):
        print(f"sanitize: status {code}: {shlex.join(command)}")
    print(f"sanitize: {took:.0f} s, {used:.0f} s of processor time", flush=True)
    return next(filter(None, codes), 0)


def environment(leaks: bool) -> dict[str, str]:
    """Variables of a process under the sanitizers."""
    options = "abort_on_error=1:detect_stack_use_after_return=0:allocator_may_return_null=1"
    return {
        "LD_PRELOAD": f"{library('libasan.so')}:{library('libubsan.so')}",
        "ASAN_OPTIONS": f"{options}:detect_leaks={int(leaks)}:log_path={BUILD}/asan",
        "LSAN_OPTIONS": "exitcode=0:max_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "KVSIG_EMULATED_CFLAGS": FLAGS,
        "PYTHONMALLOC": "malloc",
    }


def leaks() -> list[str]:
    """Reports of leaks that kvsig's compiled code made."""
    found, others = [], 0
    for log in BUILD.glob("asan.*"):
        for report in log.read_text(errors="replace").split("\n\n"):
            if "leak of" in report:
                if OURS.search(report):
                    found.append(report)
                else:
                    others += 1
    print(f"sanitize: leaks of kvsig's code: {len(found)}; of CPython, NumPy and torch: {others}")
    return found


def address(seconds: float, quick: bool, pytest: list[str]) -> int:
    """Build, test and fuzz under AddressSanitizer and UBSan."""
    copy_tree(BUILD)
    # Leaks of the compiler itself are no business of ours.
    build = {"CFLAGS": FLAGS, "LDFLAGS": FLAGS, "ASAN_OPTIONS": "detect_leaks=0"}
    make = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--parallel=2"]
    if code := run(make, **build):
        return code
    for log in BUILD.glob("asan.*"):
        log.unlink()
    test = [sys.executable, "-m", "pytest"]
    usual = ["-q", "-x", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})"]
    usual += [f"--ignore={file}" for file in SLOW] if quick else []
    tests = [pytest] if pytest else [[*usual, *half] for half in HALVES]
    code = run(*([*test, *arguments] for arguments in tests), **environment(leaks=False))
    fuzz = ["tests/fuzz/fuzz_run.py", "--seconds", str(seconds)]
    code = run([sys.executable, *fuzz], **environment(leaks=True)) or code
    for report in leaks():
        print(report)
        code = 1
    for log in BUILD.glob("asan.*"):
        text = log.read_text(errors="replace")
        if "ERROR: AddressSanitizer" in text or "runtime error:" in text:
            print(text)
            code = 1
    return code


def thread(seconds: float) -> int:
    """Run many threads and streams on the emulated runtime under ThreadSanitizer."""
    sys.path.insert(0, str(ROOT))
    from kvsig import codegen, registry

    folder = BUILD / "thread"
    folder.mkdir(parents=True, exist_ok=True)
    table = registry.load()
    (folder / "glue.c").write_text(codegen.emulated_glue(table, 13000))
    sources = [str(path) for path in sorted((ROOT / "csrc/emulated").glob("*.c"))]
    program = folder / "threads"
    command = [
        *compiler(), "-std=gnu11", "-O1", "-g", "-fsanitize=thread", "-pthread",
        "-I", str(ROOT / "csrc/emulated"), *sources, str(folder / "glue.c"),
        str(ROOT / "tests/emulated/threads.c"), "-ldl", "-o", str(program),
    ]  # fmt: skip
    if code := run(command):
        return code
    return run([str(program), str(seconds)], TSAN_OPTIONS="halt_on_error=0:exitcode=66")


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--thread", action="store_true", help="ThreadSanitizer instead")
    parser.add_argument("--quick", action="store_true", help="without tests that start processes")
    parser.add_argument("--seconds", type=float, default=20, help="of fuzz, or of threads (20)")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, in place of the usual")
    args = parser.parse_args()
    return thread(args.seconds) if args.thread else address(args.seconds, args.quick, args.pytest)


if __name__ == "__main__":
    sys.exit(main())
