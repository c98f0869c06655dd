"""CUDA's own calls for graphs: a stream's work is captured, and launched later. Through cuda-python.

Comes in: a stream's handle. Goes out: an executable graph.
"""

from __future__ import annotations

from typing import Any

from trt_dynamo.cuda_driver import done


def begin_capture(stream: int) -> None:
    """From now on nothing runs that this thread enqueues to the stream; other threads go on as before."""
    from cuda.bindings import driver

    done(driver.cuStreamBeginCapture(stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))


def end_capture(stream: int) -> Any | None:
    """The graph that was captured, None where something was enqueued that no graph can hold."""
    from cuda.bindings import driver

    status, graph = driver.cuStreamEndCapture(stream)
    return graph if status == driver.CUresult.CUDA_SUCCESS and int(graph) else None


class ExecutableGraph:
    """A graph made ready, which is the whole of what is captured: the captured one is given up."""

    def __init__(self, graph: Any) -> None:
        from cuda.bindings import driver

        self.start, self.destroy = driver.cuGraphLaunch, driver.cuGraphExecDestroy
        try:
            self.handle = done(driver.cuGraphInstantiate(graph, 0))
        finally:
            driver.cuGraphDestroy(graph)

    def launch(self, stream: int) -> None:
        """Starts the work on a stream, after what is there."""
        done(self.start(self.handle, stream))

    def __del__(self) -> None:
        # What still runs of it ends first.
        if hasattr(self, "handle"):
            self.destroy(self.handle)
