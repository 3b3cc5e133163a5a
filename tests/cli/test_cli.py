"""The command line, run as a user runs it: exit codes, texts, JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import ROOT, SMALL, VERSIONS, environment, kvsig_command

import kvsig
from kvsig import cli, registry
from kvsig.cli import info as info_command
from kvsig.tools import runtimes


class TestHelp:
    def test_no_arguments_print_help(self):
        done = kvsig_command()
        assert done.returncode == 0
        assert done.stdout.startswith("usage: kvsig [-h] [--version] COMMAND ...")
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
            (["bench", "--method", "foo"], "argument --method: 'foo' is not one of: auto, batch"),
            (["bench", "--section", "foo"], "argument --section: 'foo' is not one of: sizes"),
            (["bench", "--json", "/no/x"], "argument --json: /no/x: there is no folder /no"),
            (["bench", "--from", "/no/x"], "argument --from: /no/x: there is no such file"),
            (["calibrate", "--output", "/no/x"], "argument --output: /no/x: there is no folder"),
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
        lines = done.stdout.splitlines()
        row = next(line for line in lines if line.startswith(runtimes.BATCH + " "))
        label = registry.load().functions[runtimes.BATCH].select(12090).label
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
        newest = max(v.before for v in registry.load().functions[runtimes.BATCH].variants)
        done = kvsig_command("info", cudart=f"emulated:{registry.format_version(newest)}")
        assert done.returncode == 0, done.stderr
        assert "page copies   loop: " in done.stdout
        assert "\nwarning: " in done.stdout
        assert done.stderr == ""
        lines = done.stdout.splitlines()
        row = next(line for line in lines if line.startswith(runtimes.BATCH + " "))
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


class TestStreams:
    """What a shell can do to a command."""

    def shell(self, line, **env):
        return subprocess.run(
            ["/bin/bash", "-c", line.replace("kvsig", f"'{sys.executable}' -m kvsig")],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment("emulated:12.9") | env,
        )

    @pytest.mark.known_failure("closed-output")
    @pytest.mark.parametrize("command", ["info", "info --json", "demo --tokens 16"])
    def test_closed_stdout_is_quiet(self, command):
        done = self.shell(f"kvsig {command} >&-")
        # On a busy machine the demo tells every 10 s how far it is.
        said = re.sub(r"kvsig demo: \d+ of \d+ after .*\n", "", done.stderr)
        assert (done.returncode, done.stdout, said) == (0, "", "")

    def test_closed_stderr_loses_nothing(self):
        done = self.shell("kvsig demo --tokens 16 2>&-")
        assert done.returncode == 0
        assert done.stdout.endswith("Every byte is right.\n")

    def test_a_failure_keeps_its_code_where_nobody_reads_it(self):
        assert self.shell("kvsig info >&- 2>&-", KVSIG_CUDART="nonsense").returncode == 1

    def test_interrupted_while_the_arguments_are_read(self, monkeypatch, capsys):
        def interrupted():
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "build_parser", interrupted)
        assert cli.main(["info"]) == 130
        assert capsys.readouterr().err == "\nkvsig: interrupted\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it is used instead")
class TestWithoutAGpu:
    """One rule for info, demo and bench: the emulated runtime, and it is said."""

    BENCH = ("bench", "--page-bytes", "512", "--pages", "2", "--layers", "2", "--runs", "1")

    @pytest.mark.parametrize("args", [("info",), ("demo", *SMALL), BENCH], ids=lambda a: a[0])
    def test_the_emulated_runtime_is_used_and_named(self, args):
        done = kvsig_command(*args, cudart=None)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("There is no GPU to run on: ")
        said = " ".join(done.stdout.split())
        assert "The emulated CUDA runtime, which works in host memory, is used instead." in said
        assert "Another runtime can be named in KVSIG_CUDART." in said
        assert f"{VERSIONS[-1][0]}, emulated" in said

    def test_info_as_json_says_so_too(self):
        answer = json.loads(kvsig_command("info", "--json", cudart=None).stdout)
        assert answer["emulated"] is True
        assert answer["note"].startswith("There is no GPU to run on: ")
        assert answer["found"] == f"the program asked for emulated:{VERSIONS[-1][0]}"

    @pytest.mark.parametrize("args", [("info",), BENCH], ids=lambda a: a[0])
    def test_what_is_asked_for_is_taken_without_a_word(self, args):
        done = kvsig_command(*args, cudart="emulated:12.9")
        assert "There is no GPU" not in done.stdout
        assert "12.9, emulated" in done.stdout

    def test_calibrate_does_not_fall_back(self):
        done = kvsig_command("calibrate", cudart=None)
        assert (done.returncode, done.stdout) == (1, "")


class TestWidth:
    @pytest.mark.parametrize("columns", ["60", "90"])
    @pytest.mark.parametrize("args", [("info",), ("bench", "--quick", "--runs", "1")])
    def test_tables_keep_to_the_terminal(self, args, columns):
        done = subprocess.run(
            [sys.executable, "-m", "kvsig", *args],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment("emulated:12.9") | {"COLUMNS": columns},
        )
        assert done.returncode == 0, done.stderr
        long = [line for line in done.stdout.splitlines() if len(line) > int(columns)]
        assert [line for line in long if "/" not in line] == []  # a path is not broken

    def test_version(self):
        done = kvsig_command("--version")
        assert (done.returncode, done.stdout) == (0, f"kvsig {kvsig.__version__}\n")
