"""The generated callers: the type that holds all values, layouts proven, nothing but names."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from generated import build, check_glue, load
from test_registry import SMALL, changed

from kvsig import codegen, registry
from kvsig.registry import CType, RegistryError, parse

FUNCTION = """
[function.{name}]
library = "cudart"
returns = "int"
summary = "A function"
page = "https://example.com/"
"""
VARIANT = """
[[function.{name}.variant]]
since = "{since}.0"
before = "{before}.0"
reason = "a type"
params = [{param}]
"""


def with_types(**functions: tuple[str, ...]) -> str:
    """A registry of functions of one parameter, whose declarations follow one another."""
    text = SMALL
    for name, params in functions.items():
        text += FUNCTION.format(name=name)
        for index, param in enumerate(params):
            text += VARIANT.format(name=name, since=10 + index, before=11 + index, param=param)
    return text


# What is passed as which type, to each variant; None where it must not be called.
WIDENED = {
    "size": (('"int x"', '"size_t x"'), "long long",
             [(5, 5, 5), (-1, -1, None), (2**32 + 7, None, 2**32 + 7), (2**62, None, 2**62)]),
    "long_": (('"int x"', '"long long x"'), "long long",
              [(5, 5, 5), (-(2**40), None, -(2**40)), (2**31 - 1, 2**31 - 1, 2**31 - 1)]),
    "narrowed": (('"unsigned long long x"', '"unsigned int x"'), "unsigned long long",
                 [(2**64 - 1, 2**64 - 1, None), (2**32 - 1, 2**32 - 1, 2**32 - 1)]),
    "mixed": (('"unsigned int x"', '"int x"'), "long long",
              [(-1, None, -1), (2**32 - 1, 2**32 - 1, None), (2**31 - 1, 2**31 - 1, 2**31 - 1)]),
    "small": (('"unsigned char x"', '"short x"'), "short",
              [(255, 255, 255), (256, None, 256), (-1, None, -1)]),
    "valued": (('{ declaration = "int x", value = 0 }', '"size_t x"'), "long long",
               [(2**40, None, 2**40), (3, 3, 3)]),
}  # fmt: skip
CTYPES = {"int": ctypes.c_int, "size_t": ctypes.c_size_t, "long long": ctypes.c_longlong,
          "unsigned long long": ctypes.c_ulonglong, "unsigned int": ctypes.c_uint,
          "unsigned char": ctypes.c_ubyte, "short": ctypes.c_short}  # fmt: skip


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("widest")
    table = parse(with_types(**{name: case[0] for name, case in WIDENED.items()},
                             real=('"float x"', '"double x"')))  # fmt: skip
    code = "".join(
        f"def call_{name}({case[1]} x):\n    return {name}(x)\n" for name, case in WIDENED.items()
    )
    code += "def call_real(double x):\n    return real(x)\n"
    return load(folder, build(table, folder, code, "widest_types"))


class TestWidestType:
    @pytest.mark.known_failure("widened-parameter")
    @pytest.mark.parametrize("name", WIDENED)
    def test_a_value_arrives_whole_or_not_at_all(self, module: ModuleType, name: str) -> None:
        table = parse(with_types(**{name: WIDENED[name][0]}))
        function = table.functions[name]
        assert str(table.caller_params(function)["x"]) == WIDENED[name][1]
        slot = module.FUNCTIONS.index(name)
        for index, variant in enumerate(function.variants):
            seen: list[int] = []
            target = ctypes.CFUNCTYPE(ctypes.c_int, CTYPES[str(variant.params[0].type)])(
                lambda x, seen=seen: seen.append(x) or 0
            )
            address = ctypes.cast(target, ctypes.c_void_p).value
            module.bind(slot, address, index)
            for given, *arrived in WIDENED[name][2]:
                seen.clear()
                code = getattr(module, f"call_{name}")(given)
                wanted = arrived[index]
                assert (code, seen) == ((-1, []) if wanted is None else (0, [wanted])), variant
            module.bind(slot, 0, -1)

    def test_a_double_holds_a_float(self, module: ModuleType) -> None:
        seen: list[float] = []
        target = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_double)(lambda x: seen.append(x) or 0)
        slot = module.FUNCTIONS.index("real")
        module.bind(slot, ctypes.cast(target, ctypes.c_void_p).value, 1)
        assert module.call_real(0.1) == 0 and seen == [0.1]
        module.bind(slot, 0, -1)

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("int x", "void *x"),
            ("void *x", "size_t x"),
            ("int *x", "size_t *x"),
            ("int *x", "int **x"),
            ("int x", "struct Pair x"),
            ("struct Pair x", "struct Pair *x"),
            ("struct Pair *x", "int *x"),
            ("int x", "double x"),
            ("handle_t x", "enum Color x"),
        ],
    )
    def test_what_no_type_holds_is_refused(self, first: str, second: str) -> None:
        for one, other in ((first, second), (second, first)):
            with pytest.raises(RegistryError) as caught:
                parse(with_types(f_=(f'"{one}"', f'"{other}"')))
            (text,) = caught.value.problems
            assert text.startswith("function.f_: parameter 'x' is ")
            assert "no type holds both" in text

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("void **x", "void *const *x"),
            ("const size_t *x", "size_t *x"),
            ("handle_t x", "void *x"),
            ("enum Color x", "int x"),
            ("enum Color *x", "int *x"),
            ("struct Pair x", "struct Pair x"),
        ],
    )
    def test_what_is_alike_but_for_const_is_one(self, first: str, second: str) -> None:
        table = parse(with_types(f_=(f'"{first}"', f'"{second}"')))
        assert list(table.caller_params(table.functions["f_"])) == ["x"]

    def test_the_registry_itself_needs_no_guard(self) -> None:
        text = codegen.cython_text(registry.load())
        assert "!= " not in text.replace("result != NULL", "")


class TestLayout:
    @pytest.mark.parametrize(
        ("old", "new", "text"),
        [
            ("size = 8", "size = 16", "signatures.toml: size of struct Pair is not what its"),
            ('["int a", "int b"]', '["int a", "double b"]', "size of struct Pair is not what its"),
        ],
    )
    @pytest.mark.checkout
    def test_a_wrong_size_is_no_emulated_runtime(self, old: str, new: str, text: str) -> None:
        with pytest.raises(AssertionError, match=text):
            check_glue(parse(changed(old, new)), 12080)

    def test_a_wrong_size_is_no_extension(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="signatures.toml: size of struct Pair is not what"):
            build(parse(changed("size = 8", "size = 16")), tmp_path)

    @pytest.mark.checkout
    def test_a_wrong_offset_breaks_the_build(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = registry.Registry.offsets

        def wrong(self: registry.Registry, struct: str) -> list[tuple[int, int]]:
            return [(at + 4, size) for at, size in right(self, struct)]

        monkeypatch.setattr(registry.Registry, "offsets", wrong)
        with pytest.raises(AssertionError, match="signatures.toml: struct Pair: offset of a"):
            check_glue(parse(SMALL), 12080)

    def test_sizes_are_those_of_the_file(self) -> None:
        table = registry.load()
        for struct in table.structs.values():
            if not struct.opaque:
                assert table.layout(CType(struct.name))[0] == struct.size

    @pytest.mark.checkout
    def test_a_struct_may_stand_before_what_it_holds(self) -> None:
        outer = '[struct.Outer]\nlibrary = "cudart"\nsize = 8\nfields = ["struct Pair pair"]\n\n'
        table = parse(changed("[struct.Pair]", f"{outer}[struct.Pair]"))
        check_glue(table, 12080)
        assert [s.name for s in table.ordered_structs()] == ["Pair", "Outer", "Opaque"]


BAD = 'x"\nimport os\n"'


def renamed(table: registry.Registry, **parts: object) -> registry.Registry:
    function = dataclasses.replace(table.functions["f"], **parts)  # type: ignore[arg-type]
    return dataclasses.replace(table, functions={**table.functions, function.name: function})


def variant(table: registry.Registry, **parts: object) -> registry.Registry:
    (one,) = table.functions["f"].variants
    return renamed(table, variants=(dataclasses.replace(one, **parts),))  # type: ignore[arg-type]


def first_param(table: registry.Registry, **parts: object) -> registry.Registry:
    (one,) = table.functions["f"].variants
    param = dataclasses.replace(one.params[0], **parts)  # type: ignore[arg-type]
    return variant(table, params=(param,))


class TestOnlyNamesTypesAndNumbers:
    """A registry that no reader has seen does not become source either."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda t: dataclasses.replace(t, digest=BAD),
            lambda t: renamed(t, name=BAD),
            lambda t: renamed(t, name="memset"),
            lambda t: renamed(t, returns=CType(BAD)),
            lambda t: variant(t, symbol=BAD),
            lambda t: first_param(t, name=BAD),
            lambda t: first_param(t, name="x\n"),
            lambda t: first_param(t, name="\u0445"),
            lambda t: first_param(t, type=CType("int\n#error")),
            lambda t: first_param(t, type=CType("struct Nothing")),
            lambda t: first_param(t, value=BAD),
            lambda t: first_param(t, value=2**64),
            lambda t: first_param(t, value=1.5),
            lambda t: dataclasses.replace(
                t, enums={"Color": dataclasses.replace(t.enums["Color"], constants={BAD: 1})}
            ),
            lambda t: dataclasses.replace(
                t, enums={"Color": dataclasses.replace(t.enums["Color"], constants={"RED": BAD})}
            ),
            lambda t: dataclasses.replace(
                t, structs={**t.structs, BAD: dataclasses.replace(t.structs["Pair"], name=BAD)}
            ),
            lambda t: dataclasses.replace(
                t, structs={"Pair": dataclasses.replace(t.structs["Pair"], size=BAD)}
            ),
        ],
    )
    def test_it_is_refused(self, change: Callable[[registry.Registry], registry.Registry]) -> None:
        table = change(parse(SMALL))
        with pytest.raises(codegen.GenerationError):
            codegen.cython_text(table)
            codegen.emulated_glue(table, 12080)

    @pytest.mark.known_failure("text-becomes-code")
    def test_no_free_text_is_written(self) -> None:
        text = SMALL
        for index, old in enumerate(("first", "always the same", "A function", "Version")):
            text = text.replace(f'"{old}"', f'"freetext{index}"')
        text = text.replace("example.com", "freetext.example")
        table = parse(text)
        for written in (codegen.cython_text(table), codegen.emulated_glue(table, 12080)):
            assert "freetext" not in written
            assert written.isascii() and "\\" not in written and "\r" not in written


class TestByHand:
    """``python kvsig/codegen.py`` shows what the build makes."""

    def test_prints(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert codegen.main([]) == 0
        assert capsys.readouterr().out == codegen.cython_text(registry.load()) + "\n"

    def test_writes_what_changed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["--glue", "12.9", "--output", str(tmp_path / "glue.c")]
        assert codegen.main(arguments) == codegen.main(arguments) == 0
        assert capsys.readouterr().out == f"wrote {tmp_path / 'glue.c'}\n"  # once
        glue = codegen.emulated_glue(registry.load(), 12090)
        assert (tmp_path / "glue.c").read_text() == glue

    def test_a_wrong_registry(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert codegen.main(["--registry", str(tmp_path / "none.toml")]) == 1
        assert "none.toml" in capsys.readouterr().err
