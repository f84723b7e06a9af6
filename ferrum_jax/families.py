"""The model families ferrum_jax runs: one row each, everything else about a model is read from its config.json."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a `model_type` settles before its config.json is read.

    Args:
      moe: whether layers hold routed experts.
      qk_norm: whether queries and keys are normalised per head.
      expert_size_key: the config.json key that holds the hidden size of one expert.
      mixed_layers: whether `decoder_sparse_step` and `mlp_only_layers` may turn MoE layers into dense ones.
      norm_topk_prob: fixed renormalisation of the top-k routing weights; None reads the key, absent means False.
      sliding_switch: whether a window counts only with `use_sliding_window` true.
      window_from_layer: whether `max_window_layers` and `layer_types` choose the layers that slide.
      head_dim: size of a head when config.json does not say; None divides hidden_size by the heads.
      rope_theta: rotary base when config.json does not say.
      rms_norm_eps: epsilon when config.json does not say.
    """

    moe: bool
    qk_norm: bool
    expert_size_key: str = "moe_intermediate_size"
    mixed_layers: bool = False
    norm_topk_prob: bool | None = None
    sliding_switch: bool = False
    window_from_layer: bool = False
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6


FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family(moe=True, qk_norm=True, mixed_layers=True, sliding_switch=True),
    "qwen3": Family(moe=False, qk_norm=True, sliding_switch=True, window_from_layer=True, head_dim=128),
    "mixtral": Family(
        moe=True,
        qk_norm=False,
        expert_size_key="intermediate_size",
        norm_topk_prob=True,
        rope_theta=1_000_000.0,
        rms_norm_eps=1e-5,
    ),
}
