"""The stages of sampling that remove tokens: pure functions on float32 logits [B, V] with one traced parameter per row.

A token that is removed gets -inf; the best token of a row is never removed. Each runs on any device. On NVIDIA GPUs
kernels find where top-k and top-p cut; `implementation="xla"` keeps to XLA's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ferrum_jax.sampling_stages import apply_temperature, positions, sample_token
from ferrum_kernels import triton, triton_cut, triton_draw
from ferrum_kernels.errors import BackendError


def keep_min_p(logits: Array, min_p: Array) -> Array:
    """Keeps tokens at least `min_p` times as likely as the best one.

    Args:
      logits: float32 [B, V].
      min_p: float32 [B] in [0, 1]; 0 keeps all.

    Returns:
      float32 [B, V], -inf for the tokens removed.

    Source: Nguyen et al., Turning Up the Heat: Min-p Sampling (2024).

    Example:
      >>> keep_min_p(jnp.log(jnp.array([[0.6, 0.3, 0.1]])), jnp.array([0.4]))[0, 2].item()
      -inf
    """
    ratio = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return jnp.where(ratio >= min_p[:, None], logits, -jnp.inf)


def keep_top_k(logits: Array, k: Array, *, implementation: str | None = None) -> Array:
    """Keeps the k best tokens; of equal logits at the cut, the smaller token ids.

    Args:
      logits: float32 [B, V].
      k: int32 [B]; 0 keeps all.
      implementation: see `keep_best`.

    Returns:
      float32 [B, V], -inf for the tokens removed.

    Source: Fan et al., Hierarchical Neural Story Generation (2018).

    Example:
      >>> keep_top_k(jnp.array([[1.0, 3.0, 1.0]]), jnp.array([2])).tolist()
      [[1.0, 3.0, -inf]]
    """
    return keep_best(logits, k, None, implementation=implementation)


def keep_top_p(logits: Array, p: Array, *, implementation: str | None = None) -> Array:
    """Keeps the smallest set of best tokens whose probability reaches p; equal logits as in `keep_top_k`.

    Args:
      logits: float32 [B, V].
      p: float32 [B] in (0, 1]; 1 keeps all, and the best token always stays.
      implementation: see `keep_best`.

    Returns:
      float32 [B, V], -inf for the tokens removed.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (2020).

    Example:
      >>> keep_top_p(jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.array([0.7]))[0, 2].item()
      -inf
    """
    return keep_best(logits, None, p, implementation=implementation)


def keep_best(logits: Array, k: Array | None, p: Array | None, *, implementation: str | None = None) -> Array:
    """`keep_top_k` and then, of what it keeps, `keep_top_p`; on a GPU by one search.

    Args:
      logits: float32 [B, V].
      k: int32 [B]; None or 0 keeps all.
      p: float32 [B] in (0, 1]; None or 1 keeps all.
      implementation: "triton" for the GPU kernels, "xla" for XLA's operations, None for the kernels where they run.
        Both keep the same tokens, but for rounding of sums where a nucleus ends.

    Returns:
      float32 [B, V], -inf for the tokens removed.

    Raises:
      BackendError: "triton" cannot run here, or the implementation is neither.

    Example:
      >>> logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
      >>> keep_best(logits, jnp.array([3]), jnp.array([0.7]))[0, 2].item()  # the third has 0.2 / 0.9
      -inf
    """
    return _run(_keep_by_kernels, _keep_portably, implementation, logits, k, p)


def draw_best(
    logits: Array,
    k: Array | None,
    p: Array | None,
    keys: Array,
    temperature: Array,
    *,
    implementation: str | None = None,
) -> Array:
    """`apply_temperature`, `keep_best` and `sample_token`; on a GPU noise is made for the tokens that stay only.

    Args:
      logits: float32 [B, V].
      k, p: as in `keep_best`.
      keys, temperature: as in `sample_token`.
      implementation: as in `keep_best`.

    Returns:
      int32 [B].

    Raises:
      BackendError: as in `keep_best`.

    Example:
      >>> logits, key = jnp.array([[0.0, 9.0]]), jnp.array([[0, 1]], jnp.uint32)
      >>> draw_best(logits, jnp.array([1]), None, key, jnp.ones(1)).tolist()
      [1]
    """
    return _run(_draw_by_kernels, _draw_portably, implementation, logits, k, p, keys, temperature)


def _run(by_kernels: Callable[..., Array], portably: Callable[..., Array], name: str | None, *given: Any) -> Array:
    """One of two implementations: the named one, or the kernels where they run."""
    if name not in (None, "triton", "xla"):
        raise BackendError(
            f'implementation="{name}" does not filter logits; "triton" and "xla" do, and None takes the kernels where '
            "they run."
        )
    if name == "triton":
        triton.check()
    if name == "xla" or triton.unavailable():
        return portably(*given)
    if name == "triton" or triton.is_interpreted():
        return by_kernels(*given)
    # The process has a GPU, but these logits may be elsewhere.
    return lax.platform_dependent(*given, cuda=by_kernels, default=portably)


def _find(logits: Array, scale: Array | None, k: Array | None, p: Array | None) -> triton_cut.Cuts:
    rows = logits.shape[:1]
    scale = jnp.ones(rows, jnp.float32) if scale is None else scale
    k, p = jnp.zeros(rows, jnp.int32) if k is None else k, jnp.ones(rows, jnp.float32) if p is None else p
    given = lax.stop_gradient(logits), scale, k.astype(jnp.int32), p.astype(jnp.float32)
    return triton_cut.find(*given, triton.is_interpreted())


def _keep_by_kernels(logits: Array, k: Array | None, p: Array | None) -> Array:
    cut, last, _ = _find(logits, None, k, p)
    stay = (logits > cut[:, None]) | ((logits == cut[:, None]) & (positions(logits) <= last[:, None]))
    return jnp.where(stay, logits, -jnp.inf)


def _draw_by_kernels(logits: Array, k: Array | None, p: Array | None, keys: Array, temperature: Array) -> Array:
    random = temperature > 0
    scale = 1 / jnp.where(random, temperature, jnp.ones_like(temperature))
    return triton_draw.draw(logits, scale, _find(logits, scale, k, p), keys, random, triton.is_interpreted())


def _draw_portably(logits: Array, k: Array | None, p: Array | None, keys: Array, temperature: Array) -> Array:
    return sample_token(_keep_portably(apply_temperature(logits, temperature), k, p), keys, temperature)


@jax.jit
def _keep_portably(logits: Array, k: Array | None, p: Array | None) -> Array:
    if k is not None:
        total = jnp.where(k > 0, k.astype(jnp.float32), jnp.inf)
        logits = _keep_until(logits, jnp.ones_like(logits), total)
    if p is not None:
        # A float32 sum may reach 1 early, so p = 1 is never reached.
        logits = _keep_until(logits, jax.nn.softmax(logits, axis=-1), jnp.where(p < 1, p, jnp.inf))
    return logits


def _keep_until(logits: Array, weights: Array, total: Array) -> Array:
    """Keeps the best tokens, equal ones by token id, until they weigh `total`.

    The logit at the cut is found bit by bit: 32 masked sums are several times faster than a sort. Counts are exact in
    float32 for any vocabulary below 2**24.
    """
    order = _order(logits)

    def raise_cut(cut: Array, bit: Array) -> tuple[Array, None]:
        higher = cut | bit
        return jnp.where(_weigh(order >= higher[:, None], weights) >= total, higher, cut), None

    bits = jnp.uint32(1) << jnp.arange(31, -1, -1, dtype=jnp.uint32)
    cut, _ = lax.scan(raise_cut, jnp.zeros(logits.shape[0], jnp.uint32), bits)
    better, equal = order > cut[:, None], order == cut[:, None]
    earlier = lax.cumsum(equal.astype(logits.dtype), axis=1) - 1
    before = _weigh(better, weights)[:, None] + earlier * weights
    return jnp.where(better | (equal & (before < total[:, None])), logits, -jnp.inf)


def _weigh(mask: Array, weights: Array) -> Array:
    return jnp.sum(jnp.where(mask, weights, jnp.zeros_like(weights)), axis=-1)


def _order(logits: Array) -> Array:
    """uint32 numbers in the order of the float32 logits, with -0 equal to 0."""
    bits = lax.bitcast_convert_type(jnp.where(logits == 0, jnp.zeros_like(logits), logits), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)
