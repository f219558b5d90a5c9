"""Progress of long work: a bar with a rate and the time left, or plain lines where nobody watches."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """`with Progress("align", total=100_000, unit="tokens") as bar: bar.advance(1024, loss=0.3)`.

    total: units of work in all. done: units that an earlier, interrupted run has done already;
    they count towards the bar, not towards the rate. Output goes to stderr; where that is not a
    terminal, a plain line is printed every `every` seconds, and one at the end. quiet: print nothing.
    """

    def __init__(
        self,
        label: str,
        total: float,
        unit: str = "tokens",
        done: float = 0,
        every: float = 15.0,
        quiet: bool = False,
    ) -> None:
        self.label, self.total, self.unit, self.every, self.quiet = label, total, unit, every, quiet
        self.done = self.start_done = done
        self.note = ""
        self.bar: Any = None

    def __enter__(self) -> Progress:
        self.start = self.last = time.monotonic()
        if sys.stderr.isatty() and not self.quiet:
            self._open_bar()
        return self

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self.bar.start()
        self.task = self.bar.add_task(self.label, total=self.total, completed=self.done, rate="", note="")

    def advance(self, amount: float, **values: float) -> None:
        """Count `amount` units as done; `values` (a loss, say) stand behind the bar."""
        self.done += amount
        if values:
            self.note = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, rate=f"{self.rate():,.0f} {self.unit}/s", note=self.note)
        elif time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            self._line()

    def rate(self) -> float:
        """Units a second since this process began."""
        return (self.done - self.start_done) / max(time.monotonic() - self.start, 1e-9)

    def _line(self) -> None:
        if self.quiet:
            return
        left = (self.total - self.done) / self.rate() if self.done > self.start_done else 0.0
        share = 100 * self.done / self.total if self.total else 100
        print(
            f"{self.label}: {share:.0f}%, {self.rate():,.0f} {self.unit}/s, {left:.0f} s left {self.note}".rstrip(),
            file=sys.stderr,
            flush=True,
        )

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        elif kind is None and time.monotonic() - self.start >= 2.0:
            self._line()
