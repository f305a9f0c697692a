"""The figure's layers, and narrow ones of their kind, as the engine has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memladder import formats, frameworks, models
from memladder.engine.compile import layers
from memladder.engine.packed.packed_layer import Form
from memladder.frameworks._shared.base import Job, Session
from memladder.models import LayerConfig


def narrow(model: str, **changes: Any) -> LayerConfig:
    """The narrow layer, with other values in its `config.json`."""
    definition = models.definition(model)
    return LayerConfig(model, definition.read({**definition.NARROW, **changes}))


def form(config: LayerConfig, cache_dir: Path, kind: str = "fp16") -> Form:
    """The layer compiled from ONNX, all matrices in one format."""
    return Form(layers.ensure(config, cache_dir).fused, formats.get(kind), {})


def started(job: Job) -> tuple[Session, list[str]]:
    """A session that has run once, and what it announced."""
    framework = frameworks.get(job.case.framework)
    framework.prepare(job)
    announced: list[str] = []
    session = framework.session(job, announced.append)
    session.context()
    session.weights()
    session.compile()
    session.run()
    return session, announced
