"""The reference checkpoints on a GPU, in bfloat16, through load()."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.params import fold_permutations
from ferrum_kernels import mosaic
from ferrum_kernels.tiles import tile_all
from tests.support.goldens import DEMO, FOLDERS, pad, read_model, reference
from tests.support.triton_cases import ignore_deprecation

pytestmark = [pytest.mark.gpu, ignore_deprecation]
PROMPTS = range(4)


# Whose layers the Mosaic GPU kernels take: 4 bits in symmetric groups of 128, in input order.
OF_MOSAIC = {DEMO, "mixtral-w4g128sym", "qwen3moe-w4g128sym"}


@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
@pytest.mark.parametrize("name", FOLDERS)
def test_logits_are_near_the_reference(name, implementation):
    if implementation == "mosaic" and (problem := mosaic.unavailable()):
        pytest.skip(problem)
    golden = reference(name)
    if name == DEMO:
        model = fj.load(FOLDERS[name], dtype="bfloat16", implementation=implementation, quiet=True)
        cfg, params = model.cfg, model.params
    else:  # without a tokenizer
        cfg, params = read_model(FOLDERS[name], dtype="bfloat16", implementation=implementation)
        params = jax.device_put(params, jax.devices()[0])
        params = fold_permutations(jax.jit(tile_all)(params))
    tokens, lengths = pad([golden[f"ids_{i}"] for i in PROMPTS])
    step = jax.jit(fj.forward, static_argnames="cfg").lower(params, tokens, cfg=cfg)
    assert ("mosaic_gpu" in step.as_text()) == (implementation == "mosaic" and name in OF_MOSAIC)
    logits = np.asarray(step.compile()(params, tokens), np.float64)
    for i in PROMPTS:
        expected = golden[f"logits_q_{i}"].astype(np.float64)
        found = logits[i, lengths[i] - len(expected) : lengths[i]]
        # Activations and layers between are bfloat16 here and float32 in the reference.
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.03
