"""Formal languages: read a string and say after each symbol which symbols may come next (Table 5 of Nested Learning).

The languages of Bhattamishra et al. (2009.11264) as Irie et al. (2310.16076) put the question: at each place one class
out of a few, learned with a softmax cross-entropy; a string counts as right where all of its answers are. For parity,
(aa)* and (abab)* a model has to count modulo 2 or 4 at lengths that it never saw; a linear recurrence needs negative or
complex eigenvalues for that. The other three take counters without bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import pad

from nestlearn.evaluation.tasks.checks import check_whole
from nestlearn.evaluation.tasks.task import IGNORED, Examples, Task

PADDING, BEGIN, FIRST_SYMBOL = 0, 1, 2
END = "$"  # in a set of symbols that may come next: the string may end here

# Shortest and longest string: as in training, and longer than any seen there.
BINS = ((1, 50), (51, 100))

Draw = Callable[[Tensor, int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Language:
    """What a language is made of.

    Attributes:
        symbols: its alphabet.
        sets: the classes, each the symbols that may come next, with `END` where the string may end.
        unit: it has strings of this length and its multiples, and of no other.
        draw: (lengths (B,), T, generator) -> numbers of symbols (B, T), anything after a row's length, and classes
            (B, T + 1): before the first symbol and after each.
    """

    symbols: str
    sets: tuple[str, ...]
    unit: int
    draw: Draw


@dataclass(frozen=True, kw_only=True)
class FormalLanguage(Task):
    """Strings of one language, and after each prefix the class of symbols that may come next.

    Tokens: 0 is padding, 1 begins a string, 2 and above are the symbols of `LANGUAGES[language].symbols`, in their
    order. The target at a token is the class of the prefix that ends there, a number into `LANGUAGES[language].sets`;
    at the begin symbol, which the literature does without, that of the empty prefix. For parity, the strings with an
    even number of ones, the class is the parity of the prefix. Bhattamishra et al. predict the members of the set each
    on its own, a k-hot vector; that is the same information.

    A length is drawn uniformly from those that the language has in the range, then a string uniformly from the
    language's strings of that length. Irie et al. have lists of strings whose lengths are not uniform, and give the
    range of a^n b^n and a^n b^n c^n for n; here it is the length for all languages.

    Attributes:
        language: one of `LANGUAGES`.
        shortest, longest: range of the strings' lengths in symbols, both included. The begin symbol comes on top.

    Raises:
        ValueError: for an unknown language, or if it has no string in the range.
    """

    language: str
    shortest: int = BINS[0][0]
    longest: int = BINS[0][1]

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise ValueError(f"language: expected one of {', '.join(map(repr, LANGUAGES))}; got {self.language!r}")
        for name in ("shortest", "longest"):
            check_whole(name, getattr(self, name), 1)
        if not self.string_lengths():
            unit = LANGUAGES[self.language].unit
            raise ValueError(
                f"shortest, longest: {self.language} has no string of {self.shortest} to {self.longest} symbols; "
                f"expected a range with a multiple of {unit}, for example 1 to {max(unit, self.shortest, self.longest)}"
            )

    @property
    def vocab_size(self) -> int:
        own = LANGUAGES[self.language]
        return max(FIRST_SYMBOL + len(own.symbols), len(own.sets))

    def string_lengths(self) -> range:
        """The lengths in the range that the language has strings of."""
        unit = LANGUAGES[self.language].unit
        return range(-(-self.shortest // unit) * unit, self.longest + 1, unit)

    def sample(self, count: int, generator: torch.Generator) -> Examples:
        own = LANGUAGES[self.language]
        existing = torch.tensor(self.string_lengths())
        lengths = existing[torch.randint(len(existing), (count,), generator=generator)]
        width = int(existing[-1])
        symbols, targets = own.draw(lengths, width, generator)
        tokens = torch.cat([torch.full((count, 1), BEGIN), FIRST_SYMBOL + symbols], dim=1)
        after = torch.arange(1 + width) > lengths[:, None]
        return Examples(tokens.masked_fill(after, PADDING), targets.masked_fill(after, IGNORED), 1 + lengths)


def draw_parity(lengths: Tensor, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bits, the last of which makes the number of ones even."""
    bits = torch.randint(2, (len(lengths), width), generator=generator)
    last = lengths[:, None] - 1
    bits = bits.masked_fill(torch.arange(width) >= last, 0)
    bits.scatter_(1, last, bits.sum(1, keepdim=True) % 2)
    return bits, pad(bits.cumsum(1) % 2, (1, 0))


