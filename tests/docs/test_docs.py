"""The examples in the documentation are what kvsig does."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cuda_headers import REGISTRY, header
from pages import DOCS, PAGES, blocks, name

from kvsig import registry
from kvsig.check import headers, proposals, registry_text

ADD = (DOCS / "add-a-signature.md").read_text()
REFERENCE = (DOCS / "registry.md").read_text()


EXAMPLES = [
    pytest.param(block, id=f"{page.name}-{index}")
    for page in sorted(DOCS.glob("*.md"))
    for index, block in enumerate(blocks(page.read_text(), "toml"))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_toml_example_is_a_part_of_a_registry(example: str) -> None:
    """An example replaces the registry's own entry of that name, and the whole is read."""
    data = tomllib.loads(example)
    table = REGISTRY
    for section in ("function", "struct", "enum", "alias", "library"):
        own = f"{section}s" if section != "alias" else "aliases"
        own = "libraries" if section == "library" else own
        kept = {k: v for k, v in getattr(table, own).items() if k not in data.get(section, {})}
        table = replace(table, **{own: kept})
    text = registry_text.dump(table)
    if "verified" in data:
        text = re.sub(r"\Averified = \[.*?\]\n", "", text, flags=re.DOTALL)
    if "alias" in data:
        text = text.replace("[alias]\n", "[alias]\n" + example.removeprefix("[alias]\n"))
        example = ""
    # A key of the whole file stands before the first table, tables behind the others.
    parts = [example, text] if "verified" in data else [text, example]
    whole = registry.parse("\n".join(parts))
    assert set(REGISTRY.functions) <= set(whole.functions)
    for key, function in data.get("function", {}).items():
        assert len(whole.functions[key].variants) == len(function["variant"])


def test_examples_of_known_entries_are_the_registry_s_own() -> None:
    for block in blocks(REFERENCE, "toml"):
        if not block.startswith(("verified", "[alias]")):
            assert block in registry.PATH.read_text()


def test_the_python_example_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(REFERENCE, "python")
    exec(compile(code, "registry.md", "exec"), {})
    assert capsys.readouterr().out == blocks(REFERENCE, "text")[0]


@pytest.mark.parametrize("version", ["12.9", "13.0"])
def test_the_calls_print_what_the_page_says(
    version: str, emulated_runtime: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    emulated_runtime(version)
    page = (DOCS / "call.md").read_text()
    names: dict[str, object] = {}
    printed = []
    for code in blocks(page, "python"):
        exec(compile(code, "call.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    same, missing = blocks(page, "text")
    assert printed[0] == same
    if version == "12.9":
        assert printed[1] == missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_listed_in_the_index_once() -> None:
    index = (DOCS / "index.md").read_text()
    listed = re.findall(r"^- \[.*?\]\((.+?\.md)\)", index, re.MULTILINE)
    listed = sorted((DOCS / page).resolve() for page in listed)
    assert listed == sorted(page for page in PAGES if page != DOCS / "index.md")


def test_every_variable_of_the_environment_is_documented() -> None:
    sources = [*(DOCS.parent / "kvsig").rglob("*.py"), DOCS.parent / "kvsig" / "_core.pyx"]
    read = re.compile(r"environ[^\n]*\"(KVSIG_\w+)\"")
    used = {name for source in sources for name in read.findall(source.read_text())}
    assert {"KVSIG_CUDART", "KVSIG_ROUTE"} <= used
    pages = "".join(page.read_text() for page in DOCS.glob("*.md"))
    assert sorted(used - set(re.findall(r"`\$?(KVSIG_\w+)", pages))) == []


@pytest.mark.parametrize(
    ("heading", "keys"),
    [
        ("[library.NAME]", "header soname version lookup optional"),
        ("[enum.NAME]", "library since constants"),
        ("[struct.NAME]", "library since fields size typedef grows"),
        ("[function.NAME]", "library returns summary page stands_in_for result variant"),
        ("[[function.NAME.variant]]", "since before open reason params symbol pinned"),
    ],
)
def test_every_key_is_explained(heading: str, keys: str) -> None:
    section = REFERENCE.partition(f"## `{heading}`")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(keys.split())


@pytest.mark.releases
def test_add_a_signature_is_what_the_command_prints() -> None:
    name = "cudaStreamUpdateCaptureDependencies"
    found = [header(release) for release in REGISTRY.verified]
    proposal = proposals.propose(REGISTRY, found, [name])
    (entry,) = blocks(ADD, "toml")
    declaration = '"const cudaGraphEdgeData *dependencyData"'
    assert proposal.text.startswith(blocks(ADD, "text")[0])
    assert proposal.blocks == [
        entry.replace(f"{{ declaration = {declaration}, value = 0 }}", declaration)
    ]
    table = registry.parse(registry.PATH.read_text() + "\n" + entry)
    for one in found:
        assert {r.status for r in headers.check(table, one, {name})} == {"agrees"}
