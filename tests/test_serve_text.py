from __future__ import annotations

import random

from fastdllm_ext.serve.text import UNFINISHED, Detokenizer, Speech, StopStrings

TEXT = "a ä € 𝄞 👩‍👩‍👧 e\u0301 ß"


def of_bytes(tokens: list[int]) -> str:
    """A tokenizer of bytes; 256 is a special token."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def of_words(tokens: list[int]) -> str:
    """A tokenizer that writes a blank before every word but the first, as SentencePiece's do."""
    return " ".join(f"w{token}" for token in tokens)


def split(rng: random.Random, whole: list[int] | str) -> list[list[int] | str]:
    """Any cut into pieces, empty ones too."""
    cuts = sorted(rng.randint(0, len(whole)) for _ in range(rng.randint(0, 8)))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def pushed(decode: object, pieces: list[list[int] | str]) -> list[str]:
    detokenizer = Detokenizer(decode)  # type: ignore[arg-type]
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.rest()]  # type: ignore[arg-type]


def test_text_comes_in_whole_characters() -> None:
    for seed in range(50):
        texts = pushed(of_bytes, split(random.Random(seed), list(TEXT.encode())))
        assert "".join(texts) == TEXT
        assert UNFINISHED not in "".join(texts[:-1])


def test_a_character_is_given_out_with_its_last_token() -> None:
    a, b, c, d = "𝄞".encode()
    assert pushed(of_bytes, [[a], [b], [c], [d], [97]]) == ["", "", "", "𝄞", "a", ""]
    assert pushed(of_bytes, [[97, a], [b, c], [d, 98]]) == ["a", "", "𝄞b", ""]


def test_bytes_that_are_no_text_come_as_they_are_decoded_together() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        tokens = [rng.choice([*"é€𝄞".encode(), 97, 128, 255, 256]) for _ in range(rng.randint(0, 40))]
        assert "".join(pushed(of_bytes, split(rng, tokens))) == of_bytes(tokens)


def test_text_that_depends_on_the_token_before() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        tokens = [rng.randrange(100) for _ in range(20)]
        assert "".join(pushed(of_words, split(rng, tokens))) == of_words(tokens)


def test_a_call_decodes_no_more_than_the_last_ones() -> None:
    lengths = []

    def decode(tokens: list[int]) -> str:
        lengths.append(len(tokens))
        return of_bytes(tokens)

    pushed(decode, [[97] * 32] * 50)
    assert max(lengths) == 64


class Letters:
    """A tokenizer that knows of no special tokens."""

    def decode(self, tokens: list[int], **arguments: object) -> str:
        return "".join(map(chr, tokens))


def test_the_end_of_text_is_no_text() -> None:
    speech = Speech(Letters(), [33])
    assert speech([72, 105, 33]) == "Hi"
    assert speech.whole([72, 105, 33]) == "Hi!"
    assert speech.name(33) == "!"


def passed(strings: list[str], pieces: list[str]) -> tuple[str, bool]:
    stops, text = StopStrings(strings), ""
    for piece in pieces:
        text += stops.push(piece)
        if stops.found:
            return text, True
    return text + stops.rest(), False


def test_an_answer_ends_before_the_first_stop_string() -> None:
    assert passed(["cd", "e"], ["abcdef"]) == ("ab", True)
    assert passed(["e", "cd"], ["abcdef"]) == ("ab", True)
    assert passed(["x"], ["abcdef"]) == ("abcdef", False)
    assert passed([], ["abc", "def"]) == ("abcdef", False)
    assert passed(["abcx", "c"], ["abcx"]) == ("ab", True), "the one that is complete first"
    assert passed(["bc", "abc"], ["xabc"]) == ("x", True), "of two that end together the longer"


def test_what_may_become_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["\n\nQ:"])
    assert stops.push("an answer\n") == "an answer"
    assert stops.push("\n") == ""
    assert stops.push("A") == "\n\nA"
    assert stops.push("\n\n\n") == "\n"
    assert stops.push("Q") == ""
    assert not stops.found
    assert stops.push(": more") == ""
    assert stops.found
    assert stops.rest() == ""


def test_pieces_change_nothing() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        text = "".join(rng.choices("aab", k=rng.randint(0, 30)))
        strings = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
        ends = [text.find(stop) + len(stop) for stop in strings if stop in text]
        first = min(ends, default=len(text))
        begin = min((first - len(stop) for stop in strings if text[:first].endswith(stop)), default=len(text))
        assert passed(strings, split(rng, text)) == (text[:begin], bool(ends))  # type: ignore[arg-type]
