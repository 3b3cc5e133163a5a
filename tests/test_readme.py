"""What the README says is true: its table is the registry's, its example runs."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

import kvsig
from kvsig import emulated, registry
from kvsig.cli import info

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_table_of_prototypes():
    rows = re.findall(
        r"^\| .*?\| `\((.*?)\)` \| batches, (\d) parameters \|$", README, re.MULTILINE
    )
    table = registry.load()
    variants = table.functions["cudaMemcpyBatchAsync"].variants
    looked = [registry.parse_version(r.rpartition(".")[0]) for r in table.verified]
    assert rows == [
        (", ".join(param.declaration for param in variant.params), str(len(variant.params)))
        for variant in variants
        # What is written for a release that nobody has seen has no place in the table yet.
        if any(variant.covers(version) for version in looked)
    ]


def test_sample_of_info(emulated_runtime):
    """Every line of the sample is a line of the command's, but for its paths and addresses."""

    def plain(text: str) -> list[str]:
        text = re.sub(r"0x[0-9a-f]+ *", "ADDRESS ", text)
        text = re.sub(r"/\S*/(?=kvsig/_emulated)", "", text)
        text = re.sub(r"^(found +).*", r"\1", text, flags=re.MULTILINE)
        return [re.sub(r"^-+$", "-", re.sub(r" +", " ", line)) for line in text.splitlines()]

    (sample,) = re.findall(r"```\n(CUDA runtime.*?)```", README, re.DOTALL)
    emulated_runtime("12.9")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown = plain(info.describe(kvsig.info()))
    assert [line for line in plain(sample) if line not in shown] == []


def test_example_on_the_emulated_runtime(emulated_runtime, capsys):
    emulated_runtime("12.9")
    example = EXAMPLE
    for real, stand_in in (
        ('device="cuda"', 'device="cpu"'),
        ("pin_memory=True", "pin_memory=False"),
        ("torch.cuda.Stream()", "Stream()"),
        ("32, 1024, 1024, 16,", "32, 16, 1024, 1,"),
    ):
        assert real in example
        example = example.replace(real, stand_in)
    # The names live until the stream has come to its end: it works on their memory.
    names = {"Stream": emulated.Stream}
    exec(example, names)
    names["stream"].synchronize()
    assert capsys.readouterr().out.count("copies") == 2


@pytest.mark.gpu
def test_example_on_a_gpu(capsys):
    names: dict[str, object] = {}
    exec(EXAMPLE, names)
    torch.cuda.synchronize()
    out = capsys.readouterr().out
    assert out.count("Report(") == 2
    assert "loop" not in out
