"""SGLang's real plugin registry takes kvsig's hooks, and its callers call as kvsig understands."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from stubs import Finder, need

from kvsig import _core, observe
from kvsig.emulated import Control
from kvsig.integrations import sglang as integration
from kvsig.integrations.sglang import direct, kernel, layered

IO = "sgl_kernel.kvcacheio"
JIT = "sglang.kernels.ops.kvcache.hicache"
# Callers' modules, by what they call.
SEAMS = {
    "sglang/srt/mem_cache/l2_transfer.py": ("class L2TransferEngine", "submit_host_to_device"),
    "sglang/srt/plugins/__init__.py": ('"sglang.srt.plugins"', "apply_hooks"),
}


def check_signatures(module: Any, functions: dict[str, Any]) -> None:
    """Each argument without a default that SGLang's function has, kvsig's has, in that order."""
    for name, own in functions.items():
        need(hasattr(module, name), f"{module.__name__}.{name} is gone")
        theirs = list(inspect.signature(getattr(module, name)).parameters)
        known = inspect.signature(own).parameters.values()
        ours = [p.name for p in known if p.kind != p.VAR_KEYWORD]
        kept = [p for p in theirs if p in ours]
        need(kept == ours, f"{name} takes {theirs}, kvsig knows {ours}")


def functions_of(file: Path) -> dict[str, list[str]]:
    """Return the arguments of each function of a file, without importing it."""
    found = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found[node.name] = [a.arg for a in arguments]
    return found


def check_twins(folder: Path) -> None:
    found = functions_of(folder.joinpath(*JIT.split(".")).with_suffix(".py"))
    for name, own in kernel.JUST_IN_TIME.items():
        need(name in found, f"{JIT}.{name} is gone")
        for parameter in inspect.signature(own).parameters.values():
            known = parameter.kind == parameter.VAR_KEYWORD or parameter.name in found[name]
            # The page size is an argument since 0.5.21.
            need(known or parameter.name == "page_size", f"{name} has no {parameter.name}")


def check_loads(folder: Path) -> None:
    """The method that loads layer by layer: its arguments, and where its events are recorded."""
    module, _, name = layered.OWNER.rpartition(".")
    tree = ast.parse((folder.joinpath(*module.split(".")).with_suffix(".py")).read_text())
    (owner,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    methods = {n.name: n for n in owner.body if isinstance(n, ast.FunctionDef)}
    need(layered.METHOD in methods, f"{layered.OWNER}.{layered.METHOD} is gone")
    method = methods[layered.METHOD]
    keywords = [a.arg for a in method.args.kwonlyargs]
    need("on_layer_done" in keywords, f"{layered.METHOD} takes {keywords}")
    need(set(layered._LAYERS) & set(keywords), f"{layered.METHOD} takes {keywords}")
    loops = [n for n in ast.walk(method) if isinstance(n, ast.For)]
    outer = next(n for n in loops if "range" in ast.dump(n.iter))
    done = [
        n for n in ast.walk(outer)
        if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "on_layer_done"
    ]  # fmt: skip
    need(len(done) == 1, "on_layer_done is not called once for each layer")
    inner = next(n for n in ast.walk(outer) if isinstance(n, ast.For) and n is not outer)
    need(done[0].lineno > max(n.lineno for n in ast.walk(inner) if hasattr(n, "lineno")),
         "on_layer_done does not come behind the copies of a layer")  # fmt: skip
    for file in (folder / "sglang/srt").rglob("*.py"):
        if f"{layered.METHOD}(" not in file.read_text():
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == layered.METHOD:
                names = {word.arg for word in node.keywords}
                need(names & set(layered._LAYERS), f"{file.name} calls it with {names}")


def calls(folder: Path) -> Iterator[tuple[str, str, ast.Call]]:
    for file in (folder / "sglang/srt/mem_cache").rglob("*.py"):
        text = file.read_text()
        if not any(name in text for name in direct.__all__):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else ""
                if name in direct.__all__:
                    yield file.name, name, node


def check_calls(folder: Path) -> None:
    """Each call of the engine fits the arguments of kvsig's function."""
    seen = set()
    for file, name, call in calls(folder):
        signature = inspect.signature(getattr(direct, name))
        keywords = {word.arg: None for word in call.keywords}
        need(None not in keywords, f"{file} calls {name} with ** arguments")
        bound = signature.bind(*call.args, **keywords)
        more = bound.arguments.get("more")
        need(not more, f"{file} calls {name} with {more}")
        seen.add(name)
    need(set(direct.__all__) - {"transfer_embedding_ranges_direct"} <= seen, f"only {seen} called")


def check_plugin(registry: Any) -> None:
    """The real registry applies the hooks, and a call comes through to kvsig and no further."""
    integration.plugin()
    registry.HookRegistry.apply_hooks()
    installed = integration.installed()
    wanted = [f"{IO}.{name}" for name in (*direct.__all__, *kernel.AHEAD_OF_TIME)]
    need(all(installed.get(name) for name in wanted), f"not all hooks are applied: {installed}")
    function = importlib.import_module(IO).transfer_kv_direct
    src, dst = torch.arange(32).view(8, 4), torch.zeros(8, 4, dtype=torch.int64)
    function(
        src_layers=[src], dst_layers=(dst,), src_indices=torch.tensor([0, 1]),
        dst_indices=torch.tensor([6, 7]), page_size=2,
    )  # fmt: skip
    Control(_core.info()["library"]).synchronize()
    need(torch.equal(dst[6:], src[:2]), "a copy by plugin did not arrive")
    need(observe.stats()["integrations"]["sglang"]["calls"] == 1, f"{observe.stats()}")
    reached = False
    try:  # what kvsig leaves alone reaches SGLang's function, which asks torch for its operator
        function([src], [dst], torch.tensor([0]), torch.tensor([0]), 2)
    except (AttributeError, RuntimeError):
        reached = True
    need(reached, "a call that kvsig does not serve did not reach SGLang's function")


def main() -> None:
    folder, kernels = (Path(argument) for argument in sys.argv[1:3])
    version = {"__version__": folder.name.rpartition("-")[2]}
    Finder("sgl_kernel", kernels, {IO}, {"sgl_kernel": {"__version__": "0.4.10"}})
    Finder("sglang", folder, {"sglang.srt.plugins.hook_registry"}, {"sglang": version})
    module = importlib.import_module(IO)
    check_signatures(module, {name: getattr(direct, name) for name in direct.__all__})
    check_signatures(module, kernel.AHEAD_OF_TIME)
    check_twins(folder)
    check_calls(folder)
    check_loads(folder)
    for file, words in SEAMS.items():
        for word in words:
            need(word in (folder / file).read_text(), f"{file} has no {word}")
    for name in integration._HICACHE:  # compiled at first use; its names have been looked at above
        sys.modules[name] = None  # type: ignore[assignment]
    check_plugin(importlib.import_module("sglang.srt.plugins.hook_registry"))


if __name__ == "__main__":
    main()
