"""What a step must move and compute at least, and what a device can: the denominators of `ferrum-jax bench`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferrum_jax.config import ModelConfig

# Read bandwidth and bfloat16 matrix products as measured on these cards, not their data sheets.
KNOWN = {"H200": (4.65e12, 790e12), "H100 80GB HBM3": (3.1e12, 790e12)}
PROBE = 2**30  # bytes that are read to measure a device that is not known


@dataclass(frozen=True)
class Ceilings:
    """What the device can do.

    Attributes:
      bytes_per_second: reading its memory; None where it is not known, as on a CPU.
      flops_per_second: matrix products in 16 bits; None for devices that are not in the table.
      source: "known", "measured" or None.
    """

    bytes_per_second: float | None
    flops_per_second: float | None
    source: str | None


def ceilings() -> Ceilings:
    """The ceilings of the default device: from the table, else its bandwidth measured, on a CPU nothing."""
    import jax

    device = jax.devices()[0]
    for name, (bandwidth, flops) in KNOWN.items():
        if name in device.device_kind:
            return Ceilings(bandwidth, flops, "known")
    if device.platform == "cpu":
        return Ceilings(None, None, None)
    return Ceilings(_measured_bandwidth(), None, "measured")


def _measured_bandwidth(nbytes: int = PROBE, repeats: int = 5) -> float:
    """Bytes per second of a sum over a large array, the best of some."""
    import time

    import jax
    import jax.numpy as jnp

    array = jnp.ones(nbytes // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        total(array).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return nbytes / best


def experts_touched(cfg: ModelConfig, tokens: int) -> float:
    """Experts of a layer that some of the tokens go to, expected where each takes top_k of them with equal chances.

    >>> import ferrum_jax as fj
    >>> cfg = fj.load("demo").cfg  # 4 of 16
    >>> experts_touched(cfg, 1), round(experts_touched(cfg, 4), 2)
    (4.0, 10.94)
    """
    return cfg.num_experts * (1 - (1 - cfg.top_k / cfg.num_experts) ** tokens) if cfg.num_experts else 0.0


def decode_bytes(
    cfg: ModelConfig,
    params: dict[str, Any],
    batch: int,
    context: float,
    experts: float | None = None,
    cache_dtype: str | None = None,
) -> dict[str, float]:
    """Bytes that one decode step reads at least.

    Args:
      cfg: the model.
      params: its parameters, concrete or abstract; their sizes count.
      batch: rows.
      context: tokens that each row holds.
      experts: of a layer that are read; None takes what equal chances let expect.
      cache_dtype: of keys and values; None means cfg.dtype.

    Returns:
      {"weights", "cache"}: these experts, all other weights once, of the embedding the rows that are looked up; keys
      and values of live tokens, at most a sliding window of them.
    """
    from ferrum_jax.budget import token_bytes
    from ferrum_jax.params import num_bytes

    # The projection of a tied model reads all of the embedding.
    touched = experts_touched(cfg, batch) if experts is None else experts
    looked_up = min(1.0, batch / cfg.vocab_size) if "lm_head" in params else 1.0
    weights = looked_up * num_bytes(params["embed"])
    weights += sum(num_bytes(leaf) for name, leaf in params.items() if name not in ("embed", "layers"))
    for run in params["layers"]:
        rest = dict(run)
        if "moe" in run:
            weights += num_bytes(run["moe"]["experts"]) * touched / cfg.num_experts
            rest["moe"] = {name: leaf for name, leaf in run["moe"].items() if name != "experts"}
        weights += num_bytes(rest)
    token = token_bytes(cfg, cache_dtype) / cfg.num_layers
    held = sum(min(context, window or context) for window in _windows(cfg))
    return {"weights": weights, "cache": batch * held * token}


def prefill_flops(cfg: ModelConfig, tokens: int) -> float:
    """Floating point operations that reading a prompt takes at least: products with weights, causal attention.

    Args:
      cfg: the model.
      tokens: of the prompt.

    Returns:
      Operations, a multiplication and an addition each counting; the output projection counts for the last token.
    """
    d, h = cfg.hidden_size, cfg.head_dim
    attention = d * h * (2 * cfg.num_heads + 2 * cfg.num_kv_heads)
    total = 2.0 * d * cfg.vocab_size
    for moe, window in zip(cfg.moe_layers, _windows(cfg), strict=True):
        inner = cfg.top_k * 3 * d * cfg.moe_intermediate_size + d * cfg.num_experts if moe else 0
        total += 2.0 * tokens * (attention + (inner or 3 * d * cfg.intermediate_size))
        span = min(window or tokens, tokens)
        pairs = span * (span + 1) / 2 + (tokens - span) * span
        total += 4.0 * cfg.num_heads * h * pairs
    return total


def _windows(cfg: ModelConfig) -> tuple[int | None, ...]:
    return tuple(cfg.sliding_windows) or (None,) * cfg.num_layers
