"""The reader of ``signatures.toml``: what it gives, and every error word for word."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from kvsig import registry
from kvsig.check import registry_text
from kvsig.registry import CType, RegistryError, parse

SMALL = """\
verified = ["12.9.79"]

[library.cudart]
header = "cuda_runtime_api.h"
soname = "libcudart.so"
version = "version"

[alias]
handle_t = "void *"

[enum.Color]
library = "cudart"
constants = { RED = 1, GREEN = 2 }

[struct.Pair]
library = "cudart"
size = 8
fields = ["int a", "int b"]

[struct.Opaque]
library = "cudart"

[function.version]
library = "cudart"
returns = "int"
summary = "Version"
page = "https://example.com/"

[[function.version.variant]]
since = "11.0"
open = "always the same"
reason = "first"
params = ["int *out"]

[function.f]
library = "cudart"
returns = "int"
summary = "A function"
page = "https://example.com/"

[[function.f.variant]]
since = "12.8"
before = "13.0"
reason = "first"
params = ["int x", "const void *p"]
"""

SECOND = """
[[function.f.variant]]
since = "13.0"
before = "14.0"
reason = "second"
params = ["int x"]
"""


def problems(text: str) -> list[str]:
    with pytest.raises(RegistryError) as caught:
        parse(text, "small.toml")
    return list(caught.value.problems)


def changed(*changes: str) -> str:
    text = SMALL
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in text, old
        text = text.replace(old, new)
    return text


def with_param(item: str) -> str:
    """The small registry with another first parameter of ``f``."""
    return changed('params = ["int x", "const void *p"]', f"params = [{item}]")


FUNCTION_KEYS = "library, returns, summary, page, variant, stands_in_for, result"
VARIANT_KEYS = "since, before, params, reason, open, symbol, pinned"
V0 = "function.f.variant[0]"
P0 = f"{V0}.params[0]"

ERRORS = {
    # The file
    "not TOML": (
        "[function", "file: not TOML: Expected ']' at the end of a table declaration"
        " (at end of document)",
    ),
    "unknown section": (
        changed("[alias]", "[aliases]"),
        "aliases: unknown key; use one of: verified, sha256, library, alias, enum, struct,"
        " function",
    ),
    "no library": (
        "[function]\n", "library: missing key; add it",
    ),
    "section is no table": (
        'library = 1\n[function]\n', "library: must be a table, not 1",
    ),
    "alias section is no table": (
        'alias = 1\n' + changed('[alias]\nhandle_t = "void *"\n', ""),
        "alias: must be a table, not 1",
    ),
    "verified is no list": (
        changed('verified = ["12.9.79"]', 'verified = "12.9.79"'),
        'verified: must be a list of releases, such as "12.8.90", not \'12.9.79\'',
    ),
    "verified release of two numbers": (
        changed('"12.9.79"', '"12.9"'),
        'verified: must be a list of releases, such as "12.8.90", not [\'12.9\']',
    ),
    # Libraries
    "library lacks its soname": (
        changed('soname = "libcudart.so"\n', ""), "library.cudart.soname: missing key; add it",
    ),
    "library has an unknown key": (
        changed("soname = ", 'path = "x"\nsoname = '),
        "library.cudart.path: unknown key; use one of: header, soname, version, lookup,"
        " optional",
    ),
    "library tells its version by an unknown function": (
        changed('version = "version"', 'version = "nothing"'),
        "library.cudart.version: 'nothing' is not a function of this file; declare it",
    ),
    "library looks up by an unknown function": (
        changed('version = "version"', 'version = "version"\nlookup = "find"'),
        "library.cudart.lookup: 'find' is not a function of this file; declare it",
    ),
    # Names and texts
    "function name is not C": (
        changed("[function.f]", '[function."f-g"]', "function.f.variant", 'function."f-g".variant'),
        "function.f-g: 'f-g' is not a C name; use letters, digits and _",
    ),
    "function name is a keyword": (
        changed("[function.f]", "[function.int]", "function.f.variant", "function.int.variant"),
        "function.int: 'int' is not a C name; use letters, digits and _",
    ),
    "text is a number": (
        changed('summary = "A function"', "summary = 3"),
        "function.f.summary: must be text, not 3",
    ),
    "text is blank": (
        changed('summary = "A function"', 'summary = " "'),
        "function.f.summary: must be text, not ' '",
    ),
    # Functions
    "function is no table": (
        changed("[function.version]", "[function]\ng = 3\n[function.version]"),
        "function.g: must be a table, not 3",
    ),
    "function has an unknown key": (
        changed('summary = "A function"', 'summary = "A function"\nsumary = "x"'),
        f"function.f.sumary: unknown key; use one of: {FUNCTION_KEYS}",
    ),
    "function lacks its page": (
        changed('summary = "A function"\npage = "https://example.com/"', 'summary = "A function"'),
        "function.f.page: missing key; add it",
    ),
    "page is no link": (
        changed('"A function"\npage = "https://example.com/"', '"A function"\npage = "manual"'),
        "function.f.page: must be a link to NVIDIA's page, not 'manual'",
    ),
    "function of an unknown library": (
        changed('[function.f]\nlibrary = "cudart"', '[function.f]\nlibrary = "cublas"'),
        "function.f.library: 'cublas' is not a library; declare [library.cublas]",
    ),
    "function returns an unknown type": (
        changed('returns = "int"\nsummary = "A', 'returns = "result_t"\nsummary = "A'),
        "function.f.returns: type 'result_t' is not known; use a C type, or declare it under"
        " [struct], [enum] or [alias]",
    ),
    "function returns void": (
        changed('returns = "int"\nsummary = "A', 'returns = "void"\nsummary = "A'),
        "function.f.returns: void is no type for a value; use a pointer",
    ),
    "function returns no plain type": (
        changed('returns = "int"\nsummary = "A', 'returns = "int x"\nsummary = "A'),
        "function.f.returns: 'int x' is no plain C type; use one such as \"cudaError_t\"",
    ),
    "function without variants": (
        SMALL.partition("[[function.f.variant]]")[0] + "variant = []\n",
        "function.f.variant: must be one or more [[function.f.variant]]",
    ),
    "variant is no list": (
        SMALL.partition("[[function.f.variant]]")[0] + "variant = 3\n",
        "function.f.variant: must be one or more [[function.f.variant]]",
    ),
    "variant is no table": (
        SMALL.partition("[[function.f.variant]]")[0] + "variant = [3]\n",
        f"{V0}: must be a table, not 3",
    ),
    "stands in for nothing": (
        changed('summary = "A function"', 'summary = "A function"\nstands_in_for = "g"'),
        "function.f.stands_in_for: 'g' is not a function of this file",
    ),
    "result is no flag": (
        changed('summary = "A function"', 'summary = "A function"\nresult = 1'),
        "function.f.result: must be true or false, not 1",
    ),
    # Variants
    "variant has an unknown key": (
        changed('before = "13.0"', 'befor = "13.0"\nbefore = "13.0"'),
        f"{V0}.befor: unknown key; use one of: {VARIANT_KEYS}",
    ),
    "variant lacks its reason": (
        changed('before = "13.0"\nreason = "first"', 'before = "13.0"'),
        f"{V0}.reason: missing key; add it",
    ),
    "variant lacks its parameters": (
        changed('params = ["int x", "const void *p"]', ""), f"{V0}.params: missing key; add it",
    ),
    "variant lacks since": (
        changed('since = "12.8"\n', ""), f"{V0}.since: missing key; add it",
    ),
    "range without end": (
        changed('before = "13.0"\n', ""),
        f"{V0}.before: missing key; close the range at the next major, or give open ="
        ' "why every release can be trusted to keep it"',
    ),
    "open and before": (
        changed('before = "13.0"\n', 'before = "13.0"\nopen = "trusted"\n'),
        f"{V0}.open: a range with an end is not open; drop one of before and open",
    ),
    "version of three numbers": (
        changed('since = "12.8"', 'since = "12.8.1"'),
        f"{V0}.since: version '12.8.1' is not \"MAJOR.MINOR\", such as \"12.8\"",
    ),
    "version is a number": (
        changed('since = "12.8"', "since = 12.8"),
        f'{V0}.since: version 12.8 is not "MAJOR.MINOR", such as "12.8"',
    ),
    "version with a leading zero": (
        changed('since = "12.8"', 'since = "12.08"'),
        f"{V0}.since: version '12.08' is not \"MAJOR.MINOR\", such as \"12.8\"",
    ),
    "empty range": (
        changed('since = "12.8"', 'since = "13.0"'),
        f"{V0}: range 13.0 to 13.0 is empty; since must be below before",
    ),
    "swapped range": (
        changed('since = "12.8"\nbefore = "13.0"', 'since = "12.9"\nbefore = "12.8"'),
        f"{V0}: range 12.9 to 12.8 is swapped; since must be below before",
    ),
    "range past the next major": (
        changed('before = "13.0"', 'before = "13.1"'),
        f"{V0}.before: 13.1 is past the next major, 13.0: no release beyond it has been seen;"
        " close the range there",
    ),
    "overlapping ranges": (
        changed('before = "13.0"', 'before = "12.9"')
        + SECOND.replace('since = "13.0"\nbefore = "14.0"', 'since = "12.8"\nbefore = "13.0"'),
        "function.f.variant[1]: range 12.8 to before 13.0 overlaps 12.8 to before 12.9;"
        " close the older one earlier",
    ),
    "range after an open one": (
        changed('before = "13.0"', 'open = "trusted"') + SECOND,
        "function.f.variant[1]: range 13.0 to before 14.0 overlaps 12.8 and later;"
        " close the older one earlier",
    ),
    "unsorted variants": (
        SMALL + SECOND.replace('since = "13.0"\nbefore = "14.0"', 'since = "12.0"\nbefore ="12.8"'),
        "function.f.variant[1]: variants are not sorted: 12.0 to before 12.8 comes after"
        " 12.8 to before 13.0; put the oldest first",
    ),
    "symbol is not C": (
        changed('before = "13.0"', 'before = "13.0"\nsymbol = "f@v2"'),
        f"{V0}.symbol: 'f@v2' is not a C name; use letters, digits and _",
    ),
    "pinned without lookup": (
        changed('before = "13.0"', 'before = "13.0"\npinned = "12.8"'),
        f"{V0}.pinned: library 'cudart' has no lookup function to pin a version with",
    ),
    # Parameters
    "parameters are no list": (
        changed('params = ["int x", "const void *p"]', 'params = "int x"'),
        f"{V0}.params: must be a list of C declarations, not 'int x'",
    ),
    "parameter is a number": (
        with_param("3"), f'{P0}: must be a C declaration, such as "size_t count", not 3',
    ),
    "parameter is empty": (
        with_param('""'), f"{P0}: '' has no type; write it as in the header, such as"
        ' "size_t count"',
    ),
    "parameter without name": (
        with_param('"int"'),
        f"{P0}: 'int' has no name; give the header's, such as \"size_t count\"",
    ),
    "pointer without name": (
        with_param('"void *"'),
        f"{P0}: 'void *' has no name; give the header's, such as \"size_t count\"",
    ),
    "parameter of one word": (
        with_param('"count"'),
        f"{P0}: 'count' has no type or no name; write both, such as \"size_t count\"",
    ),
    "parameter name is not C": (
        with_param('"int 3x"'), f"{P0}: '3' in 'int 3x' is not a C name; use letters, digits and _",
    ),
    "two declarations in one": (
        with_param('"int x, int y"'),
        f"{P0}: 'int x, int y' is no plain declaration after 'x'; give one type and one name",
    ),
    "parameter is an array": (
        with_param('"int x[3]"'), f"{P0}: 'int x[3]' is an array; write it as a pointer",
    ),
    "duplicate parameter": (
        with_param('"int x", "void *x"'),
        f"{V0}.params[1]: parameter 'x' is there twice; name each once",
    ),
    "unknown type": (
        with_param('"cudaStream_t s"'),
        f"{P0}: type 'cudaStream_t' is not known; use a C type, or declare it under"
        " [struct], [enum] or [alias]",
    ),
    "no such combination of words": (
        with_param('"unsigned float x"'),
        f"{P0}: type 'unsigned float' is not known; use a C type, or declare it under"
        " [struct], [enum] or [alias]",
    ),
    "unknown struct": (
        with_param('"struct Triple *t"'),
        f"{P0}: type 'struct Triple' is not known; declare [struct.Triple]",
    ),
    "unknown enum": (
        with_param('"enum Shape s"'), f"{P0}: type 'enum Shape' is not known; declare [enum.Shape]",
    ),
    "void by value": (
        with_param('"void x"'), f"{P0}: void is no type for a value; use a pointer",
    ),
    "opaque struct by value": (
        with_param('"struct Opaque o"'),
        f"{P0}: struct Opaque is opaque; use a pointer, or declare its fields",
    ),
    "parameter has an unknown key": (
        with_param('{ declaration = "int x", default = 0 }'),
        f"{P0}.default: unknown key; use one of: declaration, value, out",
    ),
    "parameter lacks its declaration": (
        with_param("{ value = 0 }"), f"{P0}.declaration: missing key; add it",
    ),
    "out is no flag": (
        with_param('{ declaration = "int *x", out = "yes" }'),
        f"{P0}.out: must be true or false, not 'yes'",
    ),
    "out without pointer": (
        with_param('{ declaration = "int x", out = true }'),
        f"{P0}: out goes with a pointer, not with int",
    ),
    # Values
    "pointer value": (
        with_param('{ declaration = "void *p", value = 4096 }'),
        f"{P0}: value of a pointer can only be 0, not 4096",
    ),
    "value is a flag": (
        with_param('{ declaration = "int x", value = true }'),
        f"{P0}: value must be a number, the name of a constant or a table, not True",
    ),
    "value is a list": (
        with_param('{ declaration = "int x", value = [1] }'),
        f"{P0}: value must be a number, the name of a constant or a table, not [1]",
    ),
    "value is an unknown constant": (
        with_param('{ declaration = "enum Color c", value = "BLUE" }'),
        f"{P0}: value 'BLUE' is no constant of an [enum]; declare it, or use a number",
    ),
    "constant for a pointer": (
        with_param('{ declaration = "void *p", value = "RED" }'),
        f"{P0}: value of a pointer can only be 0, not 'RED'",
    ),
    "table for a number": (
        with_param('{ declaration = "int x", value = { a = 1 } }'),
        f"{P0}: value {{'a': 1}} is a table, but int is not a struct",
    ),
    "table for a pointer": (
        with_param('{ declaration = "struct Pair *x", value = { a = 1 } }'),
        f"{P0}: value {{'a': 1}} is a table, but struct Pair * is not a struct",
    ),
    "table with an unknown field": (
        with_param('{ declaration = "struct Pair x", value = { c = 1 } }'),
        f"{P0}: value has a field 'c'; struct Pair has: a, b",
    ),
    "table with a text": (
        with_param('{ declaration = "struct Pair x", value = { a = "1" } }'),
        f"{P0}: value of field 'a' must be a number, not '1'",
    ),
    "number for a struct": (
        with_param('{ declaration = "struct Pair x", value = 0 }'),
        f"{P0}: value of struct Pair must be a table of its fields, not 0",
    ),
    "value for a handle": (
        with_param('{ declaration = "handle_t h", value = 7 }'),
        f"{P0}: value of a pointer can only be 0, not 7",
    ),
    # Aliases
    "alias is no text": (
        changed('handle_t = "void *"', "handle_t = 3"),
        "alias.handle_t: must be a C type, such as \"void *\", not 3",
    ),
    "alias with a name": (
        changed('handle_t = "void *"', 'handle_t = "void *p"'),
        "alias.handle_t: 'void *p' is no plain C type; use one such as \"void *\"",
    ),
    "alias of an unknown type": (
        changed('handle_t = "void *"', 'handle_t = "other_t"'),
        "alias.handle_t: type 'other_t' is not known; use a C type, or declare it under"
        " [struct], [enum] or [alias]",
    ),
    # Enums
    "enum lacks its constants": (
        changed("constants = { RED = 1, GREEN = 2 }\n", ""),
        "enum.Color.constants: missing key; add it",
    ),
    "enum with an unknown key": (
        changed("constants = {", 'size = 4\nconstants = {'),
        "enum.Color.size: unknown key; use one of: library, since, constants",
    ),
    "enum constants are no table": (
        changed("constants = { RED = 1, GREEN = 2 }", 'constants = ["RED"]'),
        "enum.Color.constants: must be a table of numbers, not ['RED']",
    ),
    "enum constant is not C": (
        changed("RED = 1", '"RE D" = 1'),
        "enum.Color.constants.RE D: 'RE D' is not a C name; use letters, digits and _",
    ),
    "enum constant is text": (
        changed("RED = 1", 'RED = "1"'),
        "enum.Color.constants.RED: must be an integer of 32 bits, not '1'",
    ),
    "enum constant is too wide": (
        changed("RED = 1", "RED = 4294967296"),
        "enum.Color.constants.RED: must be an integer of 32 bits, not 4294967296",
    ),
    "enum with a bad version": (
        changed("constants = {", 'since = "new"\nconstants = {'),
        "enum.Color.since: version 'new' is not \"MAJOR.MINOR\", such as \"12.8\"",
    ),
    # Structs
    "struct with an unknown key": (
        changed("size = 8", "size = 8\nalign = 4"),
        "struct.Pair.align: unknown key; use one of: library, since, size, fields, typedef, grows",
    ),
    "struct lacks its library": (
        changed('[struct.Opaque]\nlibrary = "cudart"', "[struct.Opaque]"),
        "struct.Opaque.library: missing key; add it",
    ),
    "struct lacks its size": (
        changed("size = 8\n", ""), "struct.Pair.size: missing key; give the size in bytes",
    ),
    "struct of no bytes": (
        changed("size = 8", "size = 0"), "struct.Pair.size: must be a number of bytes, not 0",
    ),
    "struct fields are no list": (
        changed('fields = ["int a", "int b"]', 'fields = "int a"'),
        "struct.Pair.fields: must be a list of C declarations, not 'int a'",
    ),
    "field twice": (
        changed('"int b"', '"int a"'),
        "struct.Pair.fields[1]: field 'a' is there twice; name each once",
    ),
    "field of an unknown type": (
        changed('"int b"', '"enum Shape b"'),
        "struct.Pair.fields[1]: type 'enum Shape' is not known; declare [enum.Shape]",
    ),
    "field with an unknown key": (
        changed('"int b"', '{ declaration = "int b", path = "u.b" }'),
        "struct.Pair.fields[1].path: unknown key; use one of: declaration, member",
    ),
    "field lacks its declaration": (
        changed('"int b"', '{ member = "u.b" }'),
        "struct.Pair.fields[1].declaration: missing key; add it",
    ),
    "struct holds itself": (
        changed('"int b"', '"struct Pair b"'),
        "struct.Pair.fields: holds itself; use a pointer",
    ),
    "typedef is no flag": (
        changed("size = 8", 'size = 8\ntypedef = "yes"'),
        "struct.Pair.typedef: must be true or false, not 'yes'",
    ),
}  # fmt: skip


@pytest.mark.known_failure("odd-numbers")
@pytest.mark.parametrize(("text", "error"), ERRORS.values(), ids=ERRORS.keys())
def test_one_wrong_thing_is_one_error(text: str, error: str) -> None:
    found = problems(text)
    if error.startswith("file: "):
        error = error.removeprefix("file: ")
    assert found == [error]


class TestErrors:
    def test_every_offender_is_in_one_error(self) -> None:
        text = changed(
            'size = 8', 'size = "big"',
            'summary = "A function"', 'sumary = "A function"',
            'since = "12.8"', 'since = "12"',
            '"int x", "const void *p"', '"int", "cudaEvent_t e"',
        )  # fmt: skip
        with pytest.raises(RegistryError) as caught:
            parse(text, "small.toml")
        assert str(caught.value).splitlines() == [
            "small.toml: 6 errors",
            "  struct.Pair.size: must be a number of bytes, not 'big'",
            f"  function.f.sumary: unknown key; use one of: {FUNCTION_KEYS}",
            "  function.f.summary: missing key; add it",
            f'  {V0}.since: version \'12\' is not "MAJOR.MINOR", such as "12.8"',
            f"  {P0}: 'int' has no name; give the header's, such as \"size_t count\"",
            f"  {V0}.params[1]: type 'cudaEvent_t' is not known; use a C type, or declare it under"
            " [struct], [enum] or [alias]",
        ]

    def test_one_error_is_singular(self) -> None:
        with pytest.raises(RegistryError, match=r"\Asmall.toml: 1 error\n  function.f.page: "):
            parse(ERRORS["page is no link"][0], "small.toml")

    def test_text_that_is_no_utf8(self) -> None:
        with pytest.raises(RegistryError, match="not TOML: 'utf-8' codec can't decode"):
            parse(b"\xff", "small.toml")

    def test_it_pickles(self) -> None:
        with pytest.raises(RegistryError) as caught:
            parse(ERRORS["page is no link"][0], "small.toml")
        again = pickle.loads(pickle.dumps(caught.value))
        assert str(again) == str(caught.value) and again.problems == caught.value.problems

    def test_an_error_of_a_file_names_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text("x = 1")
        with pytest.raises(RegistryError) as caught:
            registry.load(path)
        assert str(caught.value).startswith(f"{path}: 3 errors\n  x: unknown key")
        with pytest.raises(FileNotFoundError):
            registry.load(tmp_path / "nothing.toml")


class TestVersions:
    @pytest.mark.parametrize(
        ("text", "number"),
        [("11.8", 11080), ("12.8", 12080), ("13.0", 13000), ("0.0", 0), ("12.12", 12120)],
    )
    def test_text_and_number(self, text: str, number: int) -> None:
        assert registry.parse_version(text) == number
        assert registry.format_version(number) == text

    @pytest.mark.parametrize(
        "text", ["", "12", "12.", ".8", "12.8.0", "v12.8", "12.8 ", "012.8", "-12.8", "12,8", None]
    )
    def test_no_version(self, text: str) -> None:
        with pytest.raises(ValueError) as caught:
            registry.parse_version(text)
        assert str(caught.value) == f'version {text!r} is not "MAJOR.MINOR", such as "12.8"'


class TestContents:
    def test_functions_variants_and_prototypes(self) -> None:
        table = parse(SMALL + SECOND)
        function = table.functions["f"]
        first, second = function.variants
        assert (first.since, first.before, first.symbol) == (12080, 13000, "f")
        assert first.label == "12.8 to before 13.0"
        assert table.functions["version"].variants[0].label == "11.0 and later"
        assert function.prototype(first) == "int f(int x, const void *p)"
        assert function.prototype(second, "(*call)") == "int (*call)(int x)"
        assert [p.name for p in first.params] == ["x", "p"]
        assert table.boundaries() == (11000, 12080, 13000, 14000)
        assert table.boundaries("other") == ()
        assert list(table.caller_params(function)) == ["x", "p"]

    def test_function_without_parameters(self) -> None:
        table = parse(changed('params = ["int x", "const void *p"]', "params = []"))
        function = table.functions["f"]
        assert function.prototype(function.variants[0]) == "int f(void)"

    @pytest.mark.parametrize(
        ("text", "ctype", "spelled"),
        [
            ("int x", CType("int"), "int"),
            ("unsigned x", CType("unsigned int"), "unsigned int"),
            ("unsigned long long x", CType("unsigned long long"), "unsigned long long"),
            ("const void *x", CType("void", True, (False,)), "const void *"),
            ("void const *x", CType("void", True, (False,)), "const void *"),
            ("void *const *x", CType("void", False, (True, False)), "void *const *"),
            (
                "const void *const *x",
                CType("void", True, (True, False)),
                "const void *const *",
            ),
            ("const void **x", CType("void", True, (False, False)), "const void **"),
            ("struct Pair *x", CType("struct Pair", False, (False,)), "struct Pair *"),
            ("enum Color x", CType("enum Color"), "enum Color"),
            ("handle_t x", CType("handle_t"), "handle_t"),
            ("struct Opaque *x", CType("struct Opaque", False, (False,)), "struct Opaque *"),
        ],
    )
    def test_types(self, text: str, ctype: CType, spelled: str) -> None:
        (param,) = parse(with_param(f'"{text}"')).functions["f"].variants[0].params
        assert (param.type, str(param.type), param.name) == (ctype, spelled, "x")
        assert param.declaration == text

    def test_aliases_are_resolved(self) -> None:
        table = parse(with_param('"const handle_t *x"'))
        (param,) = table.functions["f"].variants[0].params
        assert table.resolve(param.type).pointers == (True, False)

    @pytest.mark.parametrize(
        ("item", "value"),
        [
            ('{ declaration = "int x", value = -1 }', -1),
            ('{ declaration = "void *x", value = 0 }', 0),
            ('{ declaration = "enum Color x", value = "GREEN" }', "GREEN"),
            ('{ declaration = "struct Pair x", value = { a = 1 } }', {"a": 1}),
            ('"int x"', None),
        ],
    )
    def test_values(self, item: str, value: object) -> None:
        (param,) = parse(with_param(item)).functions["f"].variants[0].params
        assert param.value == value

    def test_a_parameter_with_a_value_is_not_asked_of_the_caller(self) -> None:
        table = parse(with_param('"int y", { declaration = "int x", value = 0 }'))
        assert list(table.caller_params(table.functions["f"])) == ["y"]

    def test_digest_is_of_the_bytes(self) -> None:
        assert parse(SMALL).digest != parse(SMALL + "\n").digest
        assert registry.load().digest == registry.digest()

    def test_a_changed_file_is_read_again(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text(SMALL)
        assert registry.load(path) is registry.load(path)
        path.write_text(SMALL + SECOND)
        assert len(registry.load(path).functions["f"].variants) == 2


class TestText:
    def test_what_is_written_reads_back(self) -> None:
        for table in (parse(SMALL + SECOND), registry.load()):
            again = parse(registry_text.dump(table))
            assert dataclasses.replace(again, digest="", path=table.path) == dataclasses.replace(
                table, digest=""
            )
