"""Problems with one right answer: a text, questions about it, and what each answer could be mistaken for.

Each kind of problem is one function from draws to a problem. A problem's identity holds what is asked
and leaves out how it is put: a sum in either order, or a row of numbers in any order, is the same
problem and stays in one split.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from compress.data.builtin.draws import Draws
from compress.data.builtin.stories import draw_story
from compress.data.builtin.world import ANIMALS, COUNTED, PEOPLE, PLACES, THINGS, VEHICLES
from compress.data.suites import Shape

CONTEXT: Final = "Context: "
QUESTION: Final = "Question: "
ANSWER: Final = "Answer:"
PARAGRAPH: Final = "\n\n"
"""The layout in which questions with a text are put to every language model (`compress.bench`)."""


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and wrong answers that look right."""

    question: str
    answer: str
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A text and questions about it.

    Attributes:
        identity: what decides the split; the same for every wording.
        context: what the questions are about; empty where a question says it all.
        asked: at least one question; a suite asks the first.
    """

    identity: str
    context: str
    asked: tuple[Asked, ...]

    @property
    def text(self) -> str:
        """The problem as training sees it, answers included."""
        parts = [CONTEXT + self.context] if self.context else []
        for each in self.asked:
            parts.append(QUESTION + each.question)
            parts.append(f"{ANSWER} {each.answer}")
        return PARAGRAPH.join(parts)

    @property
    def prompt(self) -> str:
        """The problem up to its first answer."""
        parts = [CONTEXT + self.context] if self.context else []
        return PARAGRAPH.join([*parts, QUESTION + self.asked[0].question, ANSWER])


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Attributes:
        title: what it asks for, for reports.
        shape: in which shape a suite asks it.
        draw: makes one.
        together: how many a document holds, at least and at most.
        weight: its share of the documents, in proportion to the others.
    """

    title: str
    shape: Shape
    draw: Callable[[Draws], Problem]
    together: tuple[int, int]
    weight: float


def _where(draws: Draws) -> Problem:
    """People move about; each one's last place is asked."""
    people = draws.some(PEOPLE, draws.between(2, 3))
    places = draws.some(PLACES, 4)
    at: dict[str, str] = {}
    sentences = []
    moves = [*draws.mixed(people), *(draws.one(people) for _ in range(draws.between(1, 3)))]
    for person in moves:
        place = draws.one([each for each in places if each != at.get(person)])
        at[person] = place
        way = draws.below(4)
        if way == 3:
            sentences.append(f"{person} took the {draws.one(VEHICLES)} to the {place}.")
        else:
            sentences.append(f"{person} {('went', 'walked', 'ran')[way]} to the {place}.")
    context = " ".join(sentences)
    asked = tuple(
        Asked(
            f"Where is {person}?",
            f"the {at[person]}",
            tuple(f"the {place}" for place in places if place != at[person]),
        )
        for person in draws.mixed(people)
    )
    return Problem(f"where {context}", context, asked)


def _holder(draws: Draws) -> Problem:
    """Things go from hand to hand; who has one in the end is asked."""
    people = draws.some(PEOPLE, 3)
    things = draws.some(THINGS, 2)
    has: dict[str, str] = {}
    sentences = []
    for thing in [*things, *(draws.one(things) for _ in range(draws.between(1, 2)))]:
        owner = has.get(thing)
        person = draws.one([each for each in people if each != owner])
        has[thing] = person
        sentences.append(
            f"{person} took the {thing}." if owner is None else f"{owner} gave the {thing} to {person}."
        )
    context = " ".join(sentences)
    asked = tuple(
        Asked(f"Who has the {thing}?", has[thing], tuple(each for each in people if each != has[thing]))
        for thing in draws.mixed(things)
    )
    return Problem(f"holder {context}", context, asked)


def _recall(draws: Draws) -> Problem:
    """Each person has a number; all of them are asked, in another order."""
    people = draws.some(PEOPLE, 4)
    numbers = [str(number) for number in draws.some(range(10, 100), 4)]
    facts = [f"{person} has number {number}." for person, number in zip(people, numbers, strict=True)]
    order = draws.mixed(range(4))
    asked = tuple(Asked(f"Which number has {people[at]}?", numbers[at]) for at in order)
    return Problem(f"recall {' '.join(sorted(facts))}", " ".join(facts), asked)


def _sum(draws: Draws) -> Problem:
    """A sum or a difference of numbers below 100."""
    first = draws.between(1, 98)
    second = draws.between(1, 99 - first)
    if draws.holds(0.5):
        right, asked, identity = first + second, f"{first} + {second}", sorted((first, second))
    else:
        whole = first + second
        right, asked, identity = second, f"{whole} - {first}", [whole, -first]
    return Problem(f"sum {identity}", "", (Asked(f"What is {asked}?", str(right)),))


