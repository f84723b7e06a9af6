"""The arguments of load, what it reports, and what it refuses before the device is touched."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import environment
from ferrum_jax.checkpoint.load import default_dtype
from ferrum_jax.errors import BackendError, CapacityError, CheckpointError, ConfigError
from ferrum_jax.kernels import PackedLinear
from ferrum_jax.params import num_bytes
from ferrum_kernels import cpu_library
from tests.support import damage
from tests.support.checkpoint_writer import TinySpec, write_checkpoint

SMALL = TinySpec(num_experts=4, num_layers=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny", SMALL)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_that_of_unquantised_leaves_and_scales_stay_exact(dtype: str, folder: Path) -> None:
    model = fj.load(folder, dtype=dtype, quiet=True)
    assert model.cfg.dtype == dtype and model.params["embed"].dtype == dtype
    layer = fj.layer(model.params, 0)
    assert layer["input_norm"].dtype == layer["moe"]["router"].dtype == dtype
    qkv = layer["attn"]["qkv"]
    assert isinstance(qkv, PackedLinear) and (qkv.qweight.dtype, qkv.scales.dtype) == (jnp.uint32, jnp.float16)
    assert fj.init_cache(model.cfg, batch=1, length=4).k.dtype == dtype


def test_no_dtype_means_the_checkpoint_s_own_where_the_cpu_kernels_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "bfloat16"  # what config.json says
    cfg = fj.load(folder, quiet=True).cfg
    assert cfg.dtype == ("float32" if cpu_library.unavailable() else own)
    for implementation in ("xla", "apple"):
        assert fj.load(folder, implementation=implementation, quiet=True).cfg.dtype == "float32"
    for name in ("cpu", "cpu-exact", "cpu-int8"):
        assert default_dtype(dataclasses.replace(cfg, dtype=own), name) == own
    assert cfg.quant is not None
    for quant in (None, dataclasses.replace(cfg.quant, bits=3)):
        assert default_dtype(dataclasses.replace(cfg, dtype=own, quant=quant), "cpu") == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "mps")
    assert fj.load(folder, quiet=True).cfg.dtype == own


def test_an_implementation_that_cannot_run_here_is_refused_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ferrum_kernels.triton.unavailable", lambda: "it needs an NVIDIA GPU")
    monkeypatch.setattr("ferrum_jax.checkpoint.load.open_checkpoint", lambda _: pytest.fail("weights were opened"))
    with pytest.raises(BackendError, match=r'cannot run: it needs an NVIDIA GPU\. .* or use "xla"\.'):
        fj.load(folder, implementation="triton", quiet=True)


@pytest.mark.parametrize("implementation", [None, "xla", "apple", "reference"])
def test_the_implementation_is_kept_in_cfg_and_used(implementation: str | None, folder: Path) -> None:
    model = fj.load(folder, implementation=implementation, dtype="float32", quiet=True)
    assert model.cfg.implementation == implementation
    logits = fj.forward(model.params, jnp.array([[5, 6]]), model.cfg)
    expected = fj.forward(model.params, jnp.array([[5, 6]]), fj.load(folder, dtype="float32", quiet=True).cfg)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"dtype": "int4"}, ConfigError, "dtype is 'int4'; one of bfloat16, float16, float32 is accepted"),
        ({"implementation": "cuda"}, BackendError, "implementation='cuda' is unknown; accepted are None, .*'xla'"),
        ({"checkpoint_format": "awq"}, ConfigError, "checkpoint_format='awq' is unknown; accepted are 'gptq' and"),
    ],
)
def test_unknown_arguments_are_refused(
    arguments: dict[str, str], kind: type, text: str, folder: Path, untouched_device: None
) -> None:
    with pytest.raises(kind, match=text):
        fj.load(folder, quiet=True, **arguments)  # type: ignore[arg-type]


def test_float16_refuses_weights_that_it_cannot_hold(tmp_path: Path) -> None:
    large = damage.set_value("model.embed_tokens.weight", (0, 0), 1e5)
    folder = write_checkpoint(tmp_path, SMALL, edits=[large])
    with pytest.raises(CheckpointError, match=r"'model.embed_tokens.weight' holds values beyond 65504, .*'bfloat16'"):
        fj.load(folder, dtype="float16", quiet=True)
    assert float(fj.load(folder, dtype="bfloat16", quiet=True).params["embed"].max()) > 9e4


def test_the_report_says_what_loading_took(folder: Path) -> None:
    model = fj.load(folder, quiet=True)
    report = model.report
    assert (report.folder, report.version, report.warnings) == (folder, "gptq", ())
    assert report.bytes_held == num_bytes(model.params) > 0 and report.seconds > 0
    assert report.bytes_read > (folder / "model.safetensors").stat().st_size * 0.8


def test_quiet_or_piped_loading_writes_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fj.load(folder)
    assert capfd.readouterr() == ("", "")


def test_parameters_that_do_not_fit_are_refused_with_both_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, untouched_device: None
) -> None:
    monkeypatch.setattr(environment, "free_memory", lambda: 1000)
    with pytest.raises(CapacityError, match=r"tiny needs 0.0 GiB for its parameters; 0.0 GiB are free on this device"):
        fj.load(folder, quiet=True)


def test_a_device_that_does_not_tell_its_memory_is_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "free_memory", lambda: None)
    assert fj.load(folder, quiet=True).report.version == "gptq"


def test_a_broken_apple_pair_is_refused_with_the_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, untouched_device: None
) -> None:
    monkeypatch.setattr(environment, "installed", {"jax-metal": "0.1.1", "jax": "0.12.0"}.get)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    text = r"jax-metal 0.1.1 does not work with jax 0.12.0: .*ferrum-jax\[mps\].*jax-mps.*JAX_PLATFORMS=cpu"
    with pytest.raises(BackendError, match=text):
        fj.load(folder, quiet=True)


def test_editing_one_checkpoint_file_after_another_leaves_no_trace(folder: Path) -> None:
    """Two loads share nothing: neither arrays nor a remembered table of tensors."""
    first = fj.load(folder, quiet=True)
    write_checkpoint(folder, TinySpec(num_experts=4, num_layers=1, seed=1))
    second = fj.load(folder, quiet=True)
    assert first.cfg == second.cfg
    assert not np.array_equal(first.params["embed"], second.params["embed"])
