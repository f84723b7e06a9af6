"""Laws of the parameter tree: plan, random weights and loaded checkpoint have one shape; layers come and go."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ferrum_jax as fj
from ferrum_jax.config import ModelConfig, QuantConfig
from ferrum_jax.errors import ShapeError
from ferrum_jax.params import num_bytes
from tests.support.checkpoint_writer import MIXED_DYNAMIC, TinySpec, write_checkpoint
from tests.support.tiny import CONFIGS, tiny_config

MIXED = tiny_config(
    num_layers=3,
    moe_layers=(True, False, True),
    quant=QuantConfig(group_size=16, sym=False, dynamic=((r"-:.*experts\.1\.", None),)),
)


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    layers = draw(st.integers(1, 4))
    quant = QuantConfig(
        bits=draw(st.sampled_from([2, 3, 4, 8])),
        group_size=draw(st.sampled_from([-1, 16, 24])),
        sym=draw(st.booleans()),
        desc_act=draw(st.booleans()),
        lm_head=draw(st.booleans()),
        dynamic=draw(st.sampled_from([(), ((r"-:.*experts\.1\.", None),), ((r".*up_proj", (("bits", 8),)),)])),
    )
    return tiny_config(
        num_layers=layers,
        moe_layers=tuple(draw(st.lists(st.booleans(), min_size=layers, max_size=layers))),
        hidden_size=draw(st.sampled_from([32, 40])),
        quant=draw(st.sampled_from([None, quant])),
        tie_word_embeddings=draw(st.booleans()),
        lm_head_bits=draw(st.sampled_from([None, 4, 8])),
        attention_bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )


@settings(max_examples=6)  # every example compiles
@given(cfg=model_configs())
def test_random_parameters_have_the_abstract_shapes(cfg: ModelConfig) -> None:
    tree, params = fj.abstract(cfg), fj.random_params(cfg)
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, params)
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    assert num_bytes(tree) == num_bytes(params) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(run["input_norm"].shape[0] for run in params["layers"]) == cfg.num_layers


@pytest.mark.parametrize(
    "spec",
    [
        TinySpec(),
        TinySpec(sym=False, desc_act=True, lm_head="quantized", mlp_only_layers=(1,)),
        TinySpec(dynamic=MIXED_DYNAMIC, lm_head="tied"),
        TinySpec(family="qwen3", attention_bias=True, group_size=-1),
        TinySpec(family="mixtral", old_mixtral_names=True, bits=8),
    ],
    ids=["qwen3_moe", "a dense layer, quantised head", "mixed", "qwen3", "mixtral"],
)
def test_a_loaded_checkpoint_has_the_abstract_shapes(spec: TinySpec, tmp_path: Path) -> None:
    model = fj.load(write_checkpoint(tmp_path, spec), quiet=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(fj.abstract(model.cfg), model.params)
    assert jax.tree.structure(fj.abstract(model.cfg)) == jax.tree.structure(model.params)


def test_the_demo_model_has_the_abstract_shapes() -> None:
    model = fj.load("demo", quiet=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(fj.abstract(model.cfg), model.params)


def test_random_parameters_follow_their_seed() -> None:
    one, same, other = (fj.random_params(MIXED, seed) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(one, same)
    assert not np.array_equal(one["embed"], other["embed"])


@pytest.mark.parametrize("cfg", [MIXED, *CONFIGS.values()], ids=["mixed", *CONFIGS])
def test_a_layer_taken_out_and_put_back_changes_nothing(cfg: ModelConfig) -> None:
    params = fj.random_params(cfg)
    for index in range(cfg.num_layers):
        chex.assert_trees_all_equal(fj.set_layer(params, index, fj.layer(params, index)), params)


def test_a_new_layer_is_found_where_it_was_put_and_the_original_is_kept() -> None:
    params, other = fj.random_params(MIXED, 0), fj.random_params(MIXED, 1)
    edited = fj.set_layer(params, 2, fj.layer(other, 2))
    chex.assert_trees_all_equal(fj.layer(edited, 2), fj.layer(other, 2))
    for index in (0, 1):
        chex.assert_trees_all_equal(fj.layer(edited, index), fj.layer(params, index))
    chex.assert_trees_all_equal(params, fj.random_params(MIXED, 0))


@pytest.mark.parametrize("index", [-1, 3])
def test_layers_that_do_not_exist_are_refused(index: int) -> None:
    params = fj.random_params(MIXED)
    for call in (lambda: fj.layer(params, index), lambda: fj.set_layer(params, index, {})):
        with pytest.raises(ShapeError, match=rf"layer {index} does not exist; this model has layers 0 to 2"):
            call()


def test_layers_of_another_kind_are_refused() -> None:
    params = fj.random_params(MIXED)
    moe, dense = fj.layer(params, 0), fj.layer(params, 1)
    with pytest.raises(ShapeError, match=r"the new layer has another structure than the old one; keep the keys"):
        fj.set_layer(params, 0, dense)
    with pytest.raises(ShapeError, match=r"\['post_norm'\] is float32\[31\]; expected float32\[32\]"):
        fj.set_layer(params, 0, {**moe, "post_norm": moe["post_norm"][:31]})
    with pytest.raises(ShapeError, match=r"\['input_norm'\] is bfloat16\[32\]; expected float32\[32\]"):
        fj.set_layer(params, 0, {**moe, "input_norm": moe["input_norm"].astype(jnp.bfloat16)})
    repacked = dataclasses.replace(moe["attn"]["qkv"], bits=8)
    with pytest.raises(ShapeError, match=r"another structure"):
        fj.set_layer(params, 0, {**moe, "attn": {**moe["attn"], "qkv": repacked}})
