"""The parameters: one abstract tree that drives shapes, memory budget, loading and random test weights.

Axis legend, used in every shape of this package: B batch, T tokens, S cache slots, D hidden, F expert intermediate,
E experts, K experts per token, H query heads, Kv key/value heads, h head_dim, V vocabulary, L layers, G groups,
P (token, expert) pairs, R rows of the block layout.

    {"embed": [V, D],
     "layers": (run, ...),          consecutive layers of one structure, stacked on a leading axis
     "norm": [D],
     "lm_head": [D, V]}             absent when tied, unless lm_head_bits makes a packed one of the embedding
    run = {"input_norm", "post_norm", "attn": {"qkv", "o", "q_norm", "k_norm"},
           "moe": {"router": [D, E], "experts": {"gate_up", "down"}}  or  "mlp": {"gate", "up", "down"}}

Linear leaves are PackedLinear where quantised and arrays [K, N] where not; expert leaves have an expert axis and are
MixedStack where the experts of a layer differ. Linears of the same inputs that are packed alike are one leaf, side by
side: queries, keys and values (else "q", "k", "v"), gate and up of experts (else "gate", "up"). Loaded for the GPU
kernels, every PackedLinear is a TiledLinear, and where down's inputs were permuted (act-order) the columns of gate and
up are in that order instead: such experts compute the same, but edit gate, up and down together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import ShapeError
from ferrum_jax.kernels import PackedLinear, default_implementation
from ferrum_jax.plan import Plan, make_plan
from ferrum_kernels import mosaic
from ferrum_kernels.bits import centred
from ferrum_kernels.folding import folds, reorder_gate_and_up
from ferrum_kernels.tiles import tile_all


def abstract(cfg: ModelConfig) -> dict[str, Any]:
    """The parameters as `jax.ShapeDtypeStruct` leaves: no memory, no checkpoint.

    Args:
      cfg: the model.

    Returns:
      The pytree described at the top of this file, as the configuration promises it.

    >>> import ferrum_jax as fj
    >>> tree = fj.abstract(fj.load("demo").cfg)
    >>> tree["layers"][0]["moe"]["experts"]["down"].qweight.shape
    (6, 16, 16, 256)
    """
    return make_plan(cfg).tree


def num_bytes(tree: Any) -> int:
    """Bytes of all leaves, concrete or abstract."""
    return sum(int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _locate(params: dict[str, Any], index: int) -> tuple[int, int]:
    start = 0
    for i, run in enumerate(params["layers"]):
        count = run["input_norm"].shape[0]
        if start <= index < start + count:
            return i, index - start
        start += count
    raise ShapeError(f"layer {index} does not exist; this model has layers 0 to {start - 1}.")


def layer(params: dict[str, Any], index: int) -> dict[str, Any]:
    """One decoder layer of the parameters, without the layer axis.

    Args:
      params: the model's pytree.
      index: layer number.

    Returns:
      {"input_norm", "attn", "post_norm", "moe" or "mlp"}; which leaves those hold is said at the top of this file.

    Raises:
      ShapeError: no such layer.

    >>> import ferrum_jax as fj
    >>> sorted(fj.layer(fj.load("demo").params, 3))
    ['attn', 'input_norm', 'moe', 'post_norm']
    """
    run, offset = _locate(params, index)
    return jax.tree.map(lambda leaf: leaf[offset], params["layers"][run])


def set_layer(params: dict[str, Any], index: int, new: dict[str, Any]) -> dict[str, Any]:
    """The parameters with one decoder layer replaced; the argument is not changed.

    Args:
      params: the model's pytree.
      index: layer number.
      new: a layer with the structure, shapes and dtypes that `layer(params, index)` has.

    Returns:
      A new pytree.

    Raises:
      ShapeError: no such layer, or another structure, shape or dtype.

    >>> import ferrum_jax as fj
    >>> params = fj.load("demo").params
    >>> one = fj.layer(params, 2)
    >>> edited = fj.set_layer(params, 2, {**one, "post_norm": one["post_norm"] * 0})
    >>> float(fj.layer(edited, 2)["post_norm"].sum())
    0.0
    """
    run, offset = _locate(params, index)
    old = layer(params, index)
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ShapeError("the new layer has another structure than the old one; keep the keys and packing of layer().")
    for (path, was), now in zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True):
        if was.shape != now.shape or was.dtype != now.dtype:
            raise ShapeError(
                f"{jax.tree_util.keystr(path)} is {now.dtype}{list(now.shape)}; expected {was.dtype}{list(was.shape)}."
            )
    runs = list(params["layers"])
    runs[run] = jax.tree.map(lambda stack, leaf: stack.at[offset].set(leaf), runs[run], new)
    return {**params, "layers": tuple(runs)}


def assemble(
    plan: Plan,
    top: Callable[[str], Any],
    layer_of: Callable[[int, int], Any],
    layout: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """Build the parameters on the device, one leaf of one layer on the host at a time.

    Args:
      plan: what to build.
      top: name -> host leaf, for "embed", "norm" and "lm_head".
      layer_of: (run, offset) -> one layer with the structure of the run's tree, but functions that read the host
        leaves (or subtrees) in their place.
      layout: how a leaf (or subtree) is laid out on the device, a traceable function; `tile_all` for the GPU kernels.

    Returns:
      The parameters; each stack is allocated once and filled in place.
    """
    layout = _as_it_is if layout is None else layout
    lay_out = jax.jit(layout)
    params: dict[str, Any] = {name: lay_out(jax.tree.map(jnp.asarray, top(name))) for name in plan.top}
    runs = []
    for i, run in enumerate(plan.runs):
        stacks = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(layout, run.tree))
        for offset in range(len(run.sources)):
            stacks = jax.tree.map(partial(_fill, offset, lay_out), layer_of(i, offset), stacks)
        runs.append(stacks)
    params["layers"] = tuple(runs)
    return fold_permutations(params)


def fold_permutations(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters whose tiled experts need no gather between their products; the stacks of gate and up are donated.

    Args:
      params: the model's pytree.

    Returns:
      The same model: where down's inputs were permuted, gate and up have their columns in that order, and down has no
      `perm`. Beside the parameters it takes the memory of one layer. Experts that are not tiled are left as they are.
    """
    runs = []
    for run in params["layers"]:
        experts = run.get("moe", {}).get("experts")
        if experts is not None and folds(experts):
            down = experts["down"]
            others = {name: w for name, w in experts.items() if name != "down"}
            for layer in range(down.lead[0]):
                others = _fold_layer(others, down.perm, np.int32(layer))
            experts = {**others, "down": dataclasses.replace(down, perm=None)}
            run = {**run, "moe": {**run["moe"], "experts": experts}}
        runs.append(run)
    return {**params, "layers": tuple(runs)}


