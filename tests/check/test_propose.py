"""``check --propose``: a registry cut down to one release, proposed up to the next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from cuda_headers import REGISTRY, SMALL, Checker, header, run, small_headers

from kvsig import registry
from kvsig.check import headers, proposals, registry_text
from kvsig.registry import Registry, Variant, parse_version


def cut(release: str) -> tuple[str, list[str]]:
    """The registry as it would be if a release were the newest, and the functions it loses."""
    version = parse_version(release.rpartition(".")[0])
    limit = headers.next_major(version)

    def closed(variant: Variant) -> Variant:
        return replace(variant, before=variant.before and min(variant.before, limit))

    functions = {}
    for function in REGISTRY.functions.values():
        variants = tuple(closed(v) for v in function.variants if v.since <= version)
        if variants:
            functions[function.name] = replace(function, variants=variants)
    lost = [name for name in REGISTRY.functions if name not in functions]
    place = REGISTRY.verified.index(release) + 1
    table = replace(
        REGISTRY,
        functions=functions,
        structs={s.name: s for s in REGISTRY.structs.values() if s.since <= version},
        enums={e.name: e for e in REGISTRY.enums.values() if e.since <= version},
        verified=REGISTRY.verified[:place],
    )
    return registry_text.dump(table), lost


def paste(text: str, proposal: str) -> str:
    """Do by machine what the comments of a proposal tell a person to do."""
    for line in proposal.splitlines():
        if found := re.fullmatch(r'# In verified, add: ("[\d.]+")', line):
            text = re.sub(r"(?m)^(verified = \[[^]]*?),?\s*\]", rf"\1, {found[1]}]", text)
        elif found := re.fullmatch(r"# In \[alias\], add: (.+)", line):
            text = text.replace("[alias]\n", f"[alias]\n{found[1]}\n", 1)
        elif found := re.fullmatch(
            r'# In \[\[function\.(\w+)\.variant\]\] since ([\d.]+): (\w+) = ("[\d.]+")( .*)?', line
        ):
            name, since, key, value, _ = found.groups()
            head = f'[[function.{name}.variant]]\nsince = "{since}"\n'
            start = text.index(head)
            body, gap, rest = text[start:].partition("\nreason = ")
            if "in place of open" in line:
                body = re.sub(r"\nopen = .*", f"\n{key} = {value}", body)
            else:
                body = re.sub(rf'\n{key} = "[\d.]+"', f"\n{key} = {value}", body)
            text = text[:start] + body + gap + rest
        elif line.startswith("#"):
            assert line.startswith(("# Registry and", "# Left to you", "# Add at the end")), line
    return text + "\n" + proposal


def agrees(text: str, *releases: str) -> Registry:
    table = registry.parse(text)
    for release in releases:
        results = headers.check(table, header(release))
        assert [(r.name, r.problems) for r in results if r.status == "differs"] == [], release
    return table


def declared(release: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if header(release).function(name) is not None]


@pytest.mark.releases
class TestSteps:
    @pytest.mark.parametrize(("older", "newer"), list(pairwise(REGISTRY.verified)))
    def test_the_proposal_makes_the_check_pass_on_both_releases(
        self, older: str, newer: str
    ) -> None:
        text, lost = cut(older)
        table = agrees(text, older)
        proposal = proposals.propose(table, [header(newer)], declared(newer, lost))
        assert f'In verified, add: "{newer}"' in proposal.edits
        pasted = agrees(paste(text, proposal.text), older, newer)
        assert pasted.functions == proposal.after.functions
        assert pasted.verified == proposal.after.verified
        again = proposals.propose(pasted, [header(newer)])
        assert again.text.endswith(": nothing is missing\n")

    def test_one_after_the_other_from_the_first_release_to_the_last(self) -> None:
        text, lost = cut(REGISTRY.verified[0])
        minors = list({r.rpartition(".")[0]: r for r in REGISTRY.verified}.values())
        for place, release in enumerate(minors):
            table = registry.parse(text)
            wanted = [n for n in declared(release, lost) if n not in table.functions]
            found = [header(known) for known in minors[: place + 1]]
            text = paste(text, proposals.propose(table, found, wanted).text)
        table = agrees(text, *REGISTRY.verified)
        assert set(table.functions) == set(REGISTRY.functions)
        batch = table.functions["cudaMemcpyBatchAsync"]
        real = REGISTRY.functions["cudaMemcpyBatchAsync"]
        assert [(v.since, v.before, v.symbol) for v in batch.variants] == [
            (v.since, v.before, v.symbol) for v in real.variants
        ]
        assert [[(p.declaration, p.type) for p in v.params] for v in batch.variants] == [
            [(p.declaration, p.type) for p in v.params] for v in real.variants
        ]

    def test_all_releases_at_once(self) -> None:
        text, lost = cut(REGISTRY.verified[0])
        found = [header(release) for release in reversed(REGISTRY.verified)]
        proposal = proposals.propose(registry.parse(text), found, lost)
        agrees(paste(text, proposal.text), *REGISTRY.verified)

    def test_the_text_for_the_change_of_the_batch_function(self) -> None:
        text, _ = cut("12.9.79")
        table = registry.parse(text)
        proposal = proposals.propose(table, [header("13.0.48")])
        assert (
            "[[function.cudaMemcpyBatchAsync.variant]]\n"
            'since = "13.0"\n'
            'before = "14.0"\n'
            'reason = "13.0 dropped failIdx and changed the type of dsts, srcs, sizes"\n'
            "params = [\n"
            '    "void *const *dsts",\n'
            '    "const void *const *srcs",\n'
            '    "const size_t *sizes",\n'
            '    "size_t count",\n'
            '    "struct cudaMemcpyAttributes *attrs",\n'
            '    "size_t *attrsIdxs",\n'
            '    "size_t numAttrs",\n'
            '    "cudaStream_t stream",\n'
            "]\n"
        ) in proposal.blocks
        assert 'In [[function.cudaFree.variant]] since 11.8: before = "14.0"' in proposal.edits

    def test_a_function_that_the_registry_has_never_seen(self) -> None:
        name = "cudaGraphKernelNodeGetParams"
        proposal = proposals.propose(REGISTRY, [header("12.8.90"), header("13.0.96")], [name])
        assert [block.partition("\n")[0] for block in proposal.blocks] == [
            "[struct.dim3]",
            "[struct.cudaKernelNodeParams]",
            f"[function.{name}]",
        ]
        text = paste(registry.PATH.read_text(), proposal.text)
        table = agrees(text, "12.8.90", "12.9.79", "13.0.96")
        assert table.structs["cudaKernelNodeParams"].size == 56
        (variant,) = table.functions[name].variants
        assert variant.label == "12.8 to before 14.0"

    def test_the_newest_release_needs_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        header(REGISTRY.verified[-1])
        assert run("--propose", "--releases", REGISTRY.verified[-1]) == 0
        assert capsys.readouterr().out == "# Registry and CUDA 13.5: nothing is missing\n"


@pytest.fixture
def small(tmp_path: Path) -> Checker:
    return small_headers(tmp_path)


class TestSmallHeaders:
    def test_names_no_header_declares(self, small: Checker, tmp_path: Path) -> None:
        small()
        table = registry.parse(SMALL)
        found = headers.read(tmp_path, table, fresh=True)
        with pytest.raises(headers.HeaderError) as caught:
            proposals.propose(table, [found], ["cudaBatch", "nope", "never"])
        assert str(caught.value) == f"no function nope, never in the headers of {tmp_path}"

    def test_a_new_function_with_all_that_it_needs(
        self,
        small: Checker,
        tmp_path: Path,
    ) -> None:
        small(
            "static inline",
            "typedef int (*hook_t)(void *);\n"
            "typedef enum Shape_enum { ROUND = 3, SQUARE } Shape;\n"
            "typedef unsigned long int word_t;\n"
            "struct Inner { int x, y; };\n"
            "struct Outer { struct Inner inner; union { word_t w; float f; } u; Shape s[2]; };\n"
            "struct Odd { int bits : 3; };\n"
            "/** \\defgroup CUDART_ODD Odd */\n"
            "/**\n * \\brief Does an odd thing.\n */\n"
            "int cudaOdd(hook_t hook, const struct Outer *outer, struct Odd *odd, int list[4]);\n"
            "static inline",
        )
        table = registry.parse(SMALL)
        found = headers.read(tmp_path, table, fresh=True)
        proposal = proposals.propose(table, [found], ["cudaOdd"])
        assert proposal.edits == [
            'In [alias], add: hook_t = "void *"',
            'In [alias], add: word_t = "unsigned long"',
        ]
        assert proposal.notes == (
            f"in verified, add the release of {tmp_path}, in three numbers, once it is checked",
        )
        assert "\n".join(proposal.blocks) == (
            '[enum.Shape]\nlibrary = "cudart"\nsince = "12.8"\n\n'
            "[enum.Shape.constants]\nROUND = 3\nSQUARE = 4\n\n"
            '[struct.Inner]\nlibrary = "cudart"\nsince = "12.8"\nsize = 8\n'
            'fields = [\n    "int x",\n    "int y",\n]\n\n'
            '[struct.Outer]\nlibrary = "cudart"\nsince = "12.8"\nsize = 24\nfields = [\n'
            '    "struct Inner inner",\n'
            '    { declaration = "word_t w", member = "u.w" },\n'
            '    "Shape s[2]",\n]\n\n'
            '[struct.Odd]\nlibrary = "cudart"\nsince = "12.8"\n\n'
            '[function.cudaOdd]\nlibrary = "cudart"\nreturns = "int"\n'
            'summary = "Does an odd thing"\n'
            'page = "https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__ODD.html"\n\n'
            '[[function.cudaOdd.variant]]\nsince = "12.8"\nbefore = "13.0"\n'
            'reason = "first release that kvsig knows"\nparams = [\n'
            '    "hook_t hook",\n    "const struct Outer *outer",\n    "struct Odd *odd",\n'
            '    "int *list",\n]\n'
        )
        pasted = registry.parse(paste(SMALL, proposal.text))
        results = headers.check(pasted, found)
        assert [r for r in results if r.status == "differs"] == []

    @pytest.mark.parametrize(
        ("changes", "edits", "notes"),
        [
            # Removed in the middle of a range.
            (
                (
                    "CUDART_VERSION 12080",
                    "CUDART_VERSION 12090",
                    "extern __host__ int cudaBatch",
                    "static int cudaGone",
                ),
                ['In [[function.cudaBatch.variant]] since 12.8: before = "12.9"'],
                [],
            ),
            # Open, and yet changed.
            (
                (
                    "CUDA_VERSION 12080",
                    "CUDA_VERSION 14000",
                    "GetProcAddress(const char *symbol)",
                    "GetProcAddress(const char *symbol, int f)",
                ),
                [
                    'In [[function.cuGetProcAddress.variant]] since 11.0: before = "14.0" in'
                    " place of open"
                ],
                [
                    "cuGetProcAddress has a new parameter f: give it a value to pass where no"
                    ' caller knows it, as { declaration = "int f", value = 0 }'
                ],
            ),
            # What the registry says of this very version is wrong.
            (
                ("size_t count, enum", "size_t number, enum"),
                [
                    "In [[function.cudaBatch.variant]] since 12.8: drop it, the header of this"
                    " version differs"
                ],
                [
                    "cudaBatch has a new parameter number: give it a value to pass where no caller"
                    ' knows it, as { declaration = "size_t number", value = 0 }'
                ],
            ),
            # A type that is there already is not changed behind your back.
            (
                ("GREEN = RED + 1", "GREEN = 5"),
                [],
                ["enum Color in CUDA 12.8: GREEN is 2 in the registry, 5 in the header"],
            ),
            # No form in the registry.
            (
                (
                    "CUDART_VERSION 12080",
                    "CUDART_VERSION 12090",
                    "struct Pair pair, cudaStream_t s)",
                    "struct Pair pair, int (*f)(int))",
                ),
                [],
                [
                    "cudaBatch in CUDA 12.9: parameter 4, int (*f)(int), is a pointer to a"
                    " function, which only an alias can stand for",
                    "function cudaBatch in CUDA 12.9: the types of the two prototypes differ",
                ],
            ),
        ],
    )
    def test_what_is_told(
        self,
        small: Checker,
        tmp_path: Path,
        changes: tuple[str, ...],
        edits: list[str],
        notes: list[str],
    ) -> None:
        small(*changes)
        table = registry.parse(SMALL)
        found = headers.read(tmp_path, table, fresh=True)
        proposal = proposals.propose(table, [found])
        assert proposal.edits == edits
        assert list(proposal.notes[1:]) == notes
