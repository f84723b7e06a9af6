"""The tiny checkpoints say what they were asked to say, read back by the independent reader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.support import damage
from tests.support import numpy_reader as reader
from tests.support.checkpoint_writer import (
    MIXED_DYNAMIC,
    TinySpec,
    make_tensors,
    pack_fields,
    pack_zeros,
    random_packed,
    write_checkpoint,
)

IDS = np.random.default_rng(0).integers(2, 97, 12)
BITS = [2, 3, 4, 8]
Q_PROJ = "model.layers.0.self_attn.q_proj"

SPECS = {
    "qwen3_moe": TinySpec(),
    "2-bit asym": TinySpec(bits=2, sym=False),
    "3-bit, one group": TinySpec(bits=3, sym=False, group_size=-1),
    "8-bit v2 act-order": TinySpec(bits=8, sym=False, group_size=16, checkpoint_format="gptq_v2", desc_act=True),
    "mixed": TinySpec(dynamic=MIXED_DYNAMIC),
    "odd sizes": TinySpec(hidden_size=72, moe_intermediate_size=40, sym=False, desc_act=True),
    "odd sizes, 3-bit head": TinySpec(hidden_size=72, moe_intermediate_size=40, bits=3, lm_head="quantized"),
    "a dense layer": TinySpec(mlp_only_layers=(0,), norm_topk_prob=None, dtype="float32"),
    "qwen3, tied": TinySpec(family="qwen3", lm_head="tied", sliding_window=4, attention_bias=True),
    "mixtral": TinySpec(family="mixtral", vocab_size=128),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 31, 32, 33, 40, 97])
def test_unpacking_undoes_packing(bits: int, count: int) -> None:
    fields = np.random.default_rng(count).integers(0, 2**bits, (3, count))
    words = pack_fields(fields, bits)
    assert words.dtype == np.int32 and words.shape == (3, -(-count * bits // 32))
    np.testing.assert_array_equal(reader.unpack_fields(words, bits, count), fields)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", BITS)
def test_zero_points_survive_both_versions(bits: int, version: int) -> None:
    zeros = np.random.default_rng(bits).integers(0, 2**bits, (4, 40))
    zeros[:, ::3], zeros[:, 1::3] = 2**bits - 1, 0
    np.testing.assert_array_equal(reader.zero_points(pack_zeros(zeros, bits, version), bits, 40, version), zeros)


def test_words_written_out_by_hand() -> None:
    assert pack_fields(np.array([[1, 2, 3, 4, 5, 6, 7, 8]]), 4)[0, 0].view(np.uint32) == 0x87654321
    assert pack_zeros(np.full((1, 8), 8), 4, version=1)[0, 0] == 0x77777777
    borrowed = np.array([[0, 5, 5, 5, 5, 5, 5, 5]])  # 0 - 1 borrows, so the neighbour stores 5 - 1 - 1
    assert pack_zeros(borrowed, 4, version=1)[0, 0] == 0x4444443F
    three = pack_fields(np.array([[0] * 10 + [7] + [0] * 21]), 3)[0].view(np.uint32)
    assert three.tolist() == [0xC0000000, 0x00000001, 0]  # field 10 crosses into the second word


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_tiny_checkpoint_runs_with_logits_of_order_one(spec: TinySpec, tmp_path: Path) -> None:
    ckpt = reader.read_checkpoint(write_checkpoint(tmp_path, spec))
    logits = reader.forward(ckpt, IDS).logits
    assert logits.shape == (len(IDS), spec.vocab_size)
    assert 0.5 < logits.std() < 2
    text = "Once upon a time"
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == spec.vocab_size
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TinySpec(sym=False), TinySpec(sym=False, checkpoint_format="gptq_v2")),
        (TinySpec(sym=False), TinySpec(sym=False, checkpoint_format=None)),
        (TinySpec(), TinySpec(transformers=4)),
        (TinySpec(), TinySpec(shards=3)),
        (TinySpec(), TinySpec(quantization_in=("quantize_config.json",))),
        (TinySpec(family="mixtral"), TinySpec(family="mixtral", old_mixtral_names=True, transformers=4)),
        (TinySpec(family="qwen3", sliding_window=3), TinySpec(family="qwen3", sliding_window=3, transformers=4)),
    ],
)
def test_spellings_of_one_model_give_the_same_logits(first: TinySpec, second: TinySpec, tmp_path: Path) -> None:
    one, two = (
        reader.forward(reader.read_checkpoint(write_checkpoint(tmp_path / str(i), spec)), IDS).logits
        for i, spec in enumerate((first, second))
    )
    np.testing.assert_array_equal(one, two)


def test_a_sliding_window_hides_the_distant_past_from_later_layers(tmp_path: Path) -> None:
    ckpt = reader.read_checkpoint(
        write_checkpoint(tmp_path, TinySpec(family="mixtral", num_layers=1, sliding_window=3))
    )
    changed = np.concatenate([[IDS[0] + 1], IDS[1:]])
    difference = np.abs(reader.forward(ckpt, IDS).logits - reader.forward(ckpt, changed).logits).max(axis=-1)
    assert np.all(difference[:3] > 0) and np.all(difference[3:] == 0)


def test_act_order_permutes_each_expert_its_own_way_and_shares_where_the_input_is_shared() -> None:
    tensors = make_tensors(TinySpec(hidden_size=72, desc_act=True))
    layer = "model.layers.0"
    q, k, v = (tensors[f"{layer}.self_attn.{p}_proj.g_idx"] for p in "qkv")
    np.testing.assert_array_equal(q, k)
    np.testing.assert_array_equal(q, v)
    assert np.bincount(q).tolist() == [32, 32, 8] and not np.array_equal(q, np.sort(q))
    gates = [tensors[f"{layer}.mlp.experts.{e}.gate_proj.g_idx"] for e in range(2)]
    np.testing.assert_array_equal(gates[0], tensors[f"{layer}.mlp.experts.0.up_proj.g_idx"])
    assert not np.array_equal(gates[0], gates[1])


def test_dynamic_rules_leave_whole_experts_beside_packed_ones() -> None:
    tensors = make_tensors(TinySpec(dynamic=MIXED_DYNAMIC))
    experts = "model.layers.0.mlp.experts"
    assert tensors[f"{experts}.3.up_proj.weight"].dtype.name == "bfloat16"
    assert tensors[f"{experts}.4.up_proj.qweight"].shape == (64 * 4 // 32, 32)
    assert tensors[f"{Q_PROJ}.qweight"].shape == (64 * 8 // 32, 64)
    assert tensors[f"{Q_PROJ}.scales"].shape == (64 // 16, 64)


@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_zero_points_reach_both_ends_and_some_scales_are_subnormal(bits: int) -> None:
    packed = random_packed(np.random.default_rng(0), 72, 40, bits=bits, sym=False)
    zeros = reader.zero_points(packed["qzeros"], bits, 40, version=1)
    assert np.all(zeros.min(axis=1) == 0) and np.all(zeros.max(axis=1) == 2**bits - 1)
    scales = packed["scales"]
    assert scales.dtype == np.float16 and 0 < np.sum(scales < np.finfo(np.float16).smallest_normal) < scales.size / 4
    assert scales.min() > 0


def test_config_updates_have_the_last_word_and_none_drops_a_key(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TinySpec(config_updates={"rms_norm_eps": 0.5, "head_dim": None}))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rms_norm_eps"] == 0.5 and "head_dim" not in config


def test_zeros_version_writes_words_that_contradict_the_config() -> None:
    declared_v1 = make_tensors(TinySpec(zeros_version=2))[f"{Q_PROJ}.qzeros"]
    assert np.all(declared_v1.view(np.uint32) == 0x88888888)


def test_each_damage_changes_what_it_names(tmp_path: Path) -> None:
    whole = make_tensors(TinySpec())
    edits = [
        damage.drop("model.norm.weight"),
        damage.rename(f"{Q_PROJ}.scales", f"{Q_PROJ}.scale"),
        damage.add("extra", np.zeros(3, np.float32)),
        damage.cast(f"{Q_PROJ}.qweight", np.float32),
        damage.cut("lm_head.weight", axis=1),
        damage.set_value("model.layers.0.self_attn.k_proj.scales", (0, 1), np.nan),
        damage.set_value("model.layers.0.self_attn.k_proj.g_idx", 5, -1),
        damage.unbalance_groups("model.layers.0.self_attn.v_proj"),
        damage.shift_zeros(bits=4, modules=1),
    ]
    tensors = reader.read_checkpoint(write_checkpoint(tmp_path, edits=edits)).tensors
    assert set(whole) - set(tensors) == {"model.norm.weight", f"{Q_PROJ}.scales"}
    assert set(tensors) - set(whole) == {"extra", f"{Q_PROJ}.scale"}
    assert tensors[f"{Q_PROJ}.qweight"].dtype == np.float32
    assert tensors["lm_head.weight"].shape == (97, 63)
    assert np.isnan(tensors["model.layers.0.self_attn.k_proj.scales"][0, 1])
    assert tensors["model.layers.0.self_attn.k_proj.g_idx"][5] == -1
    assert np.bincount(tensors["model.layers.0.self_attn.v_proj.g_idx"]).tolist() == [33, 31]
    shifted = sorted(k for k in tensors if k.endswith(".qzeros") and not np.array_equal(tensors[k], whole[k]))
    assert shifted == ["model.layers.0.mlp.experts.0.down_proj.qzeros"]
