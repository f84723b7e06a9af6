"""QuantConfig: the two metadata copies, rules per module, and every refused method by name."""

import pytest

from ferrum_jax.config import ModelConfig, QuantConfig
from ferrum_jax.errors import ConfigError

MODEL = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
EXPERT = "model.layers.0.mlp.experts.3.gate_proj"
QUERY = "model.layers.0.self_attn.q_proj"


def quant(section, quantize_config=None):
    found = ModelConfig.from_hf({**MODEL, "quantization_config": section}, quantize_config).quant
    assert found is not None
    return found


def test_an_unquantised_model_has_none():
    assert ModelConfig.from_hf(MODEL).quant is None
    assert ModelConfig.from_hf({**MODEL, "quantization_config": None}).quant is None


def test_either_copy_is_enough():
    expected = QuantConfig(bits=4, group_size=128, sym=True, desc_act=False)
    assert quant(GPTQ) == quant(GPTQ, GPTQ) == ModelConfig.from_hf(MODEL, GPTQ).quant == expected


def test_what_an_old_file_leaves_out():
    old = ModelConfig.from_hf(MODEL, {"bits": 3, "group_size": -1, "damp_percent": 0.01, "model_file_base_name": "m"})
    assert old.quant == QuantConfig(bits=3, group_size=-1, sym=True, desc_act=False, checkpoint_format=None)


def test_the_format_may_be_in_either_key_and_either_copy():
    assert quant({**GPTQ, "format": "gptq_v2"}).checkpoint_format == "gptq_v2"
    assert quant({**GPTQ, "checkpoint_format": "gptq_v2"}, GPTQ).checkpoint_format == "gptq_v2"


def test_copies_that_differ_on_the_zero_points_are_refused():
    text = (
        r"quantize_config\.json says checkpoint_format gptq and config\.json's quantization_config says gptq_v2; zero"
    )
    with pytest.raises(ConfigError, match=text):
        quant({**GPTQ, "format": "gptq_v2"}, {**GPTQ, "format": "gptq"})


def test_copies_that_differ_otherwise_are_a_warning_and_the_quantisers_file_counts():
    text = r"quantize_config\.json says group_size 64 and config\.json's quantization_config says 128; .* is used"
    with pytest.warns(UserWarning, match=text):
        assert quant(GPTQ, {**GPTQ, "group_size": 64}).group_size == 64


def test_unknown_keys_are_named():
    with pytest.warns(UserWarning, match=r"config\.json's quantization_config holds unknown keys, .*: packing, turbo;"):
        quant({**GPTQ, "turbo": 1, "packing": "x", "meta": {"anything": 1}})
    with pytest.warns(UserWarning, match=r"the dynamic rule 'a' of config\.json's .* holds unknown keys, .*: turbo"):
        quant({**GPTQ, "dynamic": {"a": {"turbo": 1}}})


def test_the_first_matching_override_applies():
    config = quant(
        {**GPTQ, "dynamic": {r"+:.*self_attn.*": {"bits": 8, "group_size": 64}, r".*q_proj": {"bits": 2, "mse": 2.4}}}
    )
    assert config.for_module(QUERY) == QuantConfig(bits=8, group_size=64)
    assert config.for_module(EXPERT) == QuantConfig()
    assert config.for_module("layers.0.q_proj") == QuantConfig(bits=2)


def test_an_exclusion_wins_wherever_it_stands():
    config = quant({**GPTQ, "dynamic": {r".*experts.*": {"bits": 8}, r"-:.*experts\.[0-3]\..*": {}}})
    assert config.for_module(EXPERT) is None
    assert config.for_module("model.layers.0.mlp.experts.4.gate_proj") == QuantConfig(bits=8)


def test_a_pattern_is_anchored_at_the_start_only():
    config = quant({**GPTQ, "dynamic": {r"-:model\.layers\.0": {}, r"-:self_attn": {}}})
    assert config.for_module("model.layers.0.mlp.down_proj") is None
    assert config.for_module("model.layers.1.self_attn.q_proj") == QuantConfig()


def test_the_output_projection_is_quantised_only_when_declared():
    assert quant(GPTQ).for_module("lm_head") is None
    config = quant({**GPTQ, "lm_head": True, "dynamic": {"lm_head": {"bits": 8, "group_size": 32, "mse": 2.4}}})
    assert config.for_module("lm_head") == QuantConfig(bits=8, group_size=32, lm_head=True)


METHODS = ["awq", "compressed-tensors", "bitsandbytes", "exl2", "exl3", "gguf", "fp8", "hqq", "aqlm", "mxfp4", "quark"]


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_refused_by_name(method):
    text = rf"config\.json's quantization_config says quant_method '{method}'; only gptq is accepted; .*GPTQModel"
    with pytest.raises(ConfigError, match=text):
        quant({"quant_method": method, "bits": 4})


