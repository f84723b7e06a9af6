"""The library against the quantising tool's own numbers: logits, routing, greedy texts, likelihoods.

Every reference holds float32 results of plain transformers on the weights as the tool itself dequantises them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.config import ModelConfig
from tests.support.goldens import DEMO, FOLDERS, pad, read_model, reference
from tests.support.implementations import needs_library

PROMPTS = range(4)
IMPLEMENTATIONS = [pytest.param("cpu-exact", marks=needs_library), "xla", "apple"]
ACT_ORDER = "qwen3moe-w4g32act"
DEMO_PERPLEXITY, WINDOW = 28.3373, 512

forward = jax.jit(fj.forward, static_argnames=("cfg", "with_aux"))
prefill = jax.jit(fj.prefill, static_argnames="cfg", donate_argnames="cache")
decode_step = jax.jit(fj.decode_step, static_argnames="cfg", donate_argnames="cache")


@functools.cache
def load(name: str) -> tuple[ModelConfig, dict[str, Any]]:
    return read_model(FOLDERS[name])


def prompts(golden: Any) -> tuple[np.ndarray, np.ndarray]:
    """The prompts as a batch of the held-out texts' shape, where there are any, so that one program serves both."""
    tokens, lengths = pad([golden[f"ids_{i}"] for i in PROMPTS])
    held_out = golden["heldout_ids"]
    if held_out.ndim == 2:
        rows, columns = np.subtract(held_out.shape, tokens.shape)
        tokens = np.pad(tokens, ((0, rows), (0, columns)))
    return tokens, lengths


def worst(logits: jax.Array, golden: Any, lengths: np.ndarray) -> float:
    """The largest difference over all recorded positions; long prompts keep only their last ones."""
    host = np.asarray(logits)
    differences = []
    for i in PROMPTS:
        expected = golden[f"logits_q_{i}"]
        differences.append(np.abs(host[i, lengths[i] - len(expected) : lengths[i]] - expected).max())
    return float(np.max(differences))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FOLDERS)
def test_logits_and_routing_equal_the_reference(name: str, implementation: str) -> None:
    golden, (cfg, params) = reference(name), load(name)
    tokens, lengths = prompts(golden)
    cfg = dataclasses.replace(cfg, implementation=implementation)
    logits, aux = forward(params, tokens, cfg=cfg, with_aux=True)
    assert worst(logits, golden, lengths) < 1e-4
    if "router_logits_q_0" in golden:
        seen = np.concatenate([run.logits for run in aux.routing])
        for i in PROMPTS:
            np.testing.assert_allclose(seen[:, i, : lengths[i]], golden[f"router_logits_q_{i}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, "xla") for name in FOLDERS),
        *(pytest.param(name, "cpu", marks=needs_library) for name in FOLDERS),
        (DEMO, "apple"),
        (ACT_ORDER, "apple"),
    ],
)
def test_greedy_tokens_equal_the_reference(name: str, implementation: str) -> None:
    golden, (cfg, params) = reference(name), load(name)
    tokens, lengths = pad([golden[f"ids_{i}"] for i in PROMPTS])
    cfg = dataclasses.replace(cfg, implementation=implementation)
    expected = [golden[f"greedy_q_{i}"].tolist() for i in PROMPTS]
    steps = max(map(len, expected))
    cache = fj.init_cache(cfg, batch=len(tokens), length=int(lengths.max()) + steps)
    logits, cache = prefill(params, tokens, lengths, cache, cfg=cfg)
    written: list[np.ndarray] = []
    for _ in range(steps):
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        written.append(np.asarray(token))
        logits, cache = decode_step(params, token, cache, cfg=cfg)
    texts = np.stack(written, axis=1).tolist()
    assert [text[: len(known)] for text, known in zip(texts, expected, strict=True)] == expected


@pytest.mark.parametrize("name", FOLDERS)
def test_bfloat16_logits_are_close_to_the_reference(name: str) -> None:
    golden = reference(name)
    cfg, params = read_model(FOLDERS[name], dtype="bfloat16")
    cfg = dataclasses.replace(cfg, implementation="xla")
    tokens, lengths = prompts(golden)
    assert worst(forward(params, tokens, cfg=cfg), golden, lengths) < 0.15


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0.01, 0.2), (4, 0.2, 3.0)])
@pytest.mark.parametrize("name", [DEMO, ACT_ORDER])  # tied and separate
def test_a_rounded_projection_costs_what_numerics_says(name: str, bits: int, least: float, most: float) -> None:
    golden = reference(name)
    cfg, params = read_model(FOLDERS[name], lm_head_bits=bits, implementation="xla")
    tokens, lengths = prompts(golden)
    assert least < worst(forward(params, tokens, cfg=cfg), golden, lengths) < most


def token_nll(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Negative log likelihood of every token but the first, float32 [B, T - 1]."""
    log_probs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != DEMO])
def test_held_out_likelihoods_equal_the_reference(name: str) -> None:
    golden, (cfg, params) = reference(name), load(name)
    tokens = golden["heldout_ids"]
    logits, _ = forward(params, tokens, cfg=dataclasses.replace(cfg, implementation="xla"), with_aux=True)
    nll = token_nll(logits, jnp.asarray(tokens))
    np.testing.assert_allclose(nll, golden["nll_q"], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "within"),
    [("float32", 1e-3), pytest.param("bfloat16", 5e-3, marks=needs_library)],  # on the CPU kernels with int8 activations
)
def test_held_out_perplexity_of_the_demo_model(dtype: str, within: float) -> None:
    ids, (cfg, params) = reference(DEMO)["heldout_ids"], read_model(FOLDERS[DEMO], dtype=dtype)
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, 3, WINDOW)  # as recorded: full windows only, 201 of them
    loss = jax.jit(lambda params, tokens: token_nll(fj.forward(params, tokens, cfg), tokens).sum())
    total = sum(float(loss(params, some)) for some in windows)
    perplexity = math.exp(total / (windows.shape[0] * 3 * (WINDOW - 1)))
    assert perplexity == pytest.approx(DEMO_PERPLEXITY, rel=within)
    assert math.log(perplexity) == pytest.approx(float(reference(DEMO)["heldout_nll_q"]), abs=within)


@needs_library
@pytest.mark.parametrize("name", FOLDERS)
def test_int8_activations_cost_what_numerics_says(name: str) -> None:
    golden = reference(name)
    cfg, params = read_model(FOLDERS[name], dtype="bfloat16", implementation="cpu")
    tokens, lengths = prompts(golden)
    assert 1e-3 < worst(forward(params, tokens, cfg=cfg), golden, lengths) < 2.0
