"""Small libraries under the names of CUDA's, for what no real one does."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

CUDART = """
int cudaRuntimeGetVersion(int *version) { *version = 12090; return 0; }
int cudaMemcpyAsync(void *d, const void *s, unsigned long n, int kind, void *stream) { return 35; }
"""
DRIVER = "int cuDriverGetVersion(int *version) { *version = 13000; return 0; }\n"
STUB = "int cuDriverGetVersion(int *version) { return 34; }\n"
# A wrapper that passes on what it knows, and the lookup does not know the batch function.
WRAPPER = (
    DRIVER
    + """
int cuGetProcAddress_v2(const char *s, void **f, int v, unsigned long long g, int *status)
{ *f = 0; *status = 1; return 500; }
int cuGetProcAddress(const char *s, void **f, int v, unsigned long long g)
{ *f = 0; return 500; }
"""
)
NOTHING = "int kvsig_nothing;\n"


def library(path: Path, source: str, *flags: str) -> str:
    """Compile a shared library; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.with_suffix(".c")
    text.write_text(source)
    command = [
        *shlex.split(os.environ.get("CC", "cc")), "-shared", "-fPIC", "-w", "-o", str(path),
        str(text), f"-Wl,-soname,{path.name}", *flags,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return str(path)
