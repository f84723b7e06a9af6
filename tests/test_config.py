"""ModelConfig and its checks: what is read from Hugging Face files, and the sentence for everything refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ferrum_jax.config import ModelConfig, RopeConfig
from ferrum_jax.errors import ConfigError

DEMO = Path(__file__).parent.parent / "ferrum_jax" / "models" / "tales-13m-gptq-int4"

QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def read(base, **changes):
    return ModelConfig.from_hf({**base, **changes})


def folder_configs(folder):
    names = ("config.json", "quantize_config.json", "generation_config.json")
    return [json.loads((folder / name).read_text(encoding="utf-8")) for name in names]


def test_every_reference_checkpoint_is_read(shared):
    folders = sorted(path.parent for path in shared.glob("checkpoints/*/config.json"))
    assert len(folders) >= 6
    for folder in folders:
        config, quantize, generation = folder_configs(folder)
        cfg = ModelConfig.from_hf(config, quantize, generation)
        assert (cfg.num_layers, cfg.vocab_size) == (config["num_hidden_layers"], 2048)
        assert cfg.quant is not None
        assert (cfg.quant.bits, cfg.quant.group_size) == (quantize["bits"], quantize["group_size"])
        assert (cfg.quant.sym, cfg.quant.desc_act) == (quantize["sym"], quantize["desc_act"])
        assert cfg.qk_norm == (cfg.model_type != "mixtral")
        assert cfg == ModelConfig.from_hf(config, None, generation) == ModelConfig.from_hf(config, quantize, None)


def test_the_demo_model_is_read():
    cfg = ModelConfig.from_hf(*folder_configs(DEMO))
    assert (cfg.num_layers, cfg.num_experts, cfg.top_k, cfg.moe_intermediate_size) == (6, 16, 4, 128)
    assert (cfg.head_dim, cfg.num_kv_heads, cfg.tie_word_embeddings) == (64, 4, True)
    assert (cfg.eos_token_ids, cfg.bos_token_id, cfg.pad_token_id) == ((0,), 0, 0)
    assert cfg.moe_layers == (True,) * 6
    assert cfg.rope == RopeConfig(theta=10_000.0)


def test_both_spellings_give_the_same_config():
    four = {
        **QWEN3_MOE,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "torch_dtype": "float16",
        "sliding_window": None,
        "use_sliding_window": False,
        "head_dim": 32,
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
    }
    five = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"} | {
        "num_local_experts": 8,
        "rope_parameters": {
            "rope_theta": 1_000_000.0,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "dtype": "float16",
        "head_dim": 32,
    }
    assert ModelConfig.from_hf(four) == ModelConfig.from_hf(five)
    assert ModelConfig.from_hf(five).dtype == "float16"
    assert hash(ModelConfig.from_hf(four)) == hash(ModelConfig.from_hf(five))


def test_what_each_family_settles():
    moe, dense, mixtral = read(QWEN3_MOE), read(QWEN3), read(MIXTRAL)
    assert (moe.norm_topk_prob, read(QWEN3_MOE, norm_topk_prob=True).norm_topk_prob) == (False, True)
    assert (mixtral.norm_topk_prob, read(MIXTRAL, norm_topk_prob=False).norm_topk_prob) == (True, True)
    assert (moe.qk_norm, dense.qk_norm, mixtral.qk_norm) == (True, True, False)
    assert (moe.moe_intermediate_size, mixtral.moe_intermediate_size) == (32, 96)
    assert (moe.rope.theta, mixtral.rope.theta) == (10_000.0, 1_000_000.0)
    assert (moe.rms_norm_eps, mixtral.rms_norm_eps) == (1e-6, 1e-5)
    assert (dense.num_experts, dense.moe_layers) == (0, (False,) * 3)
    assert mixtral.num_kv_heads == mixtral.num_heads == 4


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        (QWEN3, {}, 128),
        (QWEN3, {"head_dim": None}, 128),
        (QWEN3_MOE, {}, 16),
        (MIXTRAL, {"head_dim": None}, 16),
        (MIXTRAL, {"head_dim": 40, "hidden_size": 66}, 40),
    ],
)
def test_head_dim_when_absent_is_that_of_transformers(base, changes, expected):
    assert read(base, **changes).head_dim == expected


def test_dense_layers_among_moe_layers():
    assert read(QWEN3_MOE, decoder_sparse_step=2).moe_layers == (False, True, False, True)
    assert read(QWEN3_MOE, mlp_only_layers=[0, 3]).moe_layers == (False, True, True, False)
    assert read(QWEN3_MOE, num_experts=0).moe_layers == (False,) * 4


def test_sliding_windows_per_layer():
    window = {"use_sliding_window": True, "sliding_window": 100}
    assert read(QWEN3, sliding_window=100).sliding_windows == (None,) * 3
    assert read(QWEN3, **window).sliding_windows == (None,) * 3  # max_window_layers is 28
    assert read(QWEN3, **window, max_window_layers=1).sliding_windows == (None, 100, 100)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert read(QWEN3, **window, layer_types=kinds).sliding_windows == (100, None, 100)
    assert read(QWEN3_MOE, **window, max_window_layers=1).sliding_windows == (100,) * 4
    assert read(MIXTRAL, sliding_window=100).sliding_windows == (100, 100)


def test_generation_config_comes_before_config_for_special_ids():
    config = {**QWEN3, "eos_token_id": 3, "bos_token_id": 1}
    assert ModelConfig.from_hf(config).eos_token_ids == (3,)
    cfg = ModelConfig.from_hf(config, None, {"eos_token_id": [5, 3], "pad_token_id": 9, "do_sample": True})
    assert (cfg.eos_token_ids, cfg.bos_token_id, cfg.pad_token_id) == ((5, 3), 1, 9)


def test_a_padding_id_outside_the_vocabulary_is_dropped_aloud():
    with pytest.warns(UserWarning, match=r"pad_token_id is -1, outside the vocabulary of 512; it is not used"):
        assert read(QWEN3, pad_token_id=-1).pad_token_id is None


def test_rope_types():
    def rope(**values):
        return read(QWEN3, rope_parameters=values).rope

    assert rope(rope_type="linear", factor=2.0) == RopeConfig(rope_type="linear", factor=2.0)
    assert rope(rope_type="dynamic", factor=2.0).original_max_position == 256
    implicit = rope(rope_type="yarn", original_max_position_embeddings=64, factor=None, truncate=False)
    assert (implicit.factor, implicit.truncate) == (4.0, False)
    llama = rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    assert (llama.original_max_position, llama.high_freq_factor) == (256, 4.0)
    assert read(QWEN3, rope_scaling=None, rope_theta=5e5).rope == RopeConfig(theta=5e5)


def test_unknown_rope_keys_are_named():
    with pytest.warns(
        UserWarning, match=r"rope_parameters holds unknown keys, which are not used: fast, mrope_section"
    ):
        read(QWEN3, rope_parameters={"rope_type": "default", "mrope_section": [1], "fast": 1})


def test_unknown_keys_of_config_json_are_fine():
    assert read(QWEN3, use_cache=True, my_own_key={"a": 1}) == read(QWEN3)


REFUSED = [
    (QWEN3, {"model_type": "llama"}, r"model_type is 'llama'; one of qwen3_moe, qwen3, mixtral is accepted"),
    (QWEN3, {"model_type": None}, r"model_type is None; one of qwen3_moe"),
    (QWEN3, {"hidden_size": "64"}, r"hidden_size is '64'; an integer from 1 to 262144 is accepted; correct it"),
    (QWEN3, {"hidden_size": 64.0}, r"hidden_size is 64\.0; an integer"),
    (QWEN3, {"hidden_size": True}, r"hidden_size is True; an integer"),
    (QWEN3, {"hidden_size": -64}, r"hidden_size is -64; an integer from 1"),
    (QWEN3, {"hidden_size": None}, r"hidden_size is missing from config\.json; a value is needed; add it"),
    (QWEN3, {"vocab_size": 10**9}, r"vocab_size is 1000000000; an integer from 1 to 4194304"),
    (QWEN3, {"num_hidden_layers": 10**9}, r"num_layers \(num_hidden_layers in config\.json\) is 1000000000; .* to 512"),
    (QWEN3, {"num_attention_heads": 0}, r"num_heads \(num_attention_heads in config\.json\) is 0; an integer from 1"),
    (QWEN3, {"num_key_value_heads": 3}, r"is 4 and num_kv_heads .* is 3; the first must be a multiple of the second"),
    (QWEN3, {"head_dim": 15}, r"head_dim is 15; an even number is accepted"),
    (QWEN3, {"head_dim": "x" * 10_000}, r"head_dim is 'x{20,40}\.\.\.x{20,40}'; an integer"),
    (QWEN3, {"intermediate_size": 0}, r"intermediate_size is 0; an integer from 1"),
    (QWEN3, {"max_position_embeddings": 2**40}, r"max_position \(max_position_embeddings in config\.json\) is 109951"),
    (QWEN3, {"rms_norm_eps": float("nan")}, r"rms_norm_eps is nan; a finite number above 0\.0 is accepted"),
    (QWEN3, {"rms_norm_eps": "1e-6"}, r"rms_norm_eps is '1e-6'; a finite number"),
    (QWEN3, {"rms_norm_eps": 0}, r"rms_norm_eps is 0; a finite number above 0\.0"),
    (QWEN3, {"hidden_act": "gelu"}, r"hidden_act is 'gelu'; one of silu is accepted"),
    (QWEN3, {"tie_word_embeddings": 1}, r"tie_word_embeddings is 1; true or false is accepted"),
    (QWEN3, {"attention_bias": "false"}, r"attention_bias is 'false'; true or false is accepted; correct it without q"),
    (QWEN3, {"dtype": "int8"}, r"dtype is 'int8'; one of bfloat16, float16, float32 is accepted"),
    (
        QWEN3,
        {"dtype": "float16", "torch_dtype": "bfloat16"},
        r"dtype is 'float16' and torch_dtype is 'bfloat16'; these are spellings of one value and must agree",
    ),
    (QWEN3, {"eos_token_id": 512}, r"eos_token_ids is 512; an integer from 0 to 511 is accepted"),
    (QWEN3, {"eos_token_id": [3, "4"]}, r"eos_token_ids is '4'; an integer"),
    (QWEN3, {"bos_token_id": True}, r"bos_token_id is True; an integer"),
    (QWEN3, {"pad_token_id": "0"}, r"pad_token_id is '0'; an integer"),
    (QWEN3, {"use_sliding_window": True}, r"sliding_window is missing from config\.json"),
    (QWEN3, {"use_sliding_window": 1}, r"use_sliding_window is 1; true or false"),
    (
        QWEN3,
        {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0},
        r"an entry of sliding_windows is 0; an integer from 1",
    ),
    (QWEN3, {"max_window_layers": -1}, r"max_window_layers is -1; an integer from 0"),
    (QWEN3, {"layer_types": ["full_attention"]}, r"layer_types is \['full_attention'\]; .* each of the 3 layers"),
    (QWEN3, {"layer_types": ["full_attention"] * 2 + ["ssm"]}, r"an entry of layer_types is 'ssm'; one of full_att"),
    (QWEN3, {"layer_types": ["sliding_attention"] * 3}, r"layer_types holds sliding_attention but there is no window"),
    (QWEN3, {"rope_theta": float("inf")}, r"theta \(rope_theta in config\.json\) is inf; a finite number above 1\.0"),
    (QWEN3, {"rope_theta": 10**400}, r"theta \(rope_theta in config\.json\) is 1000.*; a finite number"),
    (QWEN3, {"rope_parameters": [1]}, r"rope_parameters holds \[1\]; a JSON object or TOML table is accepted"),
    (QWEN3, {"rope_parameters": {"rope_type": "longrope"}}, r"rope_type is 'longrope'; one of default, linear, dynam"),
    (QWEN3, {"rope_parameters": {"rope_type": "linear"}}, r"rope type linear has no factor; a number of 1\.0 or more"),
    (QWEN3, {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, r"factor is 0\.5; a finite number of 1\.0 or"),
    (
        QWEN3,
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
        r"original_max_position \(original_max_position_embeddings in config\.json\) is 0; an integer from 1",
    ),
    (
        QWEN3,
        {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 512}},
        r"original_max_position .* is 512; an integer from 1 to 256",
    ),
    (
        QWEN3,
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}},
        r"beta_fast is 1 and beta_slow is 2; yarn needs beta_fast >= beta_slow; swap them",
    ),
    (QWEN3, {"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": 1}}, r"truncate is 1; true or false"),
    (
        QWEN3,
        {"rope_parameters": {"rope_type": "yarn", "factor": 2, "attention_factor": -1.0}},
        r"attention_factor is -1\.0; a finite number of 0\.0 or more",
    ),
    (
        QWEN3,
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        r"low_freq_factor is 4\.0 and high_freq_factor is 1\.0; rope type llama3 needs both",
    ),
    (QWEN3, {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, r"rope_theta is 1000000\.0 and rope_theta is"),
    (QWEN3, {"rope_parameters": {"rope_type": "yarn", "type": "linear"}}, r"rope_type is 'yarn' and type is 'linear'"),
    (QWEN3, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; only 1\.0 is accepted"),
    (
        QWEN3,
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        r"rope_parameters differ per layer kind \(full_attention\); one set for all layers",
    ),
    (QWEN3_MOE, {"num_experts": 10**9}, r"num_experts \(num_local_experts in config\.json\) is 1000000000; .* to 4096"),
    (QWEN3_MOE, {"num_experts": None}, r"num_experts is missing for model_type qwen3_moe; num_experts or num_local_"),
    (QWEN3_MOE, {"num_local_experts": 16}, r"num_experts is 8 and num_local_experts is 16; .* must agree"),
    (
        QWEN3_MOE,
        {"num_experts_per_tok": 9},
        r"top_k \(num_experts_per_tok in config\.json\) is 9 with 8 experts; .* 8 is",
    ),
    (QWEN3_MOE, {"num_experts_per_tok": 0}, r"top_k .* is 0 with 8 experts; an integer from 1 to 8"),
    (QWEN3_MOE, {"moe_intermediate_size": 0}, r"moe_intermediate_size is 0 with 8 experts; the hidden size of one"),
    (QWEN3_MOE, {"norm_topk_prob": "yes"}, r"norm_topk_prob is 'yes'; true or false"),
    (QWEN3_MOE, {"decoder_sparse_step": 0}, r"decoder_sparse_step is 0; an integer from 1"),
    (QWEN3_MOE, {"mlp_only_layers": [4]}, r"mlp_only_layers is \[4\]; a list of layer numbers from 0 to 3"),
    (QWEN3_MOE, {"mlp_only_layers": 2}, r"mlp_only_layers is 2; a list of layer numbers"),
    (MIXTRAL, {"hidden_size": 66}, r"head_dim is missing and hidden_size 66 is not a multiple of the 4 heads; .* add"),
]


@pytest.mark.parametrize(("base", "changes", "text"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_refused_with_a_sentence(base, changes, text):
    with pytest.raises(ConfigError, match=text):
        read(base, **changes)


def test_config_json_must_be_an_object():
    with pytest.raises(ConfigError, match=r"config\.json holds \[1, 2\]; a JSON object or TOML table is accepted"):
        ModelConfig.from_hf([1, 2])  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ConfigError, match=r"generation_config\.json holds 'x'; a JSON object or TOML table is accepted"
    ):
        ModelConfig.from_hf(QWEN3, None, "x")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"moe_layers": (True,)}, r"moe_layers is \(True,\); one entry for each of the 3 layers is accepted"),
        ({"moe_layers": (0, 0, 0)}, r"an entry of moe_layers is 0; true or false"),
        ({"moe_layers": (True, False, True)}, r"moe_layers marks 2 MoE layers but num_experts is 0; .* come together"),
        ({"sliding_windows": [None] * 3}, r"sliding_windows is \[None, None, None\]; one entry for each"),
        ({"eos_token_ids": 5}, r"eos_token_ids is 5; a list of token ids is accepted; wrap a single id"),
        ({"rope": {"theta": 1e4}}, r"rope is \{'theta': 10000\.0\}; a RopeConfig is accepted; build it first"),
        ({"quant": {"bits": 4}}, r"quant is \{'bits': 4\}; a QuantConfig or None is accepted"),
        ({"lm_head_bits": 3}, r"lm_head_bits is 3; 4 or 8 is accepted, and None, which keeps the output projection as"),
        ({"implementation": ["xla"]}, r"implementation is \['xla'\]; a name or None is accepted"),
    ],
)
def test_a_config_built_by_hand_is_checked_too(changes, text):
    with pytest.raises(ConfigError, match=text):
        dataclasses.replace(read(QWEN3), **changes)


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read(QWEN3).num_layers = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_reading_a_config_needs_no_jax():
    code = "import sys, ferrum_jax.config, ferrum_jax.config_file, ferrum_jax.hf_config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
