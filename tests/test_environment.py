"""The machine around the model: plugin pairs, free memory, the folder of compiled programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from ferrum_jax import environment
from ferrum_jax.environment import check_memory, check_platform, compile_cache_folder, enable_compile_cache
from ferrum_jax.errors import BackendError, CapacityError

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def no_chosen_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX without a folder of its own, put back as it was afterwards."""
    before = {name: jax.config.values[name] for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv(environment.COMPILE_CACHE, raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("word", ["off", "OFF", "0", "no", "false"])
def test_the_cache_of_compiled_programs_can_be_switched_off(
    word: str, monkeypatch: pytest.MonkeyPatch, no_chosen_cache: None
) -> None:
    monkeypatch.setenv(environment.COMPILE_CACHE, word)
    assert compile_cache_folder() is None and enable_compile_cache() is None
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_the_cache_is_on_in_the_users_cache_folder_and_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_chosen_cache: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = enable_compile_cache()
    assert folder is not None and folder == tmp_path / "ferrum_jax" / "xla"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.values["jax_compilation_cache_dir"] == str(folder)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compile_cache_folder() == Path.home() / ".cache" / "ferrum_jax" / "xla"


def test_a_variable_moves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_chosen_cache: None) -> None:
    monkeypatch.setenv(environment.COMPILE_CACHE, str(tmp_path / "mine"))
    assert enable_compile_cache() == tmp_path / "mine"


def test_a_folder_given_to_jax_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_chosen_cache: None) -> None:
    monkeypatch.setenv(environment.COMPILE_CACHE, str(tmp_path / "mine"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))  # what JAX_COMPILATION_CACHE_DIR does
    assert enable_compile_cache() == tmp_path / "jax"
    assert not (tmp_path / "mine").exists()


def test_a_folder_that_everyone_can_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_chosen_cache: None
) -> None:
    monkeypatch.setenv(environment.COMPILE_CACHE, str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.warns(UserWarning, match=r"can be written by everyone, so compiled programs are not kept"):
        assert enable_compile_cache() is None
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_a_folder_that_cannot_be_made_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_chosen_cache: None
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(environment.COMPILE_CACHE, str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match=r"cannot be made .*Set FERRUM_JAX_COMPILE_CACHE to a folder of your own"):
        assert enable_compile_cache() is None


@pytest.mark.parametrize(
    ("packages", "platforms"),
    [
        ({"jax": "0.12.0"}, ""),
        ({"jax": "0.5.0", "jax-metal": "0.1.1"}, ""),
        ({"jax": "0.12.0", "jax-metal": "0.1.1"}, "CPU"),
    ],
)
def test_pairs_that_work_pass(packages: dict[str, str], platforms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed", packages.get)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert check_platform() is None


@pytest.mark.parametrize("platforms", ["", "METAL", "metal,cpu"])
def test_any_other_pair_is_refused(platforms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed", {"jax": "0.5.1", "jax-metal": "0.1.1"}.get)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    with pytest.raises(BackendError, match=r"jax-metal 0.1.1 does not work with jax 0.5.1: .*jax-mps"):
        check_platform()


def test_installed_packages_are_known_by_version() -> None:
    assert environment.installed("jax") == jax.__version__.split("+")[0]
    assert environment.installed("no-such-package-at-all") is None


def test_memory_is_measured_and_compared() -> None:
    free = environment.free_memory()
    if free is None:
        pytest.skip("this system does not tell its free memory")
    check_memory(0, "nothing")
    with pytest.raises(CapacityError, match=r"huge needs \d{7}\d*\.\d GiB for its parameters; .* GiB are free"):
        check_memory(2**80, "huge")
