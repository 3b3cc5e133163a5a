"""Which variant a version gets: a truth table on a synthetic entry, and the real registry."""

from __future__ import annotations

import pytest
from future import NEXT_TEXT

from kvsig import registry
from kvsig.registry import Function, format_version, next_major, parse_version

ENTRY = """
verified = ["13.5.37"]

[library.cudart]
header = "cuda_runtime_api.h"
soname = "libcudart.so"
version = "version"

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

[function.gap]
library = "cudart"
returns = "int"
summary = "Ranges with a gap between them"
page = "https://example.com/"

[[function.gap.variant]]
since = "11.8"
before = "12.0"
reason = "first"
params = ["int a"]

[[function.gap.variant]]
since = "12.8"
before = "13.0"
reason = "second"
params = ["int a", "int b"]

[[function.gap.variant]]
since = "13.0"
before = "14.0"
reason = "third"
params = ["int a", "int b", "int c"]
"""

TABLE = registry.parse(ENTRY)
BATCH = registry.load().functions["cudaMemcpyBatchAsync"]

# What each version gets: the number of parameters of the variant, 0 for none. Each boundary has
# one step (10) and the smallest step that an integer knows (1) on either side.
TRUTH = {
    -12080: 0, -1: 0, 0: 0, 1: 0, 10: 0, 11000: 0,
    11070: 0, 11079: 0, 11080: 1, 11081: 1, 11090: 1,
    11990: 1, 11999: 1, 12000: 0, 12001: 0, 12010: 0,
    12070: 0, 12079: 0, 12080: 2, 12081: 2, 12090: 2,
    12990: 2, 12999: 2, 13000: 3, 13001: 3, 13010: 3,
    13990: 3, 13999: 3, 14000: 0, 14001: 0, 14010: 0,
    99000: 0, 2**31 - 1: 0, 12: 0, 128: 0, 1208: 0, 120800: 0,
}  # fmt: skip


@pytest.mark.parametrize(("version", "params"), TRUTH.items())
def test_truth_table(version: int, params: int) -> None:
    variant = TABLE.functions["gap"].select(version)
    assert (len(variant.params) if variant else 0) == params
    assert sum(v.covers(version) for v in TABLE.functions["gap"].variants) == bool(params)


@pytest.mark.parametrize(
    ("version", "found"),
    [(10990, False), (10999, False), (11000, True), (12080, True), (99000, True), (0, False)],
)
def test_open_range(version: int, found: bool) -> None:
    assert (TABLE.functions["version"].select(version) is not None) == found


@pytest.mark.parametrize("text", ["11.0", "12.6", "12.7", NEXT_TEXT, "99.0", "0.0"])
def test_versions_that_no_range_of_the_batch_function_covers(text: str) -> None:
    assert BATCH.select(parse_version(text)) is None


@pytest.mark.parametrize("version", [-1, -12080, 0, 7, 12, 13, 1280, 128000, 2**31 - 1, -(2**31)])
def test_garbage_versions_get_nothing(version: int) -> None:
    assert BATCH.select(version) is None


@pytest.mark.parametrize(
    ("text", "failidx"), [("12.8", True), ("12.9", True), ("12.99", True), ("13.0", False),
                          ("13.5", False), ("13.99", False)],
)  # fmt: skip
def test_batch_function_around_its_change(text: str, failidx: bool) -> None:
    variant = BATCH.select(parse_version(text))
    assert variant is not None
    assert ("failIdx" in [p.name for p in variant.params]) == failidx
    assert len(variant.params) == (9 if failidx else 8)


class TestRealRegistry:
    FUNCTIONS = list(registry.load().functions.values())

    @pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
    def test_each_boundary_and_one_step_either_side(self, function: Function) -> None:
        for index, variant in enumerate(function.variants):
            assert function.select(variant.since) is variant
            assert function.select(variant.since + 10) is variant
            before = function.select(variant.since - 10)
            assert before is (
                function.variants[index - 1]
                if index and function.variants[index - 1].before == variant.since
                else None
            )
            if variant.before is not None:
                assert function.select(variant.before - 10) is variant
                assert function.select(variant.before) is not variant

    @pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
    def test_no_range_reaches_past_the_next_major_of_what_was_verified(
        self, function: Function
    ) -> None:
        releases = (release.rpartition(".")[0] for release in registry.load().verified)
        newest = max(map(parse_version, releases))
        for variant in function.variants:
            if variant.before is None:
                assert variant.open
            else:
                assert variant.before <= next_major(max(newest, variant.since))

    def test_only_what_page_copies_stand_on_is_open(self) -> None:
        # The driver keeps its old entry points; a runtime may change anything with a major.
        opened = {
            function.name: [format_version(v.since) for v in function.variants if v.open]
            for function in self.FUNCTIONS
            if function.library == "cudart" and any(v.open for v in function.variants)
        }
        assert opened == {
            "cudaRuntimeGetVersion": ["11.0"],
            "cudaDriverGetVersion": ["11.0"],
            "cudaGetLastError": ["11.0"],
            "cudaPeekAtLastError": ["11.0"],
            "cudaGetErrorName": ["11.0"],
            "cudaGetErrorString": ["11.0"],
            "cudaMemcpyAsync": ["11.0"],
        }

    def test_every_range_begins_and_ends_where_a_release_was_looked_at(self) -> None:
        # A range is proven by a release on each side of where it begins; what begins in a version
        # that no release in the list has, or at the first one, is known from the headers' own
        # history and listed here.
        looked = {parse_version(r.rpartition(".")[0]) for r in registry.load().verified}
        odd = {
            (function.name, format_version(variant.since))
            for function in self.FUNCTIONS
            for variant in function.variants
            if variant.since not in looked and not variant.open
        }
        known = {("cudaStreamGetCaptureInfo", "12.0"), ("cudaGraphInstantiate", "12.0")}
        assert odd == known, (
            f"{sorted(odd - known)}: no release in verified is of that version; check one"
            " (kvsig check --releases), and add it there"
        )

    def test_verified_releases_are_sorted_and_named_once(self) -> None:
        verified = registry.load().verified
        numbers = [tuple(map(int, release.split("."))) for release in verified]
        assert numbers == sorted(set(numbers))
