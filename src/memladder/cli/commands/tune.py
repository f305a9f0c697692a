"""`memladder tune`: the fastest cuts of Ladder's kernels."""

from __future__ import annotations

import typer

from memladder import api, frameworks
from memladder.cli.console import plain_console
from memladder.cli.options import CacheDir, Device, Frameworks, Models, Shapes
from memladder.cli.requests import Request, tell_missing
from memladder.cli.terminal import progress_bar
from memladder.core.errors import UsageError
from memladder.meter import environment


def tune(
    models: Models = None,
    frameworks: Frameworks = None,
    shapes: Shapes = None,
    device: Device = "cuda",
    cache_dir: CacheDir = None,
) -> None:
    """Measure which cuts of Ladder's kernels are fastest on this GPU, and keep them."""
    request = Request(
        models=models,
        frameworks=frameworks,
        shapes=shapes,
        device=device,
        cache_dir=cache_dir,
    )
    raise typer.Exit(_tune(request))


def _tune(request: Request) -> int:
    """Measure the cuts of Ladder's kernels on a GPU and keep the fastest; 0 when that was done."""
    device = environment.resolve_device(request.device)
    if device == "cpu":
        raise UsageError("tune measures a GPU's kernels; --device cpu has none")
    names = request.framework_names
    runnable, missing = api.available([name for name in names if name.startswith("ladder")], device)
    tell_missing(missing, device, plain_console(stderr=True))
    if not runnable:
        raise UsageError(f"none of {', '.join(names)} is a Ladder that can run on {device} here")
    import torch

    from memladder import __version__, formats
    from memladder.engine.compile import layers
    from memladder.engine.packed import packed_layer
    from memladder.engine.run import tuner
    from memladder.frameworks.ladder import Ladder
    from memladder.kernels.cuda import tuning

    torch.cuda.set_device(torch.device(device))
    cache_dir = request.options().cache_dir
    file = tuning.path(cache_dir, __version__)
    tuning.load(file)
    shapes = request.workloads
    cases = [
        (config, variant, shape)
        for config in [one.config for one in request.subjects().values()]
        for variant in map(frameworks.get, runnable)
        for shape in shapes
    ]
    with progress_bar("tuning") as progress:
        for number, (config, variant, shape) in enumerate(cases):
            progress(number, len(cases))
            assert isinstance(variant, Ladder)
            path = layers.ensure_packed(config, formats.get(variant.weight), cache_dir, 0)
            tuner.tune(packed_layer.load(path), shape, variant.activation_format(), _tell_cut)
            tuning.save(file)
    print(f"{file}: {len(tuning.preferred())} cuts differ from the shipped ones")
    return 0


def _tell_cut(key: str, cut: str, shipped_s: float, best_s: float) -> None:
    print(f"{key}: {1e6 * shipped_s:.1f} µs → {1e6 * best_s:.1f} µs with {cut}")