@partial(jax.jit, donate_argnums=0)
def _fold_layer(others: dict[str, Any], perm: jax.Array, layer: jax.Array) -> dict[str, Any]:
    one = jax.tree.map(lambda stack: stack[layer], (others, perm))
    return jax.tree.map(
        lambda stack, leaf: jax.lax.dynamic_update_index_in_dim(stack, leaf, layer, 0),
        others,
        reorder_gate_and_up(*one),
    )


_put = jax.jit(
    lambda stack, value, offset: jax.lax.dynamic_update_index_in_dim(stack, value, offset, 0), donate_argnums=0
)


def _fill(offset: int, lay_out: Callable[[Any], Any], read: Callable[[], Any], stacks: Any) -> Any:
    filled = jax.tree.map(lambda stack, value: _put(stack, value, np.int32(offset)), stacks, lay_out(read()))
    # Wait, so that the host copy of this leaf is gone before the next one is read.
    return jax.block_until_ready(filled)


def random_params(cfg: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Random weights in the packed format, for tests and benchmarks without a checkpoint.

    Args:
      cfg: the model.
      seed: of the host generator.

    Returns:
      Parameters with the structure of `abstract(cfg)`, in tiles for the GPU kernels. Scales keep activations near one.

    >>> import ferrum_jax as fj
    >>> cfg = fj.load("demo").cfg
    >>> fj.random_params(cfg)["norm"].shape
    (256,)
    """
    rng = np.random.default_rng(seed)
    plan = make_plan(cfg)

    def leaf(path: tuple, shape: tuple[int, ...], dtype: Any, parent: PackedLinear | None) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        if dtype == jnp.uint32:
            words = rng.integers(0, 2**32, shape, np.uint32)
            return words if parent is None else centred(words, parent.bits)
        if dtype == jnp.int32:
            return np.broadcast_to(rng.permutation(shape[-1]).astype(np.int32), shape)
        if parent is not None:
            spread = 2**parent.bits * parent.shape[0] ** 0.5 * 0.3
            return rng.uniform(0.5 / spread, 1.5 / spread, shape).astype(np.float16)
        if "norm" in name:
            return np.ones(shape, dtype)
        fan_in = 1.0 if "embed" in name else shape[-2] ** 0.5 if len(shape) > 1 else 1.0
        return (rng.standard_normal(shape, np.float32) / fan_in).astype(dtype)

    def fill(path: tuple, node: Any, lead: int) -> Any:
        parent = node if isinstance(node, PackedLinear) else None
        return jax.tree.map(lambda a: leaf(path, a.shape[lead:], a.dtype, parent), node)

    def readers(tree: Any, lead: int) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, node: partial(fill, path, node, lead),
            tree,
            is_leaf=lambda node: isinstance(node, PackedLinear),
        )

    tops = readers(plan.top, 0)
    return assemble(plan, lambda name: tops[name](), lambda run, _: readers(plan.runs[run].tree, 1), layout_for(cfg))


def layout_for(cfg: ModelConfig) -> Callable[[Any], Any]:
    """How the kernels of a configuration want its weights: as they are, or in tiles."""
    implementation = default_implementation() if cfg.implementation is None else cfg.implementation
    return tile_all if implementation in mosaic.NAMES else _as_it_is


def _as_it_is(tree: Any) -> Any:
    return tree
