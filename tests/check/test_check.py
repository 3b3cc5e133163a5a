"""The header check: real releases, mutations of the registry, and small headers of its own."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cuda_headers import REGISTRY, SMALL, Checker, expected, header, run, small_headers

from kvsig import registry
from kvsig.check import headers, releases
from kvsig.cli import check as command
from kvsig.registry import CType, Function, Param, Variant
from kvsig.tools.report import Progress

ROOT = Path(__file__).parents[2]
TEXT = registry.PATH.read_text()


def differing(results: list[headers.Result]) -> set[str]:
    return {r.name for r in results if r.status == "differs"}


# --- Real releases -------------------------------------------------------------------------------


@pytest.mark.releases
class TestReleases:
    @pytest.mark.parametrize("release", REGISTRY.verified)
    def test_the_registry_agrees_with_every_verified_release(self, release: str) -> None:
        results = headers.check(REGISTRY, header(release))
        assert [(r.name, r.problems) for r in results if r.status == "differs"] == []
        wanted = {(r.name, r.status, r.since) for r in expected(REGISTRY, release)}
        found = {(r.name, r.status, r.since) for r in results if r.kind != "alias"}
        assert found == wanted

    def test_every_variant_and_type_is_seen_by_some_release(self) -> None:
        seen: set[tuple[str, int | None]] = set()
        for release in REGISTRY.verified:
            results = headers.check(REGISTRY, header(release))
            seen |= {(r.name, r.since) for r in results if r.status == "agrees"}
        for function in REGISTRY.functions.values():
            for variant in function.variants:
                if not is_elsewhere(function.library):
                    assert (function.name, variant.since) in seen
        names = {name for name, _ in seen}
        types = {**REGISTRY.structs, **REGISTRY.enums}
        here = {name for name, entry in types.items() if not is_elsewhere(entry.library)}
        elsewhere = {"nvrtcProgram"}  # an alias, which names no library
        assert here | (set(REGISTRY.aliases) - elsewhere) <= names

    def test_the_command_prints_the_table_and_writes_the_matrix(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Progress, "INTERVALS", (0, 0))
        chosen = ["12.9.79", "13.0.96"]
        for release in chosen:
            header(release)
        page = tmp_path / "releases.md"
        assert run("--releases", *chosen, "--matrix", str(page)) == 0
        captured = capsys.readouterr()
        assert re.search(r"^cudaMemcpyBatchAsync +12\.8 +13\.0$", captured.out, re.MULTILINE)
        assert "2 releases checked: the registry agrees" in captured.out
        assert re.fullmatch(
            r"kvsig check: 1 of 2 after \d+ s, read CUDA 12.9.79\n"
            r"kvsig check: 2 of 2 after \d+ s, read CUDA 13.0.96\n",
            captured.err,
        )
        wanted = [(release, expected(REGISTRY, release)) for release in chosen]
        assert page.read_text() == command.markdown(wanted)


def is_elsewhere(library: str) -> bool:
    """Whether a library's header is in a package of its own, which no release folder has."""
    return REGISTRY.libraries[library].optional


