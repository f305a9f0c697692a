"""vLLM's int4 row with a quantisation that leaves out every module: its weights stay fp16."""

from __future__ import annotations

import json

from memladder.frameworks._shared.base import Job
from memladder.frameworks.vllm import Vllm


class MisSet(Vllm):
    def prepare(self, job: Job) -> None:
        super().prepare(job)
        for path in job.cache_dir.glob("vllm/*int4*/config.json"):
            config = json.loads(path.read_text())
            config["quantization_config"]["ignore"] = ["re:.*"]
            path.write_text(json.dumps(config))


FRAMEWORK = MisSet("vllm_fp16_int4", "int4")
