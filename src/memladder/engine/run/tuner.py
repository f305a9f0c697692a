"""Measuring which cuts of the kernels are fastest on this GPU, on the layers themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch

from memladder.core.case import Workload
from memladder.engine.packed import packed_layer
from memladder.engine.packed.packed_layer import PackedLayer
from memladder.engine.program.plan import plan
from memladder.engine.run.driver import CudaGraph
from memladder.engine.run.execute import Execution, arena_bytes
from memladder.formats._shared.base import Format
from memladder.kernels import cuda
from memladder.kernels.cuda import tuning

Report = Callable[[str, str, float, float], None]

# A cut is preferred to the shipped one if it saves that much: less is noise.
_WORTH = 0.01


def tune(layer: PackedLayer, shape: Workload, activation: Format | None, report: Report) -> None:
    """Prefer, for every choice that the layer at that shape makes, the fastest candidate.

    One choice after another, each with all others as they are: a candidate's time is that of the
    whole layer's graph. `report` gets the choice, the cut, and both times in seconds.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    block = torch.empty(packed_layer.device_bytes(layer), dtype=torch.uint8, device=device)
    program = layer.form.program(shape, activation)
    planned = plan(program)
    size = arena_bytes(program, planned, cuda)
    arena = torch.zeros(size, dtype=torch.uint8, device=device)
    moved = packed_layer.on_device(layer, block)
    execution = Execution(program, planned, moved, cuda, arena)

    def seconds() -> float:
        graph = CudaGraph(execution.run, device)
        found = graph.seconds()
        graph.close()
        return found

    before = tuning.asked()
    shipped = seconds()
    kept = dict(tuning.preferred())
    for key, cuts in tuning.asked().items():
        if key in before or key in kept:
            continue
        times = {cuts[0]: shipped}
        for cut in cuts[1:]:
            tuning.prefer(kept | {key: cut})
            times[cut] = seconds()
        best = min(times, key=lambda cut: times[cut])
        if times[best] < (1 - _WORTH) * shipped:
            kept[key] = best
            report(key, best, shipped, times[best])
            shipped = times[best]
        tuning.prefer(kept)
