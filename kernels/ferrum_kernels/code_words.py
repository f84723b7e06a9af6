"""How a cache of int8 codes lies in memory: four codes to a word, one from each quarter of a head.

Word i of a head holds channels i, i + h/4, i + 2h/4 and i + 3h/4, lowest byte first, each as code + 128. A kernel that
reads words has four strips of neighbouring channels, whichever axis it multiplies over.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

WORD = 4  # codes of a word


def packed(strips: tuple[jax.Array, ...]) -> jax.Array:
    """Words int32 of the codes of four strips: whole numbers from -128 to 127, alike in shape."""
    words = [(x.astype(jnp.int32) + 128) << (8 * i) for i, x in enumerate(strips)]
    return functools.reduce(jnp.bitwise_or, words)


def unpacked(words: jax.Array) -> tuple[jax.Array, ...]:
    """The four strips int32 that `packed` packed."""
    return tuple(((words >> (8 * i)) & 255) - 128 for i in range(WORD))


def to_words(codes: jax.Array) -> jax.Array:
    """Words int32 [..., h / 4] of codes [..., h].

    >>> import jax.numpy as jnp
    >>> [hex(word) for word in to_words(jnp.array([-128, 1, -127, 2, -126, 3, -125, -125])).tolist()]
    ['0x3020100', '0x3838281']
    """
    return packed(tuple(jnp.split(codes, WORD, axis=-1)))


def from_words(words: jax.Array) -> jax.Array:
    """Codes int32 [..., h] of words [..., h / 4].

    >>> import jax.numpy as jnp
    >>> from_words(to_words(jnp.array([-128, 127, 0, -1]))).tolist()
    [-128, 127, 0, -1]
    """
    return jnp.concatenate(unpacked(words), axis=-1)
