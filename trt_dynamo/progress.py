"""Watches a build through TensorRT's progress monitor: calls it off when the program ends or is interrupted, and shows
a bar for a long one, where somebody looks at a terminal.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from trt_dynamo import shutdown
from trt_dynamo.settings import Settings
from trt_dynamo.trt import trt

# A bar that is there for less is a flicker.
PATIENCE = 1.0


class Bars:
    """TensorRT's outermost phase as a bar in a `rich` progress display."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.label = label
        self.display = Progress(console=Console(stderr=True), transient=True)
        self.tasks: dict[str, Any] = {}
        self.started = time.monotonic()

    def start(self, phase: str, steps: int) -> None:
        self.tasks[phase] = self.display.add_task(f"{self.label}: {phase}", total=steps)

    def step(self, phase: str, done: int) -> None:
        if phase in self.tasks:
            if not self.display.live.is_started and time.monotonic() - self.started > PATIENCE:
                self.display.start()
            self.display.update(self.tasks[phase], completed=done)

    def finish(self, phase: str) -> None:
        if phase in self.tasks:
            self.display.remove_task(self.tasks.pop(phase))


def monitor(bars: Bars | None, raised: Sequence[BaseException]) -> Any:
    """An `IProgressMonitor` that draws bars, and ends the build once something was raised or the program ends."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if bars is not None and parent_phase is None:
                bars.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if bars is not None:
                bars.step(phase_name, step + 1)
            return not raised and not shutdown.ENDING.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if bars is not None:
                bars.finish(phase_name)

    return Monitor()


@contextlib.contextmanager
def progress(config: Any, settings: Settings, label: str) -> Iterator[None]:
    """Watches the build that runs inside the block, and shows it where the settings and the terminal allow it.

    Raises:
        BaseException: what a signal handler raised meanwhile, KeyboardInterrupt for one; the build was called off.
    """
    if not hasattr(trt, "IProgressMonitor"):
        yield
        return
    shown = settings.progress == "on" or (settings.progress == "auto" and sys.stderr.isatty())
    bars = Bars(label) if shown else None
    with shutdown.signals_kept() as raised:
        watcher = monitor(bars, raised)
        config.progress_monitor = watcher
        try:
            yield
        finally:
            if bars is not None:
                bars.display.stop()
