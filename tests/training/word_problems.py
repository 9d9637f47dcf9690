"""Word problems in the form of GSM8K: a question, and an answer with its rationale, the calculator's marks and `#### n`.

`python word_problems.py` prints the 200 problems of word_problems.jsonl. They are ours, under the MIT licence: no line of GSM8K is among
them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

NAMES = ("Ada", "Bela", "Chidi", "Dana", "Emre", "Femi", "Greta", "Hugo", "Ines", "Jun")
THINGS = ("apples", "pencils", "shells", "stamps", "marbles", "cookies", "beads", "tickets")
Problem = tuple[str, str, int]  # question, rationale, answer


def shopping(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    boxes, each, given = rng.randint(2, 9), rng.randint(3, 12), rng.randint(1, 5)
    total = boxes * each
    asked = f"{name} buys {boxes} boxes with {each} {thing} each and gives {given} {thing} away. How many {thing} does {name} have left?"
    first = f"The boxes hold {boxes}*{each}=<<{boxes}*{each}={total}>>{total} {thing}."
    return asked, f"{first}\n{total}-{given}=<<{total}-{given}={total - given}>>{total - given} {thing} are left.", total - given


def saving(rng: random.Random) -> Problem:
    name, weeks, each, start = rng.choice(NAMES), rng.randint(3, 12), rng.randint(2, 15), rng.randint(10, 60)
    saved = weeks * each
    asked = f"{name} has ${start} and saves ${each} a week. How many dollars does {name} have after {weeks} weeks?"
    first = f"In {weeks} weeks {name} saves {weeks}*{each}=$<<{weeks}*{each}={saved}>>{saved}."
    return asked, f"{first}\nThat makes {start}+{saved}=$<<{start}+{saved}={start + saved}>>{start + saved}.", start + saved


def sharing(rng: random.Random) -> Problem:
    name, thing, friends, each = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 8), rng.randint(2, 11)
    kept = rng.randint(1, 9)
    total = friends * each + kept
    asked = (
        f"{name} has {total} {thing}, keeps {kept} of them and shares the rest equally among {friends} friends. "
        f"How many {thing} does each friend get?"
    )
    first = f"{name} shares {total}-{kept}=<<{total}-{kept}={total - kept}>>{total - kept} {thing}."
    return asked, f"{first}\nEach friend gets {total - kept}/{friends}=<<{total - kept}/{friends}={each}>>{each} {thing}.", each


def earning(rng: random.Random) -> Problem:
    name, hours, rate, days = rng.choice(NAMES), rng.randint(2, 8), rng.randint(9, 25), rng.randint(5, 20)
    daily = hours * rate
    asked = f"{name} works {hours} hours a day for ${rate} an hour. How many dollars does {name} earn in {days} days?"
    first = f"{name} earns {hours}*{rate}=$<<{hours}*{rate}={daily}>>{daily} a day."
    total = f"{daily * days:,}"  # as GSM8K writes large numbers
    return asked, f"{first}\nIn {days} days that is {daily}*{days}=$<<{daily}*{days}={daily * days}>>{total}.", daily * days


FORMS: tuple[Callable[[random.Random], Problem], ...] = (shopping, saving, sharing, earning)


def problems(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield records with different questions."""
    rng, seen = random.Random(seed), set()
    while len(seen) < count:
        question, rationale, answer = FORMS[len(seen) % len(FORMS)](rng)
        if question not in seen:
            seen.add(question)
            yield {"question": question, "answer": f"{rationale}\n#### {answer:,}"}


if __name__ == "__main__":
    for record in problems(200):
        print(json.dumps(record))
