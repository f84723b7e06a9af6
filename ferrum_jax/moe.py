"""The mixture-of-experts layer in four steps that also stand alone: route, dispatch, experts, combine."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import ShapeError
from ferrum_jax.kernels import (
    Dispatch,
    TiledLinear,
    from_blocks,
    grouped_gptq_matmul,
    to_blocks,
)
from ferrum_jax.layers import (
    add_norm,
    added,
    at_layer,
    folded,
    implementation_of,
    linear,
    rms_norm,
    silu_mul,
    uses_cpu_kernels,
    uses_triton,
)
from ferrum_kernels import cpu, mosaic, triton, triton_norm
from ferrum_kernels.blocks import dispatch as dispatch
from ferrum_kernels.derivatives import differentiable
from ferrum_kernels.ops import resolve
from ferrum_kernels.pairs import Pairs


@dataclasses.dataclass(frozen=True)
class Routing:
    """Where each token goes.

    Attributes:
      logits: float32 [..., E], the router's output.
      experts: int32 [..., K], chosen experts, best first.
      weights: float32 [..., K], their weights.
    """

    logits: Any
    experts: Any
    weights: Any


jax.tree_util.register_dataclass(Routing, data_fields=["logits", "experts", "weights"], meta_fields=[])


def route(logits: Float[Array, "*lead E"], top_k: int, norm_topk_prob: bool = False) -> Routing:
    """Softmax over all experts, then the best K; equal probabilities go to the smaller index.

    Args:
      logits: [..., E], any float dtype; computed in float32.
      top_k: K.
      norm_topk_prob: rescale the K weights to sum to one.

    Returns:
      Routing. A logit of NaN or +inf makes the token's weights NaN, so that it cannot pass unnoticed; -inf rules its
      expert out.

    Raises:
      ShapeError: top_k is not in 1 .. E.

    >>> r = route(jnp.log(jnp.array([0.1, 0.4, 0.4, 0.1])), top_k=2, norm_topk_prob=True)
    >>> r.experts.tolist(), r.weights.tolist()
    ([1, 2], [0.5, 0.5])

    Source: Qwen3-MoE and Mixtral (arXiv 2401.04088).
    """
    num_experts = logits.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ShapeError(f"top_k={top_k}; a router over {num_experts} experts chooses between 1 and {num_experts}.")
    logits = logits.astype(jnp.float32)
    left = probs = jax.nn.softmax(logits, axis=-1)
    lanes = jax.lax.broadcasted_iota(jnp.int32, probs.shape, probs.ndim - 1)
    experts = []
    # K passes of argmax: they settle ties by index, need no sort and lower on plugins without top_k.
    for _ in range(top_k):
        best = jnp.argmax(left, axis=-1, keepdims=True).astype(jnp.int32)
        left = jnp.where(lanes == best, -1.0, left)
        experts.append(best)
    chosen = jnp.concatenate(experts, axis=-1)
    weights = jnp.take_along_axis(probs, chosen, axis=-1)
    if norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(logits=logits, experts=chosen, weights=weights)


def run_experts(
    experts: dict[str, Any],
    x: Float[Array, "T D"],
    plan: Dispatch,
    cfg: ModelConfig,
    layer: jax.Array | int | None = None,
) -> Float[Array, "R D"]:
    """The gated MLP of each pair's expert, in the block layout.

    Args:
      experts: {"gate_up", "down"} stacks, or {"gate", "up", "down"} where gate and up are packed differently.
      x: one row per token.
      plan: the dispatch of T * K pairs.
      cfg: its top_k and implementation.
      layer: index into stacks that have a layer axis.

    Returns:
      float32 [R, D], before routing weights.
    """

    def grouped(rows: jax.Array, name: str, out_dtype: Any) -> jax.Array:
        return grouped_gptq_matmul(
            rows, experts[name], plan, layer=layer, implementation=cfg.implementation, out_dtype=out_dtype
        )

    rows = to_blocks(x, plan, pairs_per_row=cfg.top_k)
    if "gate_up" in experts:
        gate, up = jnp.split(grouped(rows, "gate_up", x.dtype), 2, axis=-1)
    else:
        gate, up = grouped(rows, "gate", x.dtype), grouped(rows, "up", x.dtype)
    return grouped(silu_mul(gate, up), "down", jnp.float32)


def combine(y: Float[Array, "R D"], plan: Dispatch, weights: Float[Array, "T K"]) -> Float[Array, "T D"]:
    """Add up each token's experts, weighted, in float32.

    A token's K pairs are one segment, so the segment sum is a gather and a sum over K: deterministic, no scatter.

    Args:
      y: [R, D] in the block layout.
      plan: the dispatch.
      weights: routing weights [T, K].

    Returns:
      float32 [T, D]; skipped pairs add zero.
    """
    pairs = from_blocks(y.astype(jnp.float32), plan).reshape(*weights.shape, y.shape[-1])
    live = (plan.slots < plan.num_rows).reshape(weights.shape)
    return jnp.sum(pairs * jnp.where(live, weights, 0.0)[..., None], axis=-2)


def router_rows(router: jax.Array, x: jax.Array, cfg: ModelConfig) -> jax.Array | None:
    """A stack of routers [L, D, E] as `add_norm_route` reads it, [L, E, D]; None where it has no kernel.

    Laid out before the scan over layers, so once per step: a row of inputs is one run of memory, a column is not.
    """
    return jnp.swapaxes(router, -1, -2) if uses_triton(cfg) and triton_norm.takes(x, router) else None


def add_norm_route(
    x: Float[Array, "*lead D"],
    y: Float[Array, "*lead D"],
    weight: jax.Array,
    router: jax.Array | None,
    cfg: ModelConfig,
    layer: jax.Array | int,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """`layers.add_norm`, and the router's logits where kernels give all of it.

    Args:
      x: the residual stream.
      y: what a branch adds to it, or parts of that from `layers.linear_parts`.
      weight: of the norm, a stack [L, D].
      router: of `router_rows`.
      cfg: its rms_norm_eps and implementation.
      layer: index into both.

    Returns:
      (sum, norm, float32 logits [..., E], parts [parts, ..., E] of them, or None where `moe_layer` takes them itself,
      and int32 [1], zero, a counter that `moe_layer` takes, or None).
    """
    if router is None or not triton_norm.takes(x, weight):
        return *add_norm(x, y, weight, cfg, layer), None, None

    def specified(activations: tuple, layer: Any) -> tuple[jax.Array, ...]:
        x, y, weight, router = activations
        total = added(x, y)
        norm = rms_norm(total, at_layer(weight, layer), cfg.rms_norm_eps)
        matrix = jnp.swapaxes(at_layer(router, layer), 0, 1)
        logits = linear(norm.astype(jnp.float32), matrix, dataclasses.replace(cfg, implementation="xla"))
        if parts > 1:
            logits = jnp.concatenate([logits[None], jnp.zeros((parts - 1, *logits.shape), logits.dtype)])
        return total, norm, logits, jnp.zeros(1, jnp.int32)

    def kernel(activations: tuple, layer: Any) -> tuple[jax.Array, ...]:
        x, y, weight, router = activations
        *out, arrived = triton_norm.add_norm_route(
            *folded(x, y), weight, router, layer, cfg.rms_norm_eps, triton.is_interpreted()
        )
        return *(a.reshape(*a.shape[:-2], *x.shape[:-1], -1) for a in out), arrived

    parts = triton_norm.logit_parts(math.prod(x.shape[:-1]))
    return differentiable(kernel, specified)((x, y, weight, router), jnp.asarray(layer, jnp.int32))


def moe_layer(
    params: dict[str, Any],
    x: Float[Array, "*lead D"],
    cfg: ModelConfig,
    *,
    layer: jax.Array | int | None = None,
    mask: Bool[Array, "*lead"] | None = None,
    block: int | None = None,
    logits: jax.Array | None = None,
    arrived: jax.Array | None = None,
    whole: bool = True,
) -> tuple[Any, Routing]:
    """One mixture-of-experts layer: route, dispatch, run the live experts, combine.

    Args:
      params: {"router": [D, E], "experts": {...}} as in `params.layer(model.params, i)["moe"]`.
      x: hidden states [..., D]; leading axes are folded into tokens.
      cfg: top_k, norm_topk_prob and implementation are read.
      layer: index into stacks that have a layer axis, as inside a scan over layers; the router may lack that axis.
      mask: bool [...], False for padding tokens: they are sent to no expert and get zero.
      block: rows per block of the dispatch; None picks one for the number of tokens.
      logits: the router's [..., E], or parts of them, as of `add_norm_route`; None: to be computed.
      arrived: the counter, zero, that `add_norm_route` of this layer gave, with which GPU kernels need one launch less;
        or None.
      whole: add a token's experts up; else kernels may leave that to `layers.add_norm`, and nothing is differentiable.

    Returns:
      ([..., D] in x.dtype or Pairs, Routing with the same leading axes). Differentiable with respect to x and the
      router.

    >>> import ferrum_jax as fj
    >>> model = fj.load("demo")
    >>> y, aux = moe_layer(fj.layer(model.params, 0)["moe"], jnp.ones((2, 3, 256)), model.cfg)
    >>> y.shape, aux.experts.shape
    ((2, 3, 256), (2, 3, 4))
    """
    lead = x.shape[:-1]
    tokens = x.reshape(-1, x.shape[-1])
    known = None
    if logits is not None:
        known = logits.reshape(*logits.shape[: logits.ndim - x.ndim], -1, logits.shape[-1])
    if block is None and tokens.shape[0] and _fits_cpu_kernels(params["experts"], cfg):
        y, routing = _on_cpu_kernels(params, tokens, cfg, layer, mask)
    elif block is None and tokens.shape[0] and _fits_triton(params["experts"], cfg):
        y, routing = _on_triton(params, tokens, cfg, layer, mask, known, arrived, whole)
    else:
        y, routing = _step_by_step(params, tokens, cfg, layer, mask, block, known)
    routing = jax.tree.map(lambda leaf: leaf.reshape(*lead, leaf.shape[-1]), routing)
    return (y if isinstance(y, Pairs) else y.astype(x.dtype).reshape(x.shape)), routing


def _step_by_step(
    params: dict[str, Any],
    x: jax.Array,
    cfg: ModelConfig,
    layer: jax.Array | int | None,
    mask: jax.Array | None,
    block: int | None,
    logits: jax.Array | None,
) -> tuple[jax.Array, Routing]:
    logits = _router_logits(params["router"], x, cfg, layer) if logits is None else _whole(logits)
    routing = route(logits, cfg.top_k, cfg.norm_topk_prob)
    plan = dispatch(_live(routing.experts, mask, cfg), cfg.num_experts, block)
    return combine(run_experts(params["experts"], x, plan, cfg, layer), plan, routing.weights), routing


def _router_logits(router: jax.Array, x: jax.Array, cfg: ModelConfig, layer: Any) -> jax.Array:
    # In float32 whatever the activations: a rounded logit sends a token elsewhere.
    return linear(x.astype(jnp.float32), router, cfg, layer=_router_layer(router, layer))


def _whole(logits: jax.Array) -> jax.Array:
    """Logits [T, E], of which [parts, T, E] are parts."""
    return logits if logits.ndim == 2 else jnp.sum(logits, axis=0)


def _router_layer(router: jax.Array, layer: Any) -> Any:
    """A router may come without the layer axis that the expert stacks have."""
    return layer if router.ndim == 3 else None


def _live(experts: Int[Array, "T K"], mask: jax.Array | None, cfg: ModelConfig) -> jax.Array:
    return experts if mask is None else jnp.where(mask.reshape(-1, 1), experts, cfg.num_experts)


def _fits_cpu_kernels(experts: dict[str, Any], cfg: ModelConfig) -> bool:
    """Whether one kernel runs all experts: packed alike, gate and up in one stack, in a format that it takes."""
    if not uses_cpu_kernels(cfg) or "gate_up" not in experts:
        return False
    return not any(map(cpu.refuses, experts.values()))


def _fits_triton(experts: dict[str, Any], cfg: ModelConfig) -> bool:
    """Whether the GPU kernels run the layer as a whole: tiled alike, gate and up in one stack."""
    return (
        uses_triton(cfg) and "gate_up" in experts and all(isinstance(stack, TiledLinear) for stack in experts.values())
    )


def _on_triton(
    params: dict[str, Any],
    x: jax.Array,
    cfg: ModelConfig,
    layer: jax.Array | int | None,
    mask: jax.Array | None,
    logits: jax.Array | None,
    arrived: jax.Array | None,
    whole: bool,
) -> tuple[Any, Routing]:
    """The same layer in two to five kernels after the router's product."""
    backend = mosaic if implementation_of(cfg) == mosaic.NAME else triton
    backend.check(*params["experts"].values())
    triton.check_dtype(x)
    portable = dataclasses.replace(cfg, implementation="xla")
    index = None if layer is None else jnp.asarray(layer, jnp.int32)
    logits = _router_logits(params["router"], x, portable, layer) if logits is None else logits
    live_tokens = None if mask is None else mask.reshape(-1)

    def layer_of(activations: tuple, constants: tuple) -> tuple[Any, ...]:
        x, logits = activations
        mask, experts, layer, arrived = constants
        rest = cfg.top_k, cfg.norm_topk_prob, experts["gate_up"], experts["down"], layer, arrived
        return backend.routed_experts(x, logits, mask, *rest, whole)[:3]

    def layer_specified(activations: tuple, constants: tuple) -> tuple[jax.Array, ...]:
        x, logits = activations
        mask, experts, layer, _ = constants
        routing = route(_whole(logits), cfg.top_k, cfg.norm_topk_prob)
        plan = dispatch(_live(routing.experts, mask, cfg), cfg.num_experts)
        y = combine(run_experts(experts, x, plan, portable, layer), plan, routing.weights).astype(x.dtype)
        return y, routing.experts, routing.weights

    constants = live_tokens, params["experts"], index, arrived
    run = differentiable(layer_of, layer_specified) if whole else layer_of
    y, chosen, weights = run((x, logits), constants)
    return y, Routing(_whole(logits), chosen, weights)


