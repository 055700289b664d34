"""Progress bars of training."""

from __future__ import annotations

import sys

from tqdm import tqdm

from backbones.train import Update

__all__ = ["Bars"]


class Bars:
    """Progress bars over images to check and steps to train; none without a terminal."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def check(self, done: int, of: int) -> None:
        """Show how many images are checked."""
        self._move(done, of, "checking images", "image")

    def update(self, update: Update) -> None:
        """Show a training step, with throughput; the bar itself shows the time left."""
        self._move(update.step, update.steps, f"epoch {update.epoch}", "step")
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {update.loss:.3f}, {update.images_per_second:.0f} images/s", refresh=False
            )

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _move(self, done: int, of: int, what: str, unit: str) -> None:
        if self.bar is None:
            # A resumed run begins in the middle.
            self.bar = tqdm(total=of, initial=done - 1, unit=unit, leave=False, disable=None)
        self.bar.set_description(what, refresh=False)
        self.bar.update(done - self.bar.n)
        if done == of:
            self.close()
