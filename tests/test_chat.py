"""Chat templates: rendered as their authors meant, and stopped when they are not meant well."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from ferrum_jax import chat
from ferrum_jax.chat import render
from ferrum_jax.errors import CheckpointError, RequestError

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello 🦉"}]


def worker_process() -> subprocess.Popen[str]:
    process = chat._worker._process
    assert process is not None
    return process


def test_chatml():
    conversation = [{"role": "system", "content": "Be brief."}, *HELLO]
    told = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello 🦉<|im_end|>\n"
    assert render(CHATML, conversation) == told + "<|im_start|>assistant\n"
    assert render(CHATML, conversation, add_generation_prompt=False) == told


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}\n  {{ m.role }}\n{% endfor %}\n", "  user\n"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
            "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "013",
        ),
        ("a{% generation %}b{{ messages[0].role }}{% endgeneration %}c", "abuserc"),
        ("{{ bos_token }}{{ eos_token }}{{ pad_token }}", "<s></s>"),
        ("{% if enable_thinking is defined and not enable_thinking %}quiet{% endif %}", "quiet"),
        ("{% if tools %}tools{% endif %}{{ documents is none }}", "True"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "1",
        ),
        ("{{ messages[0].content.split(' ')[0].rstrip('o') }}", "Hell"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_templates_find_what_hugging_face_gives_them(template, text):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    assert render(template, HELLO, special_tokens=special, enable_thinking=False) == text


def test_a_template_that_refuses_gives_its_own_words():
    with pytest.raises(RequestError, match="the chat template refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", HELLO)


def test_a_template_that_fails_names_the_failure():
    with pytest.raises(RequestError, match=r"fails on these messages \(UndefinedError: .*check roles and their order"):
        render("{{ messages[5].role.upper() }}", HELLO)


def test_no_template_is_told_to_use_a_prompt():
    with pytest.raises(RequestError, match=r"has no chat template.* give it a plain prompt"):
        render(None, HELLO)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ("hello", "messages is a str; give a list"),
        ([], "there are 0 messages; give 1 to 512"),
        (HELLO * 513, "there are 513 messages"),
        (["hello"], "message 0 is str; give exactly role and content"),
        ([{"role": "user"}], r"message 0 is the keys \['role'\]"),
        ([*HELLO, {"role": "user", "content": "a", "chat_template": "b"}], r"message 1 is the keys .*'chat_template'"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            r"content of message 0 is a list; give a str \(text only\)",
        ),
        ([{"role": 1, "content": "a"}], "role of message 0 is a int"),
        ([{"role": "", "content": "a"}], "role of message 0 is empty"),
        ([{"role": "user", "content": "\udfff"}], r"content of message 0 holds U\+DFFF"),
        ([{"role": "user", "content": "a" * 1_000_001}], "the messages have 1000005 characters"),
    ],
    ids=range(11),
)
def test_malformed_messages_are_refused(messages, text):
    with pytest.raises(RequestError, match=text):
        render(CHATML, messages)


def test_unknown_options_are_refused():
    with pytest.raises(
        RequestError, match="'messages_' is not an option of chat templates here; known are enable_think"
    ):
        render(CHATML, HELLO, messages_="x")
    with pytest.raises(RequestError, match="'chat_template' is not an option"):
        render(CHATML, HELLO, chat_template="x")
    with pytest.raises(RequestError, match="enable_thinking is 'no'; give a bool"):
        render(CHATML, HELLO, enable_thinking="no")


def test_special_tokens_cannot_replace_the_messages():
    assert render("{{ messages[0].role }}", HELLO, special_tokens={"messages": "x"}) == "user"


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.sys }}",
        "{{ strftime_now.__globals__['sys'].modules }}",
        "{{ (messages | tojson).__class__.__base__.__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ''['__cl' + 'ass__'].__base__ }}",
        "{{ (('' | attr('__class__')) | attr('__base__')).x }}",
        "{{ '{0.__class__.__base__.__subclasses__}'.format('').x.y }}",
        "{{ messages.append(1) }}",
    ],
)
def test_the_sandbox_holds(template):
    with pytest.raises((CheckpointError, RequestError), match=r"reaches outside its sandbox|UndefinedError"):
        render(template, HELLO)


def test_the_class_of_a_string_shows_nothing():
    assert render("[{{ ''.__class__ }}]", HELLO) == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_worker_gets_no_secrets_of_the_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET_TOKEN", "x")
    chat._worker.close()
    render(CHATML, HELLO)
    environment = Path(f"/proc/{worker_process().pid}/environ").read_bytes()
    assert b"PYTHONPATH" in environment and b"A_SECRET_TOKEN" not in environment


STOPPED = {
    "text without end": "{% for i in range(90000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "long sum": "{{ " + "1+" * 40_000 + "1 }}",
}
GREEDY = {
    "times": "{{ 'a' * 10**10 }}",
    "center": "{{ 'a'.center(3000000000) }}",
    "center filter": "{{ 'a' | center(3000000000) }}",
    "percent": "{{ '%3000000000d' % 1 }}",
    "format": "{{ '{:3000000000}'.format(1) }}",
    "list": "{{ [1] * 10**10 }}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
}
SLOW = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "power": "{{ (7 ** 9999999) ** 99 }}",
    "lorem ipsum": "{{ lipsum(n=100000000) }}",
}


@pytest.mark.parametrize("template", STOPPED.values(), ids=STOPPED)
def test_endless_templates_are_stopped(template):
    with pytest.raises(CheckpointError, match=r"the chat template was stopped at a limit .*distrust the checkpoint"):
        render(template, HELLO)
    assert render("fine", HELLO) == "fine"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a limit of memory per process")
@pytest.mark.parametrize("template", GREEDY.values(), ids=GREEDY)
def test_greedy_templates_are_stopped_by_the_memory_limit(template, monkeypatch):
    monkeypatch.setattr(chat, "TIME_LIMIT_SECONDS", 60.0)  # taking a gigabyte may last on a busy machine
    with pytest.raises(CheckpointError, match=r"stopped at a limit \(the memory limit\)"):
        render(template, HELLO)


@pytest.mark.parametrize("template", SLOW.values(), ids=SLOW)
def test_slow_templates_are_stopped_in_time(template, monkeypatch):
    render(CHATML, HELLO)
    monkeypatch.setattr(chat, "TIME_LIMIT_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"stopped at a limit \(0.5 s\)"):
        render(template, HELLO)
    assert time.monotonic() - start < 5
    monkeypatch.undo()
    assert render(CHATML, HELLO, add_generation_prompt=False).startswith("<|im_start|>user")


def test_templates_too_long_or_broken_are_refused():
    with pytest.raises(CheckpointError, match="the chat template has 131073 characters; at most 131072"):
        render("a" * 131_073, HELLO)
    with pytest.raises(CheckpointError, match=r"is not valid Jinja \(line 2: .*correct chat_template.jinja"):
        render("a\n{% if %}", HELLO)


def test_rendering_is_fast_once_started():
    render(CHATML, HELLO)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        render(CHATML, HELLO)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


def test_threads_get_their_own_answers():
    answers = {}

    def ask(i: int) -> None:
        answers[i] = render("{{ messages[0].content }}", [{"role": "user", "content": str(i)}])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: str(i) for i in range(16)}


def test_a_dead_worker_is_replaced():
    render(CHATML, HELLO)
    process = worker_process()
    process.terminate()
    process.wait()
    assert render("again", HELLO) == "again"


def test_a_worker_that_dies_while_rendering_is_told(monkeypatch):
    render(CHATML, HELLO)
    process = worker_process()
    killer = threading.Timer(0.2, process.terminate)
    killer.start()
    with pytest.raises(CheckpointError, match=r"stopped at a limit \(the process that renders it ended\)"):
        render(SLOW["nested loops"], HELLO)


def test_an_interrupt_leaves_no_stale_answer(monkeypatch):
    render(CHATML, HELLO)

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    process = worker_process()
    assert process.stdout is not None
    monkeypatch.setattr(process, "stdout", mock.Mock(readline=interrupted, close=process.stdout.close))
    with pytest.raises(KeyboardInterrupt):
        render("stale", HELLO)
    monkeypatch.undo()
    assert render("fresh", HELLO) == "fresh"


def test_a_worker_that_cannot_start_is_told(monkeypatch, tmp_path):
    chat._worker.close()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RequestError, match=r"rendered by a second Python process, .* did not start"):
        render(CHATML, HELLO)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RequestError, match="the process that renders chat templates did not start"):
        render(CHATML, HELLO)
    monkeypatch.undo()
    assert render("fine", HELLO) == "fine"


def test_a_plain_script_ends_cleanly():
    script = "from ferrum_jax import chat\nprint(chat.render('ok', [{'role': 'user', 'content': 'a'}]))"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("ok\n", "", 0)