def draw_repeated(
    lengths: Tensor, width: int, _: torch.Generator, *, word: tuple[int, ...], classes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """A word again and again; classes[i] is the class where i symbols of it are read."""
    place = (torch.arange(1 + width) % len(word)).expand(len(lengths), -1)
    return torch.tensor(word)[place[:, :-1]], torch.tensor(classes)[place]


def draw_blocks(lengths: Tensor, width: int, _: torch.Generator, *, kinds: int) -> tuple[Tensor, Tensor]:
    """n symbols of each kind, one kind after the other; once the second kind has begun, all that follows is certain."""
    n = lengths[:, None] // kinds
    place = torch.arange(1 + width)
    finished = place // n
    return finished[:, :-1], torch.where(place > n, 1 + finished, (place > 0).long())


def draw_shuffle(lengths: Tensor, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two well-bracketed words, one of () and one of [], shuffled into each other: uniformly among all such strings.

    Reading such a string is a walk in the quarter plane, x open brackets of one kind and y of the other, from (0, 0)
    back to (0, 0). By reflection, (x + 1) (y + 1) r! (r + 2)! / (((r - x - y) / 2)! ((r + x + y + 4) / 2)!
    ((r - x + y + 2) / 2)! ((r + x - y + 2) / 2)!) walks of r steps lead home from (x, y). A step is drawn with the
    fraction of these that begin with it.
    """
    x, y = torch.zeros_like(lengths), torch.zeros_like(lengths)
    symbols = torch.zeros(len(lengths), width, dtype=torch.long)
    classes = torch.zeros(len(lengths), 1 + width, dtype=torch.long)
    for place in range(width):
        r = lengths - place
        outward, inward = r - x - y, r + x + y + 4
        along, across = r - x + y + 2, r + x - y + 2
        weights = torch.stack(
            [
                (x + 2) * (y + 1) * outward * along,
                x * (y + 1) * inward * across,
                (y + 2) * (x + 1) * outward * across,
                y * (x + 1) * inward * along,
            ],
            dim=1,
        )
        going = r > 0
        weights = weights.where(going[:, None], torch.ones_like(weights))
        step = torch.multinomial(weights.double(), 1, generator=generator)[:, 0]
        change = going.long() * (1 - 2 * (step % 2))
        x, y = x + change * (step < 2), y + change * (step >= 2)
        symbols[:, place] = step
        classes[:, 1 + place] = (x > 0) + 2 * (y > 0)
    return symbols, classes


LANGUAGES: Mapping[str, Language] = MappingProxyType(
    {
        "parity": Language(symbols="01", sets=("01$", "01"), unit=1, draw=draw_parity),
        "(aa)*": Language(
            symbols="a", sets=("a$", "a"), unit=2, draw=partial(draw_repeated, word=(0, 0), classes=(0, 1))
        ),
        "(abab)*": Language(
            symbols="ab",
            sets=("a$", "b", "a"),
            unit=4,
            draw=partial(draw_repeated, word=(0, 1, 0, 1), classes=(0, 1, 2, 1)),
        ),
        "a^n b^n": Language(symbols="ab", sets=("a", "ab", "b", "$"), unit=2, draw=partial(draw_blocks, kinds=2)),
        "a^n b^n c^n": Language(
            symbols="abc", sets=("a", "ab", "b", "c", "$"), unit=3, draw=partial(draw_blocks, kinds=3)
        ),
        "shuffle-2": Language(symbols="()[]", sets=("([$", "()[", "([]", "()[]"), unit=2, draw=draw_shuffle),
    }
)
