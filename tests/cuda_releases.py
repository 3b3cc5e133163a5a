"""Headers of real CUDA releases for tests, fetched once and kept in the user's cache."""

from __future__ import annotations

import pytest

from kvsig import headers, registry, releases

REGISTRY = registry.load()


def header(release: str) -> headers.Header:
    """Headers of a release; skips where they are not in the cache and cannot be fetched."""
    try:
        return headers.read(releases.include(release), REGISTRY, [releases.crt()])
    except releases.ReleaseError as error:
        if "package index cannot be reached" not in str(error):
            raise
        pytest.skip(str(error))
