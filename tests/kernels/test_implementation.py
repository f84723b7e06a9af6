"""`implementation=`: None, a name or a sequence, and what is said when none can run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from ferrum_kernels import default_implementation, gptq_matmul, grouped_gptq_matmul, ops
from ferrum_kernels.errors import BackendError
from tests.support.close import normal
from tests.support.gptq_cases import make_linear, make_stack

X = normal(0, 5, 37)
W, _ = make_linear(0)
SIZES = jnp.array([2, 3])
NO_KERNEL = (
    r"this version has no GPTQ kernel for the platform 'tpu'; kernels exist for cpu, cuda, METAL and mps\. "
    r'implementation="xla" runs on any platform, one dequantised expert at a time, and is slow on a GPU\.'
)


@pytest.fixture
def ran(monkeypatch):
    """The names of the implementations that run, in order."""
    names = []
    for name in ("xla", "apple", "reference"):
        module = getattr(ops, name)

        def noting(x, w, name=name, original=module.gptq_matmul):
            names.append(name)
            return original(x, w)

        monkeypatch.setattr(module, "gptq_matmul", noting)
    return names


@pytest.mark.parametrize(
    ("platform", "name"), [("METAL", "apple"), ("mps", "apple"), ("cuda", "triton"), ("gpu", "triton")]
)
def test_each_platform_has_a_best_one(platform, name):
    assert default_implementation(platform) == name


def test_a_hopper_gpu_takes_the_kernels_made_for_it(monkeypatch):
    monkeypatch.setattr(ops.mosaic, "unavailable", lambda: None)
    assert [default_implementation(name) for name in ("cuda", "gpu", "mps")] == ["mosaic", "mosaic", "apple"]


def test_the_cpu_has_its_kernels_where_they_were_built(monkeypatch):
    monkeypatch.setattr(ops, "unavailable", lambda: None)
    assert default_implementation("cpu") == "cpu"
    monkeypatch.setattr(ops, "unavailable", lambda: "They were not built.")
    assert default_implementation("cpu") == "xla"


def test_a_platform_without_a_kernel_is_told_what_to_do(monkeypatch):
    with pytest.raises(BackendError, match=NO_KERNEL):
        default_implementation("tpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(BackendError, match=NO_KERNEL):
        gptq_matmul(X, W)
    with pytest.raises(BackendError, match=NO_KERNEL):
        grouped_gptq_matmul(X, make_stack(0, 2)[0], SIZES)


def test_without_cpu_kernels_none_takes_xla(ran, monkeypatch):
    monkeypatch.setattr(ops, "unavailable", lambda: "They were not built.")
    gptq_matmul(X, W)
    assert ran == ["xla"]


def test_none_takes_xla_for_what_the_cpu_kernels_do_not_take(ran, monkeypatch):
    monkeypatch.setattr(ops, "unavailable", lambda: None)
    gptq_matmul(X, make_linear(0, bits=3)[0])
    assert ran == ["xla"]


def test_a_cpu_name_without_its_library_says_what_to_do(monkeypatch):
    monkeypatch.setattr(ops.cpu, "unavailable", lambda: "They were not built. Install a compiler.")
    message = r'implementation="cpu-int8" cannot run: They were not built\. Install a compiler\.'
    with pytest.raises(BackendError, match=message):
        gptq_matmul(X, W, implementation="cpu-int8")


def test_a_cpu_name_on_another_device_is_refused(monkeypatch):
    monkeypatch.setattr(ops.cpu, "unavailable", lambda: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(BackendError, match=r"runs on the CPU; the default device is of platform 'gpu'\. Set JAX_PLATF"):
        gptq_matmul(X, W, implementation="cpu")


@pytest.mark.parametrize("name", ["xla", "apple", "reference"])
def test_a_name_runs_that_one(ran, name):
    gptq_matmul(X, W, implementation=name)
    assert ran == [name]


def test_a_sequence_runs_the_first_that_applies(ran, monkeypatch):
    gptq_matmul(X, W, implementation=("reference", "xla"))
    assert ran == ["reference"]

    def refuse(x, w):
        raise BackendError("not here.")

    monkeypatch.setattr(ops.reference, "gptq_matmul", refuse)
    gptq_matmul(X, W, implementation=["reference", "apple"])
    assert ran == ["reference", "apple"]


KNOWN = r"\('cpu', 'cpu-exact', 'cpu-int8', 'triton', 'mosaic', 'xla', 'apple', 'reference'\)\."


def test_an_unknown_name_is_refused_with_the_known_ones():
    message = r"implementation='marlin' is unknown; accepted are None, " + KNOWN
    with pytest.raises(BackendError, match=message):
        gptq_matmul(X, W, implementation="marlin")
    with pytest.raises(BackendError, match=message):
        grouped_gptq_matmul(X, make_stack(0, 2)[0], SIZES, implementation="marlin")


def test_the_gpu_kernels_say_what_they_need():
    message = (
        r"implementation=.triton. cannot run: it needs an NVIDIA GPU; the default device is 'cpu' of platform 'cpu'"
    )
    with pytest.raises(BackendError, match=message):
        gptq_matmul(X, W, implementation="triton")


def test_an_empty_sequence_is_refused():
    message = r"implementation is an empty sequence; name at least one of " + KNOWN
    with pytest.raises(BackendError, match=message):
        gptq_matmul(X, W, implementation=())


def test_a_sequence_that_fails_as_a_whole_says_why_for_each():
    with pytest.raises(ExceptionGroup, match="all implementations failed") as caught:
        gptq_matmul(X, W, implementation=("marlin", "hopper"))
    assert [type(error) for error in caught.value.exceptions] == [BackendError] * 2
    assert ["'marlin'" in str(caught.value.exceptions[0]), "'hopper'" in str(caught.value.exceptions[1])] == [True] * 2


def test_a_wrong_shape_is_not_blamed_on_the_implementation():
    with pytest.raises(ValueError, match=r"its last axis must be the weight's K=37"):
        gptq_matmul(X[:, :3], W, implementation=("xla", "apple"))
