"""The model as a `flax.nnx` module: the same pure functions over the same pytree, for programs written around nnx."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from ferrum_jax import model as functions
from ferrum_jax.checkpoint.load import Model
from ferrum_jax.config import ModelConfig
from ferrum_jax.kernels import is_weight
from ferrum_jax.paged import Cache


class Packed(nnx.Variable):
    """An array of a PackedLinear. Not an `nnx.Param`, so that `nnx.grad` and optimisers leave it alone."""


class CausalLM(nnx.Module):
    """A decoder whose leaves are variables: `Packed` inside packed weights, `nnx.Param` everywhere else.

    Paths in `nnx.state` are those of the pytree, such as ("layers", 0, "attn", "qkv", "scales"). Nothing is copied.

    Args:
      cfg: frozen configuration, static.
      params: the model's pytree, or `abstract(cfg)`.

    >>> import ferrum_jax as fj
    >>> from flax import nnx
    >>> lm = CausalLM.from_model(fj.load("demo"))
    >>> nnx.jit(lambda lm, tokens: lm(tokens))(lm, jax.numpy.array([[11, 12, 13]])).shape
    (1, 3, 4096)
    """

    def __init__(self, cfg: ModelConfig, params: dict[str, Any]) -> None:
        self.cfg = cfg
        self.embed = _variables(params["embed"])
        self.layers = _variables(params["layers"])
        self.norm = _variables(params["norm"])
        if "lm_head" in params:
            self.lm_head = _variables(params["lm_head"])

    @classmethod
    def from_model(cls, model: Model) -> CausalLM:
        """The module of what `ferrum_jax.load` gives."""
        return cls(model.cfg, model.params)

    @property
    def params(self) -> dict[str, Any]:
        """The plain pytree as it is now, for `forward`, `layer`, `save_params` and the other functions."""
        names = ("embed", "layers", "norm", "lm_head")
        tree = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return jax.tree.map(_value, tree, is_leaf=_is_variable)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of every position; see `ferrum_jax.forward`."""
        return functions.forward(self.params, tokens, self.cfg)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Read prompts into a cache from `init_cache(module.cfg, ...)`; see `ferrum_jax.prefill`."""
        return functions.prefill(self.params, tokens, lengths, cache, self.cfg)

    def decode(self, token: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        """Read one more token per row; see `ferrum_jax.decode_step`."""
        return functions.decode_step(self.params, token, cache, self.cfg)


def _variables(tree: Any) -> Any:
    def wrap(node: Any) -> Any:
        return jax.tree.map(Packed if is_weight(node) else nnx.Param, node)

    wrapped = jax.tree.map(wrap, tree, is_leaf=is_weight)
    # flax 0.12 wants containers of variables marked as data; 0.10 has no such mark.
    return nnx.data(wrapped) if hasattr(nnx, "data") else wrapped


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _value(variable: Any) -> Any:
    # flax 0.12 deprecates `.value`, 0.10 has nothing else.
    return variable.get_value() if hasattr(nnx.Variable, "get_value") else variable.value
