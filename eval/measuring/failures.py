"""What fails costs its own value: a call that raises becomes one line, and the calls beside it go on.

Only damage of the video itself (VideoError) goes through: nothing about such a video can be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sparse_forcing.errors import SparseForcingError, VideoError

LONGEST_REASON = 400  # characters
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no value, in one line; `lasting` when the same video fails in the same way every time."""

    reason: str
    lasting: bool


def attempt(call: Callable[[], T]) -> T | Failure:
    """The call's result, or why there is none. Raises VideoError when the video itself is damaged."""
    try:
        return call()
    except VideoError:
        raise
    except SparseForcingError as error:
        return Failure(reason=shorten(str(error)), lasting=True)
    except Exception as error:  # a plugin or a strange video may raise anything; the other metrics must not suffer
        return Failure(reason=shorten(f"{type(error).__name__}: {error}"), lasting=False)


def shorten(text: str) -> str:
    """Text as one line of at most LONGEST_REASON characters."""
    return " ".join(text.split())[:LONGEST_REASON]
