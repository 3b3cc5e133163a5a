"""Registry files that are written to do harm: each is refused by name and place, or is inert."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from generated import build, check_glue
from test_registry import P0, SMALL, V0, changed, with_param

from kvsig import registry
from kvsig.registry import RegistryError, parse


def quoted(text: str) -> str:
    return json.dumps(text)


def value(old: str, new: str) -> str:
    """The small registry with a text put in place of another."""
    return changed(f'"{old}"', quoted(new))


def param(declaration: str, extra: str = "") -> str:
    return with_param(f"{{ declaration = {quoted(declaration)}{extra} }}")


def field(declaration: str, member: str | None = None) -> str:
    where = "" if member is None else f", member = {quoted(member)}"
    return changed('"int b"', f"{{ declaration = {quoted(declaration)}{where} }}")


def constant(name: str) -> str:
    return changed("RED = 1", f"{quoted(name)} = 1")


RUN = '\nimport os; os.system("touch kvsig-attack")\n#'
FIELDS = "struct.Pair.fields[1]"
CONSTANTS = "enum.Color.constants"

# Name of the attack: the file, where the error is said to be, and a word of what it says.
ATTACKS = {
    # Code behind a newline, in every kind of text
    "reason newline": (value("first", f"first{RUN}"), f"{V0}.reason", "printable"),
    "reason carriage return": (value("first", "first\rx = 1"), f"{V0}.reason", "printable"),
    "reason form feed": (value("first", "first\fx = 1"), f"{V0}.reason", "printable"),
    "reason vertical tab": (value("first", "first\vx = 1"), f"{V0}.reason", "printable"),
    "reason NEL": (value("first", "first\x85x = 1"), f"{V0}.reason", "printable"),
    "reason line separator": (value("first", "first\u2028x = 1"), f"{V0}.reason", "printable"),
    "reason NUL": (value("first", "first\0x"), f"{V0}.reason", "printable"),
    "reason bidi": (value("first", "first\u202ex"), f"{V0}.reason", "printable"),
    "reason escape of a terminal": (value("first", "\x1b[2J"), f"{V0}.reason", "printable"),
    "reason endless": (value("first", "x" * 100_000), f"{V0}.reason", "printable"),
    "open newline": (value("always the same", f"x{RUN}"), ".open", "printable"),
    "summary newline": (value("A function", f"x{RUN}"), "function.f.summary", "printable"),
    "page newline": (value("https://example.com/", f"https://x{RUN}"), ".page", "printable"),
    "grows newline": (
        changed("size = 8", f"size = 8\ngrows = {quoted(RUN)}"), "struct.Pair.grows", "printable",
    ),
    # Names of files, which end in an #include and at the dynamic loader
    "header quote": (value("cuda_runtime_api.h", 'x.h"\n#error "'), ".header", "printable"),
    "header closes": (value("cuda_runtime_api.h", 'x.h" "y.h'), "library.cudart.header", "header"),
    "header absolute": (value("cuda_runtime_api.h", "/etc/x.h"), ".header", "header"),
    "header above": (value("cuda_runtime_api.h", "../x.h"), ".header", "header"),
    "header device": (value("cuda_runtime_api.h", "/dev/stdin"), ".header", "header"),
    "soname path": (value("libcudart.so", "/tmp/evil.so"), "library.cudart.soname", "file name"),
    "soname above": (value("libcudart.so", "../evil.so"), "library.cudart.soname", "file name"),
    "soname list": (
        changed('"libcudart.so"', '["libcudart.so", "./evil.so"]'), ".soname", "file name",
    ),
    "soname NUL": (value("libcudart.so", "libcudart.so\0.1"), ".soname", "printable"),
    # Members of a header's struct, which end in C
    "member closes": (field("int b", 'b) || sizeof(int'), f"{FIELDS}.member", "path of a field"),
    "member newline": (field("int b", "b\n#error"), f"{FIELDS}.member", "printable"),
    "member index": (field("int b", "b[0]"), f"{FIELDS}.member", "path of a field"),
    "member call": (field("int b", "b,abort()"), f"{FIELDS}.member", "path of a field"),
    # Declarations
    "parameter newline": (param("int\nx"), P0, "plain ASCII"),
    "parameter directive": (param("int x\n#define int long"), P0, "plain ASCII"),
    "parameter comment": (param("int /* */ x"), P0, "is not a C name"),
    "parameter line comment": (param("int x // y"), P0, "no plain declaration"),
    "parameter default": (param("int x = 1"), P0, "no plain declaration"),
    "parameter closes": (param("int x) { abort(); } int g(int y"), P0, "no plain declaration"),
    "parameter semicolon": (param("int x; int y"), P0, "no plain declaration"),
    "parameter hash": (param("int #x"), P0, "is not a C name"),
    "parameter string": (param('int "x"'), P0, "is not a C name"),
    "parameter backslash": (param("int x\\"), P0, "no plain declaration"),
    "parameter trigraph": (param("int ??/x"), P0, "is not a C name"),
    "parameter digraph": (param("int %:x"), P0, "is not a C name"),
    "parameter attribute": (param("int __attribute__((x)) x"), P0, "keep for themselves"),
    "parameter unicode": (param("int \u0445"), P0, "plain ASCII"),
    "parameter fullwidth": (param("int \uff4e"), P0, "plain ASCII"),
    "parameter bidi": (param("int \u202ex"), P0, "plain ASCII"),
    "parameter no-break space": (param("int\u00a0x"), P0, "plain ASCII"),
    "parameter form feed": (param("int\fx"), P0, "plain ASCII"),
    "parameter tab": (param("int\tx"), P0, "plain ASCII"),
    "parameter dunder": (param("int __pyx_v_x"), P0, "keep for themselves"),
    "parameter of generated code": (param("int kvsig_variant"), P0, "keep for themselves"),
    "parameter endless": (param("int " + "x" * 500), P0, "at most 128"),
    "parameter pointers": (param("int " + "*" * 1000 + "x"), P0, "levels of pointers"),
    "parameter hides a type": (param("int Pair"), P0, "name of [struct.Pair] already"),
    "parameter hides a constant": (param("int RED"), P0, "a constant of [enum.Color] already"),
    "parameter hides a function": (param("int version"), P0, "[function.version] already"),
    "field comment end": (field("int b */ x"), FIELDS, "no plain declaration"),
    "field bits": (field("int b : 3"), FIELDS, "no plain declaration"),
    "field newline": (field("int b[4\n]"), FIELDS, "plain ASCII"),
    "array octal": (field("int b[010]"), FIELDS, "no length of an array"),
    "array zero": (field("int b[0]"), FIELDS, "no length of an array"),
    "array superscript": (field("int b[\u00b2]"), FIELDS, "plain ASCII"),
    "array arabic": (field("int b[\u0664]"), FIELDS, "plain ASCII"),
    "array name": (field("int b[sizeof]"), FIELDS, "no length of an array"),
    "array huge": (field("int b[999999]"), FIELDS, "no length of an array"),
    "array of 400 digits": (field(f"int b[{'9' * 400}]"), FIELDS, "no length of an array"),
    # Types
    "returns newline": (changed('returns = "int"', 'returns = "int\\nx"'), ".returns", "printable"),
    "returns code": (changed('returns = "int"', 'returns = "int f(void)"'), ".returns", "plain C"),
    "returns struct": (
        changed('returns = "int"', 'returns = "struct Pair"'), ".returns", "must be an integer",
    ),
    "returns pointer": (
        changed('returns = "int"', 'returns = "void *"'), ".returns", "must be an integer",
    ),
    "alias code": (value("void *", "void *; int x"), "alias.handle_t", "no plain C type"),
    "alias newline": (value("void *", "void *\n"), "alias.handle_t", "plain ASCII"),
    # Keys
    "key newline in alias": (
        changed("handle_t =", f"{quoted(RUN)} ="), "alias.\\nimport", "is not a C name",
    ),
    "key of a function": (
        changed("function.f", 'function."f(void); int g"'), "function.f(void); int g", "C name",
    ),
    "key of a struct": (
        changed("struct.Opaque", 'struct."Opaque { int x; }"'), "struct.Opaque {", "C name",
    ),
    "key of an enum": (changed("enum.Color", 'enum."Color*/"'), "enum.Color*/", "C name"),
    "key of a library": (
        changed("library.cudart", 'library."a b"'), "library.a b", "C name",
    ),
    "key of a constant newline": (constant(f"RED{RUN}"), CONSTANTS, "is not a C name"),
    "key of a constant unicode": (constant("R\u00c9D"), CONSTANTS, "is not a C name"),
    "key empty": (constant(""), CONSTANTS, "is not a C name"),
    "key unknown": (changed("size = 8", f"size = 8\n{quoted(RUN)} = 1"), "struct.Pair.\\n", "key"),
    # Symbols
    "symbol newline": (
        changed("params = [\"int x", f"symbol = {quoted(RUN)}\nparams = [\"int x"),
        f"{V0}.symbol", "printable",
    ),
    "symbol code": (
        changed("params = [\"int x", "symbol = \"f(void); int g\"\nparams = [\"int x"),
        f"{V0}.symbol", "is not a C name",
    ),
    "symbol of libc": (
        changed("params = [\"int x", "symbol = \"exit\"\nparams = [\"int x"),
        f"{V0}.symbol", "word",
    ),
    "symbol of a constant": (
        changed("params = [\"int x", "symbol = \"RED\"\nparams = [\"int x"), f"{V0}.symbol", "RED",
    ),
    # Values
    "value newline": (param("int x", f", value = {quoted(RUN)}"), P0, "no constant"),
    "value code": (param("int x", ', value = "0) or f(1"'), P0, "no constant"),
    "value of 400 digits": (param("int x", f", value = {'9' * 400}"), P0, "of 1329 bits"),
    "value of 5000 digits": (param("int x", f", value = {'9' * 5000}"), "not TOML",
        "too many digits"),
    "value past size_t": (param("size_t x", f", value = {2**64}"), P0, "does not fit"),
    "value below size_t": (param("size_t x", ", value = -1"), P0, "does not fit"),
    "value past int": (param("int x", f", value = {2**31}"), P0, "does not fit"),
    "value past unsigned char": (param("unsigned char x", ", value = 256"), P0, "does not fit"),
    "value behind an alias": (
        changed('handle_t = "void *"', 'handle_t = "unsigned short"',
                '"int x", "const void *p"', '{ declaration = "handle_t x", value = 65536 }'),
        P0, "does not fit",
    ),
    "value past a field": (
        param("struct Pair x", f", value = {{ a = {2**40} }}"), P0, "does not fit",
    ),
    "value of a field newline": (
        param("struct Pair x", f", value = {{ {quoted(RUN)} = 1 }}"), P0, "value has a field",
    ),
    "value text of a pointer": (param("void *x", ', value = "RED"'), P0, "can only be 0"),
    "constant of 400 digits": (changed("RED = 1", f"RED = 0x{'f' * 400}"), CONSTANTS, "1600 bits"),
    "size of 400 digits": (changed("size = 8", f"size = {'9' * 400}"), "struct.Pair.size", "bits"),
    # Hashes and releases
    "hash no digest": (
        "sha256 = { \"a-1.0-py3-none-any.whl\" = \"x\\n\" }\n" + SMALL, "sha256", "64 hexadecimal",
    ),
    "hash path": (
        f"sha256 = {{ \"../a-1.0-py3-none-any.whl\" = \"{'0' * 64}\" }}\n" + SMALL,
        "sha256", "name",
    ),
    "release endless": (value("12.9.79", f"{'9' * 400}.1.1"), "verified", "list of releases"),
    # Circles and depth
    "alias of itself": (
        changed('handle_t = "void *"', 'handle_t = "handle_t"'), "alias.handle_t", "not known",
    ),
    "alias and struct of one name": (
        changed('handle_t = "void *"', 'Pair = "Pair"'), "alias.Pair", "[struct.Pair] already",
    ),
    "alias and struct, and a value": (
        changed('handle_t = "void *"', 'Pair = "Pair"',
                '"int x", "const void *p"', '{ declaration = "Pair x", value = 0 }'),
        "alias.Pair", "[struct.Pair] already",
    ),
    "alias and enum of one name": (
        changed('handle_t = "void *"', 'Color = "Color"'), "alias.Color", "[enum.Color] already",
    ),
    "a longer circle": (
        changed('handle_t = "void *"', 'A = "Pair"\nB = "A"\nPair = "B"'), "alias.Pair", "already",
    ),
    "circle through a struct": (
        changed('handle_t = "void *"', 'handle_t = "struct Pair"', '"int b"', '"handle_t b"'),
        "struct.Pair.fields", "holds itself",
    ),
    "deep arrays": (SMALL + f"\nx = {'[' * 5000}{']' * 5000}", "file", "too deep"),
    "deep tables": ("a" + ".a" * 900 + " = 1\n" + SMALL, "a", "unknown key"),
    "deep value": ("library" + ".a" * 900 + " = 1", "library", "unknown key"),
}  # fmt: skip

WORDS = ["NULL", "None", "True", "class", "def", "lambda", "asm", "arguments", "slots", "memset",
         "memcpy", "object", "list", "print", "cdef", "nogil", "include", "from", "size_t", "main",
         "UNBOUND", "Slot", "SLOT_x", "invoke", "exit", "errno", "int",
         "typeof", "linux"]  # fmt: skip


@pytest.mark.known_failure("text-becomes-code")
@pytest.mark.parametrize(("text", "place", "what"), ATTACKS.values(), ids=ATTACKS.keys())
def test_it_is_refused_by_name_and_place(text: str, place: str, what: str) -> None:
    with pytest.raises(RegistryError) as caught:
        parse(text, "attack.toml")
    found = caught.value.problems
    assert any(place in line and what in line for line in found), found
    # Nothing of the file moves the cursor of whoever reads the error, or fills the screen.
    assert all(line.isprintable() and len(line) < 1500 for line in found)


@pytest.mark.parametrize("key", ["a", "library"])
def test_a_key_of_very_many_parts(key: str) -> None:
    """From 3.14 on, tomllib refuses more parts than Python's recursion limit (1000)."""
    with pytest.raises(RegistryError, match="unknown key|nest too deeply"):
        parse(key + ".a" * 2000 + " = 1\n" + SMALL)


