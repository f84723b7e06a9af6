"""The flax.nnx module: the same numbers as the pure functions, and everything nnx does with a module."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ferrum_jax as fj
from ferrum_jax.nnx import CausalLM, Packed
from tests.support.checkpoint_writer import MIXED_DYNAMIC, TinySpec, write_checkpoint

ROOT = Path(__file__).parents[1]
TOKENS = jnp.array([[5, 6, 7, 8, 3], [9, 10, 7, 0, 0]], jnp.int32)

forward = jax.jit(fj.forward, static_argnums=2)
call = nnx.jit(lambda lm, tokens: lm(tokens))


@pytest.fixture(scope="module")
def demo() -> fj.Model:
    return fj.load("demo", quiet=True)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> fj.Model:
    """Act-order, zero points, a separate lm_head, two runs of layers, and experts of two kinds in one layer."""
    spec = TinySpec(dynamic=MIXED_DYNAMIC, sym=False, desc_act=True)
    return fj.load(write_checkpoint(tmp_path_factory.mktemp("nnx") / "mixed", spec), dtype="bfloat16", quiet=True)


@pytest.fixture(params=["demo", "mixed"])
def model(request: pytest.FixtureRequest) -> fj.Model:
    return request.getfixturevalue(request.param)


def assert_same(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def edit(variable: nnx.Variable, change: Callable[[jax.Array], jax.Array]) -> None:
    if hasattr(variable, "set_value"):
        variable.set_value(change(variable.get_value()))
    else:  # flax 0.10
        variable.value = change(variable.value)


def test_params_are_the_plain_pytree_uncopied(model: fj.Model) -> None:
    params = CausalLM.from_model(model).params
    assert jax.tree.structure(params) == jax.tree.structure(model.params)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(model.params), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)


def test_call_is_forward(model: fj.Model) -> None:
    logits = call(CausalLM.from_model(model), TOKENS)
    np.testing.assert_array_equal(logits, forward(model.params, TOKENS, model.cfg))


def test_prefill_and_decode_keep_a_cache(mixed: fj.Model) -> None:
    lm = CausalLM.from_model(mixed)
    cache = fj.init_cache(lm.cfg, batch=2, length=16)
    lengths = jnp.array([4, 2], jnp.int32)
    _, cache = nnx.jit(lambda lm, *read: lm.prefill(*read))(lm, TOKENS[:, :4], lengths, cache)
    logits, cache = nnx.jit(lambda lm, *read: lm.decode(*read))(lm, jnp.array([3, 7], jnp.int32), cache)
    assert cache.lengths.tolist() == [5, 3]
    # The same rows without a cache: what stands after a row's last token does not reach back.
    expected = forward(mixed.params, TOKENS, mixed.cfg)
    np.testing.assert_allclose(logits, jnp.stack([expected[0, 4], expected[1, 2]]), atol=0.15)


def test_split_and_merge_lose_nothing(model: fj.Model) -> None:
    lm = CausalLM.from_model(model)
    graph, dense, packed = nnx.split(lm, nnx.Param, Packed)
    merged = nnx.merge(graph, dense, packed)
    assert merged.cfg == model.cfg
    assert_same(merged.params, model.params)
    assert hash(graph) == hash(nnx.graphdef(merged))


def test_state_has_the_paths_of_the_pytree(demo: fj.Model) -> None:
    paths = dict(nnx.to_flat_state(nnx.state(CausalLM.from_model(demo))))
    assert {("embed",), ("layers", 0, "attn", "qkv", "qweight"), ("layers", 0, "moe", "router")} <= paths.keys()
    assert len(paths) == len(jax.tree.leaves(demo.params))


def test_packed_arrays_are_no_params(mixed: fj.Model) -> None:
    lm = CausalLM.from_model(mixed)
    dense = jax.tree.leaves(nnx.state(lm, nnx.Param))
    assert {leaf.dtype.name for leaf in dense} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(lm, Packed))} == {"uint32", "float16", "int32"}


def test_edited_leaf_changes_the_logits(demo: fj.Model) -> None:
    lm = CausalLM.from_model(demo)
    before = call(lm, TOKENS)
    edit(lm.layers[0]["moe"]["router"], lambda router: router.at[3].set(0.0))
    assert not np.array_equal(call(lm, TOKENS), before)
    assert not fj.layer(lm.params, 3)["moe"]["router"].any()
    assert fj.layer(demo.params, 3)["moe"]["router"].any(), "the model it came from must not change"


def test_update_restores_a_state(demo: fj.Model) -> None:
    lm = CausalLM.from_model(demo)
    state = nnx.state(CausalLM.from_model(demo))
    edit(lm.norm, jnp.zeros_like)
    nnx.update(lm, state)
    assert_same(lm.params, demo.params)


def test_gradient_reaches_the_params_and_only_them(demo: fj.Model) -> None:
    def loss(lm: CausalLM) -> jax.Array:
        return -jax.nn.log_softmax(lm(TOKENS))[..., 8].mean()

    grads = dict(nnx.to_flat_state(nnx.jit(nnx.grad(loss))(CausalLM.from_model(demo))))
    assert grads.keys() == dict(nnx.to_flat_state(nnx.state(CausalLM.from_model(demo), nnx.Param))).keys()
    for path, leaf in grads.items():
        values = np.asarray(jax.tree.leaves(leaf)[0])
        assert np.isfinite(values).all() and values.any(), path


def test_abstract_module_needs_no_memory(demo: fj.Model) -> None:
    lm = CausalLM(demo.cfg, fj.abstract(demo.cfg))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(lm)))
    state = nnx.state(CausalLM.from_model(demo))
    assert_same(nnx.merge(nnx.graphdef(lm), state).params, demo.params)


def test_core_imports_neither_flax_nor_orbax(tmp_path: Path) -> None:
    code = "import ferrum_jax.generation, ferrum_jax.saving, sys; print({'flax', 'orbax'} & sys.modules.keys())"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
