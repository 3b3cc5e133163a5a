"""Everything that needs a GPU, in one command, each part with a time limit.

    python3 benchmarks/gpu_run.py OUTDIR [SECTIONS] [--cudart FOLDER] [--commit HASH]

Needs only Python with torch and Cython, and a C compiler; standard library otherwise, so that
a section that fails, or runs out of its time, loses no other. Results are a few JSON files and
one log in OUTDIR; the table of sections comes last.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"

#: Section -> seconds that it may take.
SECTIONS = {
    "build": 150,
    "machine": 40,
    "tests": 240,
    "demo": 60,
    "matrix": 240,
    "batch_vs_c": 90,
    "explore": 150,
    "threads": 140,
    "pace": 60,
    "looks": 60,
    "calibrate": 45,
    "quick": 90,
    "grid": 400,
    "targets": 415,
    "compute": 63,
    "nullstream": 60,
    "host": 40,
}
DEFAULT = ("build", "machine", "demo", "tests", "matrix", "batch_vs_c")

MACHINE = """
import importlib.metadata as m, platform, sys, torch
print(sys.version.split()[0], platform.machine(), 'torch', torch.__version__)
print(torch.cuda.get_device_name(), torch.cuda.mem_get_info())
for name in ('cython', 'numpy', 'pytest', 'matplotlib', 'cuda-bindings', 'cuda-core'):
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        print(name, 'is not installed')
"""


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        self.out = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.cudart = args.cudart
        self.model = args.model
        self.budget = args.seconds
        self.begin = time.monotonic()
        self.scale = args.scale
        self.log_path = self.out / "run.log"
        self.log = self.log_path.open("a", encoding="utf-8", buffering=1)
        self.path = self.out / "run.json"
        self.data: dict[str, Any] = {}
        if self.path.exists():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))
        self.data.setdefault("kind", "run")
        self.data["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.data["commit"] = args.commit
        self.data.setdefault("sections", {})
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "PYTHONUNBUFFERED": "1",
        }
        if args.commit:
            self.environment["KVSIG_COMMIT"] = args.commit

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.begin)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")

    def write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def run(
        self, command: list[str], seconds: float, echo: int = 40, **environment: str
    ) -> tuple[int, str]:
        """Run a command with all that it starts; its output into the log, the end of it here."""
        seconds = max(5.0, min(seconds, self.left()))
        # The command writes into the log itself: what it has said is kept whatever happens.
        self.log.write(f"\n$ {' '.join(command)}\n")
        self.log.flush()
        start = self.log_path.stat().st_size
        begin = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment | environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = 124
        took = time.monotonic() - begin
        with self.log_path.open("rb") as file:
            file.seek(start)
            text = file.read().decode("utf-8", "replace")
        lines = text.rstrip().splitlines()
        if echo and len(lines) > echo:
            print(f"  ... {len(lines) - echo} lines are in run.log")
        for line in lines[-echo:] if echo else []:
            print("  " + line, flush=True)
        self.say(f"  exit code {code} after {took:.1f} s")
        return code, text

    def python(
        self, arguments: list[str], seconds: float, echo: int = 40, **environment: str
    ) -> tuple[int, str]:
        return self.run([sys.executable, *arguments], seconds, echo, **environment)

    def section(self, name: str) -> None:
        limit = SECTIONS[name] * self.scale
        if self.left() < 5:
            self.data["sections"][name] = {"result": "no time left"}
            self.write()
            return
        self.say(f"\n=== {name} (at {time.monotonic() - self.begin:.0f} s, may take {limit:.0f} s)")
        begin = time.monotonic()
        try:
            code = getattr(self, name)(min(limit, self.left()))
            result = {"result": "ok" if code == 0 else f"exit code {code}"}
        except Exception as error:
            result = {"result": f"{type(error).__name__}: {error}"}
            self.say(f"  {result['result']}")
        self.data["sections"][name] = result | {"seconds": round(time.monotonic() - begin, 1)}
        self.write()

    # The sections.

    def build(self, seconds: float) -> int:
        return self.python(["setup.py", "-q", "build_ext", "--inplace", "-j4"], seconds, echo=6)[0]

    def machine(self, seconds: float) -> int:
        code, text = self.python(["-c", MACHINE], seconds)
        self.data["machine"] = text.splitlines()
        self.python(["-m", "kvsig", "info"], seconds, echo=60)
        self.data["cpus"] = self.python([str(HERE / "cpus.py")], seconds)[1].splitlines()
        return code

    def tests(self, seconds: float) -> int:
        command = ["-m", "pytest", "-m", "gpu", "-q", "--durations=5", "-p", "no:cacheprovider"]
        code, text = self.python([*command, "tests"], seconds, echo=30)
        self.data["tests"] = text.splitlines()[-40:]
        return code

    def demo_of(
        self, library: Path | None, seconds: float, *options: str, route: str = "auto"
    ) -> dict[str, Any]:
        """Run the main job, 1 GiB and more, with one libcudart."""
        environment = {"KVSIG_ROUTE": route}
        if library:
            environment["KVSIG_CUDART"] = str(library)
        command = ["-m", "kvsig", "demo", "--json", "--model", self.model, *options]
        code, text = self.python(command, seconds, echo=0, **environment)
        found: dict[str, Any] = {"exit_code": code}
        start = text.find("{\n")
        try:
            found |= json.loads(text[start : text.rindex("\n}") + 2])
        except ValueError:
            found["output"] = text[-2000:]
            return found
        for run in found["runs"]:
            for key in ("library", "spec"):
                if run.get(key):
                    # Folders are this machine's own affair.
                    run[key] = "/".join(Path(run[key]).parts[-2:])
            run.pop("found", None)
            said = [f"{run['library']}: runtime {run['runtime_version']}, {run['variant']}"]
            for way in ("offload", "load"):
                part = run[way]
                said.append(
                    f"{way} {part['path']} {part['bytes'] / 2**30:.2f} GiB "
                    f"{part.get('gb_per_s')} GB/s"
                    + (f" ({part['reason']})" if part.get("reason") else "")
                )
            said.append("bit-exact" if run["bit_exact"] else "WRONG BYTES")
            self.say("  " + "; ".join(said))
        return found

    def demo(self, seconds: float) -> int:
        self.data["demo"] = self.demo_of(None, seconds)
        if "output" in self.data["demo"]:
            self.say(self.data["demo"]["output"])
        return int(self.data["demo"]["exit_code"])

    def matrix(self, seconds: float) -> int:
        """The main job with every libcudart in the folder, each in a process of its own."""
        if self.cudart is None:
            raise ValueError("give --cudart FOLDER with libcudart-VERSION/libcudart.so.*")
        libraries = {}
        for folder in sorted(self.cudart.iterdir()):
            files = sorted(folder.rglob("libcudart.so*"), key=lambda path: len(path.name))
            if files:
                # The longest name is that of the file; the others are links to it.
                libraries[folder.name] = files[-1].resolve()
        if not libraries:
            raise ValueError(f"{self.cudart} holds no */libcudart.so*")
        deadline = time.monotonic() + seconds
        worst = 0
        self.data["matrix"] = {}
        for done, (name, path) in enumerate(libraries.items()):
            share = max((deadline - time.monotonic()) / (len(libraries) - done), 20)
            size = ("--tokens", "8192")
            results = {name: self.demo_of(path, share, *size, "--path", "batch")}
            if name < "libcudart-12.8":
                # The batch came from the driver; without it there are page copies.
                results[f"{name}, KVSIG_ROUTE=runtime"] = self.demo_of(
                    path, share, *size, "--path", "auto", route="runtime"
                )
            self.data["matrix"] |= results
            self.write()
            for label, result in results.items():
                if result["exit_code"] != 0:
                    worst = int(result["exit_code"])
                    self.say(f"  {label}: exit code {worst}\n{result.get('output', '')}")
        return worst

    def script(self, name: str, seconds: float, echo: int) -> int:
        arguments = [str(HERE / f"{name}.py"), "--json", str(self.out / f"{name}.json")]
        # The start of Python, memory and the C compiler come on top.
        arguments += ["--seconds", str(max(10, int(seconds - 25)))]
        return self.python(arguments, seconds, echo)[0]

    def batch_vs_c(self, seconds: float) -> int:
        return self.script("batch_vs_c", seconds, 90)

    def explore(self, seconds: float) -> int:
        return self.script("explore", seconds, 110)

    def threads(self, seconds: float) -> int:
        return self.script("threads", seconds, 30)

    def pace(self, seconds: float) -> int:
        return self.script("pace", seconds, 45)

    def looks(self, seconds: float) -> int:
        return self.script("looks", seconds, 70)

    def calibrate(self, seconds: float) -> int:
        command = ["-m", "kvsig", "calibrate", "--json", str(self.out / "calibrate.json")]
        return self.python(command, seconds, 30)[0]

    def bench(self, seconds: float, *arguments: str, name: str = "bench", echo: int = 60) -> int:
        command = ["-m", "kvsig", "bench", "--json", str(self.out / f"{name}.json"), *arguments]
        command += ["--seconds", str(max(10, int(seconds - 25)))]
        return self.python(command, seconds, echo)[0]

    def quick(self, seconds: float) -> int:
        return self.bench(seconds, "--quick", name="quick", echo=90)

    def grid(self, seconds: float) -> int:
        return self.bench(seconds, echo=140)

    def targets(self, seconds: float) -> int:
        """Only what the requirements name, without the rivals that take long."""
        cells = "sizes,layers,orders,layer-first,both,pages,models,spacing,stream,million"
        methods = "auto,batch,strided,loop,one-call,one-copy"
        return self.bench(
            seconds, "--section", cells, "--method", methods, "--runs", "9",
            name="targets", echo=120,
        )  # fmt: skip

    def compute(self, seconds: float) -> int:
        return self.bench(seconds, "--compute", name="compute")

    def nullstream(self, seconds: float) -> int:
        return self.bench(
            seconds, "--section", "stream", "--method", "auto,one-copy", name="nullstream"
        )

    def host(self, seconds: float) -> int:
        return self.bench(seconds, "--host", name="host")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("sections", nargs="?", default=",".join(DEFAULT))
    parser.add_argument("--cudart", type=Path, help="folder of libcudart-VERSION folders")
    parser.add_argument("--commit", default=os.environ.get("KVSIG_COMMIT"))
    parser.add_argument("--model", default="llama3-8b", help="of the demo")
    parser.add_argument("--seconds", type=float, default=570, help="for everything")
    parser.add_argument("--scale", type=float, default=1, help="stretches every section's time")
    args = parser.parse_args()
    names = [name.strip() for name in args.sections.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are: {', '.join(SECTIONS)}")
    if args.commit and not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", args.commit):
        parser.error(f"--commit {args.commit!r} is no commit")
    run = Run(args)
    for name in names:
        run.section(name)
    run.say("")
    failed = 0
    for name in names:
        row = run.data["sections"][name]
        failed += row["result"] != "ok"
        run.say(f"{name:<12} {row.get('seconds', 0):>7.1f} s  {row['result']}")
    run.say(f"{time.monotonic() - run.begin:.0f} s in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
