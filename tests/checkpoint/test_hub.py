"""Names resolve to folders: the demo, local folders, cached and downloaded snapshots; every failure is a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, file_download
from safetensors.numpy import save

from ferrum_jax.checkpoint.files import open_checkpoint
from ferrum_jax.checkpoint.hub import DEMO_FOLDER, resolve
from ferrum_jax.errors import CheckpointError
from tests.support.fake_hub import COMMIT, serve_hub

REPO = "some-owner/tiny-gptq"
WEIGHTS = save({"a": np.arange(4, dtype=np.float32)})
FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "chat_template.jinja": b"{{ messages }}",
    "tokenizer.model": b"words",
    "modeling_evil.py": b"raise SystemExit('code ran')",
    "tokenizer_evil.py": b"raise SystemExit('code ran')",
    "README.md": b"# tiny",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": WEIGHTS,
    "original/params.json": b"{}",
}
FETCHED = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.model"]


def fill_cache(cache: Path, files: dict[str, bytes], branch: str = "main", commit: str = COMMIT) -> Path:
    """Lay files out as the Hub client does: blobs, links from a snapshot, and a ref from branch to commit."""
    home = cache / ("models--" + REPO.replace("/", "--"))
    snapshot = home / "snapshots" / commit
    for folder in (snapshot, home / "blobs", home / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (home / "blobs" / f"{commit[:4]}-{name}").write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{commit[:4]}-{name}")
    (home / "refs" / branch).write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that this process uses; a Hub that nobody answers for."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    point_at(monkeypatch, "http://127.0.0.1:9")
    return folder


@pytest.fixture
def hub(cache, monkeypatch):
    with serve_hub(REPO, dict(FILES)) as server:
        point_at(monkeypatch, server.url)
        yield server


def point_at(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # old clients copied the name into file_download
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


class TestLocal:
    def test_demo(self):
        assert resolve("demo") == DEMO_FOLDER
        assert "model.norm.weight" in open_checkpoint(resolve("demo")).tensors

    def test_folder(self, tmp_path):
        assert resolve(tmp_path) == tmp_path
        assert resolve(str(tmp_path)) == tmp_path

    def test_folder_wins_over_hub_id_and_demo_needs_a_dot(self, tmp_path, monkeypatch):
        (tmp_path / "owner" / "name@v1").mkdir(parents=True)
        (tmp_path / "demo").mkdir()
        monkeypatch.chdir(tmp_path)
        assert resolve("owner/name@v1") == Path("owner/name@v1")
        assert resolve("./demo") == Path("demo") == resolve(Path("demo"))
        assert resolve("demo") == DEMO_FOLDER

    def test_home(self, tmp_path, monkeypatch):
        (tmp_path / "m").mkdir()
        monkeypatch.setenv("HOME", str(tmp_path))
        assert resolve("~/m") == tmp_path / "m"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("./nowhere", r"There is no folder nowhere\. Check the path, or give a Hugging Face id"),
            ("/nowhere/at/all", r"There is no folder /nowhere/at/all"),
            ("~/nowhere", r"There is no folder .*/nowhere"),
            ("a/b/c", r"There is no folder a/b/c"),
            (r"models\tiny", r"There is no folder models\\tiny"),
            ("owner/tiny.Q4.gguf", r"There is no folder owner/tiny.Q4.gguf"),
            (Path("owner/name"), r"There is no folder owner/name"),
            ("~no-such-user-of-this-machine/x", "cannot be looked up: Could not determine home directory"),
            ("x" * 5000, "cannot be looked up: .*File name too long"),
            ("demmo", "'demmo' is neither an existing folder nor a Hugging Face id"),
            ("", "'' names no model"),
            ("  ", "names no model"),
            ("a\0b", "names no model"),
            ("https://huggingface.co/owner/name", "neither an existing folder nor a Hugging Face id.*OWNER/NAME"),
            ("owner/na me", "neither an existing folder nor a Hugging Face id"),
            ("owner/name@", "'' is not a revision of owner/name"),
            ("owner/name@../../x", "'../../x' is not a revision of owner/name"),
            ("owner/name@-x", "'-x' is not a revision of owner/name"),
            ("owner/na--me", "is not a valid Hugging Face id"),
        ],
    )
    def test_names_that_lead_nowhere(self, cache, name, message):
        with pytest.raises(CheckpointError, match=message):
            resolve(name)

    def test_gguf_file(self, tmp_path):
        (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match=r"tiny.gguf is a file \(GGUF files are not supported\)"):
            resolve(tmp_path / "tiny.gguf")

    @pytest.mark.parametrize("name", ["demo", "."])
    def test_revision_of_a_local_folder(self, name):
        with pytest.raises(CheckpointError, match="revision='v1' is for Hugging Face ids"):
            resolve(name, revision="v1")

    def test_two_revisions(self):
        with pytest.raises(CheckpointError, match="'o/n@v1' and revision='v2' name two revisions"):
            resolve("o/n@v1", revision="v2")


class TestCache:
    def test_offline(self, cache):
        snapshot = fill_cache(cache, {"config.json": b"{}", "model.safetensors": WEIGHTS})
        assert resolve(REPO, offline=True) == snapshot
        assert list(open_checkpoint(resolve(REPO, offline=True)).tensors) == ["a"]

    @pytest.mark.parametrize("revision", ["v1", "refs/pr/1", "f" * 40])
    def test_revisions(self, cache, revision):
        fill_cache(cache, {"model.safetensors": WEIGHTS})
        branch = "v1" if len(revision) == 40 else revision
        (cache / "models--some-owner--tiny-gptq" / "refs" / branch).parent.mkdir(parents=True, exist_ok=True)
        other = fill_cache(cache, {"model.safetensors": WEIGHTS}, branch, "f" * 40)
        assert resolve(REPO, revision=revision, offline=True) == other
        assert resolve(f"{REPO}@{revision}", offline=True) == other
        assert resolve(f"{REPO}@{revision}", revision=revision, offline=True) == other

    def test_without_network_the_cache_serves(self, cache):
        snapshot = fill_cache(cache, {"model.safetensors": WEIGHTS})
        assert resolve(REPO) == snapshot

    def test_not_cached(self, cache):
        message = rf"{REPO} at revision v1 is not complete in the cache \(.*\), .*hf download {REPO} --revision v1"
        with pytest.raises(CheckpointError, match=message):
            resolve(f"{REPO}@v1", offline=True)

    def test_cached_without_weights(self, cache):
        fill_cache(cache, {"config.json": b"{}"})
        with pytest.raises(CheckpointError, match=f"{REPO} is not complete in the cache .*hf download {REPO}$"):
            resolve(REPO, offline=True)

    def test_no_network(self, cache):
        with pytest.raises(
            CheckpointError, match=f"{REPO} is not in the cache and the Hugging Face Hub cannot be reach"
        ):
            resolve(REPO)

    @pytest.mark.parametrize("where", ["HF_HUB_CACHE", "HF_HOME"])
    def test_environment_variables(self, tmp_path, monkeypatch, where):
        snapshot = fill_cache(tmp_path / "hub", {"model.safetensors": WEIGHTS})
        for name in ("HF_HUB_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(where, str(tmp_path / "hub" if where == "HF_HUB_CACHE" else tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        code = (
            "from ferrum_jax.checkpoint.hub import resolve; print(resolve('some-owner/tiny-gptq'))\n"
            "try: resolve('some-owner/other', offline=False)\n"
            "except ValueError as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
        lines = done.stdout.splitlines()
        assert lines[0] == str(snapshot)
        assert "some-owner/other is not complete in the cache" in lines[1]


class TestDownload:
    def test_data_only_and_never_code(self, hub, cache):
        folder = resolve(REPO)
        assert folder == cache / "models--some-owner--tiny-gptq" / "snapshots" / COMMIT
        assert sorted(path.name for path in folder.iterdir()) == FETCHED
        assert list(open_checkpoint(folder).tensors) == ["a"]
        assert not any(request.endswith((".py", ".bin", ".md")) for request in hub.requests)

    def test_second_call_works_offline(self, hub, cache):
        folder = resolve(REPO)
        hub.requests.clear()
        assert resolve(REPO, offline=True) == folder
        assert hub.requests == []

    def test_silent_when_not_on_a_terminal(self, hub, capfd):
        resolve(REPO)
        assert capfd.readouterr() == ("", "")

    def test_quiet_on_a_terminal(self, hub, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        resolve(REPO, quiet=True)
        assert capsys.readouterr() == ("", "")
        assert not huggingface_hub.utils.are_progress_bars_disabled()  # as they were

    def test_progress_on_a_terminal_goes_to_stderr(self, hub, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        resolve(REPO)
        out, err = capsys.readouterr()
        assert out == ""
        assert "Fetching 4 files" in err

    def test_unknown_repository(self, hub):
        with pytest.raises(
            CheckpointError, match=r"no folder a/b here and no model a/b on the Hugging Face Hub.*HF_TOKEN"
        ):
            resolve("a/b")

    def test_gated(self, hub):
        hub.failure = (403, "GatedRepo")
        with pytest.raises(CheckpointError, match=rf"{REPO} is gated\. Accept its terms at .*/{REPO}, then log in"):
            resolve(REPO)

    def test_unknown_revision(self, hub):
        with pytest.raises(CheckpointError, match=f"{REPO} has no revision 'v9'"):
            resolve(f"{REPO}@v9")

    def test_repository_without_safetensors(self, hub):
        hub.files = {"config.json": b"{}", "tiny.Q4_0.gguf": b"GGUF"}
        with pytest.raises(CheckpointError, match=f"{REPO} has no .safetensors weights. GGUF and PyTorch"):
            resolve(REPO)

    def test_repository_without_any_wanted_file(self, hub):
        hub.files = {"tiny.Q4_0.gguf": b"GGUF"}
        with pytest.raises(CheckpointError, match=f"{REPO} has no .safetensors weights"):
            resolve(REPO)

    def test_full_disk(self, cache, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(CheckpointError, match=f"Downloading {REPO} failed: OSError: .*No space left on device"):
            resolve(REPO)
