"""Fixtures of the tests of the emulated runtime."""

import pytest
from raw_runtime import Runtime

from kvsig import emulated, registry
from kvsig.emulated.libraries import SOURCES


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Compile emulated runtimes by version, each once; a wheel is tested with those that it has."""
    if not SOURCES.is_dir():
        return emulated.resolve
    folder = tmp_path_factory.mktemp("emulated")
    entries = registry.load()
    libraries = {}

    def get(version):
        if version not in libraries:
            libraries[version] = emulated.build(entries, version, folder)
        return libraries[version]

    return get


@pytest.fixture(params=[12080, 13000], ids=["12.8", "13.0"])
def runtime(request, built):
    """A runtime of each form of the batch call."""
    runtime = Runtime(built(request.param), request.param)
    yield runtime
    runtime.control.reset()


@pytest.fixture
def latest(built):
    """The newest runtime whose prototypes are all known."""
    runtime = Runtime(built(13020), 13020)
    yield runtime
    runtime.control.reset()
