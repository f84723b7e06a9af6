"""The layers of a decoder: those that share a structure are stacked, and one scan runs them.

Expert stacks go into the scan whole, with the layer number as an index, because slicing a layer out would copy all its
experts at every step. What a branch adds to the residual stream is added by the norm that comes next, in one kernel
where there is one; so a layer ends with the first norm of the next one, or the model's last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ferrum_jax.config import ModelConfig
from ferrum_jax.kernels import MixedStack, is_weight
from ferrum_jax.layers import add_norm, add_norm_next, linear_parts, mlp, uses_triton
from ferrum_jax.moe import add_norm_route, moe_layer, router_rows

Params = dict[str, Any]

UNROLL = 4  # layers of a turn of the loop, in a decode step on a GPU


class Place(NamedTuple):
    """Where a layer lies.

    Attributes:
      index: in its run of stacked layers.
      layer: in the model.
      window: how far back it looks.
      run: the stacked layers, for kernels that take vectors whole, with the index.
    """

    index: jax.Array
    layer: jax.Array
    window: jax.Array
    run: Params


# (weights of attention, normed hidden states [B, T, D], state, place) -> ([B, T, heads * head_dim], state)
Attend = Callable[[Params, jax.Array, Any, Place], tuple[jax.Array, Any]]


def run_layers(
    params: Params, x: jax.Array, mask: jax.Array | None, cfg: ModelConfig, attend: Attend, state: Any, with_aux: bool
) -> tuple[jax.Array, jax.Array, Any, list[tuple[Any, Any]]]:
    """Run all layers, and the norm after the last one.

    Args:
      params: the model's pytree.
      x: embeddings [B, T, D].
      mask: bool [B, T], False for padding, which is sent to no expert; None: none.
      cfg: frozen configuration.
      attend: attention of one layer.
      state: what attend carries from layer to layer, such as a cache.
      with_aux: also return hidden states and routing.

    Returns:
      The residual stream and its norm, both [B, T, D]; the state; and for each run of layers (hidden
      [layers, B, T, D], Routing), or (None, None).
    """
    if mask is not None and uses_triton(cfg):
        mask = mask.astype(jnp.int32)  # as the kernels take it: here once, not in every layer
    runs, seen, start = params["layers"], [], 0
    x, h = add_norm(x, jnp.zeros_like(x), runs[0]["input_norm"], cfg, 0)
    one = uses_triton(cfg) and x.shape[1] == 1
    step = one and mask is not None  # not `forward` of one token, which is differentiable
    for run, following in zip(runs, [*(later["input_norm"][0] for later in runs[1:]), params["norm"]], strict=True):
        count = run["input_norm"].shape[0]
        norms = jnp.concatenate([run["input_norm"][1:], following[None]])
        routers = router_rows(run["moe"]["router"], x, cfg) if "moe" in run else None

        def body(
            carry: tuple, _: None, run: Params = run, start: int = start, routers: Any = routers, norms: Any = norms
        ) -> tuple[tuple, tuple]:
            index, x, h, state = carry
            at = Place(index, start + index, _window(cfg, start + index), run)
            p = take_layer(run, index)
            with jax.named_scope("attention"):
                y, state = attend(p["attn"], h, state, at)
                y = y.reshape(*x.shape[:2], -1)
                y = linear_parts(y, p["attn"]["o"], cfg, p["attn"].get("o_bias"), layer=index)
            routing = None
            if "moe" in p:
                with jax.named_scope("moe"):
                    x, h, logits, arrived = add_norm_route(x, y, run["post_norm"], routers, cfg, index)
                    given = {"layer": index, "mask": mask, "logits": logits, "arrived": arrived}
                    y, routing = moe_layer(p["moe"], h, cfg, **given, whole=not step)
            else:
                with jax.named_scope("mlp"):
                    x, h = add_norm(x, y, run["post_norm"], cfg, index)
                    y = mlp(p["mlp"], h, cfg, index)
            x, h, after = add_norm_next(x, y, norms, cfg, index)
            return (after, x, h, state), ((x, routing) if with_aux else (None, None))

        # The loop's own work is a few launches, which weigh where a layer is a few.
        unroll = UNROLL if one else 1
        (_, x, h, state), ys = lax.scan(body, (jnp.int32(0), x, h, state), None, length=count, unroll=unroll)
        seen.append(ys)
        start += count
    return x, h, state, seen


def _window(cfg: ModelConfig, layer: jax.Array) -> jax.Array:
    no_window = np.iinfo(np.int32).max
    windows = np.asarray([no_window if w is None else w for w in cfg.sliding_windows], np.int32)
    # Not looked up where all are the same: on a GPU that is a kernel per layer.
    return jnp.int32(windows[0]) if (windows == windows[0]).all() else jnp.asarray(windows)[layer]


def take_layer(run: Params, index: jax.Array) -> Params:
    """Layer `index` of a run of stacked layers: vectors cut out, matrices left whole for who takes a layer number."""

    def whole(leaf: Any) -> bool:
        return is_weight(leaf) or isinstance(leaf, MixedStack)

    def take(leaf: Any) -> Any:
        if whole(leaf) or leaf.ndim > 2:
            return leaf
        return lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False)

    return jax.tree.map(take, run, is_leaf=whole)
