"""The figures of the planner: those that come along, those that are kept, and bad ones."""

import json
import os
from dataclasses import fields, replace

import numpy as np
import pytest
from geometries import H100, page_first, plan

from kvsig.planning import costs
from kvsig.planning.costs import CostModel, DirectionCosts, builtin


class TestStoredCosts:
    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return tmp_path

    def test_known_devices(self):
        assert builtin("NVIDIA H200").source == "built in"
        assert builtin("NVIDIA H200").load == H100.load
        assert builtin("NVIDIA GH1000").source == "default"
        assert builtin().source == "default"
        assert costs.load("NVIDIA H200") == builtin("NVIDIA H200")

    def test_saved_and_loaded(self, cache):
        model = CostModel("NVIDIA H200", "calibrated", H100.offload, H100.load, (64, 96))
        path = costs.save(model)
        assert path == cache / "kvsig" / "costs-nvidia-h200.json"
        assert costs.load("NVIDIA H200") == model
        assert os.listdir(path.parent) == [path.name]
        costs.save(replace(model, source="default"))
        assert costs.load("NVIDIA H200").source == "default"

    def test_relative_cache_folder_is_ignored(self, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
        assert costs.cache_path("A").parts[-3:] == (".cache", "kvsig", "costs-a.json")

    @pytest.mark.known_failure("absurd-costs")
    @pytest.mark.parametrize(
        ("damage", "why"),
        [
            (lambda data: "{", "Expecting property name"),
            (lambda data: "[]", "not a JSON object"),
            (lambda data: json.dumps({**data, "format": 99}), "format is 99, this version reads 2"),
            (lambda data: json.dumps({**data, "batch_sizes": [0]}), r"batch_sizes is \(0,\)"),
            (lambda data: json.dumps({**data, "load": {}}), "load does not hold exactly byte,"),
            (
                lambda data: json.dumps({**data, "load": {**data["load"], "byte": -1}}),
                "load.byte is -1, needs a number from 0 to 1e6",
            ),
            (
                lambda data: json.dumps({**data, "offload": {**data["offload"], "byte": None}}),
                "offload.byte is None",
            ),
            (
                lambda data: json.dumps({**data, "load": {**data["load"], "byte": 1e300}}),
                "load.byte is 1e.300, needs a number from 0 to 1e6",
            ),
            (
                lambda data: json.dumps(data).replace('"latency": 7.0', '"latency": ' + "9" * 400),
                "latency is 9999",
            ),
            (
                lambda data: json.dumps(data).replace('"latency": 7.0', '"latency": ' + "9" * 5000),
                "Exceeds the limit",
            ),
            (
                lambda data: json.dumps(data).replace('"latency": 7.0', '"latency": NaN'),
                "latency is nan",
            ),
            (
                lambda data: json.dumps(data).replace('"latency": 7.0', '"latency": true'),
                "latency is True",
            ),
            # Whether that is too deep or ends too soon depends on the interpreter's stack.
            (lambda data: "[" * 60_000, "recursion|Expecting value"),
            (lambda data: json.dumps({**data, "batch_sizes": [2**70]}), "batch_sizes is"),
            (lambda data: json.dumps({**data, "batch_sizes": 5}), "batch_sizes is 5, needs a list"),
            (lambda data: " " * 70_000, "longer than 65536 bytes"),
        ],
    )
    def test_damaged_file_is_reported(self, damage, why):
        path = costs.save(replace(H100, name="NVIDIA H200", source="calibrated"))
        path.write_text(damage(json.loads(path.read_text())))
        with pytest.warns(RuntimeWarning, match=why) as caught:
            model = costs.load("NVIDIA H200")
        assert model == builtin("NVIDIA H200")
        assert "python -m kvsig calibrate" in str(caught[0].message)
        assert caught[0].filename == __file__

    @pytest.mark.known_failure("costs-that-are-no-file")
    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
    def test_what_is_no_file_is_reported(self, make, recwarn):
        path = costs.cache_path("NVIDIA H200")
        path.parent.mkdir()
        make(path)
        assert costs.load("NVIDIA H200") == builtin("NVIDIA H200")
        assert str(path) in str(recwarn[0].message)

    @pytest.mark.known_failure("no-home")
    def test_without_a_home_directory(self, monkeypatch):
        """Nothing is kept then, so nothing is missed."""
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        assert costs.load("NVIDIA H200") == builtin("NVIDIA H200")
        with pytest.raises(OSError, match="no home directory to keep calibrated figures in"):
            costs.save(H100)

    def test_figures_that_cannot_be_put_in_place_leave_nothing_behind(self):
        path = costs.cache_path("NVIDIA H200")
        path.mkdir(parents=True)
        with pytest.raises(OSError):
            costs.save(replace(H100, name="NVIDIA H200"))
        assert os.listdir(path.parent) == [path.name]


class TestFigures:
    @pytest.mark.known_failure("absurd-costs")
    @pytest.mark.parametrize("value", [-1, 1e300, float("nan"), 10**400, True, "1", None])
    def test_outside_the_arithmetic_are_refused(self, value):
        with pytest.raises(ValueError, match="strided_row is .*, needs a number from 0 to 1e6"):
            replace(H100.load, strided_row=value)

    @pytest.mark.parametrize("sizes", [(), (0,), (2**31,), tuple(range(1, 10)), (1.5,)])
    def test_of_batches_too(self, sizes):
        with pytest.raises(ValueError, match="needs one to eight integers from 1 to"):
            replace(H100, batch_sizes=sizes)

    @pytest.mark.parametrize("extreme", [0.0, 1e6])
    def test_at_the_ends_plan_without_trouble(self, extreme):
        pages = np.random.default_rng(0).permutation(500)
        for name in [f.name for f in fields(DirectionCosts)]:
            side = replace(H100.load, **{name: extreme})
            model = replace(H100, load=side, offload=side)
            for direction in ("load", "offload"):
                result = plan(page_first(3, 64, 500), pages, pages[::-1], direction, model=model)
                assert result.bytes == 500 * 6 * 64
                runs = np.arange(500)
                assert plan(page_first(3, 64, 500), runs, runs, direction, model=model).calls
