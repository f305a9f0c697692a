"""The CUDA driver, as far as a process needs it that should take as little memory as it can.

On an H100 a context takes 518 MiB; 264 of them are the stacks of all threads that could be
resident, at 1 KiB each. The engine's kernels have no stack (asserted where they are tested): with
a limit of 0 the driver gives that memory back. The stream and the graph are the driver's too,
because PyTorch makes 32 streams a priority as soon as one is asked for: 166 MiB.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_WARM_UP_S = 0.1


def lean_context(index: int) -> None:
    """Make device `index`'s primary context, the one that PyTorch uses, with no room for stacks.

    To be called before anything else brings CUDA up.
    """
    from cuda.bindings import driver

    _done(driver.cuInit(0))
    device = _done(driver.cuDeviceGet(index))
    context = _done(driver.cuDevicePrimaryCtxRetain(device))
    _done(driver.cuCtxSetCurrent(context))
    _done(driver.cuCtxSetLimit(driver.CUlimit.CU_LIMIT_STACK_SIZE, 0))
    torch.cuda.set_device(index)


class CudaGraph:
    """What a function launches, as one CUDA graph on a stream of its own."""

    def __init__(self, launch: Callable[[], None], device: torch.device) -> None:
        """Run `launch` once, so that its kernels are compiled and loaded, then record it."""
        from cuda.bindings import driver

        self._driver = driver
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = _done(driver.cuStreamCreate(flags))
        self.stream: torch.cuda.Stream = torch.cuda.ExternalStream(  # type: ignore[no-untyped-call]
            int(self._stream), device=device
        )
        """Where it runs."""
        with torch.cuda.stream(self.stream):
            launch()
            self._wait()
            # Other threads of the process may use CUDA meanwhile.
            mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            _done(driver.cuStreamBeginCapture(self._stream, mode))
            try:
                launch()
            finally:
                graph = _done(driver.cuStreamEndCapture(self._stream))
        self.launches = _done(driver.cuGraphGetNodes(graph))[1]
        """Kernels of the graph."""
        self._graph = _done(driver.cuGraphInstantiate(graph, 0))
        _done(driver.cuGraphDestroy(graph))

    def launch(self) -> None:
        """Launch the graph."""
        _done(self._driver.cuGraphLaunch(self._graph, self._stream))

    def run(self) -> None:
        """Launch the graph, and wait until it is done."""
        self.launch()
        self._wait()

    def seconds(self, repeats: int = 25) -> float:
        """Median time of a launch on the device, after a tenth of a second of launches that are not
        counted: a GPU that has been idle comes to its clock first."""
        end_s = time.monotonic() + _WARM_UP_S
        while time.monotonic() < end_s:
            self.run()
        for _ in range(3):
            self.launch()
        pairs = [(_event(), _event()) for _ in range(repeats)]
        for start, end in pairs:
            start.record(self.stream)
            self.launch()
            end.record(self.stream)
        self._wait()
        return float(statistics.median(start.elapsed_time(end) for start, end in pairs)) / 1e3

    def close(self) -> None:
        """Give graph and stream back; `run` is no longer possible."""
        _done(self._driver.cuGraphExecDestroy(self._graph))
        _done(self._driver.cuStreamDestroy(self._stream))

    def _wait(self) -> None:
        _done(self._driver.cuStreamSynchronize(self._stream))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _done(result: tuple[Any, ...]) -> Any:
    """The values of a call; RuntimeError with the driver's own words if it failed."""
    from cuda.bindings import driver

    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, words = driver.cuGetErrorString(error)
        raise RuntimeError(f"CUDA: {words.decode() if words else error}")
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)