def _on_cpu_kernels(
    params: dict[str, Any], x: jax.Array, cfg: ModelConfig, layer: jax.Array | int | None, mask: jax.Array | None
) -> tuple[jax.Array, Routing]:
    """The same layer in two kernels, which sort, multiply and combine without leaving the processor's caches."""
    name = resolve(cfg.implementation, *params["experts"].values())
    portable = dataclasses.replace(cfg, implementation="xla")
    index = None if layer is None else jnp.asarray(layer, jnp.int32)

    def routing_of(activations: tuple, layer: Any) -> tuple[jax.Array, ...]:
        x, router = activations
        return cpu.route(x, router, layer, cfg.top_k, cfg.norm_topk_prob)

    def routing_specified(activations: tuple, layer: Any) -> tuple[jax.Array, ...]:
        x, router = activations
        logits = linear(x.astype(jnp.float32), router, portable, layer=layer)
        routing = route(logits, cfg.top_k, cfg.norm_topk_prob)
        return routing.logits, routing.experts, routing.weights

    def experts_of(activations: tuple, constants: tuple) -> jax.Array:
        x, weights = activations
        chosen, experts, layer = constants
        rounded = cpu.int8(name, x.dtype)
        return cpu.experts(x, chosen, weights, experts["gate_up"], experts["down"], layer, rounded)

    def experts_specified(activations: tuple, constants: tuple) -> jax.Array:
        x, weights = activations
        chosen, experts, layer = constants
        plan = dispatch(chosen, cfg.num_experts)
        return combine(run_experts(experts, x, plan, portable, layer), plan, weights).astype(x.dtype)

    logits, experts, weights = differentiable(routing_of, routing_specified)(
        (x, params["router"]), _router_layer(params["router"], index)
    )
    chosen = _live(experts, mask, cfg)
    y = differentiable(experts_of, experts_specified)((x, weights), (chosen, params["experts"], index))
    return y, Routing(logits, experts, weights)
