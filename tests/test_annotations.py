"""The shapes in the annotations are true: the model runs with every annotated argument and result checked."""

import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from jaxtyping import TypeCheckError, install_import_hook

with install_import_hook(["ferrum_jax.layers", "ferrum_jax.moe", "ferrum_jax.model"], "beartype.beartype"):
    import ferrum_jax.model as model
    import ferrum_jax.layers as layers
    import ferrum_jax.moe as moe
import ferrum_jax as fj

demo = fj.load("demo", quiet=True)
tokens = jnp.array([[11, 12, 13], [14, 15, 0]])
model.forward(demo.params, tokens, demo.cfg)
cache = fj.init_cache(demo.cfg, batch=2, length=16)
logits, cache = model.prefill(demo.params, tokens, jnp.array([3, 2]), cache, demo.cfg)
logits, cache = model.decode_step(demo.params, jnp.array([1, 2]), cache, demo.cfg)
x = jnp.ones((2, 3, demo.cfg.hidden_size))
moe.moe_layer(fj.layer(demo.params, 0)["moe"], x, demo.cfg, mask=jnp.ones((2, 3), bool))
try:
    layers.rms_norm(x, jnp.ones(7), 1e-6)
except TypeCheckError:
    print("checked")
"""


@pytest.mark.once
def test_the_model_runs_with_its_annotations_checked() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "checked\n"  # the control: a norm of another width is refused
