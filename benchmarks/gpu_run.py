"""Everything that is done on a GPU machine, in one command, each part with a time limit.

    python3 benchmarks/gpu_run.py OUT [PARTS] [--cudart FOLDER] [--against CHECKOUT]

Needs Python with torch and Cython, and a C compiler; standard library otherwise. A part that fails,
or runs out of its time, loses no other. OUT gets ``run.log``, with everything that was printed, and
``summary.json``: machine, commit, and of each part what tables and documentation need. Copy that
file to ``benchmarks/results/KIND_OF_GPU/`` to keep it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"
#: Of all JSON in a folder of results.
MOST_BYTES = 300_000

#: Part -> seconds that it may take, and what it does.
PARTS = {
    "build": (150, "the extensions, in place"),
    "machine": (40, "versions, and what kvsig is bound to"),
    "tests": (240, "pytest -m gpu"),
    "demo": (60, "the main job, 2 GiB, compared bit for bit"),
    "matrix": (240, "the main job with every libcudart of --cudart"),
    "quick": (70, "kvsig bench --quick"),
    "models": (130, "kvsig bench --section models"),
    "grid": (330, "kvsig bench: the whole preset"),
    "rivals": (120, "other projects' ways beside kvsig's"),
    "compute": (80, "a matrix product beside transfers"),
    "kernel": (270, "what the page-copy kernel is asked for"),
    "engines": (330, "kvsig's functions for SGLang and vLLM, and SGLang's where sgl_kernel is"),
    "twogpus": (150, "two processes, each with a GPU of its own"),
    "sanitizer": (300, "compute-sanitizer: memcheck and racecheck of the page-copy kernel"),
    "random": (300, "50,000 random transfers by the kernel's double, no GPU"),
    "overhead": (60, "kvsig's own time per call, with CUDA's functions stubbed"),
    "calibrate": (45, "kvsig calibrate --dry-run"),
    "against": (330, "another checkout and this one, in turn: give --against"),
}
BUILD = ("setup.py", "-q", "build_ext", "--inplace", "-j4")
DEFAULT = ("build", "machine", "tests", "quick", "models", "overhead")

MACHINE = """
import importlib.metadata as m, json, os, platform, sys, torch
versions = {}
for name in ('torch', 'cython', 'numpy', 'pytest', 'cuda-bindings', 'cuda-core'):
    try:
        versions[name] = m.version(name)
    except m.PackageNotFoundError:
        versions[name] = None
print(json.dumps({'python': sys.version.split()[0], 'machine': platform.machine(),
    'cpus': os.cpu_count(), 'devices': [torch.cuda.get_device_name(i)
    for i in range(torch.cuda.device_count())], 'versions': versions}))
