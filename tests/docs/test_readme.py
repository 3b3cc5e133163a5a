"""What the README says is true: its table is the registry's, its sample is what info prints."""

from __future__ import annotations

import re
import warnings

from pages import ROOT

import kvsig
from kvsig import registry
from kvsig.cli import info

README = (ROOT / "README.md").read_text()


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