@pytest.mark.known_failure("names-that-break")
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("function.f]", "function.{}]", "function.{}"),
        ("struct.Opaque", "struct.{}", "struct.{}"),
        ("enum.Color", "enum.{}", "enum.{}"),
        ("RED = 1", "{} = 1", "enum.Color.constants.{}"),
        ("handle_t =", "{} =", "alias.{}"),
    ],
)
def test_words_that_break_the_build_are_no_names(
    word: str, old: str, new: str, place: str
) -> None:
    text = changed(old, new.format(word)).replace("function.f.", f"function.{word}.")
    with pytest.raises(RegistryError) as caught:
        parse(text, "attack.toml")
    (line,) = [line for line in caught.value.problems if line.startswith(f"{place.format(word)}: ")]
    assert repr(word) in line


@pytest.mark.known_failure("names-twice")
@pytest.mark.parametrize("kinds", ["alias enum", "alias struct", "enum struct", "enum function",
                                   "struct function", "alias function", "constant constant",
                                   "constant function", "constant struct"])  # fmt: skip
def test_every_name_stands_once(kinds: str) -> None:
    text = SMALL
    add = {
        "alias": ("[alias]\n", '[alias]\nTwice = "int"\n'),
        "enum": ("[struct.Opaque]", '[enum.Twice]\nlibrary = "cudart"\nconstants = {}\n'
                                    "[struct.Opaque]"),
        "struct": ("[struct.Opaque]", '[struct.Twice]\nlibrary = "cudart"\n[struct.Opaque]'),
        "function": ("function.f", "function.Twice"),
    }  # fmt: skip
    if kinds == "constant constant":
        other = '[enum.Other]\nlibrary = "cudart"\nconstants = { RED = 1 }\n[struct.Opaque]'
        text = text.replace("[struct.Opaque]", other)
    for kind in kinds.split():
        if kind != "constant":
            text = text.replace(*add[kind])
        elif kinds != "constant constant":
            text = text.replace("RED = 1", "Twice = 1")
    with pytest.raises(RegistryError, match="already; every name stands once"):
        parse(text)


