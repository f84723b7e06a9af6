"""How many experts a decode step of `ferrum-jax bench` reads, counted over what its rows have written."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferrum_jax.buckets import BucketedStep
    from ferrum_jax.checkpoint.load import Model
    from ferrum_jax.config import ModelConfig

LATEST = 16  # tokens of each row that experts are counted over
COUNTED = 16  # rows of a pass that counts them, so that lines share its program


def counting(model: Model, new_tokens: int) -> dict[tuple[BucketedStep, Hashable], dict[str, Any]]:
    """The program that counts experts, as `compile_all` takes it; none for a model without them.

    Args:
      model: whose experts.
      new_tokens: that each row writes.
    """
    import jax
    import numpy as np

    from ferrum_jax.buckets import structure_of

    if not model.cfg.num_experts:
        return {}
    tokens = jax.ShapeDtypeStruct((COUNTED, min(LATEST, new_tokens)), np.int32)
    key = tokens.shape[1], structure_of(model.params)
    return {(_chosen(model.cfg), key): {"params": model.params, "tokens": tokens}}


def experts_counted(model: Model, written: list[list[int]]) -> float | None:
    """How many experts of a layer a decode step reads, counted in a forward pass over the latest tokens of every row.

    Args:
      model: that wrote them.
      written: tokens of each row, all of one length; the pass sees the last LATEST of them and nothing before.

    Returns:
      The mean over MoE layers, at the last token; None for a model without experts.
    """
    import jax
    import numpy as np

    from ferrum_jax.buckets import structure_of

    if not model.cfg.num_experts:
        return None
    tokens = np.asarray([row[-LATEST:] for row in written], np.int32)
    # Passes of as many rows each, the last one with rows of the first again, so that every line has the same program.
    rows = np.resize(np.arange(len(tokens)), -(-len(tokens) // COUNTED) * COUNTED).reshape(-1, COUNTED)
    step, key = _chosen(model.cfg), (tokens.shape[1], structure_of(model.params))
    passes = [jax.device_get(step(key, params=model.params, tokens=tokens[some])) for some in rows]
    of_layers = [set(layer.ravel().tolist()) for layer in passes[0]]
    for layers in passes[1:]:
        for seen, layer in zip(of_layers, layers, strict=True):
            seen.update(layer.ravel().tolist())
    return statistics.mean(map(len, of_layers))


@functools.lru_cache(maxsize=1)
def _chosen(cfg: ModelConfig) -> BucketedStep:
    """A step from parameters and tokens to the experts of every row's last token, in each MoE layer."""
    from ferrum_jax.buckets import BucketedStep
    from ferrum_jax.model import forward

    def chosen(params: Any, tokens: Any) -> list[Any]:
        _, aux = forward(params, tokens, cfg, with_aux=True)
        return [layer for run in aux.routing if run is not None for layer in run.experts[:, :, -1]]

    return BucketedStep("experts", chosen)
