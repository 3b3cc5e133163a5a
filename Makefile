# make demo      the main job: a KV cache goes to host pages and back, compared bit for bit
#                (also installs kvsig, editable, into the environment: .venv/bin/kvsig is there then)
# make test      the test suite
# make releases  the registry against every release of CUDA (fetches 14 packages of 1 to 3 MB, once)
# make engines   the released Python of SGLang and vLLM against what kvsig relies on (fetches
#                wheels of 1.3 GB in all, once, and keeps their Python: 300 MB below build)
# make fuzz      random requests, copies, calls, registries and files of costs against models
# make sanitize  the compiled parts and their tests under AddressSanitizer and UBSan
# make coverage  lines of Python and Cython that the tests run, in a build of its own: 93 % at least
# make lint      ruff, cython-lint and mypy
# make types     the stubs of the compiled modules against the modules
# make docs      the pages as a site in build/site, warnings as errors, links checked
# make sdist     the source distribution, and its own tests from where it is unpacked
# make wheels    wheels for the interpreters that are found, each tested by itself
# make build     the extension modules and the emulated CUDA runtimes, in place
# make clean     removes what was built; make distclean removes the environment too
#
# Each makes what it needs: a virtual environment .venv, the packages in it, the build.
#
# Variables
#   PYTHON   the interpreter to start from (default: that of the active virtual environment,
#            else the first of python3, python3.11 to python3.14, python that is 3.11 or later)
#   TORCH    what pip installs where torch is missing (default: torch==2.13.0)
#   ARGS     further arguments of demo or test: make demo ARGS="--model deepseek-v3"
#   SECONDS_OF_FUZZ  how long make fuzz goes on (default: 60)
#
# A torch that is there is left alone. Where PYTHON belongs to a virtual environment with torch,
# that environment is used; where PYTHON has torch otherwise, .venv sees PYTHON's packages.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules --no-print-directory

TORCH ?= torch==2.13.0
ARGS ?=
SECONDS_OF_FUZZ ?= 60

modern := import sys; sys.exit(sys.version_info < (3, 11))
ifeq ($(PYTHON),)
override PYTHON := $(shell for p in $(VIRTUAL_ENV:%=%/bin/python) \
	python3 python3.11 python3.12 python3.13 python3.14 python; do \
	if $$p -c '$(modern)' 2>/dev/null; then echo $$p; break; fi; done)
endif

# What PYTHON has: "none" (no torch), "shared" (torch), or the virtual environment with torch.
has_torch := import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)
found := $(shell $(or $(PYTHON),false) -c 'import importlib.util, sys; \
	torch = importlib.util.find_spec("torch"); \
	print("none" if torch is None else "shared" if sys.prefix == sys.base_prefix else sys.prefix)' \
	2>/dev/null || true)
VENV := .venv
ifneq ($(filter-out none shared $(abspath .venv),$(found)),)
VENV := $(found)
endif

