"""Shapes of the models."""

from __future__ import annotations

import pytest

from kvsig.tools import demo, models


class TestModels:
    def test_bytes_per_token(self):
        """The numbers that the models' makers and their users give."""
        assert models.MODELS["llama3-8b"].token_bytes == 128 * 1024
        assert models.MODELS["llama3-70b-tp8"].token_bytes == 320 * 1024 // 8
        assert models.MODELS["deepseek-v3"].token_bytes == 61 * 1152

    @pytest.mark.parametrize("name", list(models.MODELS))
    def test_default_is_more_than_1_gib_on_a_gpu(self, name):
        model = models.MODELS[name]
        assert demo.default_tokens(model, emulated=False) * model.token_bytes >= 1 << 30
        assert demo.default_tokens(model, emulated=True) * model.token_bytes < 80 << 20
