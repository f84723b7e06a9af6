"""A model of random weights as `generate` and the engine take it: without a tokenizer, as its tokens mean nothing."""

from __future__ import annotations

from typing import Any, cast

from ferrum_jax.checkpoint.load import Model
from ferrum_jax.config import ModelConfig


class _NoText:
    """Stands for a tokenizer, and for a stream of text, of which there is none."""

    eos_token_ids = ()

    def stream(self) -> _NoText:
        return self

    def push(self, token: int) -> str:
        del token
        return ""

    def flush(self) -> str:
        return ""


def model_of(cfg: ModelConfig, params: Any) -> Model:
    """The model; it has no report of its loading."""
    return Model(cfg, params, cast(Any, _NoText()), cast(Any, None))
