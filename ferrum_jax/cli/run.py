"""`ferrum-jax run`: text from a model, streamed to stdout; or a conversation on a terminal."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from ferrum_jax.cli.options import NO_DEFAULT, CacheDtype, Loading, ModelName, UsageError, load_model, on_terminal
from ferrum_jax.cli.output import DIM, Status, emit, say, size, styled, table
from ferrum_jax.errors import BackendError, RequestError

if TYPE_CHECKING:
    from ferrum_jax.checkpoint.load import Model
    from ferrum_jax.generation import Stats, Step
    from ferrum_jax.sampling_params import SamplingParams

PREPARING = "preparing: the first run of a size compiles it"


@dataclass(frozen=True, kw_only=True)
class Run(Loading):
    """Write text: continue a prompt, or answer it where the checkpoint has a chat template.

    The text goes to stdout as it is written, statistics to stderr. Without a PROMPT, a conversation opens on a
    terminal; elsewhere the prompt is read from stdin, less one final newline. A prompt that is continued is shown
    before its continuation on a terminal only: a pipe or a file gets the new text alone.

    Args:
      model: demo, a folder, or a Hugging Face id (OWNER/NAME or OWNER/NAME@REVISION).
      prompt: a message, or the beginning of a text; - reads stdin.
      system: system message of a chat.
      raw: continue the prompt as it is, without the chat template.
      max_tokens: most tokens to write.
      temperature: 0 takes the best token every time; higher is more varied.
      top_k: sample among the k best tokens; 0 is off.
      top_p: sample among the best tokens with this probability together; 1 is off.
      min_p: sample among tokens with this fraction of the best one's probability; 0 is off.
      repetition_penalty: above 1 discourages tokens of the prompt and the text; 1 is off.
      presence_penalty: subtracted from the logits of tokens already written.
      frequency_penalty: subtracted once per time a token was written.
      seed: of the sampler; without it every run differs.
      stop: end the text before this string; may be given several times.
      cache_dtype: of keys and values; without it the activations', and int8 takes half of bfloat16's memory.
      json: print one JSON object at the end instead of the text.
      verbose: say what loading took and what was compiled.
    """

    model: Positional[ModelName]
    prompt: Positional[Annotated[str | None, arg(metavar="[PROMPT]", help_behavior_hint=NO_DEFAULT)]] = None
    system: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint=NO_DEFAULT)] = None
    raw: Annotated[bool, arg(help_behavior_hint=NO_DEFAULT)] = False
    max_tokens: Annotated[int, arg(metavar="N")] = 256
    temperature: Annotated[float, arg(metavar="T")] = 0.0
    top_k: Annotated[int, arg(metavar="K")] = 0
    top_p: Annotated[float, arg(metavar="P")] = 1.0
    min_p: Annotated[float, arg(metavar="P")] = 0.0
    repetition_penalty: Annotated[float, arg(metavar="X")] = 1.0
    presence_penalty: Annotated[float, arg(metavar="X")] = 0.0
    frequency_penalty: Annotated[float, arg(metavar="X")] = 0.0
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint=NO_DEFAULT)] = None
    stop: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="TEXT", help_behavior_hint=NO_DEFAULT)]] = ()
    cache_dtype: CacheDtype = None
    json: Annotated[bool, arg(help_behavior_hint=NO_DEFAULT)] = False
    verbose: Annotated[bool, arg(aliases=("-v",), help_behavior_hint=NO_DEFAULT)] = False

    def execute(self) -> int:
        """Generate; returns the exit code."""
        sampling = self.sampling()  # before the model, so that a wrong number does not wait for it
        talking = self.prompt is None and on_terminal()
        if talking and self.json:
            raise UsageError("--json gives one answer, and there is no PROMPT; give one, or - to read it from stdin.")
        prompt = None if talking else self.prompt if self.prompt not in (None, "-") else read_stdin()
        if prompt == "":
            raise RequestError("the prompt is empty; give at least a word.")
        model = load_model(self, self.model)
        if self.verbose:
            say(load_report(model))
        if prompt is None:
            from ferrum_jax.cli.conversation import converse

            return converse(model, sampling, self.system, self.raw, self.quiet, self.cache_dtype)
        self.answer(model, prompt, sampling)
        return 0

    def sampling(self) -> SamplingParams:
        """The options as the library's SamplingParams."""
        from ferrum_jax.sampling_params import SamplingParams

        names = {field.name for field in dataclasses.fields(SamplingParams)}
        return SamplingParams(**{name: value for name, value in vars(self).items() if name in names})

    def answer(self, model: Model, prompt: str, sampling: SamplingParams) -> None:
        """Answer one prompt."""
        from ferrum_jax.generation import stream_generate

        chat = model.tokenizer.chat_template is not None and not self.raw
        ids = message_ids(model, prompt, self.system) if chat else text_ids(model, prompt, self.system)
        steps = stream_generate(model, ids, sampling, cache_dtype=self.cache_dtype)
        pieces: list[str] = []
        if self.json:
            with Status(PREPARING, self.quiet) as status:
                taken = []
                for step in steps:
                    taken.append(step)
                    status.update(f"{len(taken)} tokens")
            check_finite(taken[-1])
            emit(answer_json(self.model, prompt, taken))
        else:
            echo = "" if chat or not sys.stdout.isatty() else styled(prompt, DIM, sys.stdout)
            try:
                last = write(steps, pieces, self.quiet, echo)
            finally:
                print(flush=True)
            check_finite(last)
            if not self.quiet:
                say(styled(stats_line(last), DIM, sys.stderr))
        if self.verbose:
            say(compile_table(model))


