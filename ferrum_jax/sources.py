"""Which tensors of a checkpoint feed which leaf of the parameters: names and sizes, one table per layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from ferrum_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Vector:
    """An unquantised tensor that is taken as it is, such as a norm or the embedding."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Joined:
    """Vectors end to end in one leaf, such as the biases of linears that are one leaf."""

    parts: tuple[Vector, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the leaf."""
        return (sum(part.shape[0] for part in self.parts),)


@dataclasses.dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer [k, sum(n)], made of one module or of several side by side.

    With round_to it is a plain one that is held in so many bits.
    """

    modules: tuple[str, ...]
    k: int
    n: tuple[int, ...]
    round_to: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Experts:
    """The same linear layer of every expert."""

    experts: tuple[Linear, ...]


def layer_sources(cfg: ModelConfig, index: int) -> dict[str, Any]:
    """The leaves of one decoder layer.

    Args:
      cfg: the model.
      index: layer number.

    Returns:
      A nested dict with the structure of a layer's parameters; experts come as "gate", "up" and "down".
    """
    prefix, d, h = f"model.layers.{index}", cfg.hidden_size, cfg.head_dim
    attn: dict[str, Any] = {}
    widths = {"q": cfg.num_heads * h, "k": cfg.num_kv_heads * h, "v": cfg.num_kv_heads * h}
    for name, n in widths.items():
        attn[name] = Linear((f"{prefix}.self_attn.{name}_proj",), d, (n,))
    attn["o"] = Linear((f"{prefix}.self_attn.o_proj",), widths["q"], (d,))
    if cfg.attention_bias:
        for name, n in (*widths.items(), ("o", d)):
            attn[f"{name}_bias"] = Vector(f"{prefix}.self_attn.{name}_proj.bias", (n,))
    if cfg.qk_norm:
        attn["q_norm"] = Vector(f"{prefix}.self_attn.q_norm.weight", (h,))
        attn["k_norm"] = Vector(f"{prefix}.self_attn.k_norm.weight", (h,))
    layer: dict[str, Any] = {
        "input_norm": Vector(f"{prefix}.input_layernorm.weight", (d,)),
        "attn": attn,
        "post_norm": Vector(f"{prefix}.post_attention_layernorm.weight", (d,)),
    }
    if cfg.moe_layers[index]:
        layer["moe"] = {
            "router": Linear((f"{prefix}.mlp.gate",), d, (cfg.num_experts,)),
            "experts": {
                name: Experts(
                    tuple(
                        _gated(f"{prefix}.mlp.experts.{e}", name, d, cfg.moe_intermediate_size)
                        for e in range(cfg.num_experts)
                    )
                )
                for name in ("gate", "up", "down")
            },
        }
    else:
        layer["mlp"] = {
            name: _gated(f"{prefix}.mlp", name, d, cfg.intermediate_size) for name in ("gate", "up", "down")
        }
    return layer


def _gated(prefix: str, name: str, hidden: int, intermediate: int) -> Linear:
    k, n = (intermediate, hidden) if name == "down" else (hidden, intermediate)
    return Linear((f"{prefix}.{name}_proj",), k, (n,))


def top_sources(cfg: ModelConfig) -> dict[str, Vector | Linear]:
    """The leaves outside the layers: embedding, final norm and an output projection of its own, where there is one."""
    top: dict[str, Vector | Linear] = {
        "embed": Vector("model.embed_tokens.weight", (cfg.vocab_size, cfg.hidden_size)),
        "norm": Vector("model.norm.weight", (cfg.hidden_size,)),
    }
    if cfg.lm_head_bits is not None or not cfg.tie_word_embeddings:
        module = "model.embed_tokens" if cfg.tie_word_embeddings else "lm_head"
        top["lm_head"] = Linear((module,), cfg.hidden_size, (cfg.vocab_size,), cfg.lm_head_bits)
    return top


def other_names(name: str) -> tuple[str, ...]:
    """Older spellings of a tensor name: Mixtral files before transformers 5.

    >>> other_names("model.layers.0.mlp.experts.3.down_proj.qweight")
    ('model.layers.0.block_sparse_moe.experts.3.w2.qweight',)
    """
    old = name.replace(".mlp.", ".block_sparse_moe.")
    if old == name:
        return ()
    for new, short in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        old = old.replace(f".{new}", f".{short}") if ".experts." in old else old
    return (old,)
