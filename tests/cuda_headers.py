"""Headers for tests: real CUDA releases, kept in the user's cache, and small ones of our own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from kvsig import registry
from kvsig.check import headers, releases
from kvsig.cli import check as command

REGISTRY = registry.load()


def header(release: str) -> headers.Header:
    """Headers of a release; skips where they are not in the cache and cannot be fetched."""
    try:
        return headers.read(releases.include(release), REGISTRY, [releases.crt()])
    except releases.ReleaseError as error:
        if "package index cannot be reached" not in str(error):
            raise
        pytest.skip(str(error))


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="kvsig")
    command.register(parser.add_subparsers(dest="command"))
    args = parser.parse_args(["check", *arguments])
    code: int = args.run(args)
    return code


def expected(table: registry.Registry, release: str) -> list[headers.Result]:
    """What the check of a release finds if everything agrees, without its headers.

    Aliases are left out: whether a header knows a name of a type is not in the registry.
    """
    version = registry.parse_version(release.rpartition(".")[0])
    results = []
    apart = {library.name for library in table.libraries.values() if library.optional}
    for function in table.functions.values():
        variant = function.select(version)
        status = "agrees" if variant else "absent"
        if (
            variant
            and variant.pinned
            and not (variant.pinned <= version < registry.next_major(variant.pinned))
        ):
            status = "pinned"
        since: int | None = variant.since if variant else None
        if function.library in apart:
            status, since = "unchecked", None
        results.append(
            headers.Result("function", function.name, function.library, version, status, since)
        )
    types: list[registry.Struct | registry.Enum]
    types = [*table.structs.values(), *table.enums.values()]
    for item in types:
        kind = "struct" if item.name in table.structs else "enum"
        status, since = "agrees" if item.since <= version else "absent", item.since
        if item.library in apart:
            status, since = "unchecked", None
        results.append(headers.Result(kind, item.name, item.library, version, status, since))
    return results


SMALL = """
[library.cudart]
header = "cuda_runtime_api.h"
soname = "libcudart.so"
version = "cudaRuntimeGetVersion"

[library.cuda]
header = "cuda.h"
soname = "libcuda.so.1"
version = "cuDriverGetVersion"
lookup = "cuGetProcAddress"

[alias]
cudaStream_t = "void *"
handle_t = "unsigned long"

[enum.Color]
library = "cudart"

[enum.Color.constants]
RED = 1
GREEN = 2

[enum.Late]
library = "cudart"
since = "13.0"

[enum.Late.constants]
LATE = 7

[struct.Pair]
library = "cudart"
size = 16
fields = ["int first", "void *second"]

[struct.Nested]
library = "cudart"
size = 24
typedef = true
fields = ["struct Pair pair", { declaration = "int id", member = "u.id" }, "char tail[4]"]

[struct.Grown]
library = "cudart"
size = 24
grows = "releases append to it"
fields = ["void *base", "long room[2]"]

[struct.Hidden]
library = "cudart"
since = "12.8"

[function.cudaRuntimeGetVersion]
library = "cudart"
returns = "int"
summary = "Version"
page = "https://example.com/"

[[function.cudaRuntimeGetVersion.variant]]
since = "11.0"
open = "always the same"
reason = "first"
params = ["int *runtimeVersion"]

[function.cudaBatch]
library = "cudart"
returns = "int"
summary = "Batch"
page = "https://example.com/"

[[function.cudaBatch.variant]]
since = "12.8"
before = "13.0"
reason = "first"
params = ["void **dsts", "size_t count", "enum Color color", "struct Pair pair", "cudaStream_t s"]

[[function.cudaBatch.variant]]
since = "13.0"
before = "14.0"
symbol = "cudaBatch_v2"
reason = "const"
params = ["void *const *dsts", "size_t count", "cudaStream_t s"]

[function.cudaNothing]
library = "cudart"
returns = "const char *"
summary = "Nothing"
page = "https://example.com/"

[[function.cudaNothing.variant]]
since = "13.0"
before = "14.0"
reason = "first"
params = []

[function.cuDriverGetVersion]
library = "cuda"
returns = "int"
summary = "Version"
page = "https://example.com/"

[[function.cuDriverGetVersion.variant]]
since = "11.0"
open = "always the same"
reason = "first"
params = ["int *driverVersion"]

[function.cuGetProcAddress]
library = "cuda"
returns = "int"
summary = "Address"
page = "https://example.com/"

[[function.cuGetProcAddress.variant]]
since = "11.0"
open = "always the same"
reason = "first"
params = ["const char *symbol"]

[function.cuBatch]
library = "cuda"
returns = "int"
summary = "Batch of the driver"
page = "https://example.com/"

[[function.cuBatch.variant]]
since = "12.8"
open = "pinned"
pinned = "12.8"
reason = "first"
params = ["size_t count"]
"""

RUNTIME = """
#include "crt/host_defines.h"
#include <stddef.h>
#define CUDART_VERSION 12080
typedef struct stream_st *cudaStream_t;
typedef unsigned long handle_t;
enum Color { RED = 1, GREEN = RED + 1, BLUE };
struct __attribute__((aligned(8))) Pair { int first; void *second; };
typedef struct nested_st {
    struct Pair pair;
    union { int id; float x; } u;
    char tail[4];
} Nested_v1;
typedef Nested_v1 Nested;
struct Grown { void *base; };
struct Hidden;
struct Hidden { int x; };
extern __host__ int cudaRuntimeGetVersion(int *runtimeVersion);
/* int cudaBatch(int wrong); */
extern __host__ int cudaBatch(void **dsts, size_t count, enum Color color,
                              struct Pair pair, cudaStream_t s);
static inline int helper(int x) { return x; }
"""

DRIVER = """
#define CUDA_VERSION 12080
int cuDriverGetVersion(int *driverVersion);
int cuGetProcAddress(const char *symbol);
int cuBatch(size_t count);
"""

Checker = Callable[..., dict[str, headers.Result]]


def small_headers(tmp_path: Path) -> Checker:
    """``small(old, new, ...)`` checks small headers after replacing text in them."""

    def checked(*changes: str, driver: bool = True) -> dict[str, headers.Result]:
        runtime, other = RUNTIME, DRIVER
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in runtime + other
            runtime, other = runtime.replace(old, new), other.replace(old, new)
        (tmp_path / "crt").mkdir(exist_ok=True)
        (tmp_path / "crt/host_defines.h").write_text("#define __host__\n")
        (tmp_path / "cuda_runtime_api.h").write_text(runtime)
        if driver:
            (tmp_path / "cuda.h").write_text(other)
        table = registry.parse(SMALL)
        found = headers.check(table, headers.read(tmp_path, table, fresh=True))
        return {r.name: r for r in found}

    return checked
