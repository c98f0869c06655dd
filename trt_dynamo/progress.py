"""Progress bars for long builds, through TensorRT's progress monitor; quiet when nobody looks at a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from trt_dynamo.settings import Settings
from trt_dynamo.trt import trt

# A bar that is there for less is a flicker.
PATIENCE = 1.0


def monitor(display: Any, label: str) -> Any:
    """An `IProgressMonitor` that draws TensorRT's outermost phase into a `rich` progress display."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.tasks: dict[str, Any] = {}
            self.started = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.tasks[phase_name] = display.add_task(f"{label}: {phase_name}", total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.tasks:
                if not display.live.is_started and time.monotonic() - self.started > PATIENCE:
                    display.start()
                display.update(self.tasks[phase_name], completed=step + 1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.tasks:
                display.remove_task(self.tasks.pop(phase_name))

    return Monitor()


@contextlib.contextmanager
def progress(config: Any, settings: Settings, label: str) -> Iterator[None]:
    """Shows the build that runs inside the block, where the settings and the terminal allow it."""
    wanted = settings.progress == "on" or (settings.progress == "auto" and sys.stderr.isatty())
    if not wanted or not hasattr(trt, "IProgressMonitor"):
        yield
        return
    from rich.console import Console
    from rich.progress import Progress

    display = Progress(console=Console(stderr=True), transient=True)
    watcher = monitor(display, label)
    config.progress_monitor = watcher
    try:
        yield
    finally:
        display.stop()
