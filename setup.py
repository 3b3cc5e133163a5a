"""Build of kvsig: Cython from the registry, the extensions, and the emulated runtimes.

``python setup.py build_ext --inplace`` is the inner loop. It needs Cython and a C compiler;
no CUDA toolkit, no torch and no GPU.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
KERNEL = ROOT / "csrc/page_copy.cu"
FLAGS = ["-O2", "-g0", "-Wno-unused-function", "-fno-strict-aliasing"]
# A build of its own, which counts how often each line runs: packaging/covered.py.
COVERAGE = os.environ.get("KVSIG_COVERAGE") == "1"
COUNTING = ["-O0", "--coverage"] if COVERAGE else []


def load(name):
    """Load a build module of kvsig by path: the package itself needs what is built here."""
    spec = importlib.util.spec_from_file_location(f"kvsig_build_{name}", ROOT / f"kvsig/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildExt(build_ext):
    """Generates code from the registry before the extensions, emulated runtimes after them."""

    def run(self):
        """Generate, then build."""
        codegen = load("codegen")
        registry = codegen.reader.load(ROOT / "kvsig/signatures.toml")
        codegen.write_if_changed(ROOT / "kvsig/_generated.pxi", codegen.cython_text(registry))
        # The kernel's text travels in the extension, so that what is launched is what was built.
        text = KERNEL.read_bytes()
        codegen.write_if_changed(ROOT / "kvsig/_page_copy.pxi", f"PAGE_COPY = {text!r}\n")
        stub = load("stubs").call_stub(registry)
        codegen.write_if_changed(ROOT / "kvsig/_calls.pyi", stub)
        super().run()
        if not self.inplace:
            codegen.write_if_changed(Path(self.build_lib) / "kvsig/_calls.pyi", stub)
        self.emulated(codegen, registry)

    def emulated(self, codegen, registry):
        """Build one emulated runtime for each ABI of the registry."""
        package = Path(ROOT if self.inplace else self.build_lib) / "kvsig/_emulated"
        package.mkdir(parents=True, exist_ok=True)
        temp = Path(self.build_temp) / "emulated"
        folder = ROOT / "csrc/emulated"
        sources = sorted(folder.glob("*.c"))
        flags = ["-std=gnu11", "-O2", "-g0", "-pthread", "-Wall", "-Wextra", "-fvisibility=hidden"]

        def compiled(files, into):
            # Relative names keep the build folder out of the objects' paths below build_temp.
            return self.compiler.compile(
                [os.path.relpath(file) for file in files],
                output_dir=str(temp / into),
                include_dirs=[str(folder)],
                extra_postargs=flags,
            )

        shared = []  # the same for every ABI, compiled once
        names = set()
        for version in codegen.emulated_versions(registry):
            text = codegen.reader.format_version(version)
            glue = temp / f"glue-{text}.c"
            codegen.write_if_changed(glue, codegen.emulated_glue(registry, version))
            library = package / f"libcudart-emulated-{text}.so"
            names.add(library.name)
            inputs = [*sources, *folder.glob("*.h"), KERNEL, glue]
            stamps = [file.stat().st_mtime for file in inputs]
            if library.exists() and library.stat().st_mtime > max(stamps) and not self.force:
                continue
            shared = shared or compiled(sources, "shared")
            self.compiler.link_shared_object(
                shared + compiled([glue], text),
                str(library),
                # RELRO pads a library by up to a page of memory, which is 64 KiB on aarch64.
                extra_postargs=["-pthread", "-s", "-Wl,-z,norelro"],
                libraries=["dl"],
            )
        for stale in package.glob("libcudart-emulated-*.so"):
            if stale.name not in names:
                stale.unlink()


def extension(name, *depends):
    """Describe an extension module, and what it is to be built again for."""
    made = Extension(
        f"kvsig.{name}",
        [f"kvsig/{name.replace('.', '/')}.pyx"],
        depends=["kvsig/_path.pxd", *(f"kvsig/{file}" for file in depends)],
        include_dirs=["csrc"] if name == "_core" else [],
        extra_compile_args=FLAGS + COUNTING,
        extra_link_args=["-s", *COUNTING],
        libraries=["dl"] if name == "_loader" else [],
    )
    # Lines are marked in the C text; nothing traces them.
    made.cython_directives = {"linetrace": True} if COVERAGE else {}
    return made


PLAN = ("planning/_plan.pxd", "planning/_pack.pxd")
EXTENSIONS = [
    extension("_loader"),
    extension("_core", "_core.pxd", "_generated.pxi", "_kernel.pxi", "../csrc/page_copy.cu"),
    extension("planning._plan", *PLAN),
    extension("planning._pack", *PLAN),
    extension("planning._runs"),
    extension("_transfer", "_core.pxd", *PLAN),
    extension("_counters", "_core.pxd"),
]

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExt})
