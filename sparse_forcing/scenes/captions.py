"""Scenes to sentences and back.

``caption`` writes a scene in one of several thousand wordings, ``parse_caption`` reads any of them (and most free
wordings that keep to the vocabulary), ``caption_words`` is the word split that both and the text encoder share.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from functools import cache

from sparse_forcing.errors import SparseForcingError
from sparse_forcing.scenes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    RESIZING,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
)

_Phrases = dict[str, tuple[str, ...]]
REQUIRED = ("colour", "shape", "motion", "background")

_SIZE_WORDS: _Phrases = {
    "small": ("small", "tiny", "little"),
    "medium": ("medium", "medium sized"),
    "large": ("large", "big", "huge"),
}
_SHAPE_WORDS: _Phrases = {"circle": ("circle", "disk"), "ring": ("ring", "hoop")}
_COLOUR_WORDS: _Phrases = {"purple": ("purple", "violet")}
_BACKGROUND_WORDS: _Phrases = {"navy": ("navy", "navy blue")}
_BACKGROUND_PHRASES = (
    "on a {} background",
    "over a {} background",
    "against a {} background",
    "against a {} backdrop",
    "in front of a {} backdrop",
    "on a plain {} background",
    "over {}",
    "on {}",
)
_DIRECTION_WORDS: _Phrases = {
    "right": ("right", "to the right", "rightward", "toward the right"),
    "left": ("left", "to the left", "leftward", "toward the left"),
    "up": ("up", "upward", "toward the top"),
    "down": ("down", "downward", "toward the bottom"),
}
_AXIS_WORDS: _Phrases = {
    "left and right": ("left and right", "from side to side", "horizontally", "between the left and right edges"),
    "up and down": ("up and down", "vertically", "between the top and bottom edges"),
}
_SENSE_WORDS: _Phrases = {"clockwise": ("clockwise",), "counterclockwise": ("counterclockwise",)}
# Verb phrases as (finite, participle); {} takes a direction, an axis or a sense.
_VERB_PHRASES: dict[str, tuple[tuple[str, str], ...]] = {
    "moves": (
        ("moves {}", "moving {}"),
        ("drifts {}", "drifting {}"),
        ("slides {}", "sliding {}"),
        ("glides {}", "gliding {}"),
        ("travels {}", "traveling {}"),
        ("keeps moving {}", "that keeps moving {}"),
    ),
    "bounces": (
        ("bounces {}", "bouncing {}"),
        ("keeps bouncing {}", "that keeps bouncing {}"),
        ("is bouncing {}", "which bounces {}"),
    ),
    "orbits": (
        ("orbits {}", "orbiting {}"),
        ("orbits the center {}", "orbiting the center {}"),
        ("orbits {} around the middle", "orbiting {} around the middle"),
        ("moves {} around the center", "moving {} around the center"),
        ("travels {} around the middle", "traveling {} around the middle"),
    ),
    "spins": (
        ("spins {}", "spinning {}"),
        ("rotates {}", "rotating {}"),
        ("turns {} in place", "turning {} in place"),
        ("spins {} in place", "spinning {} in place"),
        ("rotates {} on the spot", "rotating {} on the spot"),
    ),
    "grows": (
        ("grows", "growing"),
        ("grows bigger", "growing bigger"),
        ("gets bigger", "getting bigger"),
        ("gets larger", "getting larger"),
        ("expands", "expanding"),
        ("becomes larger", "becoming larger"),
    ),
    "shrinks": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
        ("keeps shrinking", "that keeps shrinking"),
        ("contracts", "contracting"),
    ),
    "stays": (
        ("stays still", "staying still"),
        ("stands still", "standing still"),
        ("remains still", "remaining still"),
        ("stays in place", "staying in place"),
        ("does not move", "that does not move"),
        ("rests", "resting"),
    ),
}
_ONE_FRAMES = (
    "{np} {finite} {bg}",
    "{np} {finite} {bg}",
    "{bg}, {np} {finite}",
    "{np} {bg} {finite}",
    "{np} {participle} {bg}",
    "{np} {participle} {bg}",
    "{np}, {participle}, {bg}",
    "{bg}, {np} {participle}",
    "there is {np} {participle} {bg}",
    "{bg} there is {np} {participle}",
    "a video of {np} {participle} {bg}",
    "an animation of {np} {participle} {bg}",
)
_TWO_FRAMES = (
    "{np} {finite} and {np2} {finite2} {bg}",
    "{np} {finite} while {np2} {finite2} {bg}",
    "{np} {finite} as {np2} {finite2}, {bg}",
    "{np} {finite} {bg}, and {np2} {finite2}",
    "{bg}, {np} {finite} and {np2} {finite2}",
    "{bg}, {np} {finite} while {np2} {finite2}",
    "{np} {participle} and {np2} {participle2} {bg}",
    "{np} {participle} with {np2} {participle2} {bg}",
    "there is {np} {participle} and {np2} {participle2} {bg}",
    "a video of {np} {participle} and {np2} {participle2} {bg}",
    "two shapes {bg}: {np} {participle} and {np2} {participle2}",
    "{bg}, there are two objects: {np} {participle}, {np2} {participle2}",
)
_ALIASES = {"grey": "gray", "centre": "center", "disc": "disk", "anticlockwise": "counterclockwise"}
_ALIASES |= {f"{way}wards": f"{way}ward" for way in ("up", "down", "left", "right", "to")} | {"travelling": "traveling"}

# What single words say.
_AXES = {"right": "left and right", "left": "left and right", "up": "up and down", "down": "up and down"}
_DIRECTIONS = {phrase.split()[-1]: name for name, phrases in _DIRECTION_WORDS.items() for phrase in phrases}
_WAYS = {
    "moves": _DIRECTIONS,
    "bounces": {word: _AXES[direction] for word, direction in _DIRECTIONS.items()}
    | {"side": "left and right", "horizontally": "left and right", "vertically": "up and down"},
    "orbits": {name: name for name in _SENSE_WORDS},
    "spins": {name: name for name in _SENSE_WORDS},
}
_VERBS = {
    word: verb
    for verb, words in {
        "moves": "moves moving move drifts drifting slides sliding glides gliding travels traveling",
        "bounces": "bounces bouncing",
        "orbits": "orbits orbiting",
        "spins": "spins spinning rotates rotating turns turning",
        "grows": "grows growing bigger larger expands expanding",
        "shrinks": "shrinks shrinking smaller contracts contracting",
        "stays": "stays staying stands standing remains remaining rests resting still",
    }.items()
    for word in words.split()
}


def _synonyms(names: Iterable[str], words: _Phrases) -> dict[str, str]:
    return {word: name for name in names for word in words.get(name, (name,))}


_SHAPE_OF = _synonyms(SHAPES, _SHAPE_WORDS)
_COLOUR_OF = _synonyms(COLOURS, _COLOUR_WORDS)
_SIZE_OF = {word.split()[0]: name for word, name in _synonyms(SIZES, _SIZE_WORDS).items()}


def caption(scene: Scene, rng: random.Random, *, size_dropout: float = 0.1) -> str:
    """One natural wording of the scene, chosen by ``rng``; each size goes unmentioned with the given probability."""
    items = list(scene.objects)
    rng.shuffle(items)
    parts = {"bg": _background_phrase(scene, rng)}
    for item, mark in zip(items, ("", "2"), strict=False):
        finite, participle = _verb_phrase(str(item.motion), rng)
        parts |= {
            f"np{mark}": _noun_phrase(item, rng, size_dropout),
            f"finite{mark}": finite,
            f"participle{mark}": participle,
        }
    text = rng.choice(_ONE_FRAMES if len(items) == 1 else _TWO_FRAMES).format(**parts)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:] + "."
    return text


def canonical_caption(scene: Scene) -> str:
    """The scene in its plainest wording, for example "a small red circle moves right on a black background"."""
    clauses = " and ".join(
        f"{_with_article(' '.join(filter(None, (item.size, item.colour, item.shape))))} {item.motion}"
        for item in scene.objects
    )
    return f"{clauses} on a {scene.background} background"


def parse_caption(text: str, *, required: Sequence[str] = REQUIRED) -> Scene:
    """Read what a caption says; None for an attribute it does not mention.

    Case, punctuation, spelling (gray, grey) and word order do not matter much: adjectives belong to the shape word
    they stand before, motions to the shape word they follow.  Raises SparseForcingError that names what is
    missing (of ``required``), unknown or contradictory.
    """
    words = caption_words(text)
    unknown = sorted({word[:20] for word in words if word not in _known_words()})
    if unknown:
        raise SparseForcingError(
            f"caption {_quote(text)}: unknown words {', '.join(unknown[:5])}; see vocabulary_words()"
        )
    words, backgrounds = _take_phrases(words, _synonyms(BACKGROUNDS, _BACKGROUND_WORDS))
    nouns = [place for place, word in enumerate(words) if word in _SHAPE_OF]
    if not 1 <= len(nouns) <= 2:
        found = "no shape" if not nouns else f"{len(nouns)} shapes"
        raise SparseForcingError(f"caption {_quote(text)}: {found} given; name one or two of {', '.join(SHAPES)}")
    edges = [0, *(place + 1 for place in nouns)]
    ends = [*nouns[1:], len(words)]
    objects = []
    for number, noun in enumerate(nouns):
        before = words[edges[number] : noun]
        after = words[noun + 1 : ends[number]]
        if len(nouns) == 1:
            before = after = words
        objects.append(_read_object(text, words[noun], before, after))
    scene = Scene(background=_only(text, "background", backgrounds), objects=tuple(objects))
    for kind in required:
        owners = [scene] if kind == "background" else list(scene.objects)
        choices = {"background": BACKGROUNDS, "colour": COLOURS, "shape": SHAPES, "size": SIZES, "motion": MOTIONS}[
            kind
        ]
        if any(getattr(owner, kind) is None for owner in owners):
            raise SparseForcingError(f"caption {_quote(text)}: no {kind} given; say one of {', '.join(choices)}")
    return scene


def caption_words(text: str) -> list[str]:
    """Lower-case words in the vocabulary's spelling, punctuation dropped."""
    text = re.sub(r"\b(counter|anti)[\s-]+clockwise", "counterclockwise", text.lower())
    return [_ALIASES.get(word, word) for word in re.findall(r"[^\W_]+", text)]


