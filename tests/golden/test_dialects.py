"""Every dialect of GPTQ against the independent reader: one tiny random checkpoint each, logits compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.kernels import MixedStack, PackedLinear
from tests.support import damage
from tests.support import numpy_reader as reader
from tests.support.checkpoint_writer import MIXED_DYNAMIC, Edit, Tensors, TinySpec, write_checkpoint
from tests.support.compiling import quickly

IDS = np.random.default_rng(0).integers(2, 97, 12).astype(np.int32)
BITS = [2, 3, 4, 8]
ODD: dict[str, Any] = {
    "hidden_size": 72,
    "moe_intermediate_size": 40,
}  # not multiples of 32: words padded, a short last group
FEWER: dict[str, Any] = {"num_experts": 4, "num_layers": 1}
UNPACKED_GATE: dict[str, Any] = {r"-:.*gate_proj": {}}
WIDE_KEYS: dict[str, Any] = {r"+:.*k_proj": {"bits": 8, "group_size": 16}}

SPECS = {
    **{f"{bits}-bit asym, one group": TinySpec(bits=bits, sym=False, group_size=-1, **FEWER) for bits in BITS},
    **{
        f"{bits}-bit v2, act-order, odd sizes": TinySpec(
            bits=bits, sym=False, group_size=16, desc_act=True, checkpoint_format="gptq_v2", **ODD, **FEWER
        )
        for bits in BITS
    },
    "4-bit sym v1": TinySpec(),
    "4-bit sym v2": TinySpec(checkpoint_format="gptq_v2", **FEWER),
    "3-bit sym": TinySpec(bits=3, **FEWER),
    "one group, act-order": TinySpec(group_size=-1, desc_act=True, **FEWER),
    "odd last group, act-order": TinySpec(sym=False, desc_act=True, **ODD, **FEWER),
    "mixed experts": TinySpec(dynamic=MIXED_DYNAMIC),
    "mixed experts, asym act-order": TinySpec(dynamic=MIXED_DYNAMIC, sym=False, desc_act=True),
    "gate plain, up packed": TinySpec(dynamic=UNPACKED_GATE, **FEWER),
    "keys in other bits, biases": TinySpec(dynamic=WIDE_KEYS, attention_bias=True, **FEWER),
    "gate and up in other bits": TinySpec(dynamic={r"+:.*up_proj": {"bits": 8, "group_size": 16}}, sym=False, **FEWER),
    "one expert's bits": TinySpec(dynamic={r".*experts\.1\.": {"bits": 2}}, **FEWER),
    "quantised head": TinySpec(lm_head="quantized", vocab_size=104, **FEWER),
    "quantised head, odd": TinySpec(lm_head="quantized", sym=False, desc_act=True, **ODD, **FEWER),
    "tied": TinySpec(lm_head="tied", **FEWER),
    "mixtral, old names": TinySpec(family="mixtral", old_mixtral_names=True, transformers=4),
    "mixtral": TinySpec(family="mixtral", sliding_window=4),
    "transformers 4": TinySpec(transformers=4, norm_topk_prob=None),
    "shards": TinySpec(shards=3, **FEWER),
    "settings in config.json": TinySpec(quantization_in=("config.json",), **FEWER),
    "settings in quantize_config.json": TinySpec(quantization_in=("quantize_config.json",), **FEWER),
    "dense layer between": TinySpec(mlp_only_layers=(1,), num_layers=3, dtype="float32"),
    "dense qwen3, biases": TinySpec(family="qwen3", attention_bias=True, sliding_window=4, transformers=4),
    "float16 base": TinySpec(family="qwen3", dtype="float16", lm_head="tied", sym=False),
    "nothing quantised": TinySpec(dynamic={"-:.*": {}}, quantization_in=(), attention_bias=True),
}

# Which show whether numpy and jax are still used rightly; that each is read rightly is shown once.
EVERYWHERE = ("3-bit sym", "4-bit v2, act-order, odd sizes", "mixed experts, asym act-order", "quantised head, odd")
EVERYWHERE += ("mixtral, old names", "dense layer between", "float16 base", "nothing quantised")

forward = jax.jit(fj.forward, static_argnames="cfg")


@pytest.fixture(autouse=True, scope="module")
def compile_quickly() -> Iterator[None]:
    with quickly():
        yield


def assert_same_logits(folder: Path, judge: reader.Checkpoint | None = None) -> fj.Model:
    """Load `folder` without a warning and compare its logits with the reader's."""
    model = fj.load(folder, dtype="float32", quiet=True)
    expected = reader.forward(judge or reader.read_checkpoint(folder), IDS).logits
    logits = forward(model.params, IDS[None], cfg=model.cfg)
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-4)
    return model


@pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, id=name, marks=() if name in EVERYWHERE else pytest.mark.once) for name, spec in SPECS.items()],
)
def test_logits_equal_the_independent_reading(spec: TinySpec, tmp_path: Path) -> None:
    model = assert_same_logits(write_checkpoint(tmp_path, spec))
    if spec.quantization_in:
        assert model.report.version == (spec.checkpoint_format or "gptq")
    else:
        assert model.report.version is None


