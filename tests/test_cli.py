"""The command line, run as a user runs it: exit codes, texts, JSON."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kvsig
from kvsig import _core, cli, demo, models, registry
from kvsig.cli import demo as demo_command
from kvsig.cli import info as info_command

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = [
    (registry.format_version(variant.since), len(variant.params))
    for variant in registry.load().functions[demo.BATCH].variants
]
SMALL = ("--tokens", "64", "--page-size", "8")


def environment(cudart: str | None) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("KVSIG_")}
    if cudart is not None:
        env["KVSIG_CUDART"] = cudart
    return env | {"COLUMNS": "100"}


def kvsig_command(
    *args: str, cudart: str | None = "emulated:12.9"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvsig", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(cudart),
        timeout=300,
    )


class TestHelp:
    def test_no_arguments_print_help(self):
        done = kvsig_command()
        assert done.returncode == 0
        assert done.stdout.startswith("usage: kvsig [-h] COMMAND ...")
        for name in ("info", "demo"):
            assert f"\n    {name} " in done.stdout
        assert done.stderr == ""

    @pytest.mark.parametrize("name", ["info", "demo"])
    def test_each_command_has_help(self, name):
        done = kvsig_command(name, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith(f"usage: kvsig {name} ")

    def test_help_needs_neither_cuda_nor_torch(self):
        code = "import sys, kvsig.cli as c; c.build_parser(); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("args", "text"),
        [
            (["nope"], "argument COMMAND: invalid choice: 'nope'"),
            (["info", "--bad"], "unrecognized arguments: --bad"),
            (["demo", "--model", "gpt"], "argument --model: invalid choice: 'gpt'"),
            (["demo", "--tokens", "0"], "argument --tokens: 0 is not from 1 to 4294967295"),
            (["demo", "--tokens", "x"], "argument --tokens: 'x' is not a whole number"),
            (["demo", "--page-size", "-1"], "argument --page-size: -1 is not from 1 to 4294967295"),
            (["demo", "--seed", "-1"], "argument --seed: -1 is not from 0 to 4294967295"),
            (["demo", "--layout", "x"], "argument --layout: invalid choice: 'x'"),
            (["demo", "--path", "x"], "argument --path: invalid choice: 'x'"),
        ],
    )
    def test_exit_code_2_and_the_offender(self, args, text):
        done = kvsig_command(*args)
        assert done.returncode == 2
        assert text in done.stderr
        assert done.stdout == ""


class TestInfo:
    def test_table(self):
        done = kvsig_command("info")
        assert done.returncode == 0, done.stderr
        assert "CUDA runtime  12.9, emulated: host memory stands in for the GPU's" in done.stdout
        assert "KVSIG_CUDART=emulated:12.9" in done.stdout
        row = next(line for line in done.stdout.splitlines() if line.startswith(demo.BATCH + " "))
        label = registry.load().functions[demo.BATCH].select(12090).label
        assert label in row
        assert row.endswith("bound")
        assert "0x" in row
        # Only a path may be longer than the lines are.
        assert all(len(line) <= 100 or "/" in line for line in done.stdout.splitlines())

    def test_every_function_is_listed_once(self):
        lines = kvsig_command("info").stdout.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
        names = list(registry.load().functions)
        assert [line.split()[0] for line in lines[start : start + len(names)]] == names

    def test_json(self):
        done = kvsig_command("info", "--json", cudart="emulated:13.0")
        assert done.returncode == 0, done.stderr
        info = json.loads(done.stdout)
        assert info["emulated"] is True
        assert info["runtime_version"] == 13000
        assert {function["name"] for function in info["functions"]} == set(
            registry.load().functions
        )
        assert info["batch"]["path"] == "batch"

    def test_runtime_newer_than_every_range(self):
        newest = max(v.before for v in registry.load().functions[demo.BATCH].variants)
        done = kvsig_command("info", cudart=f"emulated:{registry.format_version(newest)}")
        assert done.returncode == 0, done.stderr
        assert "page copies   loop: " in done.stdout
        assert "\nwarning: " in done.stdout
        assert done.stderr == ""
        row = next(line for line in done.stdout.splitlines() if line.startswith(demo.BATCH + " "))
        assert not row.endswith("bound")

    def test_functions_that_are_not_bound_are_listed_by_reason(self):
        registered = registry.load().functions.values()
        newer = [f.name for f in registered if f.variants[0].since == 13020]
        text = " ".join(kvsig_command("info").stdout.split())
        assert f"not bound: 12.9 is older than 13.2: {', '.join(newer)}" in text

    def test_symbol_is_named_where_it_differs(self):
        rows = info_command.function_table(
            [
                {
                    "name": "cudaEventElapsedTime",
                    "variant": "13.0 to before 14.0",
                    "symbol": "cudaEventElapsedTime_v2",
                    "address": 16,
                    "status": "bound",
                }
            ]
        )
        assert rows[-1] == ("cudaEventElapsedTime  13.0 to before 14.0  0x10     bound as ..._v2")


class TestErrors:
    """A user's mistake is one message and exit code 1, never a traceback."""

    @pytest.mark.parametrize("args", [["info"], ["demo", *SMALL]])
    @pytest.mark.parametrize("cudart", ["nonsense", "emulated:nonsense", "/no/libcudart.so"])
    def test_nonsense_in_kvsig_cudart(self, args, cudart):
        done = kvsig_command(*args, cudart=cudart)
        assert done.returncode == 1
        assert done.stderr.startswith(f"kvsig {args[0]}: ")
        assert cudart.removeprefix("emulated:") in done.stderr
        assert "Traceback" not in done.stderr

    def test_traceback_on_request(self):
        done = kvsig_command("info", "--traceback", cudart="nonsense")
        assert done.returncode == 1
        assert "Traceback (most recent call last):" in done.stderr

    def test_info_as_json_without_a_runtime(self):
        done = kvsig_command("info", "--json", cudart="/no/libcudart.so")
        assert done.returncode == 1
        answer = json.loads(done.stdout)
        assert answer["library"] is None
        assert "/no/libcudart.so" in answer["error"]

    @pytest.mark.skipif(torch.version.cuda is not None, reason="this torch brings a libcudart")
    def test_no_runtime_at_all(self):
        done = kvsig_command("info", cudart=None)
        assert done.returncode == 1
        assert done.stdout == ""
        assert "no libcudart is loaded in this process" in done.stderr
        assert "KVSIG_CUDART" in done.stderr
        assert "emulated:12.9" in done.stderr

    def test_more_tokens_than_memory(self):
        done = kvsig_command("demo", "--tokens", str(10**9))
        assert done.returncode == 1
        assert "a cache of 1,000,000,000 tokens needs " in done.stderr
        assert "of host memory and " in done.stderr
        assert done.stderr.endswith(" is free; ask for fewer --tokens\n")

    def test_not_built(self, monkeypatch, capsys):
        def unbuilt():
            raise ModuleNotFoundError("No module named 'kvsig._core'", name="kvsig._core")

        monkeypatch.setattr(kvsig, "info", unbuilt)
        assert cli.main(["info"]) == 1
        assert capsys.readouterr().err == (
            "kvsig info: No module named 'kvsig._core'\n"
            "Build kvsig: python setup.py build_ext --inplace\n"
        )

    @pytest.mark.parametrize("command", ["info", "demo"])
    def test_built_from_another_registry(self, tmp_path, command):
        package = tmp_path / "kvsig"
        shutil.copytree(ROOT / "kvsig", package, ignore=shutil.ignore_patterns("*.c"))
        toml = package / "signatures.toml"
        toml.write_text(toml.read_text() + "# edited\n")
        done = subprocess.run(
            [sys.executable, "-m", "kvsig", command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment("emulated:12.9") | {"PYTHONPATH": str(tmp_path)},
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"kvsig {command}: {toml} is not the registry that this extension was built from;"
            " rebuild with: python setup.py build_ext --inplace"
            " (or, for an installed package: pip install --force-reinstall --no-deps .)\n"
        )

    def test_route_that_is_none(self):
        env = environment("emulated:12.9") | {"KVSIG_ROUTE": "fast"}
        done = subprocess.run(
            [sys.executable, "-m", "kvsig", "info"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=env,
        )
        assert done.returncode == 1
        assert done.stderr == "kvsig info: KVSIG_ROUTE='fast': use auto, runtime or driver\n"

    def test_reader_that_goes_away(self):
        done = subprocess.run(
            f"set -o pipefail; '{sys.executable}' -m kvsig info --json | true",
            shell=True,
            executable="/bin/bash",
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment("emulated:12.9"),
        )
        assert done.stderr == ""
        assert done.returncode in (0, 128 + signal.SIGPIPE)

    def test_broken_pipe(self, monkeypatch):
        def broken():
            raise BrokenPipeError

        monkeypatch.setattr(kvsig, "info", broken)
        pipe = os.pipe()
        with os.fdopen(pipe[0]), os.fdopen(pipe[1], "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert cli.main(["info"]) == 128 + signal.SIGPIPE

    def test_interrupt(self):
        process = subprocess.Popen(
            [sys.executable, "-m", "kvsig", "demo", "--tokens", "8192"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment("emulated:12.9"),
            # Where the tests run in the background of a script, a child would ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout.readline().startswith("runtime ")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert errors.endswith("kvsig: interrupted\n")
        assert "Traceback" not in errors


class TestDemo:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it is used instead")
    def test_without_a_gpu_every_abi_is_run(self):
        done = kvsig_command("demo", *SMALL, cudart=None)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith("There is no GPU to run on: ")
        assert "No speed is reported: emulated." in " ".join(done.stdout.split())
        for version, parameters in VERSIONS:
            assert f"runtime   CUDA {version}, emulated\n" in done.stdout
            assert f": {parameters} parameters\n" in done.stdout
        assert done.stdout.endswith(f"Every byte is right, on each of {len(VERSIONS)} ABIs.\n")
        assert "GB/s" not in done.stdout

    @pytest.fixture
    def answer_of(self, monkeypatch, capsys):
        """Run the demo in this process, which has torch already, and give its JSON."""

        def answer(version, *args):
            monkeypatch.setenv("KVSIG_CUDART", f"emulated:{version}")
            _core.rebind(None)
            code = cli.main(["demo", *args, "--json"])
            captured = capsys.readouterr()
            assert code == 0, captured.out + captured.err
            return json.loads(captured.out)

        yield answer
        monkeypatch.undo()
        _core.rebind(None)

    @pytest.mark.parametrize(("version", "parameters"), VERSIONS)
    @pytest.mark.parametrize("model", list(models.MODELS))
    @pytest.mark.parametrize("layout", demo_command.LAYOUTS)
    def test_each_model_and_layout(self, answer_of, version, parameters, model, layout):
        answer = answer_of(version, *SMALL, "--model", model, "--layout", layout)
        assert answer["bit_exact"] is True
        (run,) = answer["runs"]
        shape = models.MODELS[model]
        assert run["emulated"] is True
        assert run["parameters"] == parameters
        assert run["bytes"] == 64 * shape.token_bytes
        for direction in ("offload", "load"):
            report = run[direction]
            assert report["bytes"] == 64 * shape.token_bytes
            assert "gb_per_s" not in report
        assert (answer["model"], answer["layout"]) == (model, layout)

    def test_runtime_newer_than_every_range(self):
        newest = max(v.before for v in registry.load().functions[demo.BATCH].variants)
        cudart = f"emulated:{registry.format_version(newest)}"
        done = kvsig_command("demo", *SMALL, cudart=cudart)
        assert done.returncode == 0
        assert "too new" in done.stdout
        assert done.stderr.startswith("kvsig: warning: libcudart ")
        assert done.stderr.count("\n") == 1

    def test_the_driver_s_own_function_is_named(self, answer_of):
        (run,) = answer_of("12.6/13.0", *SMALL, "--path", "batch")["runs"]
        assert run["function"] == (
            "cuMemcpyBatchAsync, prototype of 12.8 and later: 9 parameters, the driver's own"
        )
        assert (run["variant"], run["parameters"]) == ("12.8 and later", 9)
        assert run["offload"]["path"] == "batch"

    @pytest.mark.parametrize("path", ["batch", "loop"])
    def test_path(self, answer_of, path):
        (run,) = answer_of("12.9", *SMALL, "--path", path)["runs"]
        assert run["offload"]["path"] == run["load"]["path"] == path

    def test_tokens_are_rounded_up_to_pages(self, answer_of):
        (run,) = answer_of("12.9", "--tokens", "65", "--page-size", "8")["runs"]
        assert (run["tokens"], run["pages"]) == (72, 9)


class TestDemoFindsWrongBytes:
    """The demo fails where it has to: on pages that went wrong, and on pages that were hit."""

    def run(self, capsys, monkeypatch, spoil):
        class Spoiled(kvsig.PagedKVCache):
            def offload(self, device_pages, host_pages, **options):
                report = super().offload(device_pages, host_pages, **options)
                options["stream"].synchronize()
                spoil(self, "offload", device_pages, host_pages)
                return report

            def load(self, host_pages, device_pages, **options):
                report = super().load(host_pages, device_pages, **options)
                options["stream"].synchronize()
                spoil(self, "load", device_pages, host_pages)
                return report

            def __init__(self, device, host, **options):
                super().__init__(device=device, host=host, **options)
                self.layer = device[0]
                self.pool = host

        monkeypatch.setattr(kvsig, "PagedKVCache", Spoiled)
        monkeypatch.setenv("KVSIG_CUDART", "")
        code = cli.main(["demo", *SMALL, "--model", "deepseek-v3"])
        return code, capsys.readouterr().out

    @pytest.fixture(autouse=True)
    def one_abi(self, monkeypatch):
        monkeypatch.setattr(demo, "runtimes", lambda: (["emulated:12.9"], ""))

    def test_nothing_is_wrong(self, capsys, monkeypatch):
        code, out = self.run(capsys, monkeypatch, lambda *_: None)
        assert code == 0
        assert out.endswith("Every byte is right.\n")

    def test_one_bit_of_a_loaded_page(self, capsys, monkeypatch):
        def spoil(cache, direction, device_pages, host_pages):
            if direction == "load":
                cache.layer.view(torch.uint8)[device_pages[3] * 8 + 5, 0, 17] ^= 4

        code, out = self.run(capsys, monkeypatch, spoil)
        assert code == 1
        assert "WRONG     layer 0 latent: device page " in out
        assert out.endswith("Some bytes are WRONG.\n")

    def test_a_page_that_had_no_part(self, capsys, monkeypatch):
        def spoil(cache, direction, device_pages, host_pages):
            if direction == "load":
                spare = set(range(17)) - set(device_pages.tolist())
                cache.layer.view(torch.uint8)[min(spare) * 8, 0, 0] ^= 1

        code, out = self.run(capsys, monkeypatch, spoil)
        assert code == 1
        assert " was written\n" in out

    def test_a_host_page_that_had_no_part(self, capsys, monkeypatch):
        def spoil(cache, direction, device_pages, host_pages):
            if direction == "offload":
                (spare,) = set(range(9)) - set(host_pages.tolist())
                cache.pool.view(torch.uint8)[spare, 60, 7, 0, 0] = 0

        code, out = self.run(capsys, monkeypatch, spoil)
        assert code == 1
        assert "WRONG     layer 60 latent: host page " in out
        assert " was written\n" in out

    def test_two_host_pages_in_each_others_place(self, capsys, monkeypatch):
        def spoil(cache, direction, device_pages, host_pages):
            pair = [host_pages[0], host_pages[1]]
            cache.pool[pair] = cache.pool[pair[::-1]].clone()

        code, out = self.run(capsys, monkeypatch, spoil)
        assert code == 1
        assert "does not hold device page" in out


@pytest.mark.gpu
class TestDemoOnGpu:
    def test_one_gib_of_llama3_8b(self):
        done = kvsig_command("demo", "--json", cudart=None)
        assert done.returncode == 0, done.stdout + done.stderr
        (run,) = json.loads(done.stdout)["runs"]
        assert run["emulated"] is False
        assert run["bytes"] >= 1 << 30
        for direction in ("offload", "load"):
            assert run[direction]["gb_per_s"] > 0
            assert run["one_copy"][direction]["gb_per_s"] > 0


class TestModels:
    def test_bytes_per_token(self):
        """The numbers that the models' makers and their users give."""
        assert models.MODELS["llama3-8b"].token_bytes == 128 * 1024
        assert models.MODELS["llama3-70b-tp8"].token_bytes == 320 * 1024 // 8
        assert models.MODELS["deepseek-v3"].token_bytes == 61 * 1152

    @pytest.mark.parametrize("name", list(models.MODELS))
    def test_default_is_more_than_1_gib_on_a_gpu(self, name):
        model = models.MODELS[name]
        assert demo.default_tokens(model, emulated=False) * model.token_bytes >= 1 << 30
        assert demo.default_tokens(model, emulated=True) * model.token_bytes < 80 << 20
