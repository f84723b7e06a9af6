"""`ferrum-jax run`: one answer to a pipe, to JSON, and what options change; conversations on a pseudo-terminal."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import signal
import subprocess

import numpy as np
import pytest

from ferrum_jax.checkpoint.hub import DEMO_FOLDER
from ferrum_jax.cli import main
from ferrum_jax.cli.run import Run
from ferrum_jax.sampling_params import SamplingParams
from ferrum_jax.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.support import terminal
from tests.support.terminal import Terminal

GOLDEN = np.load(ROOT / "tests" / "golden" / "tales-13m-gptq-int4.npz")
TOKENIZER = Tokenizer.from_folder(DEMO_FOLDER)
PROMPT = TOKENIZER.decode(GOLDEN["ids_0"])
EXACT = ("--dtype", "float32")  # as the reference tokens were made
# Still writing when Ctrl-C comes, a quarter of a minute at least, and compiled already by other tests.
LONG, SLOWLY = ("--max-tokens", "2000"), {"FERRUM_JAX_CPU_ISA": "portable"}


def answer(capsys, *arguments: str) -> dict:
    assert main(["run", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return json.loads(out)


def test_defaults_are_those_of_the_library():
    ours, library = Run(model="demo"), SamplingParams()
    names = {field.name for field in dataclasses.fields(ours)} & {field.name for field in dataclasses.fields(library)}
    assert {"max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop"} < names
    assert all(getattr(ours, name) == getattr(library, name) for name in names)


def test_json_holds_the_reference_tokens(capsys):
    report = answer(capsys, "demo", PROMPT, "--max-tokens", "24", *EXACT)
    tokens = GOLDEN["greedy_q_0"][:24].tolist()
    assert report.keys() == {"model", "prompt", "text", "tokens", "finish_reason", "stats"}
    assert (report["model"], report["prompt"], report["finish_reason"]) == ("demo", PROMPT, "length")
    assert report["tokens"] == tokens
    assert report["text"] == TOKENIZER.decode(tokens)
    assert report["stats"]["prompt_tokens"] == 13 and report["stats"]["generated_tokens"] == 24
    assert report["stats"]["decode_tokens_per_second"] > 0 and report["stats"]["first_token_seconds"] > 0


def test_a_cache_in_int8_writes_nearly_the_same(capsys):
    plain, codes = (
        answer(capsys, "demo", PROMPT, "--max-tokens", "8", *EXACT, *more) for more in ([], ["--cache-dtype", "int8"])
    )
    assert codes["tokens"][:4] == plain["tokens"][:4]
    assert main(["run", "demo", PROMPT, "--cache-dtype", "int4"]) == 2
    assert "int4" in capsys.readouterr().err


def test_a_pipe_gets_the_continuation_alone_and_stderr_the_statistics(capsys):
    assert main(["run", "demo", PROMPT, "--max-tokens", "24", *EXACT]) == 0
    out, err = capsys.readouterr()
    assert out == TOKENIZER.decode(GOLDEN["greedy_q_0"][:24].tolist()) + "\n"
    assert re.fullmatch(r"24 tokens, [\d.]+ tok/s · prompt 13 tokens, first token [\d.]+ s.* · length\n", err), err


def test_quiet_and_verbose(capsys):
    assert main(["run", "demo", PROMPT, "--max-tokens", "24", "--quiet"]) == 0
    assert not capsys.readouterr().err
    assert main(["run", "demo", PROMPT, "--max-tokens", "24", "--verbose", *EXACT]) == 0
    err = capsys.readouterr().err
    assert re.search(r"tales-13m-gptq-int4: [\d.]+ MiB read, [\d.]+ MiB held, .* zeros gptq · float32 · cpu", err), err
    assert re.search(r"^decode +\(1, 128\) +[\d.]+ s ", err, re.MULTILINE), err


@pytest.mark.parametrize("arguments", [["-"], []], ids=["dash", "no prompt"])
def test_the_prompt_comes_from_stdin(arguments, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    report = answer(capsys, "demo", *arguments, "--max-tokens", "24", *EXACT)
    assert report["prompt"] == PROMPT
    assert report["tokens"] == GOLDEN["greedy_q_0"][:24].tolist()


def test_stdin_that_cannot_be_read(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert main(["run", "demo", "-"]) == 1
    assert "error: stdin is not UTF-8 text" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", None)
    assert main(["run", "demo"]) == 2
    assert "error: there is no PROMPT and no stdin to read it from" in capsys.readouterr().err


def test_stop_strings_and_seed(capsys):
    whole = answer(capsys, "demo", PROMPT, "--max-tokens", "24")["text"]
    first, second = whole[4:7], whole[12:15]
    report = answer(capsys, "demo", PROMPT, "--max-tokens", "24", "--stop", second, "--stop", first)
    assert report["finish_reason"] == "stop"
    assert report["text"] == whole[: min(whole.find(first), whole.find(second))]
    sampled = ["demo", PROMPT, "--max-tokens", "24", "--temperature", "1.5", "--top-k", "50", "--seed"]
    one, again, other = (answer(capsys, *sampled, seed)["tokens"] for seed in ("1", "1", "2"))
    assert one == again != other


def test_a_message_goes_through_the_chat_template_unless_raw(tiny, capsys, monkeypatch):
    model = str(tiny)
    chat = answer(capsys, model, "hi", "--max-tokens", "4")
    assert chat["stats"]["prompt_tokens"] == len("u:hi;a:")
    system = answer(capsys, model, "hi", "--max-tokens", "4", "--system", "ok")
    assert system["stats"]["prompt_tokens"] == len("s:ok;u:hi;a:")
    assert answer(capsys, model, "hi", "--max-tokens", "4", "--raw")["stats"]["prompt_tokens"] == 2
    assert main(["run", model, "hi", "--raw", "--system", "ok"]) == 1
    assert "a system message needs a chat template, and --raw leaves it out" in capsys.readouterr().err


def test_a_broken_model_is_an_error(capsys, monkeypatch, tiny):
    from ferrum_jax.generation import Stats, Step

    broken = Step("", 0, float("nan"), "nonfinite_logits", Stats(2, 1, 0.1, 0.0, 0.0))
    monkeypatch.setattr("ferrum_jax.generation.stream_generate", lambda *_, **__: iter([broken]))
    for extra in ([], ["--json"]):
        assert main(["run", str(tiny), "hi", *extra]) == 1
        assert "error: the model gave logits that are NaN or infinite after 1 tokens" in capsys.readouterr().err


def test_warnings_about_a_checkpoint_are_lines(tmp_path, capsys):
    from tests.support.checkpoint_writer import TinySpec, write_checkpoint

    folder = write_checkpoint(tmp_path / "odd", TinySpec(checkpoint_format="gptq", zeros_version=2))
    assert main(["run", str(folder), "hi", "--max-tokens", "2", "--quiet"]) == 0
    err = capsys.readouterr().err
    assert re.fullmatch(r"warning: zero points are stored as gptq_v2, the metadata says gptq: .*\n", err), err


def test_ctrl_c_ends_an_answer_with_130():
    terminal.heed_interrupts()
    process = subprocess.Popen(
        [*terminal.COMMAND, "run", "demo", "Once upon a time", *LONG],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=terminal.environment(**SLOWLY),
    )
    assert process.stdout
    assert process.stdout.read(4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    assert out.endswith(b"\n")


def test_a_terminal_shows_the_prompt_before_its_continuation():
    with Terminal("run", "demo", "Once upon a time", "--max-tokens", "8") as screen:
        assert screen.exit_code() == 0
        assert "\x1b[2mOnce upon a time\x1b[0m, the King's son" in screen.output
        assert "starting JAX" in screen.output and "8 tokens" in screen.output
    with Terminal("run", "demo", "Once upon a time", "--max-tokens", "8", "--quiet", NO_COLOR="1") as screen:
        assert screen.exit_code() == 0
        assert screen.output.startswith("Once upon a time, the King's son") and "\x1b" not in screen.output


def test_a_conversation_of_texts():
    with Terminal("run", "demo", "--max-tokens", "8", NO_COLOR="1") as screen:
        screen.wait_for("Type the beginning of a text.*\n> ")
        screen.type("Once upon a time\n")
        assert ", the King's son" in screen.wait_for("8 tokens.*\n> ")
        screen.type("\n")
        assert "prompt 13 tokens" in screen.wait_for("8 tokens.*\n> "), "an empty line goes on with the text"
        screen.type("/help\n")
        assert "/system TEXT" in screen.wait_for("Ctrl-C stops an answer.*\n> ")
        screen.type("/system Be brief.\n")
        screen.wait_for("error: a text that is continued has no system message.*\n> ")
        screen.type("/dance\n")
        screen.wait_for("error: /dance is no command; /help lists them.*\n> ")
        screen.type("/clear\n")
        screen.wait_for("Forgotten.\r\n> ")
        screen.type("\n")
        screen.wait_for("^\r\n> ")
        screen.type("/exit\n")
        assert screen.exit_code() == 0


def test_ctrl_c_in_a_conversation_stops_the_answer_and_twice_leaves():
    with Terminal("run", "demo", *LONG, **SLOWLY, NO_COLOR="1") as screen:
        screen.wait_for("\n> ")
        screen.interrupt()
        screen.wait_for("Ctrl-C again leaves.\r\n> ")
        screen.type("Once upon a time\n")
        screen.wait_for(", the King's")
        screen.interrupt()
        screen.wait_for(r"\[interrupted\]\r\n> ")
        screen.interrupt()
        assert screen.exit_code() == 130
        assert "Traceback" not in screen.output
    with Terminal("run", "demo", "--quiet") as screen:
        screen.wait_for("> ")
        screen.type("\x04")
        assert screen.exit_code() == 0


def converse(monkeypatch, lines: list[str], *arguments: str) -> int:
    """A conversation in this process: each line is typed in turn; then Ctrl-D."""
    typed = iter(lines)

    def read(*_) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("ferrum_jax.cli.run.on_terminal", lambda: True)
    return main(["run", *arguments])


def test_a_chat_remembers_until_it_is_cleared(tiny, capsys, monkeypatch):
    from ferrum_jax.cli import conversation

    seen: list[list[dict[str, str]]] = []
    real = conversation.chat_ids
    monkeypatch.setattr(
        conversation, "chat_ids", lambda model, messages: seen.append(messages) or real(model, messages)
    )
    lines = ["hi", "", "yo", "/system", "/system S", "/system", "a", "/clear", " /b", "/exit", "never read"]
    assert converse(monkeypatch, lines, str(tiny), "--max-tokens", "2", "--system", "Z") == 0
    out, err = capsys.readouterr()
    first, second, third, fourth = seen
    system, user = {"role": "system", "content": "Z"}, {"role": "user", "content": "hi"}
    assert first == [system, user]
    assert second[:2] == first and second[2]["role"] == "assistant" and second[3]["content"] == "yo"
    assert out.startswith(second[2]["content"] + "\n"), "what was printed is what is remembered"
    assert third == [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    assert fourth == [{"role": "system", "content": "S"}, {"role": "user", "content": " /b"}]
    assert "The system message is: Z" in err and "The system message is: S" in err
    assert "Type a message" in err and "> " in err, "stdout is no terminal here, so it must not receive the prompts"


def test_a_chat_survives_a_request_it_cannot_serve(tiny, capsys, monkeypatch):
    assert converse(monkeypatch, ["x" * 300, "hi"], str(tiny), "--max-tokens", "2", "--quiet") == 0
    out, err = capsys.readouterr()
    assert "error: prompt 0 has 305 tokens; this model's context is 256" in err
    assert out.strip("\n"), "the next message is answered"


def test_json_does_not_open_a_conversation(tiny, capsys, monkeypatch):
    assert converse(monkeypatch, [], str(tiny), "--json") == 2
    assert "error: --json gives one answer, and there is no PROMPT" in capsys.readouterr().err
