"""The generated stub of kvsig.call says what the registry says."""

from __future__ import annotations

import ast

from kvsig import registry, stubs

REGISTRY = registry.load()
TREE = ast.parse(stubs.call_stub(REGISTRY))
CALLS = {
    ast.unparse(node.args.posonlyargs[0].annotation): node
    for node in TREE.body
    if isinstance(node, ast.FunctionDef)
}


def parameters(function: str) -> dict[str, tuple[str, bool]]:
    """Type of each parameter, and whether it must be given."""
    args = CALLS[f"Literal['{function}']"].args
    pairs = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    return {arg.arg: (ast.unparse(arg.annotation), default is None) for arg, default in pairs}


def result(function: str) -> str:
    return ast.unparse(CALLS[f"Literal['{function}']"].returns)


def test_each_function_has_one_overload() -> None:
    assert list(CALLS) == [f"Literal['{name}']" for name in REGISTRY.functions]


def test_what_only_one_variant_has_may_be_left_out() -> None:
    assert parameters("cudaMemPrefetchAsync") == {
        "devPtr": ("Address", True),
        "count": ("int", True),
        "dstDevice": ("int", False),
        "stream": ("Address", True),
        "location": ("Struct", False),
        "flags": ("int", False),
    }


def test_results() -> None:
    assert result("cudaMemcpyAsync") == "None"
    assert result("cudaMemGetInfo") == "dict[str, Any]"
    assert result("cudaMalloc") == "Any"
    assert result("cudaGetErrorName") == "str"
    assert result("cudaGetLastError") == "int"


def test_enums_are_numbers_or_names() -> None:
    kind, _ = parameters("cudaMemcpyAsync")["kind"]
    assert kind == "_cudaMemcpyKind"
    (alias,) = (
        node
        for node in TREE.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == kind
    )
    assert "'cudaMemcpyDefault'" in ast.unparse(alias.value)
