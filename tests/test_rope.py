"""Rotary embeddings against values recorded from transformers, and their own laws."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.config import RopeConfig
from ferrum_jax.errors import ShapeError
from ferrum_jax.hf_config import model_config_from_hf
from ferrum_jax.rope import apply_rope, rope_frequencies

GOLDEN = np.load(Path(__file__).parent / "golden" / "rope.npz")
CASES = {case["name"]: case for case in json.loads(str(GOLDEN["about"]))["cases"]}
EPS = float(np.finfo(np.float32).eps)


def rope_of(case):
    """Through config.json, so that the goldens also hold the reader to transformers' spelling."""
    outside = ("name", "head_dim", "max_position", "seq_len")
    cfg = model_config_from_hf(
        {
            "model_type": "qwen3",
            "vocab_size": 8,
            "hidden_size": 256,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "head_dim": case["head_dim"],
            "max_position_embeddings": case["max_position"],
            "rope_parameters": {key: value for key, value in case.items() if key not in outside},
        }
    )
    return cfg.rope, cfg.head_dim, cfg.max_position


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_scale_are_those_of_transformers(name):
    case = CASES[name]
    inv_freq, scale = rope_frequencies(*rope_of(case), seq_len=case.get("seq_len"))
    assert inv_freq.dtype == jnp.float32
    np.testing.assert_allclose(inv_freq, GOLDEN[f"{name}/inv_freq"], rtol=1e-6)
    assert scale == pytest.approx(float(GOLDEN[f"{name}/scale"]), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_rotation_is_that_of_transformers_up_to_position_40000(name):
    case = CASES[name]
    inv_freq, scale = rope_frequencies(*rope_of(case), seq_len=case.get("seq_len"))
    positions = GOLDEN[f"{name}/positions"]
    half = case["head_dim"] // 2
    # Rotating (1, 0) reads cos and sin back.
    unit = jnp.concatenate([jnp.ones((len(positions), 1, half)), jnp.zeros((len(positions), 1, half))], axis=-1)
    cos, sin = np.split(np.asarray(apply_rope(unit, jnp.asarray(positions), inv_freq, scale))[:, 0], 2, axis=-1)
    # Both sides round a frequency to float32, so angles differ by a few of their own last bits: 4 eps of the angle
    # (0.02 rad at position 40,000 for the fastest pair, nothing for slow ones) bounds cos and sin, whose slope is 1.
    angle = positions[:, None].astype(np.float64) * GOLDEN[f"{name}/inv_freq"]
    bound = scale * EPS * (4 * angle + 4)
    assert np.all(np.abs(cos - GOLDEN[f"{name}/cos"]) <= bound)
    assert np.all(np.abs(sin - GOLDEN[f"{name}/sin"]) <= bound)


def test_a_row_of_a_dynamic_batch_equals_the_row_alone():
    rope = RopeConfig(rope_type="dynamic", factor=4.0, original_max_position=128)
    lengths = jnp.asarray([1, 128, 129, 4000], jnp.int32)
    frequencies = jax.jit(lambda n: rope_frequencies(rope, 64, 128, n)[0])
    together = frequencies(lengths)
    assert together.shape == (4, 32)
    for row, length in enumerate([1, 128, 129, 4000]):
        alone = frequencies(jnp.asarray([length], jnp.int32))
        np.testing.assert_array_equal(together[row], alone[0])


def test_dynamic_rows_within_the_context_keep_the_plain_table():
    rope = RopeConfig(rope_type="dynamic", factor=4.0)
    plain, _ = rope_frequencies(RopeConfig(), 64, 128)
    np.testing.assert_array_equal(rope_frequencies(rope, 64, 128)[0], plain)
    np.testing.assert_array_equal(rope_frequencies(rope, 64, 128, jnp.asarray([5, 128]))[0], np.stack([plain, plain]))
    assert np.all(rope_frequencies(rope, 64, 128, 129)[0][1:] < plain[1:])


def test_dynamic_takes_a_head_of_one_pair():
    inv_freq, _ = rope_frequencies(RopeConfig(rope_type="dynamic", factor=2.0), 2, 16, 64)
    np.testing.assert_array_equal(inv_freq, [1.0])


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    key = jax.random.key(0)
    query, keys = jax.random.normal(key, (2, 1, 1, 64))
    inv_freq, scale = rope_frequencies(RopeConfig(), 64, 2048)

    def score(p, q):
        at = [apply_rope(x, jnp.asarray([i]), inv_freq, scale) for x, i in ((query, p), (keys, q))]
        return float(jnp.sum(at[0] * at[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    turned = apply_rope(query, jnp.asarray([1234]), inv_freq, scale)
    assert float(jnp.linalg.norm(turned)) == pytest.approx(float(jnp.linalg.norm(query)), rel=1e-6)


def test_position_zero_changes_nothing_and_the_dtype_stays():
    x = jax.random.normal(jax.random.key(1), (2, 3, 4, 16)).astype(jnp.bfloat16)
    inv_freq, scale = rope_frequencies(RopeConfig(), 16, 64)
    same = apply_rope(x, jnp.zeros((2, 3), jnp.int32), inv_freq, scale)
    assert same.dtype == jnp.bfloat16
    np.testing.assert_array_equal(same, x)


def test_rows_may_have_their_own_frequencies():
    x = jax.random.normal(jax.random.key(2), (2, 5, 3, 16))
    positions = jnp.asarray([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]], jnp.int32)
    rope = RopeConfig(rope_type="dynamic", factor=2.0, original_max_position=8)
    lengths = jnp.asarray([5, 12], jnp.int32)
    together = apply_rope(x, positions, *rope_frequencies(rope, 16, 8, lengths))
    for row in range(2):
        alone = apply_rope(x[row], positions[row], *rope_frequencies(rope, 16, 8, lengths[row]))
        np.testing.assert_array_equal(together[row], alone)


@pytest.mark.parametrize("seq_len", [None, "traced"])
def test_traced_code_stays_within_32_bits(seq_len):
    rope = RopeConfig(rope_type="dynamic", factor=2.0)

    def rotate(x, positions, lengths):
        return apply_rope(x, positions, *rope_frequencies(rope, 16, 8, lengths if seq_len else None))

    args = jnp.ones((2, 5, 3, 16)), jnp.zeros((2, 5), jnp.int32), jnp.ones((2,), jnp.int32)
    text = jax.jit(rotate).lower(*args).as_text()
    for wide in ("f64", "i64>", "complex"):
        assert wide not in text


def test_shapes_that_do_not_belong_together_are_refused():
    x = jnp.ones((2, 5, 3, 16))
    inv_freq, _ = rope_frequencies(RopeConfig(), 16, 64)
    with pytest.raises(
        ShapeError, match=r"positions is \(5,\); x \[..., T, heads, head_dim\] with positions .*per token"
    ):
        apply_rope(x, jnp.arange(5), inv_freq)
    positions = jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ShapeError, match=r"inv_freq is \(4,\) for x .* build it with rope_frequencies"):
        apply_rope(x, positions, inv_freq[:4])
    with pytest.raises(ShapeError, match=r"inv_freq is \(3, 8\) for x"):
        apply_rope(x, positions, jnp.ones((3, 8)))
