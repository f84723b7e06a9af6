"""The CPU kernels: products, router, experts and attention as calls into the library built from native/.

Weights are read as PackedLinear holds them, by layer and expert number, so nothing is sliced or copied. Two numerics:

  exact  activations as they are, float32 products and sums
  int8   activations rounded to int8 with one scale per token and block of at most 128 inputs (never more than a
         group), products in integers, sums of blocks in float32; as llama.cpp does with blocks of 32

Sums run in the same order whatever the batch and the number of threads: a row gets the same bits alone and in a batch.
Source: the row-wise walk over GPTQ words and the zero point as a correction per block are this package's own; int8
activations after llama.cpp (https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_kernels.cpu_library import library, unavailable
from ferrum_kernels.derivatives import differentiable
from ferrum_kernels.errors import BackendError
from ferrum_kernels.packed import PackedLinear
from ferrum_kernels.tiles import TiledLinear

NAMES = ("cpu", "cpu-exact", "cpu-int8")
BITS = (4, 8)
_TARGETS = ("gptq_matmul", "dense_matmul", "grouped_matmul", "route", "experts", "attention")
MOST_HEAD = 256


def refuses(w: Any) -> str | None:
    """Why these kernels do not take a weight, or None when they do.

    >>> refuses(PackedLinear(None, None, bits=3, group_size=32, shape=(32, 8)))
    'the CPU kernels take 4 and 8 bits; this weight has 3'
    """
    if isinstance(w, TiledLinear):
        return "the CPU kernels take weights laid out as in their file; this one is in tiles, so untile it"
    if not isinstance(w, PackedLinear):
        return "the CPU kernels take packed weights; this one is a plain array"
    if w.bits not in BITS:
        return f"the CPU kernels take 4 and 8 bits; this weight has {w.bits}"
    if w.group_size < w.k and w.group_size % (32 // w.bits):
        return (
            f"the CPU kernels take groups of whole words, a multiple of {32 // w.bits} inputs at {w.bits} bits; "
            f"this weight has groups of {w.group_size}"
        )
    if w.scales is not None and w.scales.dtype != jnp.float16:
        return f"the CPU kernels take float16 scales, as files hold them; this weight has {w.scales.dtype}"
    return None


def check(name: str, *weights: Any) -> None:
    """Raise BackendError where an implementation of NAMES cannot run."""
    if problem := unavailable():
        raise BackendError(f'implementation="{name}" cannot run: {problem}')
    if jax.default_backend() != "cpu":
        raise BackendError(
            f'implementation="{name}" runs on the CPU; the default device is of platform {jax.default_backend()!r}. '
            f"Set JAX_PLATFORMS=cpu, or leave implementation out."
        )
    for w in weights:
        if problem := refuses(w):
            raise BackendError(f'{problem}. Use implementation="xla" for it.')


def int8(name: str, dtype: Any) -> bool:
    """Whether activations of a dtype are rounded to int8: "cpu" does so with 16-bit ones and keeps float32 exact."""
    return name == "cpu-int8" or (name == "cpu" and jnp.dtype(dtype) != jnp.float32)


def gptq_matmul(x: jax.Array, w: PackedLinear, layer: Any, rounded: bool, out_dtype: Any) -> jax.Array:
    """x [M, K] @ W [K, N] without the bias.

    Args:
      x: float32, bfloat16 or float16 [M, K].
      w: one matrix, or a stack [L] of them with `layer`.
      layer: index into the stack, or None.
      rounded: int8 numerics; else exact.
      out_dtype: float32, bfloat16 or float16.

    Returns:
      [M, N].
    """
    out = jax.ShapeDtypeStruct((x.shape[0], w.n_per_expert), out_dtype)
    return _call(
        "gptq_matmul", out, x, *_arrays(w), _index(layer), k=w.k, n=w.n_per_expert, **_packing(w), int8=rounded
    )


def dense_product(x: jax.Array, w: jax.Array, layer: Any) -> jax.Array:
    """float32 x [M, K] @ w [K, N], or w [L, K, N] with `layer`; float dtypes of any kind are widened in registers.

    Differentiable with respect to both.
    """

    def kernel(operands: tuple, layer: Any) -> jax.Array:
        x, w = operands
        out = jax.ShapeDtypeStruct((x.shape[0], w.shape[-1]), jnp.float32)
        return _call("dense_matmul", out, x, w, _index(layer), k=w.shape[-2], n=w.shape[-1])

    def specification(operands: tuple, layer: Any) -> jax.Array:
        x, w = operands
        one = w if layer is None else jax.lax.dynamic_index_in_dim(w, layer, 0, keepdims=False)
        return jnp.matmul(x.astype(jnp.float32), one.astype(jnp.float32), precision="highest")

    index = None if layer is None else jnp.asarray(layer, jnp.int32)
    return differentiable(kernel, specification)((x, w), index)


def grouped_matmul(
    x: jax.Array, w: PackedLinear, block_expert: jax.Array, block: int, layer: Any, y: jax.Array, rounded: bool
) -> jax.Array:
    """Fill the rows of the blocks whose expert is in this stack; arguments as `xla.grouped_matmul`."""
    return _call(
        "grouped_matmul",
        jax.ShapeDtypeStruct(y.shape, y.dtype),
        x,
        block_expert,
        *_arrays(w),
        _index(layer),
        y,
        aliases={7: 0},
        experts=w.num_experts,
        block=block,
        k=w.k,
        n=w.n_per_expert,
        **_packing(w),
        int8=rounded,
    )


def route(x: jax.Array, router: jax.Array, layer: Any, top_k: int, norm: bool) -> tuple[jax.Array, ...]:
    """Router logits, their softmax and the best K.

    Args:
      x: float [T, D].
      router: float [D, E], or [L, D, E] with `layer`.
      layer: index into the stack, or None.
      top_k: K.
      norm: rescale the K weights to sum to one.

    Returns:
      logits float32 [T, E], experts int32 [T, K] best first with ties to the smaller index, weights float32 [T, K];
      weights are NaN where a logit is NaN or +inf.
    """
    tokens, experts = x.shape[0], router.shape[-1]
    out = tuple(
        jax.ShapeDtypeStruct((tokens, n), dtype)
        for n, dtype in ((experts, jnp.float32), (top_k, jnp.int32), (top_k, jnp.float32))
    )
    # jax 0.5.0 gives a list.
    return tuple(_call("route", out, x, router, _index(layer), top_k=top_k, norm=norm))


def experts(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate_up: PackedLinear,
    down: PackedLinear,
    layer: Any,
    rounded: bool,
) -> jax.Array:
    """The gated MLP of each token's experts, weighted and added up.

    Args:
      x: float [T, D].
      chosen: int32 [T, K]; an id outside [0, E) is skipped.
      weights: float32 [T, K].
      gate_up: [E, D, 2 F], gate columns first; [L, E, D, 2 F] with `layer`.
      down: [E, F, D], or [L, E, F, D].
      layer: index into the stacks, or None.
      rounded: int8 numerics; else exact. What lies between the two products is float32 in both.

    Returns:
      [T, D] in x.dtype.
    """
    return _call(
        "experts",
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        x,
        chosen,
        weights,
        *_arrays(gate_up),
        *_arrays(down),
        _index(layer),
        experts=down.num_experts,
        intermediate=down.k,
        up_group=gate_up.group_size,
        up_bits=gate_up.bits,
        down_group=down.group_size,
        down_bits=down.bits,
        int8=rounded,
    )


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    norms: tuple[jax.Array, jax.Array] | None,
    eps: float,
    cosine: jax.Array,
    sine: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    layer: Any,
    start: jax.Array,
    count: jax.Array,
    window: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Head norms, rotary embedding, cache write and grouped-query attention over what each row has read.

    Args:
      q: float [B, T, H * h], as projected; k, v: [B, T, Kv * h].
      norms: weights of the RMS norms of query and key heads, each [h], or None.
      eps: of those norms.
      cosine, sine: float32 [B, T, h / 2] of each token's angles.
      cache: keys and values [L, B, S, Kv, h], written in place where their buffers allow it.
      layer: index into the cache.
      start: int32 [B], tokens each row holds.
      count: int32 [B], real tokens of each row; the others write nothing and get zero.
      window: int32 scalar, keys a query sees, itself included.

    Returns:
      ([B, T, H * h] in q.dtype, cache).

    Source: grouped queries arXiv 2305.13245; streaming softmax arXiv 1805.02867.
    """
    none = jnp.zeros(0, jnp.float32)
    q_norm, k_norm = (none, none) if norms is None else (n.astype(jnp.float32) for n in norms)
    out = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, *cache))
    y, keys, values = _call(
        "attention",
        out,
        q,
        k,
        v,
        q_norm,
        k_norm,
        cosine,
        sine,
        *cache,
        _index(layer),
        start,
        count,
        jnp.reshape(window, (1,)),
        aliases={7: 1, 8: 2},
        eps=np.float32(eps),
    )
    return y, (keys, values)


def _arrays(w: PackedLinear) -> tuple[jax.Array, ...]:
    """words, scales, zero points and permutation; what a weight has not is an empty array."""
    zeros = jnp.zeros(0, jnp.uint32) if w.qzeros is None else w.qzeros
    perm = jnp.zeros(0, jnp.int32) if w.perm is None else w.perm
    return w.qweight, w.scales, zeros, perm


def _packing(w: PackedLinear) -> dict[str, Any]:
    return {"group": w.group_size, "bits": w.bits}


def _index(layer: Any) -> jax.Array:
    return jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), (1,))


def _call(name: str, out: Any, *arrays: jax.Array, aliases: dict[int, int] | None = None, **attributes: Any) -> Any:
    _register()
    static = {key: np.int64(value) if type(value) is int else value for key, value in attributes.items()}
    call = jax.ffi.ffi_call(f"ferrum_{name}", out, input_output_aliases=aliases, vmap_method="sequential")
    return call(*arrays, **static)


@functools.cache
def _register() -> None:
    cpu = library()
    for name in _TARGETS:
        target = jax.ffi.pycapsule(getattr(cpu, f"ferrum_{name}"))
        jax.ffi.register_ffi_target(f"ferrum_{name}", target, platform="cpu")
