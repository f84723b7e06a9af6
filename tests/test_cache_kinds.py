"""The demo model in float32: every kind of cache, read in pieces or whole, gives the same tokens; int8 nearly so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.checkpoint.load import Model
from ferrum_jax.paged import Cache
from tests.support.goldens import DEMO, reference

PROMPTS = ["Once upon a time there was a king", "The fox", "In the beginning of the world the old woman said to him"]
NEW, LENGTH, PAGE = 16, 48, 16
PER_ROW = LENGTH // PAGE


def shuffled(cfg: fj.ModelConfig, dtype: str | None = None) -> fj.PagedCache:
    rows = len(PROMPTS)
    cache = fj.init_paged_cache(cfg, rows, rows * PER_ROW + 3, PAGE, length=LENGTH, dtype=dtype)
    ids = np.random.default_rng(0).permutation(cache.pages)[: rows * PER_ROW]
    return dataclasses.replace(cache, table=jnp.asarray(ids.reshape(rows, PER_ROW), jnp.int32))


CACHES: dict[str, Callable[[fj.ModelConfig], Cache]] = {
    "contiguous": lambda cfg: fj.init_cache(cfg, len(PROMPTS), LENGTH),
    "pages": lambda cfg: fj.init_paged_cache(cfg, len(PROMPTS), len(PROMPTS) * PER_ROW, PAGE),
    "shuffled pages": shuffled,
}


@pytest.fixture(scope="module")
def model() -> Model:
    return fj.load("demo", dtype="float32", quiet=True)


@pytest.fixture(scope="module")
def alone(model: Model) -> list[list[int]]:
    """What forward, which has no cache, says after each prompt."""
    forward = jax.jit(fj.forward, static_argnames="cfg")
    answers = []
    for prompt in PROMPTS:
        ids = model.tokenizer.encode(prompt)
        for _ in range(NEW):
            padded = np.zeros((1, LENGTH), np.int32)
            padded[0, : len(ids)] = ids
            logits = forward(model.params, jnp.asarray(padded), cfg=model.cfg)
            ids.append(int(logits[0, len(ids) - 1].argmax()))
        answers.append(ids[-NEW:])
    return answers


prefill = jax.jit(fj.prefill, static_argnames="cfg", donate_argnames="cache")
decode = jax.jit(fj.decode_step, static_argnames="cfg", donate_argnames="cache")


def answers(model: Model, cache: Cache, width: int) -> tuple[list[list[int]], np.ndarray]:
    """Greedy tokens of all prompts in one batch, the prompts read in pieces, and the logits [rows, NEW, V]."""
    ids = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, ids))
    last = np.zeros((len(ids), model.cfg.vocab_size), np.float32)
    for start in range(0, longest, width):
        pieces = [row[start : start + width] for row in ids]
        count = np.array([len(piece) for piece in pieces], np.int32)
        tokens = np.array([piece + [0] * (width - len(piece)) for piece in pieces], np.int32)
        logits, cache = prefill(model.params, tokens, count, cache, cfg=model.cfg)
        last = np.where(count[:, None] > 0, logits, last)
    steps = [last]
    for _ in range(NEW - 1):
        token = steps[-1].argmax(axis=-1).astype(np.int32)
        logits, cache = decode(model.params, token, cache, cfg=model.cfg)
        steps.append(np.asarray(logits))
    together = np.stack(steps, axis=1)
    return together.argmax(axis=-1).tolist(), together


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("width", [5, 24])
def test_every_cache_gives_the_same_tokens(model: Model, alone: list[list[int]], kind: str, width: int) -> None:
    assert answers(model, CACHES[kind](model.cfg), width)[0] == alone


def test_int8_is_close(model: Model) -> None:
    exact = answers(model, fj.init_cache(model.cfg, len(PROMPTS), LENGTH), 24)[1]
    codes = answers(model, shuffled(model.cfg, "int8"), 24)[1]
    first = np.abs(codes - exact)[:, 0]  # later ones follow tokens of their own
    assert 0 < first.max() < 0.5 < exact.std()


def test_int8_predicts_a_text_as_well(model: Model) -> None:
    text = reference(DEMO)["heldout_ids"].reshape(-1)[: 8 * 64].reshape(8, 64)
    tokens, lengths = jnp.asarray(text, jnp.int32), jnp.full(8, 1, jnp.int32)

    @jax.jit
    def loss(params: dict, cache: Cache) -> jax.Array:
        def step(cache: Cache, at: jax.Array) -> tuple[Cache, jax.Array]:
            logits, cache = fj.prefill(params, tokens[:, at][:, None], lengths, cache, model.cfg)
            picked = jnp.take_along_axis(logits, tokens[:, at + 1][:, None], axis=-1)[:, 0]
            return cache, (jax.nn.logsumexp(logits, axis=-1) - picked).mean()

        return jax.lax.scan(step, cache, jnp.arange(63, dtype=jnp.int32))[1].mean()

    exact, codes = (float(loss(model.params, fj.init_cache(model.cfg, 8, 64, dtype=dtype))) for dtype in (None, "int8"))
    assert exact != codes and abs(np.exp(codes - exact) - 1) < 0.005  # of the perplexity, docs/numerics.md has more
