"""A number over time, written as what it does: hold, move, hold."""

from __future__ import annotations


class Timeline:
    """Frame by frame values that begin empty at ``place``; every call adds frames."""

    def __init__(self, place: float) -> None:
        self.place = place
        self.values: list[float] = []

    def __len__(self) -> int:
        return len(self.values)

    def hold(self, frames: int) -> Timeline:
        """Stay for so many frames."""
        self.values += [self.place] * frames
        return self

    def move(self, to: float, frames: int) -> Timeline:
        """Go to ``to`` at constant speed; the last of the frames is there."""
        start = self.place
        self.values += [start + (to - start) * (step + 1) / frames for step in range(frames)]
        self.place = to
        if frames:
            self.values[-1] = to
        return self

    def jump(self, to: float) -> Timeline:
        """Be elsewhere from the next frame on."""
        self.place = to
        return self

    def until(self, frames: int) -> tuple[float, ...]:
        """The first ``frames`` values, the last place held as long as needed."""
        return (*self.values[:frames], *[self.place] * (frames - len(self.values)))
