"""Text before a stop string comes out whole, the stop string never, however tokens cut it."""

from hypothesis import given
from hypothesis import strategies as st

from ferrum_jax.stopping import StopText


class Characters:
    """A text stream whose tokens are code points."""

    def push(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


def run(text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    stream = StopText(Characters(), stop)  # pyright: ignore[reportArgumentType]
    pieces = []
    for character in text:
        pieces.append(stream.push(ord(character)))
        if stream.stopped:
            return pieces, True
    pieces.append(stream.flush())
    return pieces, stream.stopped


@given(text=st.text("ab", max_size=24), stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_where_the_first_complete_stop_string_begins(text: str, stop: list[str]) -> None:
    pieces, stopped = run(text, tuple(stop))
    # The first moment at which any stop string is complete decides, as it would for a reader of the stream.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    assert stopped == bool(ends)
    if ends:
        seen = text[: ends[0]]
        assert "".join(pieces) == seen[: min(seen.find(s) for s in stop if s in seen)]
    else:
        assert "".join(pieces) == text


def test_what_could_become_a_stop_string_is_held_back() -> None:
    pieces, stopped = run("an END", ("END",))
    assert pieces == ["a", "n", " ", "", "", ""] and stopped
    pieces, stopped = run("an ENd", ("END",))
    assert pieces == ["a", "n", " ", "", "", "ENd", ""] and not stopped


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert run("abc", ()) == (["a", "b", "c", ""], False)
