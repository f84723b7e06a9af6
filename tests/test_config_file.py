"""Model shapes as TOML: the files in configs/ and every refusal."""

import dataclasses
import json
from pathlib import Path

import pytest

from ferrum_jax.config import ModelConfig, QuantConfig
from ferrum_jax.config_file import load_toml_config
from ferrum_jax.errors import ConfigError

ROOT = Path(__file__).parent.parent
SMALL = """\
model_type = "qwen3"
vocab_size = 64
hidden_size = 32
num_layers = 2
num_heads = 4
num_kv_heads = 2
head_dim = 8
intermediate_size = 48
"""


def load(tmp_path, text):
    path = tmp_path / "shape.toml"
    path.write_text(text, encoding="utf-8")
    return load_toml_config(path)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "mixtral-8x7b", "tales-13m"])
def test_the_files_of_the_repository_are_read(name):
    cfg = load_toml_config(ROOT / "configs" / f"{name}.toml")
    assert cfg.num_experts > 0
    assert cfg.quant == QuantConfig(bits=4, group_size=128, checkpoint_format="gptq")


def test_the_demo_models_shape_equals_its_checkpoint():
    folder = ROOT / "ferrum_jax" / "models" / "tales-13m-gptq-int4"
    names = ("config.json", "quantize_config.json", "generation_config.json")
    read = ModelConfig.from_hf(*(json.loads((folder / name).read_text(encoding="utf-8")) for name in names))
    assert load_toml_config(ROOT / "configs" / "tales-13m.toml") == read


def test_the_30b_shape_equals_the_published_one(shared):
    published = json.loads((shared / "checkpoints" / "qwen3-30b-a3b-gptq-int4.shapes.json").read_text(encoding="utf-8"))
    read = ModelConfig.from_hf(published["config"], published["quantization_config"])
    cfg = load_toml_config(ROOT / "configs" / "qwen3-30b-a3b.toml")
    ids = {"eos_token_ids": (), "bos_token_id": None, "pad_token_id": None}
    assert dataclasses.replace(cfg, **ids) == read


def test_lists_and_tables_become_tuples_and_configs(tmp_path):
    cfg = load(
        tmp_path,
        SMALL
        + """
eos_token_ids = [1, 2]
sliding_windows = [16, 16]
[rope]
rope_type = "linear"
factor = 2.0
[quant]
bits = 3
[quant.dynamic]
"-:.*down_proj" = {}
".*q_proj" = { bits = 8 }
""",
    )
    assert (cfg.eos_token_ids, cfg.sliding_windows, cfg.rope.factor) == ((1, 2), (16, 16), 2.0)
    assert cfg.quant is not None
    assert cfg.quant.dynamic == (("-:.*down_proj", None), (".*q_proj", (("bits", 8),)))
    assert hash(cfg) == hash(load_toml_config(tmp_path / "shape.toml"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SMALL + "num_layer = 2", r"shape\.toml holds the unknown key num_layer; .* ModelConfig .*mean num_layers\?"),
        (SMALL + "zzz = 2", r"holds the unknown key zzz; .*; the keys are model_type, vocab_size"),
        (SMALL + "[rope]\nthetta = 2.0", r"\[rope\] of shape\.toml holds the unknown key thetta; .* mean theta\?"),
        (SMALL + "[quant]\nbit = 4", r"\[quant\] of shape\.toml holds the unknown key bit; .* mean bits\?"),
        (SMALL + 'rope = "yarn"', r"\[rope\] of shape\.toml holds 'yarn'; a JSON object or TOML table is accepted"),
        (SMALL + "quant = 4", r"\[quant\] of shape\.toml holds 4; a JSON object or TOML table is accepted"),
        (SMALL + "num_experts = -1", r"num_experts .* is -1; an integer from 0 to 4096"),
        ('model_type = "qwen3"\nvocab_size = 4', r"shape\.toml lacks hidden_size, num_layers, .*; every size without"),
        ("a = 1\nmodel_type = \n", r"shape\.toml is not TOML \(.*line 2.*\); correct the line"),
    ],
)
def test_refused_with_a_sentence(tmp_path, text, expected):
    with pytest.raises(ConfigError, match=expected):
        load(tmp_path, text)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml cannot be read \(No such file or directory\); .* configs/"):
        load_toml_config(tmp_path / "absent.toml")
