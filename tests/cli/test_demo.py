"""``kvsig demo``: every byte is right, and wrong ones are found."""

from __future__ import annotations

import json

import pytest
import torch
from commands import SMALL, VERSIONS, kvsig_command

import kvsig
from kvsig import _core, cli, registry
from kvsig.cli import demo as demo_command
from kvsig.tools import models, runtimes


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
        newest = max(v.before for v in registry.load().functions[runtimes.BATCH].variants)
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
        monkeypatch.setattr(runtimes, "choose", lambda: (["emulated:12.9"], ""))

    def test_nothing_is_wrong(self, capsys, monkeypatch):
        code, out = self.run(capsys, monkeypatch, lambda *_: None)
        assert code == 0
        assert out.endswith("Every byte is right.\n")

    def test_one_bit_of_a_loaded_page(self, capsys, monkeypatch):
        def spoil(cache, direction, device_pages, host_pages):
            if direction == "load":
                cache.layer[device_pages[3], 5 * 1152 + 17] ^= 4

        code, out = self.run(capsys, monkeypatch, spoil)
        assert code == 1
        assert "WRONG     layer 0 latent: device page " in out
        assert out.endswith("Some bytes are WRONG.\n")

    def test_a_page_that_had_no_part(self, capsys, monkeypatch):
        def spoil(cache, direction, device_pages, host_pages):
            if direction == "load":
                spare = set(range(18)) - set(device_pages.tolist())
                cache.layer[min(spare), 0] ^= 1

        code, out = self.run(capsys, monkeypatch, spoil)
        assert code == 1
        assert " was written\n" in out

    def test_a_host_page_that_had_no_part(self, capsys, monkeypatch):
        def spoil(cache, direction, device_pages, host_pages):
            if direction == "offload":
                spare = set(range(18)) - set(host_pages.tolist())
                cache.pool[min(spare), 60, 0, 7] ^= 1

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
