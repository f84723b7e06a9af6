"""How much memory a model, its cache and its steps take, and what fits, before anything is allocated."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_jax.buckets import Buckets
from ferrum_jax.cache import cache_dtype
from ferrum_jax.config import ModelConfig
from ferrum_jax.environment import free_memory
from ferrum_jax.errors import CapacityError
from ferrum_jax.layers import uses_cpu_kernels, uses_triton
from ferrum_jax.params import layout_for, num_bytes
from ferrum_jax.plan import Plan, make_plan
from ferrum_kernels.triton_attention import refuses

GIB = 2**30
WIDEST_ON_XLA = 512  # tokens of a prompt at once where all of their scores are held


def weight_bytes(cfg: ModelConfig, plan: Plan | None = None) -> int:
    """Bytes of the parameters as `load` lays them out on the device.

    Args:
      cfg: the model; its implementation decides the layout.
      plan: of a checkpoint that was examined; None takes what the configuration promises.

    Raises:
      BackendError: the implementation has no layout for these weights.

    >>> import ferrum_jax as fj
    >>> model = fj.load("demo")
    >>> weight_bytes(model.cfg) == model.report.bytes_held
    True
    """
    plan = make_plan(cfg) if plan is None else plan
    trees = [*plan.top.values(), *(run.tree for run in plan.runs)]
    return sum(num_bytes(jax.eval_shape(layout_for(cfg), tree)) for tree in trees)


def token_bytes(cfg: ModelConfig, dtype: Any = None) -> int:
    """Bytes that one token takes in a cache, all layers together, scales of int8 included.

    >>> import ferrum_jax as fj
    >>> cfg = fj.load("demo", dtype="bfloat16").cfg
    >>> token_bytes(cfg), token_bytes(cfg, "int8")
    (6144, 3264)
    """
    dtype = cache_dtype(cfg, dtype)
    scale = 4 if dtype == jnp.int8 else 0
    return 2 * cfg.num_layers * cfg.num_kv_heads * (cfg.head_dim * dtype.itemsize + scale)


def step_bytes(cfg: ModelConfig, rows: int, width: int, length: int, paged: bool = False, dtype: Any = None) -> int:
    """An estimate of the temporary memory of one step; what a compiled program says of itself is better.

    With T = rows * width tokens, d bytes of the activations' dtype and the letters of `ferrum_jax.params`, the sum of

        residual stream and its norms   T * D * (2 * 4 + 2 * d)
        queries, keys, values           T * (2 * H + 2 * Kv) * h * (4 + d)
        a layer's cache as read         rows * length * 2 * Kv * h * (4 + d), only in XLA's attention
        scores and their softmax        rows * width * length * H * (4 + 4 + d), only in XLA's attention
        experts                         T * K * (3 * F * 4 + D * 4)
        logits and sampling             rows * V * 4 * 6
        the output projection widened   V * D * 4, only for 16 bits on a CPU

    Args:
      cfg: the model.
      rows: B.
      width: tokens of a row that are read in one step.
      length: slots of a row in the cache.
      paged: whether the cache is in pages, which the CPU kernels' attention does not take.
      dtype: of the cache; None means cfg.dtype.
    """
    d, tokens = jnp.dtype(cfg.dtype).itemsize, rows * width
    heads = cfg.head_dim * tokens * (2 * cfg.num_heads + 2 * cfg.num_kv_heads) * (4 + d)
    inner = max(cfg.top_k * cfg.moe_intermediate_size, cfg.intermediate_size)
    experts = tokens * (3 * inner * 4 + max(cfg.top_k, 1) * cfg.hidden_size * 4)
    total = tokens * cfg.hidden_size * (8 + 2 * d) + heads + experts + rows * cfg.vocab_size * 4 * 6
    if _xla_attends(cfg, paged, dtype):
        total += rows * length * 2 * cfg.num_kv_heads * cfg.head_dim * (4 + d)
        total += tokens * length * cfg.num_heads * (8 + d)
    if d == 2 and jax.default_backend() == "cpu":
        total += cfg.vocab_size * cfg.hidden_size * 4
    return total


def _xla_attends(cfg: ModelConfig, paged: bool, dtype: Any) -> bool:
    """Whether XLA attends to such a cache, scores and all."""
    if uses_triton(cfg):
        return refuses(cfg.dtype, cfg.head_dim, cache_dtype(cfg, dtype)) is not None
    return paged or not uses_cpu_kernels(cfg)


def buckets_for(cfg: ModelConfig, buckets: Buckets | None, dtype: Any = None, most: int | None = None) -> Buckets:
    """The buckets to compile for; where XLA attends, prompts are read in pieces of at most 512 tokens unless given.

    Args:
      cfg: the model.
      buckets: as the user gave them; None means `Buckets()`.
      dtype: of the cache; None means cfg.dtype.
      most: tokens of a piece, unless given.

    >>> import ferrum_jax as fj
    >>> [buckets_for(fj.load("demo").cfg, None, most=most).widths()[-1] for most in (None, 100)]
    [512, 96]
    """
    buckets = buckets or Buckets()
    if buckets.prefill is not None:
        return buckets
    widths = buckets.widths()
    limits = [widths[-1] if most is None else most]
    if widths[-1] > WIDEST_ON_XLA and _xla_attends(cfg, False, dtype):
        limits.append(WIDEST_ON_XLA)
    narrow = tuple(width for width in widths if width <= min(limits))
    return buckets if narrow == widths else dataclasses.replace(buckets, prefill=narrow)


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a device's memory holds.

    Attributes:
      device_bytes: all there is to plan with.
      weight_bytes: of the parameters; 0 where they are there already.
      state_bytes: of what is kept per slot besides the cache.
      step_bytes: temporary memory of the largest step.
      token_bytes: of one token in the cache.
      page: tokens of a page.
    """

    device_bytes: int
    weight_bytes: int
    state_bytes: int
    step_bytes: int
    token_bytes: int
    page: int

    @property
    def cache_bytes(self) -> int:
        """What is left for the cache, 0 where nothing is."""
        return max(0, self.device_bytes - self.weight_bytes - self.state_bytes - self.step_bytes)

    @property
    def pages(self) -> int:
        """Pages that fit."""
        return self.cache_bytes // (self.token_bytes * self.page)

    @property
    def tokens(self) -> int:
        """Tokens that fit, in whole pages."""
        return self.pages * self.page

    def rows(self, length: int) -> int:
        """Sequences of so many tokens that fit together."""
        return self.pages // -(-length // self.page)

    def check(self, pages: int) -> None:
        """Refuse a cache that does not fit.

        Args:
          pages: wanted.

        Raises:
          CapacityError: with the numbers.
        """
        if pages <= self.pages:
            return
        parts = [
            f"{size / GIB:.2f} GiB for {what}"
            for what, size in (
                ("the parameters", self.weight_bytes),
                ("the sampler", self.state_bytes),
                ("steps", self.step_bytes),
            )
            if size
        ]
        raise CapacityError(
            f"a cache of {pages * self.page} tokens needs {pages * self.page * self.token_bytes / GIB:.2f} GiB; the "
            f"device has {self.device_bytes / GIB:.2f} GiB free, {self.cache_bytes / GIB:.2f} GiB of them for a cache "
            f"after {', '.join(parts)}: {self.tokens} tokens fit. Ask for fewer tokens or rows, hold the cache in "
            f"int8, or free memory."
        )


