"""Whole models against lines of public logs (tests/data/public_logs.json, each with its source)."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from memladder.core.units import GIB, MIB
from memladder.frameworks._rules import caches, stored, vllm
from memladder.frameworks._rules.llamacpp import cache_bytes
from memladder.frameworks._rules.question import Question
from memladder.predictor import gpus, model, predict

_HERE = Path(__file__).parents[2]
_LINES = {
    line["id"]: line
    for line in json.loads((_HERE / "data" / "public_logs.json").read_text())["lines"]
}
_SERVER = {"max_num_seqs": "1024", "max_num_batched_tokens": "8192"}


def _asked(name: str, ranks: int = 1, **given: object) -> Question:
    found = model.find(str(_HERE / "configs" / name))
    device = predict.device_of(gpus.find("H100"))
    return predict.question(found, device, layers=None, ranks=ranks, **given)  # type: ignore[arg-type]


def _activations(name: str, version: tuple[int, int], ranks: int = 1) -> Callable[[], float]:
    """vLLM's log counts cuBLAS's workspace among them."""

    def found() -> float:
        asked = _asked(name, ranks)
        return (vllm.activations(asked, 8192, 1024, version, server=True) + 32 * MIB) / GIB

    return found


def _beside_cache(name: str, utilization: str) -> Callable[[], float]:
    """Tokens, where all that is not cache is predicted: weights, activations, libraries."""

    def found() -> float:
        settings = _SERVER | {"gpu_memory_utilization": utilization}
        asked = _asked(name, settings=settings, version="0.19.0")
        answer = vllm.predict(asked, None)
        sizes = {entry.category: entry.nbytes for entry in answer.entries}
        return sizes["kv_cache"] / caches.token_bytes(asked)

    return found


def _weights(name: str, ranks: int = 1) -> Callable[[], float]:
    def found() -> float:
        asked = _asked(name, ranks)
        held = stored.stored(asked, stored.checkpoint(asked.model))
        return (held.weights + held.scales + vllm._around(asked, held.around)) / GIB

    return found


def _cache(name: str, tokens: float, unit: float, ranks: int = 1) -> Callable[[], float]:
    return lambda: tokens * caches.token_bytes(_asked(name, ranks)) / unit


def _tokens(name: str, size: float, ranks: int = 1, block: int = 1) -> Callable[[], float]:
    return lambda: size * GIB / (block * caches.token_bytes(_asked(name, ranks)))


# The goal is 0.5 % for weights and caches, 5 % for activations. Two lines miss it, and say why.
_PREDICTED: dict[str, tuple[Callable[[], float], float]] = {
    "a03": (_activations("gpt-oss-20b", (0, 19)), 0.02),
    "d02": (_activations("qwen3-0.6b", (0, 11)), 0.005),
    "d03": (_activations("qwen3-32b", (0, 11)), 0.005),
    "d04": (_activations("gpt-oss-20b", (0, 11)), 0.005),
    "d05": (_activations("llama-3.3-70b-fp8", (0, 11), 2), 0.005),
    "p01": (_beside_cache("llama-3.1-8b", "0.95"), 0.001),
    "p05": (_beside_cache("deepseek-v2-lite", "0.95"), 0.005),
    "v01": (_weights("llama-3-8b"), 0.001),
    "v02": (_weights("llama-3-8b", 2), 0.001),
    "v10": (_weights("qwen3-30b-a3b", 4), 0.001),
    # 164 MiB above two ranks' shares of the same checkpoint under later versions (v10).
    "v11": (_weights("deepseek-r1-distill-qwen-14b", 2), 0.012),
    "v05": (_tokens("llama-3.1-8b", 3.81, block=16), 0.002),
    # The cache is as large as the fullest rank allows; the size in the line is another rank's.
    "v07": (_tokens("qwen3-235b-a22b-fp8", 8.11, 4), 0.012),
    "v13": (_cache("minimax-m2", 204800, GIB), 0.001),
    "t01": (_cache("llama-2-7b", 132608, 1), 1e-9),
    "l03": (_cache("qwen2.5-3b", 4096, MIB), 1e-9),
    "l05": (_cache("qwen3.6-27b", 262144, MIB), 1e-9),
}


@pytest.mark.parametrize("name", _PREDICTED)
def test_line(name: str) -> None:
    found, bound = _PREDICTED[name]
    value = found()
    assert abs(value / _LINES[name]["value"] - 1) <= bound, value


def test_cells_of_llama_cpp_come_in_256s() -> None:
    asked = _asked("llama-3.1-8b", past=299)
    assert cache_bytes(asked) == 32 * 512 * 2 * 1024 * 2
