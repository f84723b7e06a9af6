"""Find the folder of a model: the packaged demo, a local folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ferrum_jax.checkpoint.files import check_folder
from ferrum_jax.errors import CheckpointError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "models" / "tales-13m-gptq-int4"

# Top-level data only. Code is never fetched, and consolidated.* is a second copy of the weights.
ALLOW = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
IGNORE = ["*.py", "*/*", "consolidated*"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
_WEIGHT_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json")


def resolve(model: str | Path, revision: str | None = None, offline: bool | None = None, quiet: bool = False) -> Path:
    """Return the local folder of a model, downloading it into the Hugging Face cache when needed.

    HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN mean what they mean everywhere else. Only JSON,
    safetensors, chat template and tokenizer files are fetched; never code.

    Args:
        model: "demo" (the model inside the package), a folder, or a Hub id "OWNER/NAME", with "@REVISION" if wanted.
            A folder that exists wins over a Hub id; write "./demo" for a folder of that name.
        revision: branch, tag or commit of a Hub id.
        offline: True reads the cache only. None or False leave that to HF_HUB_OFFLINE.
        quiet: show no download progress. Progress goes to stderr, and only when that is a terminal.

    Returns:
        The folder, with its files in place.

    Raises:
        CheckpointError: nothing of that name can be had; the message says why and what to do.

    >>> resolve("demo").name
    'tales-13m-gptq-int4'
    """
    name = str(model)
    if not name.strip() or not name.isprintable():
        raise CheckpointError(f'{name!r} names no model. Give "demo", a folder or a Hugging Face id (OWNER/NAME).')
    if name == DEMO and not isinstance(model, Path):
        _refuse_revision(name, revision)
        return DEMO_FOLDER
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{name!r} cannot be looked up: {error}. Check the path.") from error
    if exists or isinstance(model, Path) or _looks_like_path(name):
        _refuse_revision(name, revision)
        return check_folder(path)
    repo, revision = _split(name, revision)
    return _snapshot(repo, revision, bool(offline), quiet)


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise CheckpointError(f"revision={revision!r} is for Hugging Face ids, but {name} is a local folder. Drop it.")


def _looks_like_path(name: str) -> bool:
    if "://" in name:
        return False
    slashes = name.partition("@")[0].count("/")
    return name[0] in "./~" or "\\" in name or slashes > 1 or name.endswith(_WEIGHT_FILES)


def _split(name: str, revision: str | None) -> tuple[str, str | None]:
    repo, at, suffix = name.partition("@")
    if not _HUB_ID.fullmatch(repo):
        raise CheckpointError(
            f"{name!r} is neither an existing folder nor a Hugging Face id. "
            f'Give a folder, an id such as "OWNER/NAME" or "OWNER/NAME@REVISION", or "{DEMO}".'
        )
    if at and revision not in (None, suffix):
        raise CheckpointError(f"{name!r} and revision={revision!r} name two revisions. Give one of them.")
    revision = suffix if at else revision
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise CheckpointError(f"{revision!r} is not a revision of {repo}. Give a branch, a tag or a commit hash.")
    return repo, revision


def _snapshot(repo: str, revision: str | None, offline: bool, quiet: bool) -> Path:
    # Deferred: the Hub client is slow to import, and the demo and local folders do not need it.
    from huggingface_hub import constants, snapshot_download

    off = offline or constants.HF_HUB_OFFLINE
    try:
        with _no_bars() if quiet or not sys.stderr.isatty() else nullcontext():
            folder = snapshot_download(
                repo, revision=revision, local_files_only=offline, allow_patterns=ALLOW, ignore_patterns=IGNORE
            )
    except Exception as error:  # the client's HTTP library, and so its exceptions, differ between versions
        raise CheckpointError(_explain(error, repo, revision, off)) from error
    path = Path(folder)
    if not any(path.glob("*.safetensors")):
        if off:
            raise CheckpointError(_uncached(repo, revision))
        raise CheckpointError(
            f"{repo} has no .safetensors weights{_at(revision)}. GGUF and PyTorch .bin files are not read. "
            "Choose a repository with GPTQ weights in safetensors."
        )
    return path


@contextmanager
def _no_bars() -> Iterator[None]:
    """Switch the client's progress bars off for a while, unless HF_HUB_DISABLE_PROGRESS_BARS settles the matter."""
    from huggingface_hub import constants, utils

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _explain(error: Exception, repo: str, revision: str | None, offline: bool) -> str:
    from huggingface_hub import constants, errors

    detail = str(error).strip().split("\n")[0]
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo} is gated. Accept its terms at {constants.ENDPOINT}/{repo}, then log in:  hf auth login  "
            "(or set HF_TOKEN)."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"There is no folder {repo} here and no model {repo} on the Hugging Face Hub that you can see. Check the "
            "spelling; for a private model log in:  hf auth login  (or set HF_TOKEN)."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}. Give one of the branches, tags or commits listed on its page."
    if isinstance(error, errors.LocalEntryNotFoundError) and offline:
        return _uncached(repo, revision)
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is not a valid Hugging Face id ({detail}). Give OWNER/NAME."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"{repo} is not in the cache and the Hugging Face Hub cannot be reached. Check the network or its proxy "
            f"settings, or give a local folder. ({detail})"
        )
    return f"Downloading {repo}{_at(revision)} failed: {type(error).__name__}: {detail}. Try again."


def _uncached(repo: str, revision: str | None) -> str:
    from huggingface_hub import constants

    return (
        f"{repo}{_at(revision)} is not complete in the cache ({constants.HF_HUB_CACHE}), and downloads are off. "
        f"Fetch it once while online:  hf download {repo}{f' --revision {revision}' if revision else ''}"
    )


def _at(revision: str | None) -> str:
    return f" at revision {revision}" if revision else ""