TEXT_MUTATIONS = [
    # entry, old, new, release
    ("function.cudaMemcpyBatchAsync", "const void *const *srcs", "const void **srcs", "13.0.96"),
    ("function.cudaMemcpyBatchAsync", '"void *const *dsts"', '"void **dsts"', "13.5.37"),
    ("function.cudaMemcpyBatchAsync", '"void **srcs"', '"const void **srcs"', "12.8.57"),
    ("function.cudaMemcpyBatchAsync", '"size_t *attrsIdxs",\n', "", "12.9.79"),
    ("function.cudaMemcpyBatchAsync", '"size_t numAttrs"', '"unsigned int numAttrs"', "12.9.79"),
    ("function.cudaMemcpyBatchAsync", 'since = "12.8"', 'since = "12.9"', "12.8.90"),
    ("function.cudaMemcpyBatchAsync", 'since = "12.8"', 'since = "12.6"', "12.6.77"),
    (
        "function.cudaGraphKernelNodeCopyAttributes",
        '    "cudaGraphNode_t hSrc",\n    "cudaGraphNode_t hDst",',
        '    "cudaGraphNode_t hDst",\n    "cudaGraphNode_t hSrc",',
        "12.9.79",
    ),
    (
        "function.cudaStreamGetCaptureInfo",
        'symbol = "cudaStreamGetCaptureInfo_v2"\n',
        "",
        "12.6.77",
    ),
    (
        "function.cuGetProcAddress",
        'symbol = "cuGetProcAddress_v2"',
        'symbol = "cuGetProcAddress_v3"',
        "13.0.96",
    ),
    ("function.cudaGetErrorName", '"const char *"', '"char *"', "13.0.96"),
    ("function.cudaMemsetAsync", '"int value"', '"unsigned value"', "13.0.96"),
    ("function.cudaMemsetAsync", '"size_t count"', '"size_t counts"', "13.0.96"),
    ("function.cudaMemcpyWithAttributesAsync", 'since = "13.2"', 'since = "13.1"', "13.1.80"),
    ("struct.cudaMemcpyAttributes", '"unsigned int flags"', '"unsigned char flags"', "13.0.96"),
    ("struct.cudaMemcpyAttributes", '"unsigned int flags"', '"int flags"', "13.0.96"),
    ("struct.cudaMemcpyAttributes", "size = 24", "size = 32", "12.8.57"),
    (
        "struct.cudaMemcpyAttributes",
        '"struct cudaMemLocation srcLocHint",\n    "struct cudaMemLocation dstLocHint"',
        '"struct cudaMemLocation dstLocHint",\n    "struct cudaMemLocation srcLocHint"',
        "13.0.96",
    ),
    ("struct.cudaMemcpyAttributes", 'since = "12.8"', 'since = "12.9"', "12.8.57"),
    ("struct.cudaExtent", '"size_t depth"', '"size_t deep"', "11.8.89"),
    ("struct.cudaMemcpy3DOperand", "op.ptr.layerHeight", "op.ptr.rowLength", "13.0.96"),
    ("struct.cudaPointerAttributes", '"int device"', '"long device"', "11.8.89"),
    ("struct.cudaPointerAttributes", '"void *hostPointer"', '"void *hostPtr"', "13.5.37"),
    ("enum.cudaMemcpyKind", "cudaMemcpyDefault = 4", "cudaMemcpyDefault = 5", "13.0.96"),
    ("enum.cudaMemcpyKind", "cudaMemcpyHostToHost = 0", "cudaMemcpyHostToHosts = 0", "13.0.96"),
    ("enum.cudaError_t", "NotSupported = 801", "NotSupported = 800", "11.8.89"),
    ("enum.cudaMemcpyFlags", 'since = "12.8"\n', "", "12.6.77"),
    ("enum.cudaMemcpyFlags", 'since = "12.8"', 'since = "13.0"', "12.8.90"),
    ("alias", 'cuuint64_t = "unsigned long"', 'cuuint64_t = "unsigned int"', "13.0.96"),
    ("alias", 'cudaEvent_t = "void *"', 'cudaEvent_t = "int"', "13.0.96"),
]


def mutate(entry: str, old: str, new: str) -> str:
    """Change one thing of one entry in the text of the TOML."""
    start = TEXT.index(f"[{entry}]\n")
    place = TEXT.index(old, start)
    next_entry = re.compile(rf"^\[+(?!\[|{re.escape(entry)}\b)", re.MULTILINE)
    following = next_entry.search(TEXT, start + 1)
    assert following is None or place < following.start(), f"{old} is not in {entry}"
    return TEXT[:place] + new + TEXT[place + len(old) :]


