"""A libcudart that times its own calls, for what a library does beyond them.

Built from the registry for one version of CUDA: every function of libcudart is exported by its
prototype there and passes its arguments on to the real one. Those that copy add up the time until
it is back; what other functions take counts for whoever calls them. kvsig binds to it as to any
libcudart, by its path; torch keeps the real one.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

from baseline import compiler

from kvsig import codegen, registry

HEAD = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
"""
CLOCK = """
int64_t timed_ns, timed_calls;

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void *look(const char *symbol)
{
    static void *library;
    if (!library && !(library = dlopen(REAL, RTLD_NOW | RTLD_LOCAL))) {
        fprintf(stderr, "%s\\n", dlerror());
        abort();
    }
    void *address = dlsym(library, symbol);
    if (!address) {
        fprintf(stderr, REAL " has no %s\\n", symbol);
        abort();
    }
    return address;
}
"""


def text(version: int, real: str) -> Iterator[str]:
    """C text of the library; of one thread at a time."""
    table = registry.load()
    yield HEAD
    yield from codegen._write_c_types(table)
    yield f'#define REAL "{real}"'
    yield CLOCK
    for function in table.functions.values():
        variant = function.select(version)
        if function.library != "cudart" or variant is None:
            continue
        names = ", ".join(param.name for param in variant.params)
        yield function.prototype(variant, variant.symbol)
        yield "{"
        yield f"    static __typeof__(&{variant.symbol}) real;"
        yield f'    if (!real) real = (__typeof__(real))look("{variant.symbol}");'
        if "Memcpy" not in function.name:
            yield f"    return real({names});"
            yield "}"
            continue
        yield "    int64_t begin = now();"
        yield f"    {function.returns} result = real({names});"
        yield "    timed_ns += now() - begin;"
        yield "    timed_calls++;"
        yield "    return result;"
        yield "}"


class Timed:
    """The library of one version around a real one, and its two sums.

    Parameters
    ----------
    folder : Path
        Where to build it; it must outlive the process's use of it.
    version : int
        The real library's, as CUDA counts.
    real : str
        Path of the real library.
    """

    def __init__(self, folder: Path, version: int, real: str) -> None:
        source = folder / "timed.c"
        source.write_text("\n".join(text(version, real)) + "\n", encoding="utf-8")
        self.path = folder / "libtimed.so"
        flags = ["-std=gnu11", "-O2", "-Wall", "-shared", "-fPIC"]
        subprocess.run([*compiler(), *flags, source, "-o", self.path, "-ldl"], check=True)
        library = ctypes.CDLL(str(self.path))
        self._ns = ctypes.c_int64.in_dll(library, "timed_ns")
        self._calls = ctypes.c_int64.in_dll(library, "timed_calls")

    @property
    def us(self) -> float:
        """Microseconds that calls have taken so far."""
        return self._ns.value / 1e3

    @property
    def calls(self) -> int:
        """Calls so far."""
        return self._calls.value
