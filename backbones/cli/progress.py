"""The progress bar of long commands."""

from __future__ import annotations

import sys

from tqdm import tqdm

from backbones.train import Update

__all__ = ["Bar"]


class Bar:
    """A progress bar over what is being done; none without a terminal."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Print above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def show(self, share: float, what: str) -> None:
        """Show which share of a measurement is done."""
        self._move(round(100 * share), 100, what, "%")

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
            self.bar = tqdm(
                total=of, initial=max(0, done - 1), unit=unit, leave=False, disable=None
            )
        self.bar.set_description(what, refresh=False)
        self.bar.update(done - self.bar.n)
        if done == of:
            self.close()
