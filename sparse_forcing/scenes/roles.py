"""Colours of a caption in roles that no training clip gave them: of an object, or of a background."""

from __future__ import annotations

from sparse_forcing.scenes.captions import caption_words
from sparse_forcing.scenes.vocabulary import BACKGROUNDS, COLOURS, SHAPES

_OBJECTS = frozenset({*SHAPES, "disk", "hoop", "shape", "object", "shapes", "objects"})
_GROUNDS = frozenset({"background", "backdrop"})
_OVER = frozenset({"on", "over", "against", "of"})
_COLOURS = frozenset({*COLOURS, "violet"})
_BACKGROUNDS = frozenset({*(word for name in BACKGROUNDS for word in name.split()), "blue"})  # navy blue, dark green
_ADJECTIVES = _COLOURS | _BACKGROUNDS | frozenset("plain small medium large big tiny huge little sized".split())
_SHADES = frozenset({"dark", "navy"})  # make a background of the colour that follows


def role_remarks(text: str) -> list[str]:
    """A sentence for every colour that `text` gives to an object though it is only learned as a background, and for
    the reverse. An adjective belongs to the next shape or background word; a colour after "on" or "over" with neither
    behind it is a background, too ("on white")."""
    words = caption_words(text)
    remarks = []
    for place, word in enumerate(words):
        shade = word in _SHADES and words[place + 1 : place + 2] and words[place + 1] in _COLOURS
        if word not in _COLOURS | _BACKGROUNDS or shade:
            continue
        role = _role(words, place)
        shaded = place > 0 and words[place - 1] in _SHADES
        if role == "object" and (word not in _COLOURS or shaded):
            remarks.append(
                f"this model knows {_name(words, place)!r} as a background only, not as the colour of an object"
            )
        if role == "background" and word not in BACKGROUNDS and word not in _SHADES and not shaded:
            remarks.append(f"this model knows {word!r} as the colour of an object only, not as a background")
    return list(dict.fromkeys(remarks))


def _role(words: list[str], place: int) -> str | None:
    """What the adjective at `place` describes: "object", "background", or None where that cannot be told."""
    for word in words[place + 1 :]:
        if word in _OBJECTS:
            return "object"
        if word in _GROUNDS:
            return "background"
        if word not in _ADJECTIVES:
            break
    before = [word for word in words[:place] if word not in _SHADES]
    return "background" if before and before[-1] in _OVER else None


def _name(words: list[str], place: int) -> str:
    return " ".join(words[place - 1 : place + 1]) if place and words[place - 1] in _SHADES else words[place]
