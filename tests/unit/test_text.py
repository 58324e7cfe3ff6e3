"""Text that is shown while it is made adds up to the text of all tokens, cut at the first stop string."""

import random

import pytest

from ee_tuning.generation.text import TextStream


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def shown(text: str, stop: tuple[str, ...] = (), prompt: list[int] | None = None) -> list[str]:
    """What a stream shows for each byte of `text`, and at the end."""
    stream, parts = TextStream(decode, list(b"def main(") if prompt is None else prompt, stop), []
    for byte in text.encode():
        parts.append(stream.push(byte))
        if stream.has_stopped:
            break
    return [*parts, stream.flush()]


def test_characters_of_several_bytes_are_shown_whole():
    """Half a character shows as a replacement mark that never goes away."""
    text = "naïve — 速い 🚀 " * 8
    assert "".join(shown(text)) == text
    assert all("�" not in part for part in shown(text))


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one two three", ("two",), "one "),
        ("aaab", ("aab",), "a"),
        ("x = 1\n\ndef f", ("\n\n", "def"), "x = 1"),
        ("never", ("no such",), "never"),
        ("ends with sto", ("stop",), "ends with sto"),
    ],
)
def test_stop_string_is_cut_and_never_seen(text, stop, wanted):
    """The beginning of a stop string that was already on the screen."""
    assert "".join(shown(text, stop)) == wanted


def test_random_texts_and_stops_agree_with_a_search_of_the_whole():
    """A stop string that lies across the place where decoding restarts."""
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("abé ") for _ in range(rng.randrange(1, 80)))
        stop = tuple("".join(rng.choice("abé ") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(3)))
        # The stop string that is complete first wins; of those complete at the same byte, the one that begins first.
        ends = sorted((text.find(s) + len(s), text.find(s)) for s in stop if s in text)
        assert "".join(shown(text, stop)) == (text[: ends[0][1]] if ends else text), (text, stop)


def test_space_at_the_beginning_of_a_completion_is_kept():
    """Tokenizers of the SentencePiece kind drop the space that a text begins with, and a completion does not begin a
    text.
    """
    words = ["The", " laws", " are", " there", " three", " of", " them"]
    stream = TextStream(lambda ids: "".join(words[i] for i in ids).removeprefix(" "), [0, 1, 2])
    assert [stream.push(3), stream.push(4)] == [" there", " three"]
    for _ in range(30):
        stream.push(5)
    assert stream.flush() == "" and stream.text == " there three" + " of" * 30


def test_stop_string_before_half_a_character_is_found():
    """One token may end a stop string and begin a character whose other bytes never come."""
    pieces = [b"go ", b"stop\xe9"]
    stream = TextStream(lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"), [], ("stop",))
    assert stream.push(0) + stream.push(1) + stream.flush() == "go " and stream.has_stopped


@pytest.mark.parametrize("prompt", ["", "naïve "])
def test_text_made_at_once_is_the_text_made_token_by_token(prompt: str) -> None:
    """A completion that nobody watches, and its text differs: a character cut, a space of the prompt's end lost."""
    ids, said = list(prompt.encode()), [*"déjà vu, 𝄞 und so weiter und so fort".encode()[:-1], 0xF0, 0x9D]
    watched, unwatched = TextStream(decode, ids), TextStream(decode, ids)
    for token in said:
        watched.push(token)
        unwatched.hold(token)
    watched.flush()
    assert unwatched.flush() == unwatched.text == watched.text


def decode_by_fallback(ids: list[int]) -> str:
    """As tokenizers' ByteFallback: a run of bytes that is no UTF-8 as a whole is a mark for each of them."""
    try:
        return bytes(ids).decode()
    except UnicodeDecodeError:
        return "�" * len(ids)


def test_characters_of_bytes_survive_a_prompt_that_ends_in_such_characters() -> None:
    """The prompt's last tokens begin amid a character: the decoder makes marks of the whole run, and of the completion
    with it.
    """
    text = "日本語のテキスト" * 4
    for place in range(1, 8):
        prompt, said = text[:place].encode(), text[place:].encode()
        stream = TextStream(decode_by_fallback, list(prompt))
        assert "".join([*map(stream.push, said), stream.flush()]) == text[place:] == stream.text
        held = TextStream(decode_by_fallback, list(prompt))
        for token in said:
            held.hold(token)
        assert held.flush() == text[place:]


def test_a_last_character_that_is_cut_spoils_no_other() -> None:
    """max_tokens cuts a character, and the whole ones before it in a run of bytes turn into marks."""
    said = [*"日本語".encode(), *"の".encode()[:2]]
    watched, unwatched = TextStream(decode_by_fallback, list(b"say")), TextStream(decode_by_fallback, list(b"say"))
    for token in said:
        unwatched.hold(token)
    assert "".join([*map(watched.push, said), watched.flush()]) == watched.text == unwatched.flush() == "日本語��"


MARKS = {1: "<|eot|>", 2: "<|im_end|>"}


@pytest.mark.parametrize(
    ("said", "stop", "wanted"),
    [
        (["go", 1, "on"], ("<|eot|>",), "go"),
        (["go", 1, "on"], ("<|im_end|>",), "goon"),
        (["go", 2, "\n", "on"], ("<|im_end|>\n",), "go"),
        (["go", 2, "x", "\non"], ("<|im_end|>\n",), "gox\non"),
        (["a\n", 1, "b"], ("\n<|eot|>",), "a"),
        (["a\n", "b", 1], ("\n<|eot|>",), "a\nb"),
        (["go", 1, 2, "on"], ("<|eot|><|im_end|>",), "go"),
        (["go", 2, 1, "on"], ("<|eot|><|im_end|>",), "goon"),
        (["go", 1, "on"], ("oo",), "g"),
        (["go", 1], ("<|eot|>x", "never"), "go"),
        ([1, "x"], ("<|eot|>",), ""),
    ],
)
def test_stop_strings_that_hold_special_tokens_stop(said: list[int | str], stop: tuple[str, ...], wanted: str) -> None:
    """Text is decoded without special tokens: a stop string with one never stops, and nobody hears why."""

    def without(ids: list[int]) -> str:
        return bytes(each for each in ids if each not in MARKS).decode(errors="replace")

    stream, parts = TextStream(without, list(b"say"), stop, MARKS), []
    for token in (byte for part in said for byte in ([part] if isinstance(part, int) else part.encode())):
        parts.append(stream.push(token))
        if stream.has_stopped:
            break
    assert "".join([*parts, stream.flush()]) == wanted == stream.text
    assert stream.has_stopped is (wanted != "".join(part for part in said if isinstance(part, str)) or said == [1, "x"])