py := $(VENV)/bin/python
pip := $(py) -m pip --disable-pip-version-check --quiet
packages := $(VENV)/.kvsig-packages
linters := $(VENV)/.kvsig-linters
sphinx := $(VENV)/.kvsig-docs
installed := $(VENV)/.kvsig-installed
# A build belongs to one interpreter, so each environment has a stamp of its own.
built := build/stamp$(subst /,-,$(VENV))
sources := setup.py pyproject.toml kvsig/signatures.toml kvsig/registry.py \
	kvsig/registry_model.py kvsig/registry_types.py kvsig/codegen.py kvsig/stubs.py \
	$(wildcard kvsig/*.pyx kvsig/*.pxd kvsig/*/*.pyx kvsig/*/*.pxd csrc/*.c csrc/*.h csrc/*.cu csrc/*/*.c csrc/*/*.h)

# Requirements are written down once, in pyproject.toml; torch is installed by itself, or not at all.
define requirements
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
extras = project["project"]["optional-dependencies"]
linters = [r for r in extras["dev"] if not r.startswith(("pytest", "hypothesis", "coverage"))]
base = project["build-system"]["requires"] + project["project"]["dependencies"]
base = [r for r in base + extras["dev"] if r not in linters and not r.startswith("torch")]
print(*{"linters": linters, "base": base, "docs": extras["docs"]}[sys.argv[1]], sep="\n")
endef
export requirements

define prerequisites
import os, shlex, shutil, sys, sysconfig
compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
if shutil.which(compiler) is None:
    sys.exit(f"kvsig: the C compiler {compiler} was not found: install one (Debian, Ubuntu: "
             "apt-get install gcc), or name one: make CC=...")
header = os.path.join(sysconfig.get_path("include"), "Python.h")
if not os.path.exists(header):
    sys.exit(f"kvsig: {header} is missing: install Python's headers (Debian, Ubuntu: "
             "apt-get install python3-dev)")
endef
export prerequisites

.PHONY: demo test releases engines fuzz sanitize coverage lint types docs sdist wheels build clean distclean
demo: $(installed)
	@$(py) -m kvsig demo $(ARGS)
	@printf '%s\n' '' 'To go on:' \
		'  $(VENV)/bin/kvsig info                     # which CUDA runtime is used, which prototypes' \
		'  $(py) examples/quickstart.py  # the script of README.md, to change' \
		'  $(VENV)/bin/kvsig demo --help              # other models, layouts and paths'

test: build
	$(py) -m pytest $(ARGS)

releases: build
	$(py) -m kvsig check --releases
	$(py) -m pytest -m releases

engines: build
	$(py) tests/engines/check_engines.py $(ARGS)

fuzz: build
	PYTHONPATH='$(CURDIR)' $(py) tests/fuzz/fuzz_run.py --seconds $(SECONDS_OF_FUZZ) $(ARGS)

sanitize: $(packages)
	$(py) packaging/sanitize.py $(ARGS)

coverage: $(packages)
	$(py) packaging/covered.py $(ARGS)

lint: $(linters) build
	$(py) -m ruff check .
	PATH='$(abspath $(VENV))/bin':"$$PATH" cython-lint $(wildcard kvsig/*.pyx kvsig/*.pxd kvsig/*/*.pyx kvsig/*/*.pxd)
	$(py) -m mypy

types: $(linters) build
	$(py) packaging/stubs.py

docs: $(sphinx) build
	$(py) packaging/site.py

sdist: $(packages)
	$(py) packaging/wheels.py --sdist

wheels: $(packages)
	$(py) packaging/wheels.py

build: $(built)

$(built): $(sources) $(packages)
	@echo 'kvsig: building the extension modules and the emulated CUDA runtimes'
	$(py) setup.py --quiet build_ext --inplace
	@mkdir -p build && touch '$@'

# Editable, so that `import kvsig` and $(VENV)/bin/kvsig work from everywhere.
$(installed): setup.py pyproject.toml kvsig/__init__.py | $(built)
	@$(pip) install --no-build-isolation --no-deps --editable .
	@touch '$@'

$(VENV)/bin/python:
	@if ! $(or $(PYTHON),false) -c '$(modern)' 2>/dev/null; then \
		echo 'kvsig: Python 3.11 or later is needed, and' \
			'$(if $(PYTHON),$(PYTHON) is not one,none was found);' \
			'name one: make PYTHON=/path/to/python3' >&2; exit 1; fi
	@echo 'kvsig: making the virtual environment $(VENV) with $(PYTHON)'
	@if ! $(PYTHON) -m venv $(if $(filter shared,$(found)),--system-site-packages) '$(VENV)'; then \
		rm -rf '$(VENV)'; echo 'kvsig: $(PYTHON) cannot make virtual environments' \
			'(Debian, Ubuntu: apt-get install python3-venv)' >&2; exit 1; fi

$(packages): pyproject.toml | $(VENV)/bin/python
	@$(py) -c "$$prerequisites"
	@echo 'kvsig: installing the packages for build and tests'
	@$(py) -c "$$requirements" base | $(pip) install -r /dev/stdin
	@if ! $(py) -c '$(has_torch)'; then \
		echo 'kvsig: installing $(TORCH) (this takes a while)'; \
		$(pip) install $(TORCH) || { echo 'kvsig: $(TORCH) could not be installed;' \
			'name another: make TORCH=...' >&2; exit 1; }; fi
	@touch '$@'

$(linters): pyproject.toml | $(packages)
	@echo 'kvsig: installing the linters'
	@$(py) -c "$$requirements" linters | $(pip) install -r /dev/stdin
	@touch '$@'

$(sphinx): pyproject.toml | $(packages)
	@echo 'kvsig: installing what the pages are built with'
	@$(py) -c "$$requirements" docs | $(pip) install -r /dev/stdin
	@touch '$@'

clean:
	rm -rf build dist *.egg-info kvsig/_emulated csrc/generated
	rm -f kvsig/*.so kvsig/*/*.so kvsig/*.c kvsig/*/*.c kvsig/_generated.pxi kvsig/_page_copy.pxi kvsig/_calls.pyi
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