@pytest.mark.releases
class TestMutations:
    @pytest.mark.parametrize(("entry", "old", "new", "release"), TEXT_MUTATIONS)
    def test_one_change_of_the_toml_is_found(
        self, entry: str, old: str, new: str, release: str
    ) -> None:
        changed = registry.parse(mutate(entry, old, new))
        name = new.split()[0] if entry == "alias" else entry.partition(".")[2]
        assert differing(headers.check(changed, header(release))) == {name}

    @pytest.mark.parametrize("release", ["11.8.89", "12.6.77", "12.9.79", "13.5.37"])
    def test_every_single_change_of_every_prototype_is_found(self, release: str) -> None:
        found = header(release)
        rounds: list[dict[str, Function]] = []
        for function in REGISTRY.functions.values():
            if is_elsewhere(function.library):
                continue
            version = found.versions[function.library]
            variant = function.select(version)
            if variant is None or (variant.pinned and variant.pinned // 1000 < version // 1000):
                continue
            for index, changed in enumerate(mutations(function, variant)):
                if index == len(rounds):
                    rounds.append({})
                rounds[index][function.name] = changed
        assert len(rounds) > 30
        for number, wrong in enumerate(rounds):
            table = replace(REGISTRY, functions={**REGISTRY.functions, **wrong})
            assert differing(headers.check(table, found)) == set(wrong), f"round {number}"


def mutations(function: Function, variant: Variant) -> Iterator[Function]:
    """Copies of a function that differ in one thing of one variant."""

    def changed(**parts: object) -> Function:
        other = replace(variant, **parts)
        variants = tuple(other if v is variant else v for v in function.variants)
        return replace(function, variants=variants)

    def param(ctype: CType, name: str) -> Param:
        return Param(f"{ctype} {name}", name, ctype)

    yield changed(symbol=f"{variant.symbol}_v9")
    yield changed(since=99000, before=100000)
    yield replace(function, returns=CType("int"))
    yield changed(params=(*variant.params, param(CType("int"), "extra")))
    params = variant.params
    for index, old in enumerate(params):
        before, after = params[:index], params[index + 1 :]
        yield changed(params=before + after)
        yield changed(params=(*before, param(old.type, f"{old.name}_"), *after))
        deeper = replace(old.type, pointers=(*old.type.pointers, False))
        yield changed(params=(*before, param(deeper, old.name), *after))
        if after:
            yield changed(params=(*before, after[0], old, *after[1:]))
        if old.type.pointers:
            other = replace(old.type, const=not old.type.const)
            yield changed(params=(*before, param(other, old.name), *after))
            shallower = replace(old.type, pointers=old.type.pointers[:-1])
            if shallower.base != "void" or shallower.pointers:
                yield changed(params=(*before, param(shallower, old.name), *after))
        # The constness of the last pointer is the parameter's own, which no caller sees.
        for level in range(len(old.type.pointers) - 1):
            levels = list(old.type.pointers)
            levels[level] = not levels[level]
            other = replace(old.type, pointers=tuple(levels))
            yield changed(params=(*before, param(other, old.name), *after))


# --- The page of the documentation ---------------------------------------------------------------


@pytest.mark.checkout
def test_the_matrix_in_the_docs_is_current() -> None:
    wanted = [(release, expected(REGISTRY, release)) for release in REGISTRY.verified]
    page = (ROOT / "docs/releases.md").read_text()
    assert page == command.markdown(wanted), (
        "docs/releases.md is old: python -m kvsig check --releases --matrix docs/releases.md"
    )


# --- Small headers of our own: what is said, word for word ----------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Checker:
    return small_headers(tmp_path)


class TestSmallHeaders:
    def test_everything_agrees_or_is_rightly_absent(self, small: Checker) -> None:
        found = small()
        assert {r.name: r.problems for r in found.values() if r.problems} == {}
        absent = {r.name for r in found.values() if r.status == "absent"}
        assert absent == {"Late", "cudaNothing"}
        assert {r.status for r in found.values()} == {"agrees", "absent"}
        assert found["cudaBatch"].since == 12080
        assert (
            found["cudaBatch"].header
            == found["cudaBatch"].registry
            == (
                "int cudaBatch(void **dsts, size_t count, enum Color color, struct Pair pair,"
                " cudaStream_t s)"
            )
        )

    def test_pinned_function_is_not_compared_after_its_major(self, small: Checker) -> None:
        changes = ("CUDA_VERSION 12080", "CUDA_VERSION 13000", "cuBatch(size_t", "cuBatch(long")
        assert small(*changes)["cuBatch"].status == "pinned"
        assert small("cuBatch(size_t", "cuBatch(long")["cuBatch"].problems == (
            "the types of the two prototypes differ",
        )

    def test_library_without_header_is_not_checked(self, small: Checker) -> None:
        found = small(driver=False)
        assert {r.name for r in found.values() if r.status == "unchecked"} == {
            "cuDriverGetVersion",
            "cuGetProcAddress",
            "cuBatch",
        }

    @pytest.mark.parametrize(
        ("name", "changes", "problems"),
        [
            (
                "cudaBatch",
                ("void **dsts", "void *const *dsts"),
                ["the types of the two prototypes differ"],
            ),
            (
                "cudaBatch",
                ("size_t count, enum", "size_t number, enum"),
                ["parameter 1 is named count in the registry, number in the header"],
            ),
            (
                "cudaBatch",
                (", cudaStream_t s)", ")"),
                [
                    "the registry has 5 parameters, the header 4",
                    "the types of the two prototypes differ",
                ],
            ),
            (
                "cudaBatch",
                ("static inline", "#define cudaBatch cudaBatch_ptsz\nstatic inline"),
                ["the header does not declare the function"],
            ),
            (
                "cudaBatch",
                ("extern __host__ int cudaBatch", "#define cudaBatch cudaBatch_v2\nint cudaBatch"),
                [
                    "the registry takes the symbol cudaBatch, but the header maps cudaBatch to"
                    " cudaBatch_v2"
                ],
            ),
            (
                "cudaNothing",
                ("static inline", "const char *cudaNothing(void);\nstatic inline"),
                ["the registry has no variant for 12.8, but the header declares the function"],
            ),
            (
                "cuGetProcAddress",
                ("int cuGetProcAddress(const char *symbol);", ""),
                ["the header does not declare the function"],
            ),
            (
                "Color",
                ("GREEN = RED + 1", "GREEN = RED + 2"),
                ["GREEN is 2 in the registry, 3 in the header"],
            ),
            (
                "Color",
                ("GREEN = RED + 1, BLUE", "BLUE = 3"),
                ["the header's enum has no constant GREEN"],
            ),
            (
                "Late",
                ("struct Hidden;", "enum Late { LATE = 7 };"),
                ["the registry says that the enum begins with 13.0, but the header of 12.8 has it"],
            ),
            (
                "Pair",
                ("{ int first; void *second; }", "{ void *second; int first; }"),
                [
                    "field first is at another offset in the header, which has first at byte 8",
                    "field second is at another offset in the header, which has second at byte 0",
                ],
            ),
            (
                "Pair",
                ("int first;", "unsigned first;"),
                ["field first: 'int first' is not the type that the header gives first"],
            ),
            (
                "Nested",
                ("char tail[4]", "char tail[12]"),
                [
                    "the registry says 24 bytes, the header 32",
                    "field tail: 'char tail[4]' is not the type that the header gives tail",
                ],
            ),
            (
                "Nested",
                ("int id;", "int ident;"),
                ["field id: the header has no u.id"],
            ),
            (
                "Grown",
                ("{ void *base; }", "{ void *base; long room[3]; }"),
                ["the registry says 24 bytes, the header 32"],
            ),
            (
                "Hidden",
                ("struct Hidden;", "", "struct Hidden { int x; };", ""),
                ["the header has no such struct"],
            ),
            (
                "handle_t",
                ("typedef unsigned long", "typedef long"),
                ["the registry says unsigned long, the header long"],
            ),
        ],
    )
    def test_a_difference_is_named(
        self, small: Checker, name: str, changes: tuple[str, ...], problems: list[str]
    ) -> None:
        found = small(*changes)
        assert {r.name: list(r.problems) for r in found.values() if r.status == "differs"} == {
            name: problems
        }

    def test_several_differences_are_found_in_one_run(self, small: Checker) -> None:
        found = small("void **dsts", "int *dsts", "GREEN = RED + 1", "GREEN = 9")
        assert differing(list(found.values())) == {"cudaBatch", "Color"}


class TestCommand:
    @pytest.fixture
    def folder(self, small: Checker, tmp_path: Path) -> Path:
        small()
        (tmp_path / "small.toml").write_text(SMALL)
        return tmp_path

    def test_agreement_is_exit_code_0(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(str(folder), "--registry", str(folder / "small.toml")) == 0
        out = capsys.readouterr().out
        assert "1 release checked: the registry agrees" in out
        assert re.search(r"^cudaBatch +12\.8$", out, re.MULTILINE)
        assert re.search(r"^cudaNothing +-$", out, re.MULTILINE)

    def test_a_difference_is_exit_code_1_with_both_prototypes(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        table = folder / "small.toml"
        table.write_text(SMALL.replace('"size_t count", "enum', '"int count", "enum'))
        page = folder / "page.md"
        header_file = str(folder / "cuda_runtime_api.h")
        assert run(header_file, "--registry", str(table), "--matrix", str(page)) == 1
        out = capsys.readouterr().out
        assert out.startswith(
            "DIFFERS: function cudaBatch in CUDA 12.8, variant from 12.8\n"
            "  the types of the two prototypes differ\n"
            "    registry            header\n"
            "    int cudaBatch(      int cudaBatch(\n"
            "      void **dsts         void **dsts\n"
            "  !   int count           size_t count\n"
        )
        assert "1 release checked: 1 difference, shown above" in out
        assert not page.exists()

    def test_json(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(str(folder), "--registry", str(folder / "small.toml"), "--json") == 0
        data = json.loads(capsys.readouterr().out)
        assert data["differences"] == 0
        (one,) = data["releases"]
        assert one["release"] == "12.8" and one["versions"] == {"cudart": 12080, "cuda": 12080}
        batch = next(r for r in one["results"] if r["name"] == "cudaBatch")
        assert (batch["status"], batch["since"], batch["problems"]) == ("agrees", 12080, [])

    def test_folder_without_headers(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(str(tmp_path)) == 2
        assert capsys.readouterr().err == (
            f"kvsig check: {tmp_path} has no cuda_runtime_api.h; give a folder of CUDA headers,"
            " such as /usr/local/cuda/include\n"
        )

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["/nowhere"], "/nowhere is not there; give a folder of CUDA headers"),
            (["nowhere"], "nowhere is not there; give a folder of CUDA headers"),
            (["--releases", "abc"], "'abc' is not a release; give three numbers"),
            (["--releases", "13.0"], "'13.0' is not a release; give three numbers"),
            (["--releases", "13.0.96", "13.x"], "'13.x' is not a release; give three numbers"),
            (["--releases", "13.0.96", "/nowhere"], "/nowhere is not there; give a folder"),
            (["--propose", "--releases", "13.0", "cudaFree"], "'13.0' is not a release"),
            (["--registry", "/nowhere.toml", "--releases"], "No such file or directory"),
        ],
    )
    def test_wrong_arguments_are_told_before_anything_is_read(
        self,
        arguments: list[str],
        text: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for name in ("fetch", "include", "crt"):
            monkeypatch.setattr(releases, name, None)
        assert run(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("kvsig check: ") and text in captured.err

    def test_no_headers_given(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert run() == 2
        assert f"{tmp_path} has no cuda_runtime" in capsys.readouterr().err

    def test_header_without_version(self, small: Checker, tmp_path: Path) -> None:
        with pytest.raises(headers.HeaderError) as caught:
            small("#define CUDART_VERSION 12080", "")
        assert str(caught.value) == (
            f"{tmp_path / 'cuda_runtime_api.h'} does not define CUDART_VERSION"
        )

    def test_header_that_does_not_compile(self, small: Checker, tmp_path: Path) -> None:
        with pytest.raises(headers.HeaderError, match="nonsense.h"):
            small("#include <stddef.h>", "#include <nonsense.h>")
        with pytest.raises(headers.HeaderError, match="error: unknown type name 'nonsense'"):
            small("struct Hidden;", "nonsense x;")

    def test_common_header_is_missing(self, small: Checker, tmp_path: Path) -> None:
        small()
        (tmp_path / "crt/host_defines.h").unlink()
        with pytest.raises(headers.HeaderError) as caught:
            headers.read(tmp_path, registry.parse(SMALL), fresh=True)
        assert str(caught.value) == (
            f"{tmp_path} has no crt/host_defines.h, which its headers include; it comes with a"
            " CUDA toolkit and with the wheel nvidia-cuda-crt"
        )

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", "no-such-compiler -m64")
        with pytest.raises(headers.HeaderError) as caught:
            headers.compiler()
        assert str(caught.value) == (
            "the header check needs a C compiler: CC names 'no-such-compiler', which is not there;"
            " install one or set CC"
        )
        monkeypatch.setenv("CC", "")
        monkeypatch.setenv("PATH", "")
        with pytest.raises(headers.HeaderError, match="no cc, gcc or clang; install one or set CC"):
            headers.compiler()


class TestNothingRuns:
    @pytest.mark.known_failure("header-runs")
    @pytest.mark.parametrize(
        "hook",
        [
            "__attribute__((constructor)) static void hook(void)",
            "__attribute__((destructor)) static void hook(void)",
            'static void hook(void);\n__attribute__((section(".init_array"), used))'
            " static void (*entry)(void) = hook;\nstatic void hook(void)",
            'static void hook(void);\n__attribute__((section(".preinit_array"), used))'
            " static void (*entry)(void) = hook;\nstatic void hook(void)",
        ],
    )
    def test_a_header_with_code_of_its_own(self, small: Checker, tmp_path: Path, hook: str) -> None:
        trace = tmp_path / "trace"
        text = f'#include <stdio.h>\n{hook} {{ FILE *f = fopen("{trace}", "w"); fclose(f); }}\n'
        # Values are read where something differs, and for what is proposed.
        found = small("static inline", f"{text}static inline", "GREEN = RED + 1", "GREEN = 7")
        assert found["Color"].problems == ("GREEN is 2 in the registry, 7 in the header",)
        table = registry.parse(SMALL)
        header = headers.read(tmp_path, table)
        wanted = ["GREEN", "sizeof(struct Pair)", "-1", "(long long)1 << 62"]
        assert header.values(wanted) == [7, 16, -1, 1 << 62]
        assert header.values([]) == []
        assert not trace.exists()

    def test_a_value_that_only_a_program_knows_is_refused(
        self, small: Checker, tmp_path: Path
    ) -> None:
        small("static inline", "int now(void);\nstatic inline")
        header = headers.read(tmp_path, registry.parse(SMALL))
        with pytest.raises(headers.HeaderError, match="error: initializer element is not"):
            header.values(["now()"])

    def test_no_object_file(self) -> None:
        with pytest.raises(headers.HeaderError, match="does not write 64-bit ELF files"):
            headers.section(b"no ELF file", ".x")
        with pytest.raises(headers.HeaderError, match="wrote no section .x"):
            headers.section(Path(os.path.realpath("/proc/self/exe")).read_bytes(), ".x")


# --- Fetching ------------------------------------------------------------------------------------


class TestReleasesFolder:
    def test_cache_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("KVSIG_RELEASES_CACHE", str(tmp_path / "mine"))
        assert releases.cache() == tmp_path / "mine"
        monkeypatch.delenv("KVSIG_RELEASES_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert releases.cache() == tmp_path / "kvsig/releases"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert releases.cache() == tmp_path / ".cache/kvsig/releases"

    @pytest.mark.parametrize(
        ("release", "name"),
        [
            ("11.8.89", "nvidia-cuda-runtime-cu11"),
            ("12.9.79", "nvidia-cuda-runtime-cu12"),
            ("13.0.96", "nvidia-cuda-runtime"),
            ("14.0.1", "nvidia-cuda-runtime"),
        ],
    )
    def test_package(self, release: str, name: str) -> None:
        assert releases.package(release) == name

    @pytest.mark.parametrize("release", ["13.0", "13", "../13.0.1", "13.0.1.2", ""])
    def test_no_release(self, release: str) -> None:
        with pytest.raises(releases.ReleaseError) as caught:
            releases.ensure([release])
        assert str(caught.value) == (
            f'{release!r} is not a release; give three numbers, such as "12.8.90"'
        )

    def test_what_is_in_the_cache_needs_no_network(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("KVSIG_RELEASES_CACHE", str(tmp_path))
        for part in ("13.9.1/include/cuda_runtime_api.h", "13.9.1/lib/libcudart.so.13"):
            (tmp_path / part).parent.mkdir(parents=True)
            (tmp_path / part).touch()
        monkeypatch.setattr(releases, "_download", None)
        seen: list[str] = []
        assert releases.ensure(["13.9.1"], seen.append) == {"13.9.1": tmp_path / "13.9.1"}
        assert seen == ["13.9.1"]
        assert releases.library("13.9.1") == tmp_path / "13.9.1/lib/libcudart.so.13"
        (tmp_path / "13.9.1/lib/libcudart.so.13").unlink()
        with pytest.raises(releases.ReleaseError, match="has no lib/libcudart.so; delete it and"):
            releases.library("13.9.1")

    def test_without_network_the_error_names_the_release(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("KVSIG_RELEASES_CACHE", str(tmp_path))
        # Nothing listens at this address: what a machine without a network answers.
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PIP_RETRIES", "0")
        with pytest.raises(releases.ReleaseError) as caught:
            releases.fetch("13.0.96")
        assert str(caught.value) == (
            "cannot fetch CUDA runtime 13.0.96 (wheel nvidia-cuda-runtime==13.0.96): the package"
            " index cannot be reached; connect to the network, or unpack the wheel's include and"
            f" lib into {tmp_path / '13.0.96'}"
        )
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.known_failure("unhashed-wheels")
    def test_a_wheel_of_another_content_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("KVSIG_RELEASES_CACHE", str(tmp_path / "cache"))
        name = next(n for n in REGISTRY.sha256 if n.startswith("nvidia_cuda_runtime-13.0.96"))

        def download(package: str, release: str, folder: Path) -> Path:
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr("nvidia/cu13/include/cuda_runtime_api.h", "int x;")
            return folder / name

        monkeypatch.setattr(releases, "_download", download)
        with pytest.raises(releases.ReleaseError) as caught:
            releases.fetch("13.0.96")
        text = str(caught.value)
        assert text.startswith(f"{name} was refused: its SHA-256 is ")
        assert f"and [sha256] of the registry says {REGISTRY.sha256[name]}" in text
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_wheel_that_the_registry_does_not_know_is_told(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("KVSIG_RELEASES_CACHE", str(tmp_path / "cache"))
        name = "nvidia_cuda_runtime-99.0.1-py3-none-any.whl"

        def download(package: str, release: str, folder: Path) -> Path:
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr("nvidia/cu99/include/cuda_runtime_api.h", "int x;")
            return folder / name

        monkeypatch.setattr(releases, "_download", download)
        assert (releases.include("99.0.1") / "cuda_runtime_api.h").read_text() == "int x;"
        told = capsys.readouterr().err
        assert re.fullmatch(
            rf"kvsig: \[sha256\] of the registry does not know {re.escape(name)}; it is"
            r" [0-9a-f]{64}\n",
            told,
        )

    def test_every_verified_release_has_hashes(self) -> None:
        for release in REGISTRY.verified:
            stem = f"{releases.package(release).replace('-', '_')}-{release}-"
            found = {n for n in REGISTRY.sha256 if n.startswith(stem)}
            assert {m for m in ("x86_64", "aarch64") for n in found if m in n} == {
                "x86_64",
                "aarch64",
            }, f"{release}: add the SHA-256 of its wheels to [sha256]"
