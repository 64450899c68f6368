"""Prompts of worlds in varied wording: what kind of world and ground it is, never what an object looks like."""

from __future__ import annotations

import random
from functools import cache

from sparse_forcing.scenes.captions import caption_words

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
GROUND_WORDS = {
    "smooth": ("plain", "smooth"), "striped": ("striped",), "textured": ("textured",), "noisy": ("noisy",)
}  # fmt: skip
_ON_GROUND = ("on a {ground} background", "over a {ground} background", "in front of a {ground} background", "")
_STORIES: dict[str, tuple[str, ...]] = {
    "revisit": (
        "a view moves over shapes {on} and goes back",
        "the view moves over objects {on} and returns",
        "a video moving over shapes {on}, there and back",
        "moving over objects {on} and back again",
    ),
    "reappear": (
        "a shape goes behind a wall {on} and returns",
        "an object moves behind the wall {on} and is back again",
        "a video of a shape that goes behind a wall {on} and comes back",
        "behind a wall {on} there is an object that returns",
    ),
    "parade": (
        "shapes {on} come one after one, and the {ordinal} one comes again",
        "objects {on} come one after one, then the {ordinal} one returns",
    ),
    "swaps": (
        "cups over shapes {on} move around and one moves up again",
        "the cups {on} move around over objects, then one moves up",
    ),
}
_OPENINGS = (
    "shapes {on} come one after one",
    "objects {on} come one after one",
    "a video of shapes {on}, one after one",
)
_AGAIN = ("the {ordinal} one again", "the {ordinal} one comes again", "then the {ordinal} one returns")


def write_story(rng: random.Random, kind: str, ground: str, *, ordinal: int = 0) -> str:
    """One caption for the whole clip; ``ordinal`` (from 0) says which object of a parade is asked for."""
    return _fill(rng, rng.choice(_STORIES[kind]), ground, ordinal)


def write_parade(rng: random.Random, ground: str, ordinal: int) -> tuple[str, str]:
    """The prompt of a parade and the one that asks for one of its objects again."""
    return _fill(rng, rng.choice(_OPENINGS), ground, ordinal), _fill(rng, rng.choice(_AGAIN), ground, ordinal)


@cache
def world_words() -> list[str]:
    """Every word that a prompt of a world can contain, sorted: what a word-level text encoder must know."""
    templates = [*(text for texts in _STORIES.values() for text in texts), *_OPENINGS, *_AGAIN, *_ON_GROUND]
    texts = [text.format(on="", ordinal="", ground="") for text in templates]
    texts += [*ORDINALS, *(word for words in GROUND_WORDS.values() for word in words)]
    return sorted({word for text in texts for word in caption_words(text)})


def _fill(rng: random.Random, template: str, ground: str, ordinal: int) -> str:
    on = rng.choice(_ON_GROUND).format(ground=rng.choice(GROUND_WORDS[ground]))
    text = " ".join(template.format(on=on, ordinal=ORDINALS[ordinal]).replace(" ,", ",").split())
    return text[0].upper() + text[1:] + "." if rng.random() < 0.5 else text