ODD = r'''
[struct.Last]
library = "cudart"
size = 16
fields = ["struct Odd odd", "Odd_t other"]

[struct.Odd]
library = "cudart"
size = 8
fields = ["int NULL", "unsigned char class", "unsigned char asm", "char errno", "char from"]

[function.g]
library = "cudart"
returns = "int"
summary = '%s ??/ */ \" \\ # cython: x=1 {x} %d'
page = "https://example.com/*/"

[[function.g.variant]]
since = "12.8"
before = "13.0"
reason = '\" */ ??/ \N{BULLET} # distutils: sources=x.c {0} %s'
params = [PARAMS, { declaration = "struct Odd how", value = { class = 3, NULL = 1 } }]
'''


@pytest.mark.checkout
@pytest.mark.known_failure("names-that-break")
def test_odd_names_and_texts_are_inert(tmp_path: Path) -> None:
    """What the reader lets pass is generated, compiled, imported and called."""
    words = [w for w in WORDS if w not in ("int", "size_t")] + ["from_", "f_0", "p0", "result"]
    params = ", ".join(f'"int {word}"' for word in words)
    text = changed('handle_t = "void *"', 'Odd_t = "struct Odd"') + ODD.replace("PARAMS", params)
    table = parse(text)
    check_glue(table, 12080)
    numbers = ", ".join(map(str, range(len(words))))
    module = build(table, tmp_path, f"def all_of_them():\n    return g({numbers})\n")
    done = subprocess.run(
        [sys.executable, "-c", f"import {module} as m; m.bind(2, 0, -1);"
         " print(m.all_of_them())"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "-1\n"


class TestFiles:
    @pytest.mark.parametrize("read", [registry.load, registry.digest])
    def test_what_is_no_file(self, tmp_path: Path, read: object) -> None:
        assert callable(read)
        with pytest.raises(RegistryError, match="file: is a folder; give a TOML file"):
            read(tmp_path)
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(RegistryError, match="file: is a pipe or a device; give a TOML file"):
            read(tmp_path / "fifo")
        with pytest.raises(RegistryError, match="file: is a pipe or a device"):
            read("/dev/zero")

    def test_a_file_of_any_length(self, tmp_path: Path) -> None:
        path = tmp_path / "long.toml"
        path.write_bytes(b"#" * (registry.MAX_BYTES + 1))
        with pytest.raises(RegistryError, match=f"at most {registry.MAX_BYTES} are read"):
            registry.load(path)


@pytest.mark.parametrize("version", ["13.0", 13.0, None, True, b"13.0"])
def test_a_version_that_is_no_integer(version: object) -> None:
    function = parse(SMALL).functions["f"]
    with pytest.raises(TypeError) as caught:
        function.select(version)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"version {version!r} is no integer as CUDA counts, such as 12080 for 12.8;"
        ' for text use kvsig.registry.parse_version("12.8")'
    )
