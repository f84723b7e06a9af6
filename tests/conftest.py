"""What every test starts from: strict promotion, caches of its own, no network, hypothesis profiles."""

import contextlib
import gc
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Set before the first import of jax or huggingface_hub, and inherited by the processes that tests start.
_user_files = tempfile.TemporaryDirectory(prefix="ferrum-jax-tests-")
os.environ["XDG_CACHE_HOME"] = _user_files.name
os.environ["HF_HOME"] = str(Path(_user_files.name, "huggingface"))
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
if not os.environ.get("FERRUM_JAX_TEST_NETWORK"):
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing listens there: a download fails at once
# Compiled programs outlive the run, so that the next one is faster. XLA's flags and version are part of the key.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
if tuple(map(int, version("jax").split(".")[:2])) >= (0, 10):  # 0.5.0 reads some programs back wrong, so it keeps few
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import pytest

from ferrum_jax.generation import steps_for
from ferrum_jax.kept import keep_programs
from tests.support.compiling import Compilations, quickly

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example compiles, so time says nothing about an example. Each profile gives the same examples at every run.
for name, examples in {"few": 3, "dev": 10, "ci": 30}.items():
    hypothesis.settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


# Compiled with all of XLA's optimisations, like the goldens: what reads compiled programs, measures their memory or
# runs them for long, and what the documentation shows. The others compile much and compute little.
FULLY = {
    "test_engine_soak",
    "test_load_gpu",
    "test_memory",
    "test_notebooks",
    "test_readme",
    "test_triton_attention_gpu",
}


# Programs that a process keeps. Each holds an MLIR context, and the more there are the longer the next one takes to
# make: after 800 a program costs twice what the first cost, after some thousands four times. (Linux also allows a
# process 65,530 memory mappings, of which each program has some; beyond, XLA crashes.)
MOST_PROGRAMS = 400
programs = Compilations()


@pytest.fixture(autouse=True)
def forget_programs() -> Iterator[None]:
    """Let go of compiled programs before a process has too many; those of use are read back from the disk."""
    yield
    if programs.count > MOST_PROGRAMS:
        programs.count = 0
        steps_for.cache_clear()
        jax.clear_caches()


@pytest.fixture(autouse=True)
def trace_programs() -> Iterator[None]:
    """No program of another test, as a command keeps them: tests replace functions that programs are made of."""
    yield
    keep_programs(False)


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests stay to the end: the collector need not walk over them each time


@pytest.fixture(autouse=True, scope="module")
def compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    path = Path(str(request.path))
    with contextlib.nullcontext() if path.stem in FULLY or path.parent.name == "golden" else quickly():
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("network") and not os.environ.get("FERRUM_JAX_TEST_NETWORK"):
        pytest.skip("reaches the internet: set FERRUM_JAX_TEST_NETWORK=1 to run it")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of large reference checkpoints beside the repository; tests that need it are skipped without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"the reference checkpoints are not at {folder}")
    return folder