"""


class Run:
    """One run: a log, a summary, and the parts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        args.out.mkdir(parents=True, exist_ok=True)
        self.begin = time.monotonic()
        self.log_path = args.out / "run.log"
        self.log = self.log_path.open("a", encoding="utf-8", buffering=1)
        self.path = args.out / "summary.json"
        self.data: dict[str, Any] = {
            "kind": "run",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": args.commit,
            "parts": {},
        }
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
        }
        if args.commit:
            self.environment["KVSIG_COMMIT"] = args.commit

    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.begin)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")

    def write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(compact(self.data) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def python(
        self,
        arguments: list[str],
        seconds: float,
        echo: int = 40,
        folder: Path = ROOT,
        **environment: str,
    ) -> tuple[int, str]:
        """Run Python with all that it starts; its output into the log, the end of it here."""
        return self.command([sys.executable, *arguments], seconds, echo, folder, **environment)

    def command(
        self,
        words: list[str],
        seconds: float,
        echo: int = 40,
        folder: Path = ROOT,
        **environment: str,
    ) -> tuple[int, str]:
        """Run a command with all that it starts; its output into the log, the end of it here."""
        seconds = max(5.0, min(seconds, self.left()))
        # The command writes into the log itself: what it has said is kept whatever happens.
        self.log.write(f"\n$ {' '.join([Path(words[0]).name, *words[1:]])}\n")
        self.log.flush()
        start = self.log_path.stat().st_size
        process = subprocess.Popen(
            words,
            cwd=folder,
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
        with self.log_path.open("rb") as file:
            file.seek(start)
            text = file.read().decode("utf-8", "replace")
        lines = text.rstrip().splitlines()
        if echo and len(lines) > echo:
            print(f"  ... {len(lines) - echo} lines are in run.log")
        for line in lines[-echo:] if echo else []:
            print("  " + line, flush=True)
        return code, text

    def part(self, name: str) -> bool:
        """Run a part; whether it went well."""
        limit = PARTS[name][0] * self.args.scale
        at = time.monotonic() - self.begin
        self.say(f"\n=== {name} (at {at:.0f} s, may take {limit:.0f} s)")
        begin = time.monotonic()
        if self.left() < 5:
            result = "no time left"
        else:
            try:
                code = getattr(self, name)(min(limit, self.left()))
                result = "ok" if code == 0 else f"exit code {code}"
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
        seconds = round(time.monotonic() - begin, 1)
        self.data["parts"][name] = {"result": result, "seconds": seconds}
        self.say(f"  {result} after {seconds} s")
        self.write()
        return result == "ok"

    def measured(self, name: str, arguments: list[str], seconds: float, echo: int) -> int:
        """Run what writes JSON, and keep the gist of it under the part's name."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            code = self.python([*arguments, "--json", str(path)], seconds, echo)[0]
            if path.exists():
                self.data[name] = condensed(json.loads(path.read_text(encoding="utf-8")))
        return code

    def bench(self, name: str, seconds: float, *arguments: str) -> int:
        # The start of Python and of CUDA come on top.
        limit = ["--seconds", str(max(10, int(seconds - 25)))]
        return self.measured(name, ["-m", "kvsig", "bench", *limit, *arguments], seconds, 60)

    # The parts.

    def build(self, seconds: float) -> int:
        return self.python([*BUILD], seconds, 6)[0]

    def machine(self, seconds: float) -> int:
        code, text = self.python(["-c", MACHINE], seconds, 0)
        self.data["machine"] = json.loads(text.splitlines()[-1])
        self.say(f"  {self.data['machine']}")
        return code or self.python(["-m", "kvsig", "info"], seconds, 12)[0]

    def tests(self, seconds: float) -> int:
        command = ["-m", "pytest", "-m", "gpu", "-q", "--durations=5", "-p", "no:cacheprovider"]
        code, text = self.python([*command, "tests"], seconds, 30)
        self.data["tests"] = text.splitlines()[-1:]
        return code

    def main_job(self, seconds: float, library: Path | None, *options: str) -> dict[str, Any]:
        """Run the demo with one libcudart."""
        chosen = {"KVSIG_CUDART": str(library)} if library else {}
        command = ["-m", "kvsig", "demo", "--json", *options]
        code, text = self.python(command, seconds, 0, **chosen)
        try:
            (run,) = json.loads(text[text.index("{\n") : text.rindex("\n}") + 2])["runs"]
        except ValueError:
            return {"exit_code": code, "output": text[-500:]}
        found = {"exit_code": code, "variant": run["variant"], "bit_exact": run["bit_exact"]}
        for way in ("offload", "load"):
            keys = ("path", "reason", "bytes", "gb_per_s")
            found[way] = {key: run[way][key] for key in keys if run[way].get(key) is not None}
        return found

    def demo(self, seconds: float) -> int:
        self.data["demo"] = self.main_job(seconds, None)
        self.say(f"  {self.data['demo']}")
        return int(self.data["demo"]["exit_code"])

    def matrix(self, seconds: float) -> int:
        """The main job with every libcudart in the folder, each in a process of its own."""
        if self.args.cudart is None:
            raise ValueError("give --cudart FOLDER with libcudart-VERSION/libcudart.so.*")
        # The longest name is that of the file; the others are links to it.
        libraries = {
            folder.name: max(folder.rglob("libcudart.so*"), key=lambda path: len(path.name))
            for folder in sorted(self.args.cudart.iterdir())
            if any(folder.rglob("libcudart.so*"))
        }
        if not libraries:
            raise ValueError(f"{self.args.cudart} holds no */libcudart.so*")
        end = time.monotonic() + seconds
        self.data["matrix"] = {}
        for done, (name, path) in enumerate(libraries.items()):
            share = max((end - time.monotonic()) / (len(libraries) - done), 20)
            found = self.main_job(share, path.resolve(), "--tokens", "8192")
            self.data["matrix"][name] = found
            self.say(f"  {name}: {found}")
        return max(int(found["exit_code"]) for found in self.data["matrix"].values())

    def quick(self, seconds: float) -> int:
        return self.bench("quick", seconds, "--quick")

    def models(self, seconds: float) -> int:
        return self.bench("models", seconds, "--section", "models")

    def grid(self, seconds: float) -> int:
        return self.bench("grid", seconds)

    def compute(self, seconds: float) -> int:
        command = [str(HERE / "beside.py"), "--seconds", str(max(10, int(seconds - 25)))]
        return self.measured("compute", command, seconds, 40)

    def rivals(self, seconds: float) -> int:
        command = [str(HERE / "rivals.py"), "--seconds", str(max(10, int(seconds - 25)))]
        return self.measured("rivals", command, seconds, 40)

    def kernel(self, seconds: float) -> int:
        command = [str(HERE / "kernel.py"), "--seconds", str(max(10, int(seconds - 40)))]
        return self.measured("kernel", command, seconds, 130)

    def engines(self, seconds: float) -> int:
        command = [str(HERE / "engines.py"), "--seconds", str(max(10, int(seconds - 40)))]
        return self.measured("engines", command, seconds, 200)

    def twogpus(self, seconds: float) -> int:
        """Tests of two GPUs, and the two processes."""
        end = time.monotonic() + seconds
        tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "TwoGpus"]
        code, text = self.python([*tests, "tests/gpu/test_kernel_gpu.py"], seconds / 2, 20)
        self.data["twogpus_tests"] = text.splitlines()[-1:]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        script = [*torchrun, str(HERE / "two_gpus.py")]
        return self.measured("twogpus", script, end - time.monotonic(), 30) or code

    def sanitizer(self, seconds: float) -> int:
        """A few random transfers, layered loads and wrong numbers under each of its tools."""
        places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", str(Path(sys.prefix) / "bin")]
        found = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
        if found is None:
            raise ValueError("there is no compute-sanitizer in PATH or /usr/local/cuda/bin")
        tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_kernel_gpu.py"]
        chosen = ["-k", "TestRandom or TestLayered or wrong_one or one_graph"]
        self.data["sanitizer"] = {}
        codes = []
        for tool in ("memcheck", "racecheck"):
            options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
            code, text = self.command(
                [found, *options, sys.executable, *tests, *chosen], seconds / 2, 15,
                KVSIG_KERNEL_GPU_CASES="60", PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )  # fmt: skip
            said = [line for line in text.splitlines() if "SUMMARY" in line]
            self.data["sanitizer"][tool] = {"exit_code": code, "said": said[-2:]}
            codes.append(code)
        return max(codes)

    def random(self, seconds: float) -> int:
        """The emulated runtime's kernel, in as many processes as there are CPUs."""
        script = str(HERE / "random_cases.py")
        code, text = self.python([script, "50000"], seconds, 10)
        self.data["random"] = text.splitlines()[-1:]
        return code

    def overhead(self, seconds: float) -> int:
        return self.measured("overhead", [str(HERE / "overhead.py")], seconds, 20)

    def calibrate(self, seconds: float) -> int:
        command = ["-m", "kvsig", "calibrate", "--dry-run"]
        return self.measured("calibrate", command, seconds, 40)

    def against(self, seconds: float) -> int:
        old = self.args.against
        if old is None:
            raise ValueError("give --against CHECKOUT")
        end = time.monotonic() + seconds
        if not any((old / "kvsig").glob("_core*.so")):
            code = self.python([*BUILD], seconds, 6, folder=old)[0]
            if code:
                return code
        seconds = end - time.monotonic()
        limit = ["--seconds", str(max(10, int(seconds - 40)))]
        return self.measured("against", [str(HERE / "against.py"), str(old), *limit], seconds, 70)


def commit(root: Path) -> str | None:
    """Name the commit of a checkout, with ``-dirty`` behind a changed one; None for a copy."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def condensed(result: dict[str, Any]) -> dict[str, Any]:
    """Keep of a result what tables and plots need."""
    kept = dict(result)
    if result["kind"] == "bench":
        kept["cells"] = [condensed_cell(cell) for cell in result["cells"]]
    return kept


#: Of a method in a cell.
KEPT = ("runs", "path", "calls", "verified", "gb_s", "share", "auto_ratio", "host_ns_per_copy")


def condensed_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Keep what tables and plots show, and of times the median and the outer tenths."""
    methods = {}
    for name, row in cell["methods"].items():
        methods[name] = {key: row[key] for key in KEPT if row.get(key) is not None}
        if "ms" in row:
            methods[name]["ms"] = {key: row["ms"][key] for key in ("median", "p10", "p90")}
    return cell | {"methods": methods}


def compact(data: Any, depth: int = 3) -> str:
    """Write JSON with what is nested deeper on one line."""
    if depth and isinstance(data, dict) and data:
        return "{\n" + ",\n".join(
            f"{json.dumps(key)}: {compact(value, depth - 1)}" for key, value in data.items()
        ) + "\n}"  # fmt: skip
    if depth and isinstance(data, list) and data:
        return "[\n" + ",\n".join(compact(value, depth - 1) for value in data) + "\n]"
    return json.dumps(data, separators=(",", ":"))


def read_arguments() -> argparse.Namespace:
    parts = "\n".join(f"  {name:<10} {text}" for name, (_, text) in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"parts (default: {','.join(DEFAULT)}):\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="?", default=",".join(DEFAULT))
    parser.add_argument("--cudart", type=Path, help="folder of libcudart-VERSION folders")
    parser.add_argument("--against", type=Path, help="another checkout of kvsig")
    parser.add_argument("--commit", default=os.environ.get("KVSIG_COMMIT") or commit(ROOT))
    parser.add_argument("--seconds", type=float, default=570, help="for everything")
    parser.add_argument("--scale", type=float, default=1, help="stretches every part's time")
    args = parser.parse_args()
    args.names = [name.strip() for name in args.parts.split(",") if name.strip()]
    unknown = [name for name in args.names if name not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    if args.commit and not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", args.commit):
        parser.error(f"--commit {args.commit!r} is no commit")
    if args.against is not None:
        args.against = args.against.resolve()
        if not (args.against / "kvsig" / "__init__.py").is_file():
            parser.error(f"--against {args.against}: there is no kvsig in it")
        if "against" not in args.names:
            args.names.append("against")
    return args


def main() -> int:
    args = read_arguments()
    run = Run(args)
    good = [run.part(name) for name in args.names]
    run.say("")
    for name in args.names:
        row = run.data["parts"][name]
        run.say(f"{name:<12} {row['seconds']:>7.1f} s  {row['result']}")
    size = run.path.stat().st_size
    run.say(f"{time.monotonic() - run.begin:.0f} s in all; {run.path.name}: {size:,} bytes")
    if size > MOST_BYTES:
        run.say(f"{run.path.name} is larger than {MOST_BYTES:,} bytes: choose fewer parts to keep")
    return 0 if all(good) and size <= MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