@pytest.mark.parametrize(
    ("section", "method"),
    [
        ({"zero_point": True, "w_bit": 4}, "awq"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"config_groups": {}}, "compressed-tensors"),
        ({"weight_block_size": [128, 128]}, "fp8"),
    ],
)
def test_methods_that_do_not_name_themselves_are_recognised(section, method):
    with pytest.raises(ConfigError, match=rf"says quant_method '{method}'; only gptq"):
        quant(section)


def test_a_compression_config_is_refused():
    text = r"config\.json's compression_config says quant_method 'compressed-tensors'; only gptq"
    with pytest.raises(ConfigError, match=text):
        ModelConfig.from_hf({**MODEL, "compression_config": {"format": "pack-quantized"}})


REFUSED = [
    ({"checkpoint_format": "marlin"}, r"says checkpoint_format 'marlin'; gptq or gptq_v2 is accepted; save it again"),
    ({"format": "bitblas"}, r"says checkpoint_format 'bitblas'"),
    ({"format": "gptq_p"}, r"says checkpoint_format 'gptq_p'"),
    ({"is_marlin_format": True}, r"says checkpoint_format 'marlin'"),
    ({"format": "gptq", "checkpoint_format": "gptq_v2"}, r"is 'gptq_v2' and format is 'gptq'; .* must agree"),
    ({"method": "awq"}, r"quant_method is 'gptq' and method is 'awq'; .* must agree"),
    ({"quant_method": 4}, r"says quant_method 4; only gptq is accepted"),
    ({"quant_method": ["gptq"]}, r"says quant_method \['gptq'\]; only gptq is accepted"),
    ({"pack_dtype": "int16"}, r"says pack_dtype 'int16'; int32 is accepted"),
    (
        {"rotation": "hadamard"},
        r"says rotation 'hadamard', which needs a Hadamard transform at run time; .* without rot",
    ),
    ({"adapter": {"name": "lora"}}, r"says adapter \{'name': 'lora'\}, which needs a LoRA adapter"),
    ({"bits": 5}, r"bits is 5; one of 2, 3, 4, 8 is accepted"),
    ({"bits": "4"}, r"bits is '4'; one of 2, 3, 4, 8"),
    ({"bits": True}, r"bits is True; one of 2"),
    ({"bits": None}, r"bits is missing from config\.json's quantization_config; a value is needed"),
    ({"group_size": None}, r"group_size is missing from config\.json's quantization_config"),
    ({"group_size": 0}, r"group_size is 0; -1 \(one group over all input rows\) or an integer from 1"),
    ({"group_size": -2}, r"group_size is -2; -1 \(one group"),
    ({"group_size": "128"}, r"group_size is '128'; -1"),
    ({"group_size": 2**40}, r"group_size is 1099511627776; -1"),
    ({"sym": "true"}, r"sym is 'true'; true or false"),
    ({"desc_act": 0}, r"desc_act is 0; true or false"),
    ({"lm_head": "no"}, r"lm_head is 'no'; true or false"),
    ({"dynamic": [1]}, r"dynamic of config\.json's quantization_config holds \[1\]; a JSON object or"),
    ({"dynamic": {"a": 8}}, r"the dynamic rule 'a' of config\.json's quantization_config holds 8; a JSON object or"),
    ({"dynamic": {"+:(": {"bits": 8}}}, r"the dynamic pattern '\+:\(' is not a regular expression \(.*\); Python's"),
    ({"dynamic": {"a": {"bits": 7}}}, r"In the dynamic rule 'a': bits is 7; one of 2, 3, 4, 8"),
    ({"dynamic": {"a": {"format": "marlin"}}}, r"the dynamic rule 'a' of .* says checkpoint_format 'marlin'"),
    ({"dynamic": {"a": {"adapter": {"rank": 8}}}}, r"the dynamic rule 'a' of .* says adapter"),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED, ids=[str(row[0])[:40] for row in REFUSED])
def test_refused_with_a_sentence(changes, text):
    with pytest.raises(ConfigError, match=text):
        quant({**GPTQ, **changes})


@pytest.mark.parametrize("section", [[], "gptq", 4])
def test_the_section_must_be_an_object(section):
    with pytest.raises(
        ConfigError, match=r"config\.json's quantization_config holds .*; a JSON object or TOML table is accepted"
    ):
        quant(section)


def test_unknown_override_keys_of_a_hand_built_config_are_refused():
    with pytest.raises(ConfigError, match=r"In the dynamic rule 'a': turbo is not a setting of a module; bits, group_"):
        QuantConfig(dynamic=(("a", (("turbo", 1),)),))