@cache
def vocabulary_words() -> list[str]:
    """Every word a generated caption can contain, sorted."""
    phrases: list[str] = ["a", "an", *COLOURS, *BACKGROUNDS, *SHAPES, *SIZES, *_BACKGROUND_PHRASES]
    phrases += _ONE_FRAMES + _TWO_FRAMES
    for table in (_SIZE_WORDS, _SHAPE_WORDS, _COLOUR_WORDS, _BACKGROUND_WORDS):
        phrases += [phrase for many in table.values() for phrase in many]
    for table in (_DIRECTION_WORDS, _AXIS_WORDS, _SENSE_WORDS):
        phrases += [phrase for many in table.values() for phrase in many]
    phrases += [phrase for pairs in _VERB_PHRASES.values() for pair in pairs for phrase in pair]
    return sorted({word for phrase in phrases for word in caption_words(re.sub(r"{\w*}", "", phrase))})


@cache
def _known_words() -> frozenset[str]:
    return frozenset(vocabulary_words())


def _background_phrase(scene: Scene, rng: random.Random) -> str:
    name = str(scene.background)
    return rng.choice(_BACKGROUND_PHRASES).format(rng.choice(_BACKGROUND_WORDS.get(name, (name,))))


def _noun_phrase(item: SceneObject, rng: random.Random, size_dropout: float) -> str:
    colour, shape = str(item.colour), str(item.shape)
    words = [rng.choice(_COLOUR_WORDS.get(colour, (colour,))), rng.choice(_SHAPE_WORDS.get(shape, (shape,)))]
    if item.size is not None and rng.random() >= size_dropout:
        words.insert(0, rng.choice(_SIZE_WORDS[item.size]))
    return _with_article(" ".join(words))


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _verb_phrase(motion: str, rng: random.Random) -> tuple[str, str]:
    """Finite form and participle of the same wording."""
    verb, _, rest = motion.partition(" ")
    words = (_DIRECTION_WORDS | _AXIS_WORDS | _SENSE_WORDS).get(rest, (rest,))
    way = rng.choice(words)
    finite, participle = rng.choice(_VERB_PHRASES[verb])
    return finite.format(way), participle.format(way)


