"""The stages of sampling: pure functions on float32 logits [B, V] with one traced parameter per row [B].

Each is usable alone, under jit and on any device: no 64-bit types, no complex numbers, no custom top-k call, no sort.
Those that remove tokens are in `sampling_filters`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.random import threefry2x32_p


def apply_logit_bias(logits: Array, bias: Array) -> Array:
    """Adds a bias to every logit (OpenAI's `logit_bias`).

    Args:
      logits: float32 [B, V].
      bias: float32 [B, V], 0 where a token has none.

    Returns:
      float32 [B, V].

    Example:
      >>> apply_logit_bias(jnp.array([[1.0, 2.0]]), jnp.array([[5.0, 0.0]])).tolist()
      [[6.0, 2.0]]
    """
    return logits + bias


def apply_repetition_penalty(logits: Array, seen: Array, penalty: Array) -> Array:
    """Makes tokens of the prompt and of the output less likely: positive logits are divided, others multiplied.

    Args:
      logits: float32 [B, V].
      seen: bool [B, V], True for tokens in the prompt or generated so far.
      penalty: float32 [B]; 1 changes nothing, above 1 discourages repeats.

    Returns:
      float32 [B, V].

    Source: Keskar et al., CTRL (2019), section 4.1, with the sign rule that Hugging Face transformers uses.

    Example:
      >>> seen = jnp.array([[True, True, False]])
      >>> apply_repetition_penalty(jnp.array([[2.0, -2.0, 2.0]]), seen, jnp.array([2.0])).tolist()
      [[1.0, -4.0, 2.0]]
    """
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_presence_frequency(logits: Array, counts: Array, presence: Array, frequency: Array) -> Array:
    """Subtracts `presence` once and `frequency` per occurrence from every token generated so far (OpenAI's rule).

    Args:
      logits: float32 [B, V].
      counts: int32 [B, V], how often each token was generated; the prompt does not count.
      presence: float32 [B]; 0 changes nothing.
      frequency: float32 [B]; 0 changes nothing.

    Returns:
      float32 [B, V].

    Example:
      >>> counts = jnp.array([[0, 3]])
      >>> apply_presence_frequency(jnp.array([[1.0, 1.0]]), counts, jnp.array([0.5]), jnp.array([1.0])).tolist()
      [[1.0, -2.5]]
    """
    times = counts.astype(logits.dtype)
    return logits - frequency[:, None] * times - presence[:, None] * (counts > 0).astype(logits.dtype)


def apply_temperature(logits: Array, temperature: Array) -> Array:
    """Divides each row by its temperature; a row at 0 (greedy) is left alone.

    Args:
      logits: float32 [B, V].
      temperature: float32 [B], 0 or at least 0.001.

    Returns:
      float32 [B, V].

    Example:
      >>> apply_temperature(jnp.array([[1.0, 2.0], [1.0, 2.0]]), jnp.array([0.5, 0.0])).tolist()
      [[2.0, 4.0], [1.0, 2.0]]
    """
    return logits / jnp.where(temperature > 0, temperature, jnp.ones_like(temperature))[:, None]


def sample_token(logits: Array, keys: Array, temperature: Array) -> Array:
    """Draws one token per row from softmax(logits); rows at temperature 0 take the best token.

    The draw is argmax(logits + Gumbel noise), with noise that depends on the row's key and the token id only, so a
    row gives the same token alone and in any batch. Divide by the temperature before (`apply_temperature`).

    Args:
      logits: float32 [B, V]; -inf is never drawn.
      keys: uint32 [B, 2], one raw Threefry key per row.
      temperature: float32 [B]; only compared with 0.

    Returns:
      int32 [B]; equal logits give the smaller token id.

    Source: Gumbel-max, Maddison et al., A* Sampling (2014).

    Example:
      >>> sample_token(jnp.array([[0.0, 9.0]]), jnp.array([[0, 1]], jnp.uint32), jnp.zeros(1)).tolist()
      [1]
    """
    noise = jnp.where(temperature[:, None] > 0, gumbel(keys, logits.shape[-1]), jnp.zeros_like(logits))
    return greedy_token(logits + noise)


def greedy_token(logits: Array) -> Array:
    """The best token of each row, the smaller id of equals.

    Args:
      logits: float32 [B, V].

    Returns:
      int32 [B].

    Example:
      >>> greedy_token(jnp.array([[1.0, 2.0, 2.0]])).tolist()
      [1]
    """
    return lax.argmax(logits, logits.ndim - 1, jnp.int32)


def token_logprob(logits: Array, token: Array) -> Array:
    """Log-probability of the chosen token under softmax(logits).

    Give it the logits of the model as they are: OpenAI and vLLM report log-probabilities before biases, penalties,
    temperature and filters.

    Args:
      logits: float32 [B, V].
      token: int32 [B].

    Returns:
      float32 [B].

    Example:
      >>> round(token_logprob(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([0])).item(), 4)
      -1.3863
    """
    return _at(jax.nn.log_softmax(logits, axis=-1), token)


@functools.partial(jax.jit, static_argnames="n")
def top_logprobs(logits: Array, n: int) -> tuple[Array, Array]:
    """The n most likely tokens and their log-probabilities under softmax(logits); see `token_logprob`.

    Args:
      logits: float32 [B, V], finite.
      n: how many, static, 1 to V.

    Returns:
      ids int32 [B, n] and log-probabilities float32 [B, n], best first, equal ones by token id.

    Example:
      >>> ids, values = top_logprobs(jnp.log(jnp.array([[0.5, 0.5]])), 2)
      >>> ids.tolist(), [round(value, 4) for value in values[0].tolist()]
      ([[0, 1]], [-0.6931, -0.6931])
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)

    # n passes over the vocabulary: n is at most 20, far cheaper than sorting it.
    def best(rest: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        token = greedy_token(rest)
        return jnp.where(positions(rest) == token[:, None], -jnp.inf, rest), (token, _at(logprobs, token))

    _, (ids, values) = lax.scan(best, logits, None, length=n)
    return ids.T, values.T


def fold_in(keys: Array, step: Array) -> Array:
    """One key per row and step: `jax.random.fold_in` on raw Threefry keys, row by row.

    Args:
      keys: uint32 [B, 2].
      step: int32 [B], 0 or more.

    Returns:
      uint32 [B, 2].

    Example:
      >>> fold_in(jnp.array([[0, 7]], jnp.uint32), jnp.array([3])).shape
      (1, 2)
    """
    return jnp.stack(_threefry(keys, step.astype(jnp.uint32)[:, None]), axis=-1)[:, 0]


def gumbel(keys: Array, size: int) -> Array:
    """Standard Gumbel noise, `size` values per raw key; value i depends on the key and i only.

    Args:
      keys: uint32 [B, 2].
      size: how many values per row, static.

    Returns:
      float32 [B, size], all finite.

    Example:
      >>> gumbel(jnp.array([[0, 7]], jnp.uint32), 4).shape
      (1, 4)
    """
    counter = lax.broadcasted_iota(jnp.uint32, (keys.shape[0], size), 1)
    bits, _ = _threefry(keys, counter)
    # 23 bits and a half: exact in float32 and strictly between 0 and 1, so both logarithms are finite.
    uniform = ((bits >> jnp.uint32(9)).astype(jnp.float32) + jnp.float32(0.5)) * jnp.float32(2.0**-23)
    return -jnp.log(-jnp.log(uniform))


def _threefry(keys: Array, counter: Array) -> list[Array]:
    # jax.random counts in 64 bits when it draws arrays, which Apple's plugins do not take; 32 are enough here.
    high, low = (jnp.broadcast_to(keys[:, i : i + 1], counter.shape) for i in (0, 1))
    return threefry2x32_p.bind(high, low, jnp.zeros_like(counter), counter)


def positions(array: Array) -> Array:
    """The token id of each logit, int32 [B, V]."""
    return lax.broadcasted_iota(jnp.int32, array.shape, 1)


def _at(array: Array, index: Array) -> Array:
    """array[b, index[b]] for every row, as a masked sum, which needs no gather."""
    return jnp.sum(jnp.where(positions(array) == index[:, None], array, jnp.zeros_like(array)), axis=-1)
