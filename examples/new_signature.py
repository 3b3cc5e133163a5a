"""An invented CUDA release: one entry in the registry, a rebuild, and pages move by it.

A copy of the checkout gets it, and nothing else of the copy is touched. The release is the next
major version after the newest that the registry knows; in it the batch function has its parameters
in another order.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent

ENTRY = """
[[function.cudaMemcpyBatchAsync.variant]]
since = "{major}.0"
before = "{next}.0"
reason = "invented: the stream comes first, and there is a number of retries"
params = [
    "cudaStream_t stream",
    "void *const *dsts",
    "const void *const *srcs",
    "const size_t *sizes",
    "size_t count",
    {{ declaration = "unsigned int retries", value = 3 }},
    "struct cudaMemcpyAttributes *attrs",
    "size_t *attrsIdxs",
    "size_t numAttrs",
]

"""


def run(copy, *command, **variables):
    environment = os.environ | variables
    done = subprocess.run(
        [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def main():
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "kvsig"
        for name in ("kvsig", "csrc"):
            skip = shutil.ignore_patterns("*.so", "*.c.*", "__pycache__", "_emulated")
            shutil.copytree(CHECKOUT / name, copy / name, ignore=skip)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
            shutil.copy(CHECKOUT / name, copy / name)

        # The entry goes behind the last variant, which says already where it ends.
        registry = copy / "kvsig" / "signatures.toml"
        text = registry.read_text()
        begin = text.index("[function.cudaMemcpyBatchAsync]")
        end = re.compile(r"^\[function\.", re.MULTILINE).search(text, begin + 1).start()
        major = int(re.findall(r'^before = "(\d+)\.0"', text[begin:end], re.MULTILINE)[-1])
        entry = ENTRY.format(major=major, next=major + 1)
        registry.write_text(text[:end] + entry.lstrip() + text[end:])

        run(copy, "setup.py", "-q", "build_ext", "--inplace")
        emulated = f"emulated:{major}.0"
        info = run(copy, "-m", "kvsig", "info", KVSIG_CUDART=emulated)
        print(*(line for line in info.splitlines() if "BatchAsync" in line), sep="\n")
        quickstart = CHECKOUT / "examples" / "quickstart.py"
        variables = {"KVSIG_CUDART": emulated, "CUDA_VISIBLE_DEVICES": ""}
        print(run(copy, "-c", quickstart.read_text(), **variables), end="")


if __name__ == "__main__":
    main()
