"""`ferrum-jax perplexity`: how well a model predicts a text."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ferrum_jax.cli.options import NO_DEFAULT, Loading, ModelName, UsageError, load_model
from ferrum_jax.cli.output import Status, emit
from ferrum_jax.errors import BackendError, RequestError

if TYPE_CHECKING:
    from ferrum_jax.checkpoint.load import Model

MAX_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Perplexity(Loading):
    """Measure how well a model predicts a text: the exponential of the mean loss per token.

    The text is cut into windows of --context tokens without overlap. The first token of a window is not predicted.

    Args:
      model: demo, a folder, or a Hugging Face id (OWNER/NAME or OWNER/NAME@REVISION).
      file: a UTF-8 text; - reads stdin.
      context: tokens of a window.
      batch: windows computed together.
      tail: also score the shorter window at the end.
      json: print a JSON object.
    """

    model: Positional[ModelName]
    file: Positional[Annotated[str, arg(metavar="FILE", help_behavior_hint=NO_DEFAULT)]]
    context: Annotated[int, arg(metavar="N")] = 512
    batch: Annotated[int, arg(metavar="N")] = 4
    tail: Annotated[bool, arg(help_behavior_hint=NO_DEFAULT)] = False
    json: Annotated[bool, arg(help_behavior_hint=NO_DEFAULT)] = False

    def execute(self) -> int:
        """Score the text; returns the exit code."""
        if self.context < 2 or self.batch < 1:
            raise UsageError(
                f"--context is {self.context} and --batch {self.batch}; a window needs 2 tokens, a batch 1 window."
            )
        text = read_text(self.file)
        model = load_model(self, self.model)
        if self.context > model.cfg.max_position:
            raise RequestError(
                f"--context {self.context} exceeds this model's context of {model.cfg.max_position} tokens; "
                f"ask for less."
            )
        tokens = model.tokenizer.encode(text, max_chars=MAX_BYTES)
        with Status("compiling", self.quiet) as status:
            score = measure(model, tokens, self.context, self.batch, self.tail, status.update)
        if self.json:
            settings = {"dtype": model.cfg.dtype, "lm_head_bits": model.cfg.lm_head_bits}
            emit({"model": self.model, "file": self.file, **settings, **asdict(score)})
        else:
            print(
                f"perplexity {score.perplexity:.4f} · {score.tokens} tokens scored in {score.windows} windows of "
                f"{score.context} · {score.seconds:.1f} s"
            )
        return 0


@dataclass(frozen=True, slots=True)
class Score:
    """The result.

    Attributes:
      perplexity: exp(nll).
      nll: mean negative log-likelihood per token, in nats.
      tokens: how many were predicted.
      windows: how many were read.
      context: tokens of a full window.
      batch: windows computed together.
      seconds: wall time, compilation left out.
      compile_seconds: spent on compiling.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    context: int
    batch: int
    seconds: float
    compile_seconds: float


def read_text(name: str) -> str:
    """A text file, or stdin for "-".

    Raises:
      RequestError: it cannot be read, is not UTF-8, is empty or absurdly large.
    """
    what = "stdin" if name == "-" else name
    try:
        if name == "-":
            text = sys.stdin.read(MAX_BYTES + 1)
        else:
            with Path(name).open(encoding="utf-8") as file:
                text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RequestError(f"{what} cannot be read: {error.strerror}. Give a text file, or - for stdin.") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"{what} is not UTF-8 text ({error}). Convert it first.") from error
    if not text.strip():
        raise RequestError(f"{what} is empty; give a text to predict.")
    if len(text) > MAX_BYTES:
        raise RequestError(f"{what} has more than {MAX_BYTES} characters; give less text.")
    return text


def measure(
    model: Model,
    tokens: Sequence[int],
    context: int,
    batch: int,
    tail: bool,
    progress: Callable[[str], None] = lambda text: None,
) -> Score:
    """Perplexity of token ids in windows without overlap.

    Args:
      model: the model.
      tokens: ids of the whole text.
      context: tokens of a window; the first of each is not predicted.
      batch: windows per call of the one compiled program.
      tail: also score what is left after the last full window.
      progress: called with words after each batch.

    Returns:
      Score.

    Raises:
      RequestError: there is no window to score, or an id is outside the vocabulary.
      BackendError: the model gave a loss that is not finite.

    >>> import ferrum_jax as fj
    >>> measure(fj.load("demo"), [5, 6, 7, 8], context=4, batch=1, tail=False).tokens
    3
    """
    import jax
    import numpy as np

    vocab = model.cfg.vocab_size
    if max(tokens, default=0) >= vocab:
        raise RequestError(f"the text holds token id {max(tokens)}; this model's vocabulary is 0 to {vocab - 1}.")
    windows = [tokens[at : at + context] for at in range(0, len(tokens), context)]
    windows = [window for window in windows if len(window) == context or (tail and len(window) > 1)]
    if not windows:
        raise RequestError(
            f"the text has {len(tokens)} tokens, less than one window of {context}. Give a longer text, a smaller "
            f"--context, or --tail to score what there is."
        )
    lengths = np.array([len(window) for window in windows] + [0] * (-len(windows) % batch), np.int32)
    padded = np.zeros((len(lengths), context), np.int32)
    for row, window in zip(padded, windows, strict=False):
        row[: len(window)] = window
    began = time.perf_counter()
    program = jax.jit(functools.partial(window_losses, cfg=model.cfg))
    compiled = program.lower(model.params, padded[:batch], lengths[:batch]).compile()
    compile_seconds = time.perf_counter() - began
    total, scored = 0.0, 0
    for start in range(0, len(lengths), batch):
        count = lengths[start : start + batch]
        losses = jax.device_get(compiled(model.params, padded[start : start + batch], count))
        total += float(losses.astype(np.float64).sum())
        scored += int(np.maximum(count - 1, 0).sum())
        if not math.isfinite(total):
            raise BackendError(
                f"the loss became NaN or infinite in windows {start} to {start + batch - 1}. "
                f"Try --dtype float32; if it stays, the weights are broken."
            )
        done = min(start + batch, len(windows))
        progress(f"{done} of {len(windows)} windows, perplexity so far {math.exp(total / scored):.2f}")
    seconds = time.perf_counter() - began - compile_seconds
    nll = total / scored
    return Score(math.exp(nll), nll, scored, len(windows), context, batch, seconds, compile_seconds)


def window_losses(params: Any, tokens: Any, lengths: Any, cfg: Any) -> Any:
    """Summed negative log-likelihood of the tokens after the first of each window.

    Args:
      params: the model's pytree.
      tokens: int32 [B, T], right-padded.
      lengths: int32 [B], real tokens of each window.
      cfg: frozen configuration.

    Returns:
      float32 [B], in nats.
    """
    import jax
    import jax.numpy as jnp

    from ferrum_jax.model import forward

    logits = forward(params, tokens, cfg)[:, :-1]
    targets = tokens[:, 1:]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    real = jnp.arange(1, tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    return jnp.where(real, losses, 0.0).sum(axis=-1)
