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
FLAGS = ["-O2", "-g0", "-Wno-unused-function", "-fno-strict-aliasing"]


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
        registry = codegen._registry.load(ROOT / "kvsig/signatures.toml")
        codegen.write_if_changed(ROOT / "kvsig/_generated.pxi", codegen.cython_text(registry))
        super().run()
        self.emulated(codegen, registry)

    def emulated(self, codegen, registry):
        """Build one emulated runtime for each ABI of the registry."""
        package = Path(ROOT if self.inplace else self.build_lib) / "kvsig/_emulated"
        package.mkdir(parents=True, exist_ok=True)
        temp = Path(self.build_temp) / "emulated"
        common = [str(ROOT / "csrc/emulated.c"), str(ROOT / "csrc/emulated.h")]
        flags = ["-std=gnu11", "-O2", "-pthread", "-Wall", "-Wextra", "-fvisibility=hidden"]
        names = set()
        for version in codegen.emulated_versions(registry):
            text = codegen._registry.format_version(version)
            glue = temp / f"glue-{text}.c"
            codegen.write_if_changed(glue, codegen.emulated_glue(registry, version))
            library = package / f"libcudart-emulated-{text}.so"
            names.add(library.name)
            stamps = [Path(p).stat().st_mtime for p in [*common, str(glue)]]
            if library.exists() and library.stat().st_mtime > max(stamps) and not self.force:
                continue
            # Relative names keep the build folder out of the objects' paths below build_temp.
            objects = self.compiler.compile(
                [os.path.relpath(common[0]), os.path.relpath(glue)],
                output_dir=str(temp / text),
                include_dirs=[str(ROOT / "csrc")],
                extra_postargs=flags,
            )
            self.compiler.link_shared_object(
                objects, str(library), extra_postargs=["-pthread"], libraries=["dl"]
            )
        for stale in package.glob("libcudart-emulated-*.so"):
            if stale.name not in names:
                stale.unlink()


EXTENSIONS = [
    Extension(
        "kvsig._loader",
        ["kvsig/_loader.pyx"],
        extra_compile_args=FLAGS,
        libraries=["dl"],
    ),
    Extension(
        "kvsig._core",
        ["kvsig/_core.pyx"],
        depends=["kvsig/_core.pxd", "kvsig/_generated.pxi", "kvsig/_path.pxd"],
        extra_compile_args=FLAGS,
        libraries=["dl"],
    ),
    Extension(
        "kvsig._pack",
        ["kvsig/_pack.pyx"],
        depends=["kvsig/_clock.pxd", "kvsig/_pack.pxd"],
        extra_compile_args=FLAGS,
    ),
    Extension(
        "kvsig._submit",
        ["kvsig/_submit.pyx"],
        depends=["kvsig/_clock.pxd", "kvsig/_core.pxd", "kvsig/_pack.pxd", "kvsig/_path.pxd"],
        extra_compile_args=FLAGS,
    ),
]

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExt})
