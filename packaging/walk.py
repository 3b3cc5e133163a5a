"""A newcomer's walk: what README.md says, in a fresh clone and fresh environments, timed.

    python packaging/walk.py               clone the last commit, and walk
    python packaging/walk.py --no-tests    without `make test`, which takes most of the time

Each step is a command that a person would type. The first that fails ends the walk. The table at
the end is Markdown.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = os.environ.get("TORCH", "torch==2.13.0")

#: Pages of K and V of 8 heads, and of one latent without heads, there and back again.
TRANSFER = """
import torch, kvsig
device, stream = kvsig.emulated.start()
for name, width, planes in (("MHA", (8, 128), "kv"), ("MLA", (576,), "k")):
    layers = [[torch.randn(64 * 16, *width, device=device) for _ in range(4)] for _ in planes]
    pools = [torch.zeros(32, 4, 16, *width) for _ in planes]
    if device.type == "cuda":
        pools = [pool.pin_memory() for pool in pools]
    both = len(planes) == 2
    cache = kvsig.PagedKVCache(
        device=tuple(layers) if both else layers[0],
        host=tuple(pools) if both else pools[0],
        layout="page_first_direct",
        page_size=16,
    )
    before = [[layer.to("cpu", copy=True) for layer in plane] for plane in layers]
    print(name, cache.offload([5, 9, 60], [1, 30, 2], stream=stream))
    print(name, cache.load([30], [0], stream=stream))
    stream.synchronize()
    for plane, old in zip(layers, before, strict=True):
        for layer, was in zip(plane, old, strict=True):
            assert torch.equal(layer[:16].cpu(), was[9 * 16 : 10 * 16])
print("both are right")
"""


class Walk:
    """Steps that were made, and how long each took."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, str, float]] = []

    def step(self, title: str, *command: str | Path, cwd: Path, shown: str = "") -> None:
        """Make a step; end the walk where it fails."""
        words = [str(word) for word in command]
        shown = shown or " ".join(words)
        print(f"\n== {title}: {shown}", flush=True)
        mine = ("PYTHONPATH", "VIRTUAL_ENV", "KVSIG_CUDART", "KVSIG_ROUTE")
        clean = {k: v for k, v in os.environ.items() if k not in mine}
        begin = time.monotonic()
        code = subprocess.run(words, cwd=cwd, env=clean, check=False).returncode
        self.steps.append((title, shown, time.monotonic() - begin))
        if code:
            sys.exit(f"the walk ends here: {shown} ended with {code}")

    def table(self) -> str:
        """Return the steps as a table."""
        rows = [f"| {title} | `{shown}` | {took:.0f} s |" for title, shown, took in self.steps]
        return "\n".join(["| step | command | time |", "|---|---|---|", *rows])


def walk(place: Path, tests: bool) -> str:
    """Walk from a clone to a signature of one's own."""
    way = Walk()
    tree = place / "kvsig"
    way.step("clone", "git", "clone", "--quiet", ROOT, tree, cwd=place, shown="git clone")
    way.step("first command", "make", "demo", cwd=tree)
    if tests:
        way.step("second command", "make", "test", cwd=tree)
    own = tree / ".venv" / "bin"
    quick = ["python", "examples/quickstart.py"]
    for line in (["kvsig", "info"], quick, ["kvsig", "demo", "--help"]):
        shown = " ".join([".venv/bin/" + line[0], *line[1:]])
        way.step("line of make demo", own / line[0], *line[1:], cwd=tree, shown=shown)

    venv, outside = place / "venv", place / "outside"
    outside.mkdir()
    python = venv / "bin" / "python"
    new = f"{sys.executable} -m venv {venv} && {python} -m pip install -q {TORCH} {tree}"
    way.step("install", "bash", "-c", new, cwd=outside, shown="pip install . (a new environment)")
    readme = (tree / "README.md").read_text()
    (quickstart,) = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)[:1]
    way.step("quickstart", python, "-c", quickstart, cwd=outside, shown="the script of README.md")
    for words in (["demo"], ["info"], ["bench", "--quick"]):
        shown = " ".join(["kvsig", *words])
        way.step(words[0], venv / "bin" / "kvsig", *words, cwd=outside, shown=shown)
    way.step("own transfer", python, "-c", TRANSFER, cwd=outside, shown="MHA and MLA")
    way.step(
        "add a signature", own / "python", "examples/new_signature.py", cwd=tree,
        shown="examples/new_signature.py",
    )  # fmt: skip
    return way.table()


def main() -> None:
    """Walk in a folder that is removed afterwards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--no-tests", action="store_true", help="leave out make test")
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="kvsig-walk-"))
    try:
        table = walk(place, not arguments.no_tests)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f"\n{table}")


if __name__ == "__main__":
    main()
