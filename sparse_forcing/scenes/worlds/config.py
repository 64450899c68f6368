"""Settings of worlds and the names of their kinds; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_forcing.errors import ConfigError

KINDS = ("revisit", "reappear", "parade", "swaps")
GROUNDS = ("smooth", "striped", "textured", "noisy")
SPLITS = ("train", "heldout", "all")
MOST_OBJECTS = 8  # of a parade: as many as have an ordinal


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Settings of the worlds that are drawn; all times in pixel frames.

    Args:
        frames: length of a clip; paths and gaps adapt to it.
        gap: least and most frames that what is asked for stays out of sight; None: from a sixteenth of the clip up to
            what fits. The most is cut to what fits, a least that does not fit is an error.
        opening: least frames of the beginning, none of which ever returns; None: a tenth of the clip.
        grounds: kinds of ground to draw from.
        frame_noise: standard deviation of noise drawn anew for every frame, in 8-bit levels.
        split: "train" has no held-out (colour, shape) pair anywhere, "heldout" has one in everything that returns,
            "all" ignores the split.
        distractor_fraction: share of gaps, where there is time, in which an object passes that never returns.
        objects: numbers of objects that a parade may have.
        swaps: numbers of swaps of cups, least and most; None: from one up to what fits.
        align: a prompt changes at a multiple of this.
    """

    frames: int = 80
    gap: tuple[int, int] | None = None
    opening: int | None = None
    grounds: tuple[str, ...] = GROUNDS
    frame_noise: float = 0.0
    split: str = "train"
    distractor_fraction: float = 0.5
    objects: tuple[int, ...] = (1, 2, 4, 8)
    swaps: tuple[int, int] | None = None
    align: int = 1

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ConfigError(f"worlds: frames must be at least 1, got {self.frames}")
        if self.gap is not None and not 1 <= self.gap[0] <= self.gap[1]:
            raise ConfigError(f"worlds: gap must be two numbers, 1 <= least <= most, got {self.gap}")
        if self.opening is not None and self.opening < 1:
            raise ConfigError(f"worlds: opening must be at least 1, got {self.opening}")
        unknown = [name for name in self.grounds if name not in GROUNDS]
        if unknown or not self.grounds:
            raise ConfigError(f"worlds: grounds must be some of {', '.join(GROUNDS)}, got {self.grounds}")
        if self.split not in SPLITS:
            raise ConfigError(f"worlds: unknown split {self.split!r}; choose one of {', '.join(SPLITS)}")
        if self.frame_noise < 0 or not 0 <= self.distractor_fraction <= 1:
            raise ConfigError("worlds: frame_noise must not be negative and distractor_fraction lie in [0, 1]")
        if not self.objects or not all(1 <= count <= MOST_OBJECTS for count in self.objects):
            raise ConfigError(f"worlds: objects must lie between 1 and {MOST_OBJECTS}, got {self.objects}")
        if self.swaps is not None and not 1 <= self.swaps[0] <= self.swaps[1]:
            raise ConfigError(f"worlds: swaps must be two numbers, 1 <= least <= most, got {self.swaps}")
        if self.align < 1:
            raise ConfigError(f"worlds: align must be at least 1, got {self.align}")

    @property
    def opening_frames(self) -> int:
        """Least frames of the beginning."""
        return self.opening or max(4, self.frames // 10)

    def gap_range(self, shortest: int, longest: int, kind: str) -> tuple[int, int]:
        """The least and the most gap asked for, cut to what fits; ConfigError where nothing does."""
        least, most = self.gap or (max(shortest, self.frames // 16), longest)
        least = max(least, shortest) if most >= shortest else least
        if longest < max(least, shortest, 1):
            raise ConfigError(
                f"worlds: {self.frames} frames are too few for {kind} with a gap of {max(least, shortest, 1)}; "
                + (f"the longest that fits is {longest}" if longest >= max(shortest, 1) else "take a longer clip")
            )
        if most < shortest:
            raise ConfigError(f"worlds: the shortest gap of {kind} is {shortest} frames, got at most {most}")
        return least, min(most, longest)