def _take_phrases(words: list[str], names: dict[str, str]) -> tuple[list[str], list[str]]:
    """The words without the longest matching phrases, and what those phrases name."""
    rest, found, place = [], [], 0
    phrases = sorted((tuple(phrase.split()) for phrase in names), key=len, reverse=True)
    while place < len(words):
        for phrase in phrases:
            if tuple(words[place : place + len(phrase)]) == phrase:
                found.append(names[" ".join(phrase)])
                place += len(phrase)
                break
        else:
            rest.append(words[place])
            place += 1
    return rest, found


def _quote(text: str) -> str:
    """Text on one line and short, for error messages."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _only(text: str, kind: str, found: Iterable[str]) -> str | None:
    names = sorted(set(found))
    if len(names) > 1:
        raise SparseForcingError(
            f"caption {_quote(text)}: {len(names)} values for one {kind}: {', '.join(names)}; keep one"
        )
    return names[0] if names else None


def _read_object(text: str, noun: str, before: list[str], after: list[str]) -> SceneObject:
    motion = _read_motion(text, after)
    size = _only(text, "size", (_SIZE_OF[word] for word in before if word in _SIZE_OF))
    if size is not None and motion in RESIZING:
        raise SparseForcingError(f"caption {_quote(text)}: what {motion} has no fixed size; leave out {size!r}")
    return SceneObject(
        colour=_only(text, "colour", (_COLOUR_OF[word] for word in before if word in _COLOUR_OF)),
        shape=_SHAPE_OF[noun],
        size=size,
        motion=motion,
    )


def _read_motion(text: str, words: list[str]) -> str | None:
    verbs = {_VERBS[word] for word in words if word in _VERBS}
    if verbs & {"moves", "orbits"} and {"around", "center", "middle"} & set(words):
        verbs = (verbs - {"moves"}) | {"orbits"}
    if "not" in words:  # "does not move"
        verbs = {"stays"}
    verb = _only(text, "motion", verbs)
    if verb in ("grows", "shrinks", None):
        return verb
    if verb == "stays":
        return "stays still"
    ways = _WAYS[verb]
    way = _only(text, "direction", (ways[word] for word in words if word in ways))
    if way is None:
        choices = ", ".join(sorted(set(ways.values())))
        raise SparseForcingError(f"caption {_quote(text)}: no direction given for the motion; say one of {choices}")
    return f"{verb} {way}"
