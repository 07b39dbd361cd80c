"""The words of the small world: who lives there, where, with what, and what moves.

Each word is one that a small vocabulary can hold whole. Every place can stand after "in the", every thing
after "the", so that the sentences stay English whatever is drawn.
"""

from typing import Final

WOMEN: Final = (
    "Anna",
    "Clara",
    "Emma",
    "Greta",
    "Helen",
    "Ida",
    "Julia",
    "Mira",
    "Olga",
    "Rosa",
    "Tilda",
    "Yara",
)
MEN: Final = (
    "Ben",
    "David",
    "Felix",
    "Hugo",
    "Jonas",
    "Leo",
    "Martin",
    "Nils",
    "Otto",
    "Paul",
    "Simon",
    "Victor",
)
PEOPLE: Final = (*WOMEN, *MEN)

PLACES: Final = (
    "bakery",
    "barn",
    "castle",
    "cellar",
    "church",
    "forest",
    "garden",
    "harbour",
    "hospital",
    "kitchen",
    "library",
    "market",
    "meadow",
    "mill",
    "museum",
    "office",
    "park",
    "school",
    "stable",
    "station",
    "theatre",
    "tower",
    "valley",
    "village",
)
THINGS: Final = (
    "ball",
    "basket",
    "blanket",
    "book",
    "bottle",
    "box",
    "brush",
    "bucket",
    "candle",
    "chair",
    "clock",
    "coat",
    "cup",
    "drum",
    "flute",
    "hammer",
    "hat",
    "kite",
    "knife",
    "ladder",
    "lamp",
    "letter",
    "map",
    "mirror",
    "needle",
    "pen",
    "picture",
    "pillow",
    "ring",
    "rope",
    "shovel",
    "spoon",
    "stone",
    "umbrella",
    "violin",
    "whistle",
)
VEHICLES: Final = (
    "boat",
    "bus",
    "cart",
    "ferry",
    "sledge",
    "train",
    "tram",
    "wagon",
)
ANIMALS: Final = (
    "cat",
    "dog",
    "donkey",
    "duck",
    "fox",
    "goat",
    "hen",
    "horse",
    "mouse",
    "owl",
    "rabbit",
    "sheep",
)
COUNTED: Final = ("apples", "coins", "eggs", "nuts", "pears", "plums", "shells", "stamps")
COLOURS: Final = ("black", "blue", "brown", "green", "grey", "red", "white", "yellow")
TIMES: Final = ("morning", "afternoon", "evening", "night")
WEATHER: Final = ("cold", "dark", "quiet", "rainy", "sunny", "warm", "windy")


def pronoun(person: str) -> str:
    """``she`` or ``he``."""
    return "she" if person in WOMEN else "he"
