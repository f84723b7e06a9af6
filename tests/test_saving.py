"""Saved parameters come back bit for bit, and every way in which a saved folder can be wrong has its sentence."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import saving
from ferrum_jax.config import QuantConfig, RopeConfig
from ferrum_jax.errors import BackendError, CapacityError, CheckpointError
from ferrum_jax.kernels import MixedStack
from ferrum_jax.saving import load_params, save_params
from tests.support.checkpoint_writer import MIXED_DYNAMIC, TinySpec, write_checkpoint

Saved = tuple[fj.ModelConfig, dict[str, Any]]


@pytest.fixture(autouse=True)
def working_orbax(request: pytest.FixtureRequest) -> None:
    if "orbax_pair" not in request.node.name and not saving.orbax_fits():
        pytest.skip("the installed orbax does not work with the installed jax")


@pytest.fixture(scope="module")
def demo() -> Saved:
    model = fj.load("demo", quiet=True)
    return model.cfg, model.params


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """bfloat16, act-order, zero points, subnormal scales, two runs of layers, experts of two kinds in one layer."""
    spec = TinySpec(dynamic=MIXED_DYNAMIC, sym=False, desc_act=True)
    folder = write_checkpoint(tmp_path_factory.mktemp("saving") / "mixed", spec)
    model = fj.load(folder, dtype="bfloat16", quiet=True)
    return model.cfg, model.params


@pytest.fixture(scope="module")
def rounded() -> Saved:
    """A projection of its own beside tied embeddings."""
    model = fj.load("demo", lm_head_bits=8, quiet=True)
    return model.cfg, model.params


@pytest.fixture
def folder(mixed: Saved, tmp_path: Path) -> Path:
    return save_params(tmp_path / "saved", *mixed)


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def edit_description(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / saving.DESCRIPTION
    description = json.loads(file.read_text())
    edit(description)
    file.write_text(json.dumps(description))


def largest_file(folder: Path) -> Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize("which", ["demo", "mixed", "rounded"])
def test_round_trip_is_exact(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    cfg, params = request.getfixturevalue(which)
    read_cfg, read = load_params(save_params(tmp_path / "saved", cfg, params))
    assert read_cfg == cfg
    assert hash(read_cfg) == hash(cfg)
    assert_same_bits(read, params)


def test_mixed_model_covers_every_kind_of_leaf(mixed: Saved) -> None:
    leaves = jax.tree.leaves(mixed[1])
    assert {leaf.dtype.name for leaf in leaves} == {"uint32", "float16", "int32", "bfloat16"}
    assert isinstance(mixed[1]["layers"][0]["moe"]["experts"]["down"], MixedStack)
    scales = [np.asarray(leaf, np.float32) for leaf in leaves if leaf.dtype == jnp.float16]
    tiny = np.finfo(np.float16).smallest_normal
    assert any(((0 < values) & (values < tiny)).any() for values in scales), "subnormal scales are part of the proof"


def test_random_parameters_of_dynamic_rules_round_trip(mixed: Saved, tmp_path: Path) -> None:
    params = fj.random_params(mixed[0])
    assert_same_bits(load_params(save_params(tmp_path / "saved", mixed[0], params))[1], params)


def test_edited_parameters_are_what_is_saved(mixed: Saved, tmp_path: Path) -> None:
    cfg, params = mixed
    layer = fj.layer(params, 1)
    edited = fj.set_layer(params, 1, {**layer, "post_norm": layer["post_norm"] * 2})
    edited = {**edited, "lm_head": np.asarray(params["lm_head"], np.float32)}  # another dtype, and a host array
    read = load_params(save_params(tmp_path / "saved", cfg, edited))[1]
    assert_same_bits(read, edited)


def test_every_setting_of_the_configuration_survives(mixed: Saved, tmp_path: Path) -> None:
    rules = ((r"-:.*experts\.0\.", None), (r"+:.*self_attn", (("bits", 8), ("sym", False))))
    cfg = dataclasses.replace(
        mixed[0],
        rope=RopeConfig(rope_type="yarn", factor=4.0, original_max_position=64, mscale=0.5),
        quant=QuantConfig(bits=3, group_size=-1, desc_act=True, dynamic=rules),
        sliding_windows=(None, 32),
        moe_layers=(True, False),
        eos_token_ids=(1, 2),
        implementation="xla",
    )
    assert load_params(save_params(tmp_path / "saved", cfg, {"norm": jnp.ones(4)}))[0] == cfg
    plain = dataclasses.replace(cfg, quant=None)
    assert load_params(save_params(tmp_path / "plain", plain, {"norm": jnp.ones(4)}))[0] == plain


def test_orbax_alone_restores_the_plain_pytree(demo: Saved, tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    cfg, params = demo
    device = jnp.zeros(0).sharding
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), fj.abstract(cfg))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", params)
        checkpointer.wait_until_finished()
        assert_same_bits(checkpointer.restore(tmp_path / "orbax", target), params)


def test_orbax_restores_the_state_of_the_nnx_module(demo: Saved, tmp_path: Path) -> None:
    import orbax.checkpoint as ocp
    from flax import nnx

    from ferrum_jax.nnx import CausalLM

    cfg, params = demo
    graph, abstract_state = nnx.split(CausalLM(cfg, fj.abstract(cfg)))
    device = jnp.zeros(0).sharding
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract_state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(CausalLM(cfg, params)))
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "state", target)
    assert_same_bits(nnx.merge(graph, state).params, params)


def test_existing_folder_is_not_overwritten(folder: Path, mixed: Saved) -> None:
    with pytest.raises(CheckpointError, match="saved exists already and is not overwritten; choose another folder"):
        save_params(folder, *mixed)
    assert_same_bits(load_params(folder)[1], mixed[1])


def test_failed_save_leaves_nothing(mixed: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.os, "rename", full)
    with pytest.raises(CheckpointError, match=r"saved cannot be written \(No space left on device\); .* 0.00 GiB free"):
        save_params(tmp_path / "saved", *mixed)
    assert list(tmp_path.iterdir()) == []


def test_parent_that_is_a_file_is_named(mixed: Saved, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"saved cannot be written \((Not a directory|File exists)\)"):
        save_params(tmp_path / "file" / "saved", *mixed)


def test_unknown_node_is_refused(mixed: Saved, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"params\['layers'\]\[0\] is a list; dicts, tuples, .* convert it first"):
        save_params(tmp_path / "saved", mixed[0], {"layers": ([jnp.ones(3)],)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("")])
def test_folder_of_something_else(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"other is not a folder of saved parameters: it has no ferrum\.json"):
        load_params(tmp_path / "other")


@pytest.mark.parametrize("version", [2, "1", None])
def test_other_version(version: Any, folder: Path) -> None:
    edit_description(folder, lambda description: description.update(version=version))
    with pytest.raises(CheckpointError, match=re.escape(f"is of version {version!r}; version 1 is accepted.")):
        load_params(folder)


def test_description_that_is_no_json(folder: Path) -> None:
    (folder / saving.DESCRIPTION).write_text('{"version": 1, ')
    with pytest.raises(CheckpointError, match=r"ferrum\.json is not a JSON object"):
        load_params(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("config"),
        lambda d: d["config"].pop("rope"),
        lambda d: d["config"].update(surprise=1),
        lambda d: d["config"].update(head_dim=-1),
        lambda d: d["params"].update(norm="float32[64"),
        lambda d: d["params"].update(norm="float33[64]"),
        lambda d: d["params"].update(norm=64),
        lambda d: d["params"]["layers"][0]["attn"]["qkv"]["PackedLinear"].pop("perm"),
        lambda d: d.update(files=1),
    ],
)
def test_damaged_description(damage: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    edit_description(folder, damage)
    with pytest.raises(CheckpointError, match=r"ferrum\.json is damaged \(.*\); copy the folder again, or save again"):
        load_params(folder)


def test_flipped_bit_is_found(folder: Path) -> None:
    file = largest_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged: it is not what was saved; copy the folder"):
        load_params(folder)


def test_cut_file_is_found(folder: Path) -> None:
    file = largest_file(folder)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged: it is not what was saved"):
        load_params(folder)


def test_missing_file_is_named(folder: Path) -> None:
    file = largest_file(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"saved lacks arrays/.*{file.name}; copy the folder again"):
        load_params(folder)


def test_arrays_that_orbax_cannot_read(folder: Path) -> None:
    edit_description(folder, lambda d: d["params"].update(other="float32[3]") or d.update(orbax="99.0"))
    with pytest.raises(CheckpointError, match=r"saved is whole, but orbax-checkpoint .* cannot read it .* 99\.0"):
        load_params(folder)


def test_parameters_that_do_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferrum_jax.environment.free_memory", lambda: 1000)
    with pytest.raises(CapacityError, match=r"saved needs .* GiB for its parameters"):
        load_params(folder)


def test_bad_orbax_pair_is_named(mixed: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(jax.monitoring, "record_scalar", raising=False)
    monkeypatch.setattr(saving, "installed", lambda name: "0.11.24")
    with pytest.raises(BackendError, match=r"orbax-checkpoint 0\.11\.24 does not work with jax .* newer jax"):
        save_params(tmp_path / "saved", *mixed)
    assert list(tmp_path.iterdir()) == []
