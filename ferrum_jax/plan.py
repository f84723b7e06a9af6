"""The layout of the parameters before they exist: which leaf is made of which modules, packed how, stacked where."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_jax.config import ModelConfig
from ferrum_jax.kernels import MixedStack, PackedLinear
from ferrum_jax.sources import Experts, Joined, Linear, Vector, layer_sources, top_sources
from ferrum_kernels.bits import words_for


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    """How one linear module is packed.

    Attributes:
      bits: 2, 3, 4 or 8.
      group_size: inputs per scale, already resolved (never -1).
      sym: whether all zero points are 2**(bits - 1).
      order: None for inputs in order, else a name of the permutation; modules with the same name share it.
    """

    bits: int
    group_size: int
    sym: bool = True
    order: str | None = None


FormatOf = Callable[[str, int], Format | None]

QKV = ("q", "k", "v")
ROUNDED_GROUP = 128  # inputs per scale of what is rounded at load, as most GPTQ checkpoints have


def config_formats(cfg: ModelConfig) -> FormatOf:
    """The formats that a configuration promises, before a checkpoint has been seen.

    Args:
      cfg: the model.

    Returns:
      A function (module name, K) -> Format, or None for a module that is not quantised.
    """

    def format_of(module: str, k: int) -> Format | None:
        kept = cfg.quant is None or module.endswith(".mlp.gate")
        quant = None if kept or cfg.quant is None else cfg.quant.for_module(module)
        if quant is None:
            return None
        group = k if quant.group_size == -1 else min(quant.group_size, k)
        # One group has only one order.
        return Format(quant.bits, group, quant.sym, "act" if quant.desc_act and group < k else None)

    return format_of


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive layers of one structure.

    Attributes:
      start: first layer.
      sources: per layer, the tree of sources.
      tree: the tree of abstract leaves with the leading layer axis.
    """

    start: int
    sources: tuple[dict[str, Any], ...]
    tree: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The parameters before they exist: abstract leaves, and the sources that fill them."""

    top: dict[str, Any]
    top_sources: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def tree(self) -> dict[str, Any]:
        """The abstract pytree, with the structure of the parameters."""
        return {**self.top, "layers": tuple(run.tree for run in self.runs)}


def make_plan(cfg: ModelConfig, format_of: FormatOf | None = None) -> Plan:
    """Lay out the parameters.

    Args:
      cfg: the model.
      format_of: how each module is packed; None means as the configuration promises.

    Returns:
      Plan.
    """
    format_of = config_formats(cfg) if format_of is None else format_of
    dtype = jnp.dtype(cfg.dtype)
    tops = top_sources(cfg)
    top = {name: _abstract(source, [source], format_of, dtype, lead=()) for name, source in tops.items()}
    layers = [_fuse(layer_sources(cfg, i), format_of) for i in range(cfg.num_layers)]
    keys = [_structure(layer, format_of) for layer in layers]
    runs, start = [], 0
    for i in range(1, cfg.num_layers + 1):
        if i == cfg.num_layers or keys[i] != keys[start]:
            same = tuple(layers[start:i])
            tree = zip_sources(lambda *sources: _abstract(sources[0], sources, format_of, dtype), *same)
            runs.append(Run(start, same, tree))
            start = i
    return Plan(top, tops, tuple(runs))


def zip_sources(combine: Callable[..., Any], *trees: Any) -> Any:
    """Combine the leaves of source trees that have the same keys."""
    if isinstance(trees[0], dict):
        return {key: zip_sources(combine, *(tree[key] for tree in trees)) for key in trees[0]}
    return combine(*trees)


def _fuse(layer: dict[str, Any], format_of: FormatOf) -> dict[str, Any]:
    """Join linears of the same inputs into one leaf where they are packed alike: q, k and v; gate and up of experts."""
    layer = {**layer, "attn": _fuse_qkv(layer["attn"], format_of)}
    if "moe" not in layer:
        return layer
    experts = layer["moe"]["experts"]
    pairs = list(zip(experts["gate"].experts, experts["up"].experts, strict=True))
    if not all(_alike(pair, format_of) for pair in pairs):
        return layer
    fused = {"gate_up": Experts(tuple(map(_join, pairs))), "down": experts["down"]}
    return {**layer, "moe": {**layer["moe"], "experts": fused}}


def _fuse_qkv(attn: dict[str, Any], format_of: FormatOf) -> dict[str, Any]:
    parts = [attn[name] for name in QKV]
    names = [f"{name}_bias" for name in QKV]
    biases = [attn[name] for name in names if name in attn]
    if not _alike(parts, format_of) or len(biases) not in (0, len(QKV)):
        return attn
    fused: dict[str, Any] = {"qkv": _join(parts)}
    if biases:
        fused["qkv_bias"] = Joined(tuple(biases))
    gone = {*QKV, *names}
    return {**fused, **{name: source for name, source in attn.items() if name not in gone}}


def _alike(linears: Sequence[Linear], format_of: FormatOf) -> bool:
    return len({_format(linear, format_of) for linear in linears}) == 1


def _join(linears: Sequence[Linear]) -> Linear:
    modules = tuple(module for linear in linears for module in linear.modules)
    return Linear(modules, linears[0].k, tuple(n for linear in linears for n in linear.n))


def _format(linear: Linear, format_of: FormatOf) -> Format | None:
    if linear.round_to is not None:
        return Format(linear.round_to, min(ROUNDED_GROUP, linear.k))
    return format_of(linear.modules[0], linear.k)


def _packing(linear: Linear, format_of: FormatOf) -> tuple[int, int] | None:
    found = _format(linear, format_of)
    return None if found is None else (found.bits, found.group_size)


def _structure(layer: dict[str, Any], format_of: FormatOf) -> Any:
    """What must agree for layers to be stacked: keys, and the packing of every linear."""

    def key(source: Any) -> Any:
        if isinstance(source, Experts):
            return tuple(_packing(linear, format_of) for linear in source.experts)
        return _packing(source, format_of) if isinstance(source, Linear) else source.shape

    return jax.tree_util.tree_leaves_with_path(
        zip_sources(lambda source: (key(source),), layer), is_leaf=lambda node: isinstance(node, tuple)
    )


def expert_parts(experts: Experts, format_of: FormatOf) -> list[tuple[int, ...]]:
    """Expert ids by packing, in the order in which each packing first appears."""
    parts: dict[Any, list[int]] = {}
    for e, linear in enumerate(experts.experts):
        parts.setdefault(_packing(linear, format_of), []).append(e)
    return [tuple(ids) for ids in parts.values()]


def _abstract(source: Any, layers: Any, format_of: FormatOf, dtype: Any, lead: tuple[int, ...] | None = None) -> Any:
    """The leaf for one source and its counterparts in the other layers of a run."""
    lead = (len(layers),) if lead is None else lead
    if isinstance(source, Vector | Joined):
        return jax.ShapeDtypeStruct((*lead, *source.shape), dtype)
    if isinstance(source, Linear):
        return _abstract_linear(source, layers, format_of, dtype, lead)
    parts = expert_parts(source, format_of)
    stacks = tuple(
        _abstract_linear(
            source.experts[ids[0]],
            [layer.experts[e] for layer in layers for e in ids],
            format_of,
            dtype,
            (*lead, len(ids)),
        )
        for ids in parts
    )
    return stacks[0] if len(parts) == 1 else MixedStack(stacks, tuple(parts))


def _abstract_linear(source: Linear, members: Any, format_of: FormatOf, dtype: Any, lead: tuple[int, ...]) -> Any:
    k, n = source.k, sum(source.n)
    formats = [_format(member, format_of) for member in members]
    first = formats[0]
    if first is None:
        return jax.ShapeDtypeStruct((*lead, k, n), dtype)
    bits, groups = first.bits, -(-k // first.group_size)

    def leaf(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *shape), dtype)

    # One asymmetric or permuted member makes its whole stack carry zero points or permutations.
    sym = all(found is not None and found.sym for found in formats)
    ordered = all(found is not None and found.order is None for found in formats)
    return PackedLinear(
        qweight=leaf((words_for(k, bits), n), jnp.uint32),
        scales=leaf((groups, n), jnp.float16),
        qzeros=None if sym else leaf((groups, words_for(n, bits)), jnp.uint32),
        perm=None if ordered else leaf((k,), jnp.int32),
        bits=bits,
        group_size=first.group_size,
        shape=(k, n),
    )
