"""Whole models against transformers, at narrow sizes: every way to the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from memladder import formats, load_model
from memladder.core.errors import FormatError, UsageError
from memladder.engine.run import load
from memladder.engine.run.model import RunnableModel
from tests import whole_models
from tests.whole_models import VOCABULARY, expected, worst

# transformers and the exporter warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")
BOUND = 2e-3
# To compile a family's layer takes seconds: those that are put together as others are, are slow.
OTHERS = ("qwen3", "gemma2", "gpt_neox", "falcon")
FAMILIES = [
    *("llama", "bloom", "opt"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS),
]


class Made(NamedTuple):
    """transformers' model, its checkpoint, and the folder of its fp16 packing."""

    module: nn.Module
    checkpoint: Path
    folder: Path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Callable[..., Made]:
    known: dict[str, Made] = {}

    def make(name: str, **values: Any) -> Made:
        key = name + str(sorted(values.items()))
        if key not in known:
            base = tmp_path_factory.mktemp(name)
            module = whole_models.model(name, **values)
            source = whole_models.saved(module, base / "checkpoint", "40KB")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MEMLADDER_CACHE", str(cache_dir))
                known[key] = Made(module, source, whole_models.packed(source, base / "packed"))
        return known[key]

    return make


def ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()
    return found


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """All memory of a model holds NaN at first."""
    monkeypatch.setattr(
        load, "_allocator", lambda place: lambda n: torch.full((n,), 0xFF, dtype=torch.uint8)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_all_ways_to_the_same_logits(
    name: str, made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch)
    module, _, folder = made(name)
    prompt = ids(75)
    wanted = expected(module, prompt)
    whole = load_model(folder, device="cpu", context=80, chunk=80, every_logits=True)
    assert worst(whole.logits(prompt), wanted) < BOUND
    parts = load_model(folder, device="cpu", context=80, chunk=17, every_logits=True)
    assert worst(parts.logits(prompt), wanted) < BOUND
    steps = load_model(folder, device="cpu", context=80, chunk=16)
    found = [steps.prefill([prompt[:3]])]
    found += [steps.decode([token]) for token in prompt[3:]]
    assert worst(torch.cat(found), wanted[2:]) < BOUND
    # Again, after what is there: bit by bit.
    assert torch.equal(steps.prefill([prompt[:3]]), found[0])
    assert torch.equal(steps.decode([prompt[3]]), found[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_ragged_sequences_are_each_alone(
    name: str, made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch)
    module, _, folder = made(name)
    prompts = [ids(count, count) for count in (21, 1, 40, 16)]
    model = load_model(folder, device="cpu", context=64, batch_size=4, chunk=32)
    found = [model.prefill(prompts)]
    more = [ids(4, seed) for seed in range(5)]
    found += [model.decode(tokens) for tokens in more]
    for row, prompt in enumerate(prompts):
        whole = prompt + [tokens[row] for tokens in more]
        wanted = expected(module, whole)[len(prompt) - 1 :]
        assert worst(torch.stack([step[row] for step in found]), wanted) < BOUND
    assert model.past == tuple(len(prompt) + 5 for prompt in prompts)


def greedy(module: nn.Module, prompt: list[int], count: int) -> list[int]:
    found = list(prompt)
    for _ in range(count):
        found.append(int(expected(module, found)[-1].argmax()))
    return found[len(prompt) :]


def test_generate_is_greedy_and_repeats(made: Callable[..., Made]) -> None:
    module, _, folder = made("llama")
    prompts = [ids(5, 1), ids(9, 2)]
    model = load_model(folder, device="cpu", context=40, batch_size=2)
    found = model.generate(prompts, 12)
    assert found == [greedy(module, prompt, 12) for prompt in prompts]
    assert model.generate(prompts, 12) == found
    # A sequence ends after a token of `stop`; the other goes on.
    stop = found[0][4]
    ended = model.generate(prompts, 12, stop=[stop])
    for mine, all_of_it in zip(ended, found, strict=True):
        cut = all_of_it.index(stop) + 1 if stop in all_of_it else 12
        assert mine == all_of_it[:cut]


def test_draws_depend_on_the_seed_alone(made: Callable[..., Made]) -> None:
    model = load_model(made("llama").folder, device="cpu", context=40, batch_size=2)
    prompts = [ids(5, 1), ids(9, 2)]
    drawn = model.generate(prompts, 8, temperature=1.5, top_p=0.9, seed=7)
    assert model.generate(prompts, 8, temperature=1.5, top_p=0.9, seed=7) == drawn
    assert model.generate(prompts, 8, temperature=1.5, top_p=0.9, seed=8) != drawn
    # A tiny share leaves the most probable token alone.
    assert model.generate(prompts, 8, temperature=1.5, top_p=1e-6) == model.generate(prompts, 8)


def test_a_conversation_goes_on(made: Callable[..., Made]) -> None:
    module, _, folder = made("llama")
    model = load_model(folder, device="cpu", context=40)
    model.prefill([ids(7)])
    found = model.prefill([ids(5, 1)], keep=True)
    assert worst(found, expected(module, ids(7) + ids(5, 1))[-1:]) < BOUND


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_layers_divided_over_devices(name: str, made: Callable[..., Made]) -> None:
    folder = made(name).folder
    alone = load_model(folder, device="cpu", context=40, batch_size=2)
    divided = load_model(folder, devices=["cpu", "cpu"], context=40, batch_size=2)
    prompts = [ids(5, 1), ids(19, 2)]
    assert torch.equal(alone.prefill(prompts), divided.prefill(prompts))
    assert torch.equal(alone.decode([3, 4]), divided.decode([3, 4]))
    assert alone.generate(prompts, 8) == divided.generate(prompts, 8)
    with pytest.raises(UsageError, match="4 devices for 3 layers"):
        load_model(folder, devices=["cpu"] * 4)


@pytest.mark.parametrize("form", ["int4", "nf4", "fp8", "int1"])
@pytest.mark.parametrize("head", ["fp16", "int4"])
def test_formats(
    form: str,
    head: str,
    made: Callable[..., Made],
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the model of the dequantised weights; where activations are rounded, against one
    that rounds them too. Rounding to 8 bits is a step function: where inputs differ by a
    rounding of float16, as the second layer's do, two right layers differ by 1.2e-2 (docs)."""
    monkeypatch.setenv("MEMLADDER_CACHE", str(cache_dir))
    module, source, _ = made("llama", tie_word_embeddings=True)
    folder = whole_models.packed(source, tmp_path / "packed", form, head_format=head)
    prompt = ids(40)
    reference = whole_models.dequantised(module, source, folder)
    model = load_model(folder, device="cpu", context=64, every_logits=True, activation="fp16")
    assert worst(model.logits(prompt), expected(reference, prompt)) < BOUND
    if formats.get(form).activation != "fp16":
        whole_models.round_activations(reference, formats.get(formats.get(form).activation))
        rounded = load_model(folder, device="cpu", context=64, every_logits=True)
        found, wanted = rounded.logits(prompt), expected(reference, prompt)
        lost = torch.linalg.vector_norm(found - wanted, dim=1)
        assert float((lost / torch.linalg.vector_norm(wanted, dim=1)).median()) < 3 * 1.2e-2


@pytest.fixture
def small(made: Callable[..., Made]) -> RunnableModel:
    return load_model(made("llama").folder, device="cpu", context=12, batch_size=2, chunk=8)


def test_a_full_context_is_refused_before_it_happens(small: RunnableModel) -> None:
    with pytest.raises(UsageError, match=r"a prompt of 13 need a context of 13 .* one of 12"):
        small.prefill([ids(13)])
    with pytest.raises(UsageError, match=r"prompt of 8, 6 new ones need a context of 13"):
        small.generate([ids(8)], 6)
    assert len(small.generate([ids(8)], 5)[0]) == 5
    small.prefill([ids(12)])
    with pytest.raises(UsageError, match=r"sequence 0 has 12 tokens, and the context is 12"):
        small.decode([1])
    assert small.past == (12, 0)
    small.prefill([ids(8)])
    with pytest.raises(UsageError, match=r"8 tokens in the cache, a prompt of 5 need"):
        small.prefill([ids(5)], keep=True)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "0 sequences"),
        ([[1]] * 3, "3 sequences; this model was loaded for 1 to 2"),
        ([[1], []], "sequence 1 has no tokens"),
        ([[VOCABULARY]], f"token {VOCABULARY} is none of 0 … {VOCABULARY - 1}"),
        ([[-1]], "token -1 is none"),
    ],
)
def test_prompts_that_are_none(small: RunnableModel, prompts: list[list[int]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        small.prefill(prompts)
    with pytest.raises(UsageError, match=words):
        small.generate(prompts, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_numbers_that_are_none(small: RunnableModel, options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        small.generate([[1]], 1, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 0}, "context '0' is not a whole number"),
        ({"context": 1000}, "a context of 1000 tokens; this model knows positions up to 512"),
        ({"batch_size": -1}, "batch_size"),
        ({"cache_format": "int4"}, "int4"),
        ({"device": "cpu", "devices": ["cpu"]}, "give one of them"),
        ({"activation": "nf4"}, "nf4 is no activation format"),
    ],
)
def test_loads_that_are_refused(made: Callable[..., Made], options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_model(made("llama").folder, **{"device": "cpu", **options})


def test_memory_is_known_and_stays(made: Callable[..., Made]) -> None:
    """The cache is heads × head size × keys and values × layers × context, at two bytes each."""
    model = load_model(made("llama").folder, device="cpu", context=48, batch_size=2, chunk=16)
    before = dict(model.memory["cpu"])
    assert before["cache"] == 2 * 48 * 3 * 2 * 2 * 16 * 2
    model.generate([ids(30), ids(3)], 10)
    assert dict(model.memory["cpu"]) == before
    halved = load_model(
        made("llama").folder, device="cpu", context=48, batch_size=2, cache_format="fp8"
    )
    # A byte a number, and a float32 scale a head and token.
    assert halved.memory["cpu"]["cache"] == before["cache"] // 2 + 2 * 48 * 3 * 2 * 2 * 4


def test_last_logits_alone(small: RunnableModel) -> None:
    with pytest.raises(UsageError, match="every_logits=True"):
        small.logits([1, 2])


def test_other_folders_are_refused(made: Callable[..., Made], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="memladder quantize CHECKPOINT --all"):
        load_model(tmp_path, device="cpu")
    with pytest.raises(FormatError, match="memladder quantize CHECKPOINT --all"):
        load_model(made("llama").checkpoint, device="cpu")