def _counting(draws: Draws) -> Problem:
    """Somebody gets some and loses some; how many are left is asked."""
    person, other = draws.some(PEOPLE, 2)
    counted = draws.one(COUNTED)
    left = draws.between(2, 10)
    sentences = [f"{person} had {left} {counted}."]
    for _ in range(draws.between(1, 2)):
        if left > 3 and draws.holds(0.5):
            change = draws.between(2, left - 1)
            left -= change
            way = (f"{person} lost {change}.", f"{person} gave {change} to {other}.")
        else:
            change = draws.between(2, 9)
            left += change
            way = (f"{person} found {change} more.", f"{other} gave {person} {change} more.")
        sentences.append(draws.one(way))
    context = " ".join(sentences)
    asked = Asked(f"How many {counted} has {person}?", str(left))
    return Problem(f"counting {context}", context, (asked,))


def _series(draws: Draws) -> Problem:
    """Four numbers of a series with equal steps; the next one is asked."""
    step = draws.between(2, 20)
    first = draws.between(1, 300)
    numbers = [first + step * at for at in range(5)]
    if draws.holds(0.5):
        numbers.reverse()
    asked = Asked("Which number comes next?", str(numbers[-1]))
    return Problem(f"series {_row(numbers)}", _row(numbers[:-1]), (asked,))


def _times(draws: Draws) -> Problem:
    """Somebody leaves at a time and is on the way for some minutes; when they arrive is asked."""
    person, vehicle, place = draws.one(PEOPLE), draws.one(VEHICLES), draws.one(PLACES)
    hour, minute, length = draws.between(1, 11), draws.below(60), draws.between(5, 55)
    arrival = 60 * hour + minute + length
    context = f"{person} took the {vehicle} to the {place} at {hour}:{minute:02}. It took {length} minutes."
    asked = Asked(f"When was {person} there?", f"{arrival // 60}:{arrival % 60:02}")
    return Problem(f"times {hour}:{minute:02} {length}", context, (asked,))


def _sorting(draws: Draws) -> Problem:
    """Six numbers, from small to large."""
    numbers = draws.some(range(10, 100), 6)
    ordered = sorted(numbers)
    asked = Asked("Which order is from small to large?", _row(ordered))
    return Problem(f"sorting {_row(ordered)}", _row(numbers), (asked,))


def _copying(draws: Draws) -> Problem:
    """A row of words, said again or backwards."""
    words = draws.some((*THINGS, *ANIMALS), draws.between(6, 10))
    both = (
        Asked("What are the words?", _row(words)),
        Asked("What are the words backwards?", _row(words[::-1])),
    )
    # Neither a row nor its reverse may be known from another split.
    identity = min(_row(words), _row(words[::-1]))
    return Problem(f"copying {identity}", _row(words), tuple(draws.mixed(both)))


def _ending(draws: Draws) -> Problem:
    """A story whose last word is left out."""
    story = draw_story(draws, draws.between(3, 8))
    return Problem(f"ending {story.text}", story.text, (Asked("", story.last),))


def _row(items: Sequence[int | str]) -> str:
    return " ".join(str(item) for item in items)


KINDS: Final[Mapping[str, Kind]] = {
    "where": Kind("where somebody went last", Shape.MULTIPLE_CHOICE, _where, (1, 1), 2.0),
    "holder": Kind("who has a thing in the end", Shape.MULTIPLE_CHOICE, _holder, (1, 1), 2.0),
    "sums": Kind("sums and differences below 100", Shape.QUESTION_ANSWERING, _sum, (4, 6), 3.0),
    "series": Kind("the next number of a series", Shape.QUESTION_ANSWERING, _series, (3, 4), 3.0),
    "times": Kind("when somebody arrives", Shape.QUESTION_ANSWERING, _times, (2, 3), 3.0),
    "counting": Kind("how many are left", Shape.QUESTION_ANSWERING, _counting, (1, 2), 3.0),
    "recall": Kind("a fact of the text", Shape.QUESTION_ANSWERING, _recall, (1, 1), 2.0),
    "sorting": Kind("six numbers in order", Shape.QUESTION_ANSWERING, _sorting, (2, 3), 2.0),
    "copying": Kind("words again, or backwards", Shape.QUESTION_ANSWERING, _copying, (1, 2), 2.0),
    "ending": Kind("the last word of a story", Shape.CLOZE, _ending, (1, 1), 4.0),
}
