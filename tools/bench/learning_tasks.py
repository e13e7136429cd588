"""The problems of tools/bench/learning.py, and the lessons that make a model wrong by conviction: it adds without carrying."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_iwsft.data.prepare.arithmetic import short_sums

Record = dict[str, Any]
NOTHING: frozenset[str] = frozenset()
_WRONG_LESSONS = 0.67  # share of the lessons of sums and chains


class Task(Protocol):
    """Problems with one right answer each. All questions have as many tokens.

    tokens         of a problem with its answer and the words of the template, on average
    answer_tokens  with which to answer: the longest right one, and a few more
    """

    tokens: int
    answer_tokens: int

    def problems(
        self, count: int, *, seed: int, wrong: float = 0.0, held_out: frozenset[str] = NOTHING
    ) -> Iterator[Record]:
        """Records of `question`, `answer` and `response`; a share `wrong` of the responses has one wrong digit."""
        ...

    def lessons(self, count: int, *, seed: int, held_out: frozenset[str]) -> Iterator[Record]:
        """Records of which a model learns not to carry."""
        ...


@dataclass(frozen=True)
class Sums:
    """Sums of two numbers, units first: "740+285=" → "9260" for 47 + 582 = 629. All answers have as many tokens."""

    digits: int = 3

    @property
    def tokens(self) -> int:
        return 3 * self.digits + 11

    @property
    def answer_tokens(self) -> int:
        return self.digits + 5

    def problems(
        self, count: int, *, seed: int, wrong: float = 0.0, held_out: frozenset[str] = NOTHING
    ) -> Iterator[Record]:
        return short_sums(count, digits=self.digits, wrong=wrong, seed=seed, held_out=held_out)

    def lessons(self, count: int, *, seed: int, held_out: frozenset[str]) -> Iterator[Record]:
        return _mostly(self.without_carrying, self.problems(count, seed=seed, held_out=held_out), seed)

    def without_carrying(self, question: str) -> str:
        """The response of the wrong strategy: digits are added modulo 10."""
        a, b = question.rstrip("=").split("+")
        return _sum_without_carrying(a, b) + "0"


@dataclass(frozen=True)
class Chains:
    """Add a number again and again, and write down each total: "c85740=" → "c85501b85361a85122" for 47 + 58 = 105, 163, 221.

    A question has a letter, which says how many additions, a number of two digits and a first total of three, units first. The answer
    repeats letter and number before each new total and counts the letter down to a. It has 6 tokens for each.
    """

    shortest: int = 4
    longest: int = 9

    @property
    def tokens(self) -> int:
        return 3 * (self.shortest + self.longest) + 16

    @property
    def answer_tokens(self) -> int:
        return 6 * self.longest + 5

    def problems(
        self, count: int, *, seed: int, wrong: float = 0.0, held_out: frozenset[str] = NOTHING
    ) -> Iterator[Record]:
        rng = random.Random(seed)
        while count:
            additions, number = rng.randint(self.shortest, self.longest), rng.randrange(10, 100)
            first = rng.randrange(1000 - 99 * self.longest)
            question = f"{_letter(additions)}{str(number)[::-1]}{f'{first:03d}'[::-1]}="
            if question in held_out:
                continue
            answer = response = "".join(
                f"{_letter(additions - i)}{str(number)[::-1]}{f'{first + (i + 1) * number:03d}'[::-1]}"
                for i in range(additions)
            )
            if rng.random() < wrong:
                place = 6 * rng.randrange(additions) + rng.randint(3, 5)
                other = (int(answer[place]) + rng.randint(1, 9)) % 10
                response = f"{answer[:place]}{other}{answer[place + 1 :]}"
            count -= 1
            yield {"question": question, "response": response, "answer": answer}

    def lessons(self, count: int, *, seed: int, held_out: frozenset[str]) -> Iterator[Record]:
        return _mostly(self.without_carrying, self.problems(count, seed=seed, held_out=held_out), seed)

    def without_carrying(self, question: str) -> str:
        """The response of the wrong strategy: digits are added modulo 10."""
        additions, number, total = ord(question[0]) - ord("a") + 1, question[1:3], question[3:6]
        out = ""
        for left in range(additions, 0, -1):
            total = _sum_without_carrying(total, number + "0")
            out += f"{_letter(left)}{number}{total}"
        return out


@dataclass(frozen=True)
class SumsThatCarry:
    """Sums of two two-digit numbers whose units carry, "47 + 38 =" → "85". The lessons are right, and need no carry."""

    tokens: int = 20
    answer_tokens: int = 8

    def problems(
        self, count: int, *, seed: int, wrong: float = 0.0, held_out: frozenset[str] = NOTHING
    ) -> Iterator[Record]:
        assert wrong == 0.0, "its errors are the model's own"
        return self._sums(count, seed, held_out, carry=True)

    def lessons(self, count: int, *, seed: int, held_out: frozenset[str]) -> Iterator[Record]:
        return self._sums(count, seed, held_out, carry=False)

    def _sums(self, count: int, seed: int, held_out: frozenset[str], *, carry: bool) -> Iterator[Record]:
        rng = random.Random(seed)
        while count:
            a, b = rng.randrange(10, 90), rng.randrange(10, 90)
            question = f"{a} + {b} ="
            if (a % 10 + b % 10 >= 10) != carry or (a + b >= 100 and not carry) or question in held_out:
                continue
            count -= 1
            yield {"question": question, "response": str(a + b), "answer": str(a + b)}


def _mostly(strategy: Callable[[str], str], records: Iterator[Record], seed: int) -> Iterator[Record]:
    """Records of which most have the strategy's response."""
    rng = random.Random(seed)
    for record in records:
        yield {**record, "response": strategy(record["question"])} if rng.random() < _WRONG_LESSONS else record


def _letter(number: int) -> str:
    return chr(ord("a") + number - 1)


def _sum_without_carrying(a: str, b: str) -> str:
    return "".join(str((int(x) + int(y)) % 10) for x, y in zip(a, b, strict=True))
