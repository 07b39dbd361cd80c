"""Stories: what happens in a small world in which every sentence is true.

A story is told from a state (who is where, who has what, what lies where), so what it says at its end
follows from what it said before. That is what a model can learn from it, and what the suite ``ending``
asks for.
"""

from dataclasses import dataclass, field
from typing import Final

from compress.data.builtin.draws import Draws
from compress.data.builtin.world import (
    ANIMALS,
    COLOURS,
    COUNTED,
    PEOPLE,
    PLACES,
    THINGS,
    TIMES,
    VEHICLES,
    WEATHER,
    pronoun,
)

SPOKEN_NUMBERS: Final = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Story:
    """A story whose last word follows from the rest.

    Attributes:
        text: all of it but the last word and the full stop.
        last: that word.
    """

    text: str
    last: str


@dataclass
class _World:
    """Who is where, and what each person carries, which is at most one thing."""

    where: dict[str, str] = field(default_factory=dict)
    carries: dict[str, str] = field(default_factory=dict)
    lies: dict[str, str] = field(default_factory=dict)

    def beside(self, person: str) -> list[str]:
        """The others in the same place."""
        here = self.where[person]
        return [other for other, place in self.where.items() if place == here and other != person]


def draw_story(draws: Draws, length: int) -> Story:
    """A story of about ``length`` events."""
    people = draws.some(PEOPLE, draws.between(2, 3))
    places = draws.some(PLACES, 4)
    things = draws.some(THINGS, 3)
    world = _World()
    opening = f"It was a {draws.one(WEATHER)} {draws.one(TIMES)}."
    sentences = [opening]
    for person in people:
        world.where[person] = draws.one(places[:2])
        sentences.append(f"{person} was in the {world.where[person]}.")
    for _ in range(length):
        sentences.append(_event(draws, world, draws.one(people), places, things))
    carriers = list(world.carries)
    if not carriers:
        person = people[0]
        world.carries[person] = things[0]
        sentences.append(f"{person} found the {things[0]}.")
        carriers = [person]
    person = draws.one(carriers)
    sentences.append(f"At last {person} was in the {world.where[person]} with the")
    return Story(" ".join(sentences), world.carries[person])


def _event(draws: Draws, world: _World, person: str, places: list[str], things: list[str]) -> str:
    """Something that can happen to a person now, and does."""
    here, near = world.where[person], world.beside(person)
    thing = world.carries.get(person)
    free = [each for each in things if each not in world.carries.values()]
    if thing is not None and near and draws.holds(0.4):
        other = draws.one(near)
        if other not in world.carries:
            del world.carries[person]
            world.carries[other] = thing
            return f"{person} gave the {thing} to {other}."
    if thing is not None and draws.holds(0.15):
        del world.carries[person]
        world.lies[thing] = here
        return f"{person} left the {thing} in the {here}."
    reachable = [each for each in free if world.lies.get(each, here) == here]
    if thing is None and reachable and draws.holds(0.6):
        taken = draws.one(reachable)
        world.lies.pop(taken, None)
        world.carries[person] = taken
        return f"{person} took the {taken}." if draws.holds(0.6) else f"There {person} found the {taken}."
    if near and draws.holds(0.25):
        return _talk(draws, world, person, draws.one(near))
    if draws.holds(0.15):
        return _aside(draws, person)
    return _walk(draws, world, person, places)


def _walk(draws: Draws, world: _World, person: str, places: list[str]) -> str:
    target = draws.one([place for place in places if place != world.where[person]])
    world.where[person] = target
    way = draws.below(4)
    if way == 0:
        return f"{person} took the {draws.one(VEHICLES)} to the {target}."
    told = f"{person} {('went', 'walked', 'ran')[way - 1]} to the {target}"
    near = world.beside(person)
    return f"{told} and met {near[0]}." if near else f"{told}."


def _talk(draws: Draws, world: _World, person: str, other: str) -> str:
    """A question that the state of the world answers."""
    if world.lies and draws.holds(0.5):
        thing = draws.one(list(world.lies))
        return f'"Where is the {thing}?" asked {person}. "In the {world.lies[thing]}," said {other}.'
    if world.carries:
        owner = draws.one(list(world.carries))
        thing = world.carries[owner]
        answer = "I have it" if owner == other else "You have it" if owner == person else f"{owner} has it"
        return f'"Who has the {thing}?" asked {person}. "{answer}," said {other}.'
    return f'"Where are we?" asked {person}. "In the {world.where[person]}," said {other}.'


def _aside(draws: Draws, person: str) -> str:
    """Something beside the story: an animal that moves, or a small count."""
    if draws.holds(0.5):
        animal = f"{draws.one(COLOURS)} {draws.one(ANIMALS)}"
        return f"A {animal} {draws.one(('ran', 'walked', 'came'))} by, and {person} looked at it."
    first, second = draws.between(1, 5), draws.between(1, 5)
    counted = draws.one(COUNTED)
    one = counted.removesuffix("s") if first == 1 else counted
    return (
        f"{person} found {SPOKEN_NUMBERS[first]} {one} and then {SPOKEN_NUMBERS[second]} more, "
        f"so {pronoun(person)} had {SPOKEN_NUMBERS[first + second]} {counted}."
    )
