"""Say what a damaged or mislabelled file really is, and how to fetch the right one."""

from __future__ import annotations

from pathlib import Path

from ferrum_jax.errors import CheckpointError

_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a zip archive (torch.save writes these)"),
    (b"\x80", "a Python pickle (torch.save writes these)"),
    (b"<", "an HTML page (often a login or an error page)"),
)


def disguise(head: bytes) -> str | None:
    """Name the kind of file that a first block of bytes belongs to.

    Args:
        head: the first bytes of a file that failed to parse as what its name promises.

    Returns:
        Words such as "a Git LFS pointer", or None when the bytes are of no kind we know.

    >>> disguise(b"<!doctype html><html>")
    'an HTML page (often a login or an error page)'
    """
    stripped = head.lstrip()
    return next((words for magic, words in _SIGNATURES if stripped.startswith(magic)), None)


def refetch(path: Path) -> str:
    """Give the command that downloads one file of a checkpoint again.

    Args:
        path: the damaged or missing file. Inside a Hugging Face cache its repository id is read from the path.

    Returns:
        A sentence with an `hf download` command.

    >>> refetch(Path("hub/models--org--name/snapshots/0a1b/model.safetensors"))
    'Fetch it again:  hf download org/name --include "model.safetensors" --force-download'
    """
    for parent in path.parents:
        if parent.name.startswith("models--") and parent.name.count("--") >= 2:
            repo = parent.name.removeprefix("models--").replace("--", "/", 1)
            return f'Fetch it again:  hf download {repo} --include "{path.name}" --force-download'
    return f'Fetch it again:  hf download OWNER/NAME --include "{path.name}" --local-dir {path.parent}'


def read_bytes(path: Path, limit: int, what: str) -> bytes:
    """Read a small file whole, or refuse it.

    Args:
        path: the file.
        limit: largest accepted size in bytes.
        what: what the file is for, for the error ("the model configuration").

    Returns:
        The content.

    Raises:
        CheckpointError: the file is missing, unreadable, empty or larger than `limit`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; it holds {what}. {refetch(path)}") from None
    except OSError as error:
        raise unreadable(path, error) from error
    if not content:
        raise CheckpointError(f"{path} is empty; it should hold {what}. {refetch(path)}")
    if len(content) > limit:
        raise CheckpointError(
            f"{path} is larger than {limit:,} bytes, the most that is accepted for {what}. {refetch(path)}"
        )
    return content


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Turn an operating-system error on a file into a sentence."""
    reason = error.strerror or str(error) or type(error).__name__
    return CheckpointError(f"{path} cannot be read: {reason}. Check its permissions and the disk.")
