"""The public operations: gptq_matmul, grouped_gptq_matmul and dequantize, each with `implementation=`.

`implementation=None` takes the best one for the default device, a name runs that one or raises, a sequence takes the
first that applies and raises an ExceptionGroup when none does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_kernels import apple, cpu, mosaic, reference, triton, xla
from ferrum_kernels.blocks import Dispatch, dispatch_sorted, from_blocks, to_blocks
from ferrum_kernels.contract import is_traced
from ferrum_kernels.cpu_library import unavailable
from ferrum_kernels.derivatives import differentiable, refuse_weight_gradients
from ferrum_kernels.errors import BackendError, ShapeError
from ferrum_kernels.mixed import MixedStack
from ferrum_kernels.packed import PackedLinear, check_packed
from ferrum_kernels.tiles import TiledLinear, check_tiled, is_weight, untile

Implementation = str | Sequence[str] | None
Weight = PackedLinear | TiledLinear
ExpertStack = Weight | MixedStack | jax.Array

IMPLEMENTATIONS = (*cpu.NAMES, *mosaic.NAMES, "xla", "apple", "reference")
_BEST = {"cpu": "cpu", "gpu": triton.NAME, "cuda": triton.NAME, "metal": "apple", "mps": "apple"}


def default_implementation(platform: str | None = None) -> str:
    """The implementation that `None` stands for on a platform.

    Args:
      platform: a JAX platform name; None means the default device's.

    Returns:
      "cpu" where its kernels were built, else "xla"; "mosaic" on Hopper GPUs with jax 0.11 or later, "triton" on other
      NVIDIA GPUs; "apple" on Apple's plugins. A weight that the CPU kernels do not take (2 or 3 bits) goes to "xla" all
      the same; one that the GPU kernels do not take raises.

    Raises:
      BackendError: no kernel of this package is made for the platform.

    >>> default_implementation("METAL")
    'apple'
    """
    platform = jax.default_backend() if platform is None else platform
    if platform.lower() not in _BEST:
        raise BackendError(
            f"this version has no GPTQ kernel for the platform {platform!r}; kernels exist for cpu, cuda, METAL and "
            f"mps. "
            f'implementation="xla" runs on any platform, one dequantised expert at a time, and is slow on a GPU.'
        )
    best = _BEST[platform.lower()]
    if best == triton.NAME and mosaic.unavailable() is None:
        return mosaic.NAME
    return "xla" if best == "cpu" and unavailable() else best


def resolve(implementation: str | None, *weights: Any) -> str:
    """The implementation that runs the products of some weights.

    Args:
      implementation: a name of IMPLEMENTATIONS, or None for the best.
      weights: packed or plain stacks.

    Returns:
      A name of IMPLEMENTATIONS.

    Raises:
      BackendError: the name is unknown or cannot run here, or None has no kernel for this device.
    """
    if implementation is None:
        implementation = default_implementation()
        if implementation == "cpu" and any(cpu.refuses(w) for w in weights):
            return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise BackendError(f"implementation={implementation!r} is unknown; accepted are None, {IMPLEMENTATIONS}.")
    if implementation in cpu.NAMES:
        cpu.check(implementation, *weights)
    if implementation == triton.NAME:
        triton.check(*weights)
    if implementation == mosaic.NAME:
        mosaic.check(*weights)
    return implementation


def _first_that_applies(implementation: Implementation, weights: Sequence[Any], run: Callable[[str], Any]) -> Any:
    if implementation is None or isinstance(implementation, str):
        return run(resolve(implementation, *weights))
    errors: list[Exception] = []
    for name in implementation:
        try:
            return _first_that_applies(name, weights, run)
        except BackendError as error:
            errors.append(error)
    if not errors:
        raise BackendError(f"implementation is an empty sequence; name at least one of {IMPLEMENTATIONS}.")
    raise ExceptionGroup("all implementations failed", errors)


def dequantize(w: Weight | jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """The weight that a packed linear stands for, in input order.

    Args:
      w: a packed weight with any leading axes; a plain array is only cast, so that `jax.tree.map(dequantize, ...)`
        works.
      dtype: of the result; the arithmetic runs in float32.

    Returns:
      [..., K, N].

    Raises:
      ShapeError: the arrays do not fit the static fields.

    >>> w = PackedLinear(jnp.full((1, 2), 0x99999999, jnp.uint32), jnp.ones((1, 2), jnp.float16), group_size=8,
    ...                  shape=(8, 2))
    >>> dequantize(w)[0].tolist()
    [1.0, 1.0]
    """
    if not is_weight(w):
        return jnp.asarray(w, dtype)
    _check_weight(w)
    return xla.dequantize(w, jnp.dtype(dtype))


def _check_weight(w: Any) -> None:
    check_tiled(w) if isinstance(w, TiledLinear) else check_packed(w)


def _check_activations(x: jax.Array, k: int, what: str) -> None:
    if x.ndim == 0 or x.shape[-1] != k:
        raise ShapeError(f"x is {x.dtype}{list(x.shape)}; its last axis must be {what}'s K={k}.")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ShapeError(f"x is {x.dtype}; activations are float32, bfloat16 or float16. Cast it first.")


def gptq_matmul(
    x: jax.Array,
    w: Weight,
    *,
    layer: jax.Array | int | None = None,
    implementation: Implementation = None,
    out_dtype: Any = None,
) -> jax.Array:
    """Multiply activations by one packed weight: y = x @ W + bias.

    Args:
      x: float32, bfloat16 or float16 [..., K]; leading axes are free.
      w: a packed matrix of shape (K, N), in tiles for the GPU kernels; a stack [L] of them when `layer` is given.
      layer: index into the stack, a Python int or a traced scalar; the stack is not sliced, so nothing is copied.
      implementation: None, a name of IMPLEMENTATIONS, or a sequence of names to try in order.
      out_dtype: of the result; None means x.dtype. Sums are float32 in any case.

    Returns:
      [..., N]. Differentiable with respect to x; works under jit and vmap.

    Raises:
      ShapeError: x or w has the wrong shape or dtype.
      BackendError: the implementation named is unknown, cannot run here or does not take this weight.

    >>> w = PackedLinear(jnp.full((1, 2), 0x99999999, jnp.uint32), jnp.ones((1, 2), jnp.float16), group_size=8,
    ...                  shape=(8, 2))
    >>> gptq_matmul(jnp.ones((3, 8)), w).tolist()
    [[8.0, 8.0], [8.0, 8.0], [8.0, 8.0]]
    """
    if len(w.lead) != (0 if layer is None else 1):
        raise ShapeError(
            f"this {type(w).__name__} has leading axes {w.lead}; gptq_matmul takes one matrix, or a stack [L] with "
            f"layer=."
        )
    _check_weight(w)
    _check_activations(x, w.k, "the weight")
    rows = x.reshape(-1, w.k)
    dtype = jnp.dtype(out_dtype or x.dtype)

    def run(name: str) -> jax.Array:
        if name in cpu.NAMES and rows.shape[0]:
            return _cpu_matmul(rows, w, layer, cpu.int8(name, x.dtype), dtype)
        if name in mosaic.NAMES and rows.shape[0]:
            return _gpu_matmul(mosaic if name == mosaic.NAME else triton, rows, w, layer, dtype)
        one = _one(w, layer)
        one = untile(one) if isinstance(one, TiledLinear) else one
        if name == "reference":
            return reference.gptq_matmul(rows, one)
        y = (apple if name == "apple" else xla).gptq_matmul(rows, one)
        return y if one.bias is None else y + one.bias.astype(jnp.float32)[None]

    y = _first_that_applies(implementation, (w,), run)
    return y.astype(dtype).reshape(*x.shape[:-1], w.n_per_expert)


def _one(w: Any, layer: Any) -> Any:
    if layer is None:
        return w
    index = jnp.asarray(layer, jnp.int32)
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), w)


def _cpu_matmul(x: jax.Array, w: Any, layer: Any, rounded: bool, dtype: Any) -> jax.Array:
    return _kernel_matmul(lambda x, w, i, out: cpu.gptq_matmul(x, w, i, rounded, out), x, w, layer, dtype)


def _gpu_matmul(backend: Any, x: jax.Array, w: Any, layer: Any, dtype: Any) -> jax.Array:
    triton.check_dtype(x)
    return _kernel_matmul(backend.gptq_matmul, x, w, layer, dtype)


def _kernel_matmul(kernel: Callable[..., jax.Array], x: jax.Array, w: Any, layer: Any, dtype: Any) -> jax.Array:
    """A kernel (x, weight, layer, out_dtype) that adds no bias, with the bias and a derivative."""

    def specification(x: jax.Array, constants: tuple) -> jax.Array:
        return xla.gptq_matmul(x, _one(*constants)).astype(out)

    out = dtype if w.bias is None else jnp.dtype(jnp.float32)
    index = None if layer is None else jnp.asarray(layer, jnp.int32)
    bias = w.bias if w.bias is None or index is None else w.bias[index]
    w = dataclasses.replace(w, bias=None)
    y = differentiable(lambda x, c: kernel(x, c[0], c[1], out), specification)(x, (w, index))
    return y if bias is None else y + bias.astype(jnp.float32)[None]


def grouped_gptq_matmul(
    x: jax.Array,
    stack: ExpertStack,
    groups: Dispatch | jax.Array,
    *,
    layer: jax.Array | int | None = None,
    implementation: Implementation = None,
    out_dtype: Any = None,
) -> jax.Array:
    """Multiply each row by its expert's weight, reading live experts only.

    Args:
      x: with a Dispatch, [R, K] in its block layout; with group sizes, [P, K] sorted by expert.
      stack: expert weights [E, K, N], packed, plain or mixed; [L, E, K, N] when `layer` is given.
      groups: a Dispatch, or int32 [E] group sizes whose sum is at most P (later rows give zeros).
      layer: index into the stack's first axis, a Python int or a traced scalar. The stack is never sliced by layer,
        so a scan over layers copies no weights.
      implementation: None, a name of IMPLEMENTATIONS, or a sequence of names to try in order.
      out_dtype: of the result; None means x.dtype. Sums are float32 in any case.

    Returns:
      [R, N] or [P, N], matching x. Differentiable with respect to x (asking for the gradient of a weight raises);
      works under jit and vmap.

    Raises:
      ShapeError: shapes, dtypes or the number of experts do not match, or concrete group sizes exceed P.
      BackendError: the implementation named is unknown, cannot run here or does not take this stack.

    >>> w = PackedLinear(jnp.full((2, 1, 2), 0x99999999, jnp.uint32), jnp.ones((2, 1, 2), jnp.float16), group_size=8,
    ...                  shape=(8, 2))
    >>> grouped_gptq_matmul(jnp.ones((3, 8)), w, jnp.array([1, 2])).shape
    (3, 2)
    """
    parts, tables = _parts(stack)
    first = parts[0]
    lead, (k, n) = _lead_and_shape(first)
    if len(lead) != (1 if layer is None else 2):
        raise ShapeError(
            f"the expert stack has leading axes {lead}; expected [E] without layer=, or [L, E] with layer=."
        )
    num_experts = stack.num_experts if isinstance(stack, MixedStack) else lead[-1]
    for part in parts:
        if is_weight(part):
            _check_weight(part)
            if part.bias is not None:
                raise ShapeError("this expert stack has a bias; grouped_gptq_matmul adds none. Take it off first.")
        if _lead_and_shape(part)[1] != (k, n):
            raise ShapeError(f"the parts of a mixed stack have shapes {(k, n)} and {_lead_and_shape(part)[1]}.")
    _check_activations(x, k, "the expert stack")
    if x.ndim != 2:
        raise ShapeError(f"x is {x.dtype}{list(x.shape)}; grouped_gptq_matmul takes rows [R, K]. Fold leading axes.")
    if isinstance(groups, Dispatch):
        if groups.num_rows != x.shape[0] or groups.num_experts != num_experts:
            raise ShapeError(
                f"the dispatch lays out {groups.num_rows} rows over {groups.num_experts} experts; "
                f"x has {x.shape[0]} rows and the stack {num_experts} experts."
            )
        plan, rows = groups, x
    else:
        _check_group_sizes(groups, x.shape[0], num_experts)
        plan = dispatch_sorted(groups, x.shape[0])
        rows = to_blocks(x, plan)

    def run(name: str) -> jax.Array:
        static = (name, plan.block, jnp.dtype(out_dtype or x.dtype), tables, n)
        return _grouped(static, rows, tuple(parts), plan, jnp.asarray(0 if layer is None else layer, jnp.int32))

    packed = [part for part in parts if is_weight(part)]
    y = _first_that_applies(implementation, packed, run)
    return y if isinstance(groups, Dispatch) else from_blocks(y, plan)


def _parts(stack: ExpertStack) -> tuple[tuple[Any, ...], tuple[tuple[int, ...], ...] | None]:
    """The homogeneous stacks, and for each the static table from expert id to its place (None: the identity)."""
    if isinstance(stack, MixedStack):
        return stack.parts, tuple(tuple(stack.local_index(i).tolist()) for i in range(len(stack.parts)))
    return (stack,), None


def _lead_and_shape(part: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    if is_weight(part):
        return part.lead, part.shape
    return tuple(part.shape[:-2]), (part.shape[-2], part.shape[-1])


def _check_group_sizes(sizes: jax.Array, num_rows: int, num_experts: int) -> None:
    if sizes.shape != (num_experts,) or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ShapeError(f"group sizes are {sizes.dtype}{list(sizes.shape)}; expected int32[{num_experts}].")
    if not is_traced(sizes):
        host = np.asarray(sizes)
        if (host < 0).any() or host.sum() > num_rows:
            raise ShapeError(
                f"group sizes sum to {host.sum()} with a smallest of {host.min()}; x has {num_rows} rows. "
                f"They must be at least 0 and sum to at most the number of rows."
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(static: tuple, x: jax.Array, parts: tuple, plan: Dispatch, layer: jax.Array) -> jax.Array:
    return _run(static, x, parts, plan, layer, transpose=False)


def _run(static: tuple, x: jax.Array, parts: tuple, plan: Dispatch, layer: jax.Array, transpose: bool) -> jax.Array:
    name, block, dtype, tables, n = static
    k = _lead_and_shape(parts[0])[1][0]
    if name == "reference":
        one_layer = [jax.tree.map(lambda leaf: leaf[layer], part) if _layered(part) else part for part in parts]
        one_layer = [untile(part) if isinstance(part, TiledLinear) else part for part in one_layer]
        weights = reference.expert_weights(one_layer, tables, plan.num_experts)
        return reference.grouped_matmul(x, weights.mT if transpose else weights, plan).astype(dtype)
    y = jnp.zeros((x.shape[0], k if transpose else n), dtype)
    if not x.shape[0]:
        return y
    if name in mosaic.NAMES and not transpose:
        triton.check_dtype(x)
    for i, part in enumerate(parts):
        table = np.append(np.arange(plan.num_experts), -1) if tables is None else np.asarray(tables[i])
        block_expert = jnp.asarray(table, jnp.int32)[plan.block_expert]
        place = layer if _layered(part) else None
        if name in cpu.NAMES and isinstance(part, PackedLinear) and not transpose:
            y = cpu.grouped_matmul(x, part, block_expert, block, place, y, cpu.int8(name, x.dtype))
        elif name in mosaic.NAMES and isinstance(part, TiledLinear) and not transpose:
            rows = triton.grouped_matmul(x, part, block_expert, block, place, dtype)
            y = rows if len(parts) == 1 else y + rows  # rows of other parts' experts are zero
        else:
            grouped = apple.grouped_matmul if name == "apple" else xla.grouped_matmul
            y = grouped(x, part, block_expert, block, place, y, transpose)
    return y


def _layered(part: Weight | jax.Array) -> bool:
    return len(_lead_and_shape(part)[0]) == 2


def _grouped_fwd(static: tuple, x: Any, parts: Any, plan: Any, layer: Any) -> tuple[jax.Array, tuple]:
    refuse_weight_gradients(parts)
    x, parts, plan, layer = jax.tree.map(
        lambda node: node.value, (x, parts, plan, layer), is_leaf=lambda node: hasattr(node, "perturbed")
    )
    return _run(static, x, parts, plan, layer, transpose=False), (x[:0], parts, plan, layer)


def _grouped_bwd(static: tuple, saved: tuple, dy: Any) -> tuple:
    no_rows, parts, plan, layer = saved
    name, block, _, tables, n = static
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)  # pyright: ignore[reportArgumentType]
    dx = _run((name, block, no_rows.dtype, tables, n), dy, parts, plan, layer, transpose=True)
    return dx, None, None, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd, symbolic_zeros=True)
