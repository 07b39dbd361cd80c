"""A whole text in parts of bounded length, for readers that look at all of it.

Documents stay whole up to a length. A longer one is cut before a space between two letters or digits, where
the rules that split text begin a new word, so that the parts have the pieces that the document has. A
document without such a space is not cut.
"""

from collections.abc import Iterator

from compress.data import corpora

STRETCH = 2**17
"""Characters from which on a document is cut."""


def stretches(source: str, length: int = STRETCH) -> Iterator[str]:
    """The documents of a source, long ones in several parts.

    Args:
        source: what `compress.data.corpora` resolves.
        length: characters from which on a document is cut.

    Raises:
        DataError, UsageError, EnvironmentFault: as `compress.data.corpora.documents`.
    """
    held = ""
    for piece in corpora.pieces(source):
        held += piece.text
        while len(held) > length:
            place = _cut(held, length)
            if place is None:
                break
            yield held[:place]
            held = held[place:]
        if piece.last:
            if held:
                yield held
            held = ""


def _cut(text: str, length: int) -> int | None:
    """The last place up to a length, or the first one behind it, at which a text may be cut."""
    place = text.rfind(" ", 1, length)
    while place > 0:
        if _between_words(text, place):
            return place
        place = text.rfind(" ", 1, place)
    place = text.find(" ", length)
    while place >= 0:
        if _between_words(text, place):
            return place
        place = text.find(" ", place + 1)
    return None


def _between_words(text: str, place: int) -> bool:
    return 0 < place < len(text) - 1 and text[place - 1].isalnum() and text[place + 1].isalnum()