def read_stdin() -> str:
    """The prompt from stdin, less one final newline, which editors and echo add."""
    if sys.stdin is None:
        raise UsageError("there is no PROMPT and no stdin to read it from; give a PROMPT.")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 text ({error}); give text.") from None


def message_ids(model: Model, message: str, system: str | None) -> list[int]:
    """Token ids of one message in the chat template."""
    messages = [{"role": "user", "content": message}]
    return chat_ids(model, [{"role": "system", "content": system}, *messages] if system else messages)


def chat_ids(model: Model, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation in the chat template."""
    from ferrum_jax.chat import render

    tokenizer = model.tokenizer
    prompt = render(tokenizer.chat_template, messages, special_tokens=tokenizer.special_tokens)
    return tokenizer.encode(prompt, add_special_tokens=False)


def text_ids(model: Model, text: str, system: str | None = None) -> list[int]:
    """Token ids of a text to continue."""
    if system is not None:
        why = "--raw leaves it out" if model.tokenizer.chat_template else "this checkpoint has none"
        raise RequestError(f"a system message needs a chat template, and {why}. Put it into the prompt instead.")
    return model.tokenizer.encode(text)


def write(steps: Iterator[Step], pieces: list[str], quiet: bool, echo: str = "") -> Step:
    """Stream text to stdout.

    Args:
      steps: from stream_generate.
      pieces: receives the text, also that of a stream which is interrupted.
      quiet: no status line while waiting for the first token.
      echo: printed before the first piece.

    Returns:
      The last step.
    """
    step = None
    with Status(PREPARING, quiet) as status:
        for step in steps:
            status.clear()
            pieces.append(step.text)
            sys.stdout.write(echo + step.text)
            sys.stdout.flush()
            echo = ""
    assert step is not None  # a request has at least one token
    return step


def check_finite(last: Step) -> None:
    """Refuse a text that ended because the model broke."""
    if last.finish_reason == "nonfinite_logits":
        raise BackendError(
            f"the model gave logits that are NaN or infinite after {last.stats.generated_tokens} tokens. "
            f"Try --dtype float32; if it stays, the weights are broken."
        )


def stats_line(last: Step) -> str:
    """Counts and times in one line."""
    stats = last.stats
    compiled = f" · compiling {stats.compile_seconds:.1f} s" if stats.compile_seconds >= 0.05 else ""
    return (
        f"{stats.generated_tokens} tokens, {stats.decode_tokens_per_second:.1f} tok/s · prompt {stats.prompt_tokens} "
        f"tokens, first token {stats.first_token_seconds:.2f} s{compiled} · {last.finish_reason or 'interrupted'}"
    )


def answer_json(name: str, prompt: str, steps: list[Step]) -> dict[str, Any]:
    """What --json prints."""
    last = steps[-1]
    return {
        "model": name,
        "prompt": prompt,
        "text": "".join(step.text for step in steps),
        "tokens": [step.token for step in steps],
        "finish_reason": last.finish_reason,
        "stats": stats_json(last.stats),
    }


def stats_json(stats: Stats) -> dict[str, float]:
    """Counts, times in seconds and rates."""
    return {
        **dataclasses.asdict(stats),
        "prefill_tokens_per_second": stats.prefill_tokens_per_second,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
    }


def load_report(model: Model) -> str:
    """What loading took, in one line."""
    import jax

    report, device = model.report, jax.devices()[0]
    return (
        f"{report.folder}: {size(report.bytes_read)} read, {size(report.bytes_held)} held, {report.seconds:.1f} s · "
        f"zeros {report.version or 'none'} · {model.cfg.dtype} · {device.platform} ({device.device_kind})"
    )


def compile_table(model: Model) -> str:
    """Every program that was compiled, or read from the compile cache, with the time it took."""
    from ferrum_jax.generation import steps_for

    records = steps_for(model.cfg).records()
    rows = [
        (record.step, str(record.bucket), f"{record.seconds:.2f} s", size(record.temp_bytes or 0)) for record in records
    ]
    return table(("step", "bucket", "compile", "temporary memory"), rows, left=2)
