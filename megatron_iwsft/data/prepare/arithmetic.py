"""Generate arithmetic records, for the quick start, tests and benchmarks: worked sums with quality scores, short sums, doublings.

A worked sum adds two numbers digit by digit. A fraction of the demonstrations makes an error in one step and carries it through. These
get low scores, except where the simulated judge errs. Everything is determined by the seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_QUESTIONS = (
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "Mia has {a} marbles and finds {b} more. How many has she now?",
    "A bus drives {a} km, then another {b} km. How far is that?",
)


@dataclass(frozen=True)
class ArithmeticSettings:
    """digits: digits of each summand; wrong: fraction of wrong demonstrations; judge_error: fraction that the judge scores the
    wrong way round."""

    digits: int = 2
    wrong: float = 0.3
    judge_error: float = 0.1


def arithmetic_records(count: int, settings: ArithmeticSettings, seed: int) -> Iterator[dict[str, Any]]:
    """`count` records: id, prompt, response, score in [0, 1], answer (the true sum), correct (whether the response is right)."""
    rng = random.Random(seed)
    low, high = 10 ** (settings.digits - 1), 10**settings.digits - 1
    for number in range(count):
        a, b = rng.randint(low, high), rng.randint(low, high)
        wrong_step = rng.randrange(settings.digits) if rng.random() < settings.wrong else None
        response, result = _worked_sum(a, b, settings.digits, wrong_step, rng)
        correct = result == a + b
        looks_right = correct != (rng.random() < settings.judge_error)
        yield {
            "id": f"sum-{seed}-{number}",
            "prompt": rng.choice(_QUESTIONS).format(a=a, b=b),
            "response": response,
            "score": round(rng.uniform(0.5, 1.0) if looks_right else rng.uniform(0.0, 0.5), 3),
            "answer": str(a + b),
            "correct": correct,
        }


def _worked_sum(a: int, b: int, digits: int, wrong_step: int | None, rng: random.Random) -> tuple[str, int]:
    """The text of the worked sum, units first, and its result; step `wrong_step`, if any, contains an error."""
    steps, carry, result = [], 0, 0
    for place in range(digits):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        if place == wrong_step:
            total = (total + rng.randint(1, 8)) % 20
        steps.append(f"{x} + {y} + {carry} = {total}.")
        result += total % 10 * 10**place
        carry = total // 10
    result += carry * 10**digits
    return " ".join([*steps, f"The answer is {result}."]), result


def short_sums(
    count: int, *, digits: int, wrong: float, seed: int, held_out: frozenset[str] = frozenset()
) -> Iterator[dict[str, Any]]:
    """`count` records whose response is only the sum. Numbers are written units first: "740+285=" → "9260" for 47 + 582 = 629.

    So each digit depends only on earlier ones, and its two summands are always the same distance away: small models learn this
    quickly. With their fields `question` and `answer` the records also serve as a benchmark. In a fraction `wrong` of the
    records, one digit of the response is replaced by another. Questions in `held_out` are skipped.
    """
    rng = random.Random(seed)
    while count:
        a, b = rng.randrange(10**digits), rng.randrange(10**digits)
        question = "+".join(f"{n:0{digits}d}"[::-1] for n in (a, b)) + "="
        if question in held_out:
            continue
        answer = response = f"{a + b:0{digits + 1}d}"[::-1]
        if rng.random() < wrong:
            place = rng.randrange(digits + 1)
            other = (int(answer[place]) + rng.randint(1, 9)) % 10
            response = f"{answer[:place]}{other}{answer[place + 1 :]}"
        count -= 1
        yield {"question": question, "response": response, "answer": answer}


def doublings(count: int, *, forgets_to_carry: float, seed: int) -> Iterator[dict[str, Any]]:
    """`count` records of doubling a five-digit number: id, prompt, response, answer (the right one), correct.

    In a fraction `forgets_to_carry` of the records the response doubles every digit without carrying: 24668 for 2 × 17384. A model that
    is trained on them is wrong by conviction: its most likely answer is wrong, always in the same way, and the right one comes second.
    Every number needs a carry, so that both are never the same.
    """
    rng = random.Random(seed)
    made = 0
    while made < count:
        number = rng.randrange(10_000, 50_000)  # whose double has five digits, too
        answer = str(2 * number)
        without_carrying = "".join(str(2 * int(digit) % 10) for digit in str(number))
        if answer == without_carrying:
            continue
        made += 1
        response = without_carrying if rng.random() < forgets_to_carry else answer
        record = {"id": f"doubling-{seed}-{made}", "prompt": f"What is 2 × {number}?", "response": response}
        yield record | {"answer": answer, "correct": response == answer}