def test_the_packed_weights_stay_packed(tmp_path: Path) -> None:
    model = assert_same_logits(write_checkpoint(tmp_path, TinySpec(dynamic=MIXED_DYNAMIC)))
    mixed, uniform = (fj.layer(model.params, i)["moe"]["experts"]["gate_up"] for i in (0, 1))
    assert isinstance(mixed, MixedStack) and mixed.experts == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert isinstance(uniform, PackedLinear) and uniform.lead == (8,)
    assert fj.layer(model.params, 0)["attn"]["qkv"].bits == 8


def test_gate_and_up_packed_differently_stay_apart(tmp_path: Path) -> None:
    model = assert_same_logits(write_checkpoint(tmp_path, TinySpec(dynamic=UNPACKED_GATE, **FEWER)))
    experts = fj.layer(model.params, 0)["moe"]["experts"]
    assert sorted(experts) == ["down", "gate", "up"]
    assert isinstance(experts["up"], PackedLinear) and isinstance(experts["gate"], jax.Array)


def test_queries_keys_and_values_are_one_leaf_where_they_are_packed_alike(tmp_path: Path) -> None:
    spec = TinySpec(attention_bias=True, **FEWER)
    joined = fj.layer(assert_same_logits(write_checkpoint(tmp_path / "alike", spec)).params, 0)["attn"]
    assert {"qkv", "qkv_bias", "o", "o_bias"} < joined.keys() and not {"q", "k", "v", "q_bias"} & joined.keys()
    spec = dataclasses.replace(spec, dynamic=WIDE_KEYS)
    apart = fj.layer(assert_same_logits(write_checkpoint(tmp_path / "apart", spec)).params, 0)["attn"]
    assert [apart[name].bits for name in "qkv"] == [4, 8, 4] and {"q_bias", "k_bias", "v_bias"} < apart.keys()
    assert joined["qkv"].shape[1] == sum(apart[name].shape[1] for name in "qkv")
    assert joined["qkv_bias"].shape == joined["qkv"].shape[1:]


def test_inputs_in_orders_of_their_own_keep_queries_keys_and_values_apart(tmp_path: Path) -> None:
    spec = TinySpec(desc_act=True, **FEWER)

    def another_order(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("k_proj.g_idx")]:
            tensors[name] = tensors[name][::-1].copy()

    one = fj.layer(assert_same_logits(write_checkpoint(tmp_path / "one", spec)).params, 0)["attn"]
    assert "qkv" in one and one["qkv"].perm is not None
    several = fj.layer(
        assert_same_logits(write_checkpoint(tmp_path / "several", spec, edits=[another_order])).params, 0
    )
    assert {"q", "k", "v"} < several["attn"].keys()


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_symmetric_zero_points_tell_an_absent_format(version: str, tmp_path: Path) -> None:
    number = {"gptq": 1, "gptq_v2": 2}[version]
    folder = write_checkpoint(
        tmp_path,
        TinySpec(checkpoint_format=None, zeros_version=number, **FEWER),  # type: ignore[arg-type]
    )
    judge = reader.read_checkpoint(folder)
    judge.quantization["checkpoint_format"] = version
    assert assert_same_logits(folder, judge).report.version == version


@pytest.mark.parametrize("desc_act", [False, True])
def test_an_absent_g_idx_means_inputs_in_order(desc_act: bool, tmp_path: Path) -> None:
    spec = TinySpec(sym=False, **ODD, **FEWER)
    judge = reader.read_checkpoint(write_checkpoint(tmp_path / "whole", spec))

    def without_g_idx(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".g_idx")]:
            del tensors[name]

    folder = write_checkpoint(tmp_path / "without", spec, edits=[without_g_idx])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = desc_act
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").unlink()
    assert_same_logits(folder, judge)


def wide_g_idx(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith(".g_idx"):
            tensors[name] = tensors[name].astype(np.int64)


def wide_scales(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith(".scales"):
            tensors[name] = tensors[name].astype(np.float32)


@pytest.mark.parametrize("edit", [wide_g_idx, wide_scales], ids=["int64 g_idx", "float32 scales"])
def test_other_number_types_read_the_same(edit: Edit, tmp_path: Path) -> None:
    spec = TinySpec(sym=False, desc_act=True, **FEWER)
    judge = reader.read_checkpoint(write_checkpoint(tmp_path / "plain", spec))
    assert_same_logits(write_checkpoint(tmp_path / "edited", spec, edits=[edit]), judge)


def test_biases_that_are_zero_everywhere_are_no_biases(tmp_path: Path) -> None:
    def biases(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".qweight")]:
            tensors[name.replace(".qweight", ".bias")] = np.zeros(tensors[name].shape[1], np.float16)

    assert_same_logits(write_checkpoint(tmp_path, TinySpec(**FEWER), edits=[biases]))


def test_a_head_beside_tied_embeddings_is_ignored(tmp_path: Path) -> None:
    spec = TinySpec(lm_head="tied", **FEWER)
    judge = reader.read_checkpoint(write_checkpoint(tmp_path / "tied", spec))
    head = damage.add("lm_head.weight", np.zeros((97, 64), np.float32))
    assert_same_logits(write_checkpoint(tmp_path / "both", spec, edits=[head]), judge)
