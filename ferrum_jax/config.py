"""Frozen, hashable descriptions of a model: sizes, rotary embedding and quantisation. Imports no jax."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ferrum_jax import config_checks as check
from ferrum_jax.errors import ConfigError
from ferrum_jax.families import FAMILIES

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
BITS = (2, 3, 4, 8)
CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
DTYPES = ("bfloat16", "float16", "float32")
HIDDEN_ACTS = ("silu",)
MODULE_SETTINGS = ("bits", "group_size", "sym", "desc_act")

Overrides = tuple[tuple[str, int | bool], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: its base and how it is stretched beyond the trained context.

    Args:
      rope_type: one of default, linear, dynamic (NTK), yarn, llama3.
      theta: base of the geometric series of wavelengths.
      factor: how many times the context is stretched, 1.0 or more (every type but default).
      original_max_position: trained context in tokens (dynamic, yarn, llama3); None means the model's max_position.
      low_freq_factor: llama3, wavelengths above original / low_freq_factor are stretched.
      high_freq_factor: llama3, wavelengths below original / high_freq_factor are kept.
      beta_fast: yarn, rotations within the trained context above which a dimension is kept.
      beta_slow: yarn, rotations below which a dimension is stretched.
      attention_factor: yarn, factor on cos and sin; None derives it from factor or the two mscales.
      mscale: yarn, numerator of the derived attention factor.
      mscale_all_dim: yarn, denominator of the derived attention factor.
      truncate: yarn, whether the ramp's ends are rounded to whole dimensions.

    Raises:
      ConfigError: a value is unknown, of the wrong type or out of range.

    Example:
      >>> RopeConfig(rope_type="linear", theta=10_000.0, factor=4.0).factor
      4.0
    """

    rope_type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        check.choice("rope_type", self.rope_type, ROPE_TYPES)
        check.number("theta", self.theta, above=1.0)
        check.number("factor", self.factor, least=1.0)
        if self.original_max_position is not None:
            check.integer("original_max_position", self.original_max_position, 1, check.MAX_POSITION)
        check.number("beta_fast", self.beta_fast, above=0.0)
        check.number("beta_slow", self.beta_slow, above=0.0)
        for name in ("attention_factor", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"):
            if getattr(self, name) is not None:
                check.number(name, getattr(self, name), least=0.0)
        check.boolean("truncate", self.truncate)
        if self.beta_fast < self.beta_slow:
            raise ConfigError(
                f"beta_fast is {self.beta_fast} and beta_slow is {self.beta_slow}; yarn needs beta_fast >= beta_slow; "
                "swap them or drop both for 32 and 1."
            )
        if self.rope_type == "llama3":
            self._check_llama3()

    def _check_llama3(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is None or high is None or not 0 < low < high:
            raise ConfigError(
                f"low_freq_factor is {low} and high_freq_factor is {high}; rope type llama3 needs both, with "
                "0 < low_freq_factor < high_freq_factor; Llama 3.1 uses 1.0 and 4.0."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """GPTQ quantisation as a checkpoint declares it; shapes on disk still have the last word.

    Args:
      bits: 2, 3, 4 or 8 bits per weight.
      group_size: input rows that share a scale; -1 is one group over all of them.
      sym: whether every zero point is 2**(bits - 1).
      desc_act: whether rows were quantised in activation order, so that g_idx matters.
      checkpoint_format: "gptq" stores zero points minus one, "gptq_v2" as they are; None when not declared.
      lm_head: whether the output projection is quantised too.
      dynamic: ordered (pattern, overrides) rules per module; overrides None excludes the module.

    Raises:
      ConfigError: a value is of the wrong type or not supported.

    Example:
      >>> quant = QuantConfig(dynamic=((r"-:.*experts\\.0\\..*", None), (r"+:.*self_attn.*", (("bits", 8),))))
      >>> quant.for_module("model.layers.0.self_attn.q_proj").bits
      8

    Source: GPTQModel's quantize_config.json.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str | None = None
    lm_head: bool = False
    dynamic: tuple[tuple[str, Overrides | None], ...] = ()

    def __post_init__(self) -> None:
        check.choice("bits", self.bits, BITS)
        check.group_size("group_size", self.group_size)
        for name in ("sym", "desc_act", "lm_head"):
            check.boolean(name, getattr(self, name))
        if self.checkpoint_format is not None:
            check.choice("checkpoint_format", self.checkpoint_format, CHECKPOINT_FORMATS)
        for pattern, overrides in self.dynamic:
            _compiled(pattern)
            try:
                for key, _ in overrides or ():
                    check.module_setting(key, MODULE_SETTINGS)
                self._overridden(overrides or ())
            except ConfigError as problem:
                raise ConfigError(f"In the dynamic rule {pattern!r}: {problem}") from None

    def for_module(self, name: str) -> QuantConfig | None:
        """Quantisation of one linear layer, after the `dynamic` rules.

        A pattern is matched from the start of the name. Any matching exclusion ("-:") wins; otherwise the first
        matching override ("+:" or no prefix) in order applies.

        Args:
          name: full module name in the checkpoint, such as "model.layers.0.mlp.experts.3.gate_proj".

        Returns:
          The module's own QuantConfig without rules, or None where it is kept unquantised.

        Example:
          >>> QuantConfig().for_module("lm_head") is None
          True

        Source: GPTQModel, which moves exclusions to the front and then takes the first match (`dynamic_get`).
        """
        if name == "lm_head" and not self.lm_head:
            return None
        matching = [overrides for pattern, overrides in self.dynamic if _compiled(pattern).match(name)]
        if None in matching:
            return None
        return self._overridden(matching[0] or () if matching else ())

    def _overridden(self, overrides: Overrides) -> QuantConfig:
        settings: dict[str, Any] = dict(overrides)
        return replace(self, dynamic=(), **settings)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("-:").removeprefix("+:"))
    except re.error as problem:
        raise ConfigError(
            f"the dynamic pattern {pattern!r} is not a regular expression ({problem}); Python's `re` syntax after an "
            "optional '+:' or '-:' is accepted; correct it in quantize_config.json."
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that shapes a model's computation; hashable, so that it can be a static argument of `jax.jit`.

    Args:
      model_type: family, one of `ferrum_jax.families.FAMILIES`.
      vocab_size: V, rows of the embedding.
      hidden_size: D, width of the residual stream.
      num_layers: decoder layers.
      num_heads: H, query heads.
      num_kv_heads: Kv, key and value heads; divides num_heads.
      head_dim: h, even.
      intermediate_size: hidden size of a dense MLP.
      num_experts: E, routed experts of a MoE layer; 0 for a dense model.
      top_k: K, experts per token.
      moe_intermediate_size: F, hidden size of one expert.
      norm_topk_prob: whether the K routing weights are rescaled to sum to one.
      moe_layers: per layer, MoE or dense; empty means all of them when there are experts.
      rms_norm_eps: epsilon of every RMSNorm.
      rope: rotary embedding.
      max_position: longest context in tokens.
      tie_word_embeddings: whether the output projection is the embedding.
      qk_norm: whether queries and keys are normalised per head.
      attention_bias: whether the attention projections have a bias.
      sliding_windows: per layer, how many latest tokens a query sees, itself included; None sees all. Empty means None.
      hidden_act: activation of the gate, "silu".
      quant: GPTQ settings, None for an unquantised model.
      lm_head_bits: 4 or 8 holds an output projection that the checkpoint stores unquantised in so many bits, beside the
        embedding where it is tied; None as the checkpoint has it.
      dtype: dtype of activations and unquantised weights.
      implementation: name of the kernels to use, None for the best of the device; where that is a GPU's and its
        attention does not take the heads or the cache, XLA attends. A backend that is named refuses them instead.
      eos_token_ids: ids that end a text.
      bos_token_id: id that begins a text, if any.
      pad_token_id: id used for padding, if any.

    Raises:
      ConfigError: a value is of the wrong type, out of range or contradicts another.

    Example:
      >>> config = {"model_type": "qwen3", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
      ...           "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
      ...           "max_position_embeddings": 128}
      >>> ModelConfig.from_hf(config).num_kv_heads
      2
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int = 0
    top_k: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    moe_layers: tuple[bool, ...] = ()
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_position: int = 2048
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    hidden_act: str = "silu"
    quant: QuantConfig | None = None
    lm_head_bits: int | None = None
    dtype: str = "bfloat16"
    implementation: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check.choice("model_type", self.model_type, tuple(FAMILIES))
        for name, (least, most) in check.SIZES.items():
            check.integer(name, getattr(self, name), least, most)
        if not self.moe_layers:
            object.__setattr__(self, "moe_layers", (self.num_experts > 0,) * self.num_layers)
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_layers)
        for name in ("norm_topk_prob", "tie_word_embeddings", "qk_norm", "attention_bias"):
            check.boolean(name, getattr(self, name))
        check.number("rms_norm_eps", self.rms_norm_eps, above=0.0)
        check.choice("hidden_act", self.hidden_act, HIDDEN_ACTS)
        check.choice("dtype", self.dtype, DTYPES)
        check.lm_head_bits(self.lm_head_bits)
        check.parts(self, RopeConfig, QuantConfig)
        check.layers(self)
        check.heads(self)
        check.experts(self)
        check.token_ids(self)

    @staticmethod
    def from_hf(
        config: Mapping[str, Any],
        quantize_config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ) -> ModelConfig:
        """Read the parsed JSON files of a Hugging Face checkpoint, in the spelling of transformers 4 or 5.

        Args:
          config: config.json.
          quantize_config: quantize_config.json, if there is one.
          generation_config: generation_config.json, if there is one; its eos_token_id comes before config.json's.

        Returns:
          The checked configuration.

        Raises:
          ConfigError: the family, the quantisation or a value is not supported; the text says which and what to do.

        Example:
          See the class.
        """
        from ferrum_jax.hf_config import model_config_from_hf

        return model_config_from_hf(config, quantize_config, generation_config)
