"""A framework whose output can't be read. Its LLaMA is right; its BLOOM has a layer too many, one
matrix of another shape, and no bias of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripted import Scripted, ScriptedSession

from memladder import models
from memladder.frameworks._shared.base import Job, Session, Structure


class OpaqueSession(ScriptedSession):
    def output(self) -> Any:
        raise AssertionError("its output can't be read")

    def structure(self) -> Structure:
        shapes = models.tensor_shapes(self.job.config)
        if self.job.case.model == "llama":
            return Structure(1, shapes)
        shapes["mlp.dense_h_to_4h.weight"] = (3, 5)
        del shapes["self_attention.dense.bias"]
        return Structure(2, shapes)


class Opaque(Scripted):
    def session(self, job: Job, announce: Callable[[str], None]) -> Session:
        return OpaqueSession(job, announce)


FRAMEWORK = Opaque()