def plan_memory(
    cfg: ModelConfig,
    device_bytes: int,
    *,
    rows: int = 1,
    width: int = 1,
    length: int | None = None,
    page: int = 1,
    dtype: Any = None,
    state_bytes: int = 0,
    loaded: bool = False,
    temporary_bytes: int | None = None,
) -> MemoryPlan:
    """Plan a device's memory, without touching the device.

    Args:
      cfg: the model.
      device_bytes: all there is to plan with.
      rows: sequences of the largest step.
      width: tokens of a row that it reads.
      length: slots of a row; None means the model's context.
      page: tokens of a page; 1 for contiguous caches.
      dtype: of the cache; None means cfg.dtype.
      state_bytes: what is kept besides the cache.
      loaded: the parameters are on the device already, and device_bytes is what is free beside them.
      temporary_bytes: of the largest step, such as `CompileRecord.temp_bytes` says; None estimates it (`step_bytes`).

    Returns:
      MemoryPlan.

    Raises:
      ConfigError: a cache has no such dtype.

    >>> import ferrum_jax as fj
    >>> plan = plan_memory(fj.load("demo", dtype="bfloat16").cfg, 2**30, page=16)
    >>> plan.tokens > 100_000, plan.rows(2048) == plan.pages // 128
    (True, True)
    """
    length = cfg.max_position if length is None else length
    temporary = step_bytes(cfg, rows, width, length, dtype=dtype) if temporary_bytes is None else temporary_bytes
    weights = 0 if loaded else weight_bytes(cfg)
    return MemoryPlan(device_bytes, weights, state_bytes, temporary, token_bytes(cfg, dtype), page)


def check_cache(cfg: ModelConfig, rows: int, length: int, width: int = 1, dtype: Any = None) -> None:
    """Refuse a contiguous cache beside loaded parameters, before it is allocated.

    Args:
      cfg: the model.
      rows: B.
      length: S.
      width: most tokens of a row that a step reads.
      dtype: of the cache; None means cfg.dtype.

    Raises:
      CapacityError: it does not fit what the device has free; a device that does not say is taken at its word.
    """
    free = free_memory()
    if free is not None:
        plan_memory(cfg, free, rows=rows, width=width, length=length, dtype=dtype, loaded=True).check(rows * length)
