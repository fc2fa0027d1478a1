"""The tasks of the bundled demo model: short prompts with answers that can be checked.

Column arithmetic is what makes them a test of parallel decoding. Every line of an addition depends on
the carry of the line before it, so a decoder that commits too many tokens at once gets it wrong, while
the copied digits and the signs around them are certain early and can be committed together.

Training and held-out prompts are disjoint by construction: a prompt is held out when its checksum says
so (:func:`is_held_out`), whatever the seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

__all__ = ["FAMILIES", "Problem", "draw", "held_out", "is_held_out", "training_stream"]

# fmt: off
WORDS = (
    "apple", "arrow", "badge", "baker", "bell", "bird", "boat", "book", "brick", "bridge", "cabin",
    "candle", "chair", "cloud", "coin", "crown", "desert", "drum", "eagle", "engine", "feather",
    "flute", "forest", "garden", "glass", "hammer", "harbor", "island", "jacket", "kettle", "ladder",
    "lamp", "magnet", "maple", "mirror", "needle", "ocean", "paddle", "paper", "pencil", "piano",
    "pillow", "planet", "rabbit", "ribbon", "river", "saddle", "silver", "spoon", "stone", "table",
    "tiger", "tower", "train", "tunnel", "valley", "violin", "wagon", "water", "willow", "window",
    "winter", "yarn", "zebra",
)
NAMES = (
    "Ada", "Ben", "Chloe", "Dan", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jun", "Kofi", "Lena", "Mia",
    "Noor", "Omar", "Priya",
)
THINGS = (
    "beads", "books", "bricks", "cards", "coins", "marbles", "nails", "pens", "seeds", "shells",
    "stamps", "stones",
)
# fmt: on

_HELD_OUT_SHARE = 32  # one prompt in this many


class Problem(NamedTuple):
    """A prompt, the one right answer to it, and the family it belongs to."""

    prompt: str
    answer: str
    family: str


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _size(rng: random.Random, low: int, high: int, difficulty: float) -> int:
    """A size in low..high, the upper end scaled by difficulty."""
    return rng.randint(low, low + round(difficulty * (high - low)))


def _columns(numbers: list[int]) -> str:
    """Column addition from the units up, each line ``digits + carry = carry digit``, then the sum."""
    lines, carry = [], 0
    for column in range(len(str(max(numbers)))):
        digits = [number // 10**column % 10 for number in numbers]
        total = sum(digits) + carry
        lines.append("+".join(map(str, (*digits, carry))) + f"={total:02d}")
        carry = total // 10
    return "\n".join((*lines, f"Sum: {sum(numbers)}"))


def _operands(rng: random.Random, count: int, low: int, high: int, difficulty: float) -> list[int]:
    """Numbers of which one has the drawn size and the others up to two digits less."""
    longest = _size(rng, low, high, difficulty)
    sizes = [longest] + [max(2, longest - rng.choice((0, 0, 1, 2))) for _ in range(count - 1)]
    rng.shuffle(sizes)
    return [_number(rng, size) for size in sizes]


def _with_nines(rng: random.Random, a: int, b: int) -> tuple[int, int]:
    """The same first number, and a second one of the same size with which many columns sum to nine."""
    share = rng.uniform(0.2, 0.8)
    for column in range(min(len(str(a)), len(str(b))) - 1):
        if rng.random() < share:
            b += (9 - a // 10**column % 10 - b // 10**column % 10) * 10**column
    return a, b


def _add(rng: random.Random, difficulty: float, nines: bool = False) -> tuple[str, str]:
    a, b = _operands(rng, 2, 4, 10, difficulty)
    a, b = _with_nines(rng, a, b) if nines else (a, b)
    return f"Add {a} and {b}.", _columns([a, b])


def _add_three(rng: random.Random, difficulty: float, nines: bool = False) -> tuple[str, str]:
    a, b, c = _operands(rng, 3, 3, 6, difficulty)
    return f"Add {a}, {b} and {c}.", _columns([a, b, c])


def _story(rng: random.Random, difficulty: float, nines: bool = False) -> tuple[str, str]:
    a, b = _operands(rng, 2, 3, 7, difficulty)
    a, b = _with_nines(rng, a, b) if nines else (a, b)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    return f"{name} has {a} {thing} and finds {b} more. How many {thing} now?", _columns([a, b])


def _sort(rng: random.Random, difficulty: float, nines: bool = False) -> tuple[str, str]:
    numbers = [rng.randint(10, 99) for _ in range(_size(rng, 4, 10, difficulty))]
    return f"Sort {' '.join(map(str, numbers))}.", " ".join(map(str, sorted(numbers)))


def _reverse(rng: random.Random, difficulty: float, nines: bool = False) -> tuple[str, str]:
    words = rng.choices(WORDS, k=_size(rng, 6, 16, difficulty))
    return f"Reverse {' '.join(words)}.", " ".join(reversed(words))


# family -> (its share of the training stream, how to draw a prompt and its answer)
_FAMILIES: dict[str, tuple[float, Callable[[random.Random, float, bool], tuple[str, str]]]] = {
    "add": (0.40, _add),
    "add three": (0.22, _add_three),
    "story": (0.10, _story),
    "sort": (0.14, _sort),
    "reverse": (0.14, _reverse),
}
# What the bundled model is measured on. It also practises the others, but does not master them.
FAMILIES = ("add", "story", "reverse")


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out set; such a prompt is never trained on."""
    return zlib.crc32(prompt.encode()) % _HELD_OUT_SHARE == 0


def draw(
    rng: random.Random, family: str, *, difficulty: float = 1.0, held_out: bool = False, nines: bool = False
) -> Problem:
    """One problem of a family, from the held-out or from the training side of the split.

    Args:
        rng: the source of randomness; nothing else is random.
        family: one of :data:`FAMILIES`, or "add three" or "sort".
        difficulty: 0 to 1, how much of the family's range of sizes is used.
        held_out: the side of the split.
        nines: let many columns of an addition of two numbers sum to nine, so that they pass a carry on.
    """
    if family not in _FAMILIES:
        raise ValueError(f"draw: family={family!r} is unknown; there are {', '.join(_FAMILIES)}")
    while True:
        prompt, answer = _FAMILIES[family][1](rng, difficulty, nines)
        if is_held_out(prompt) == held_out:
            return Problem(prompt, answer, family)


def held_out(n: int, seed: int = 0) -> list[Problem]:
    """``n`` distinct held-out problems of full difficulty, the families taking turns."""
    rng = random.Random(seed)
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = draw(rng, FAMILIES[len(found) % len(FAMILIES)], held_out=True)
        found.setdefault(problem.prompt, problem)
    return list(found.values())


def training_stream(
    seed: int,
    difficulty: Callable[[], float] = lambda: 1.0,
    families: Sequence[str] = tuple(_FAMILIES),
    nines: float = 0.0,
) -> Iterator[Problem]:
    """Training problems without end.

    Args:
        seed: of the whole stream.
        difficulty: asked before each problem for its difficulty, 0 to 1.
        families: those to draw from, each with its own share.
        nines: share of the problems drawn with ``nines``, which the held-out ones never are.
    """
    rng = random.Random(seed)
    shares = [_FAMILIES[family][0] for family in families]
    while True:
        family, many = rng.choices(families, shares)[0], nines > 0 and rng.random() < nines
        yield draw(rng, family, difficulty=difficulty(), nines=many)
