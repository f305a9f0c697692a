"""`memladder generate`: text, or token ids, from a packed model."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memladder.cli.ending import needed
from memladder.core.errors import UsageError
from memladder.core.units import format_bytes

if TYPE_CHECKING:
    from memladder.engine.run.model import RunnableModel
    from memladder.engine.run.tokenizer import Tokenizer

_TOKENS = 256


def generate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `quantize --all` has written.")
    ],
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="In the model's chat template, if it has one."),
    ] = None,
    ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="Token ids in, and out: no tokenizer.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Go on asking, with all that was said before.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="The prompt as it is, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Default: 256, or what the context has room for."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the most probable token.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(metavar="P")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N")] = 0,
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of prompt and answer; the cache's size.")
    ] = None,
    cache_format: Annotated[str, typer.Option(metavar="fp16|fp8|int8")] = "fp16",
    device: Annotated[
        str | None,
        typer.Option(metavar="cpu|cuda:N[,…]", help="Default: a GPU where there is one."),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Tokens a second and bytes, on stderr.")
    ] = False,
) -> None:
    """Answer a prompt with a packed model, token by token."""
    if sum((prompt is not None, ids is not None, interactive)) != 1:
        raise UsageError("one of --prompt, --ids and --interactive is wanted")
    given = None if ids is None else _numbers(ids)
    _lean()
    with needed("generate", "ladder"):
        from memladder.engine.run.load import load_model
        from memladder.engine.run.tokenizer import Tokenizer

    tokenizer = None if given is not None else Tokenizer.open(folder)
    began = time.monotonic()
    model = load_model(
        folder,
        devices=None if device is None else device.split(","),
        context=context,
        cache_format=cache_format,
    )
    run = _Run(model, max_new_tokens, temperature, top_p, seed)
    run.loaded_s = time.monotonic() - began
    if given is not None:
        print(",".join(str(token) for token in run.tokens(given, ())))
    elif tokenizer is not None and prompt is not None:
        _say(run, tokenizer, tokenizer.prompt([("user", prompt)], plain=plain))
    elif tokenizer is not None:
        _talk(run, tokenizer, plain)
    if stats:
        sys.stderr.write(run.told())


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise UsageError(f"--ids {text[:40]!r} is no list of token ids: 1,2,3")
    return [int(part) for part in parts]


def _lean() -> None:
    """Before torch is imported: kernels are loaded when they are used, allocations are the
    driver's own, and transformers keeps its advice to itself."""
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass
class _Run:
    """A model with how it is to answer, and how long it took."""

    model: RunnableModel
    count: int | None
    temperature: float
    top_p: float
    seed: int
    loaded_s: float = 0.0
    held: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    first_s: float = 0.0
    new_tokens: int = 0
    more_s: float = 0.0

    def tokens(self, ids: Sequence[int], stop: Sequence[int]) -> Iterator[int]:
        """New tokens after `ids`; what of these the cache has from before is not read again."""
        known = len(self.held)
        keep = 0 < known < len(ids) and list(ids[:known]) == self.held
        began = time.monotonic()
        # The last token need not be in the cache.
        room = max(1, self.model.limits.context - len(ids) + 1)
        count = min(_TOKENS, room) if self.count is None else self.count
        self.held = list(ids)
        self.prompt_tokens += len(ids) - (known if keep else 0)
        steps = self.model.stream(
            [ids[known:] if keep else ids],
            count,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=stop,
            keep=keep,
        )
        token: int | None = None
        for step in steps:
            now = time.monotonic()
            if token is None:
                self.first_s += now - began
            else:
                # It is in the cache now.
                self.held.append(token)
                self.more_s += now - began
                self.new_tokens += 1
            token = step[0]
            yield token
            began = time.monotonic()

    def told(self) -> str:
        """What `--stats` says."""
        lines = [
            f"loaded in {self.loaded_s:.1f} s; {self.prompt_tokens} tokens of prompts, "
            f"first tokens after {self.first_s:.2f} s"
        ]
        if self.new_tokens:
            step_s = self.more_s / self.new_tokens
            lines.append(
                f"{1 / step_s:.1f} tokens a second, {1000 * step_s:.2f} ms each"
                + self._bandwidth(step_s)
            )
        for device, parts in self.model.memory.items():
            told = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
            lines.append(f"{device}: {told}")
        return "".join(f"{line}\n" for line in lines)

    def _bandwidth(self, step_s: float) -> str:
        """Weights and what the cache holds are read in each step: how fast, and of how much."""
        nbytes = self.model.step_bytes()
        told = f": {format_bytes(nbytes)} read in each, {nbytes / step_s / 1e9:,.1f} GB/s"
        peak = self.model.bandwidth()
        return told if peak is None else f"{told} of {peak / 1e9:,.0f}"


def _say(run: _Run, tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Print the answer as it comes; the answer."""
    said = ""
    new: list[int] = []
    for token in run.tokens(ids, tokenizer.stop):
        new.append(token)
        text = tokenizer.text(new)
        # Half of a character is not shown before its other half is there.
        if not text.endswith("\ufffd"):
            sys.stdout.write(_shown(text[len(said) :]))
            sys.stdout.flush()
            said = text
    sys.stdout.write("\n")
    sys.stdout.flush()
    return said


def _talk(run: _Run, tokenizer: Tokenizer, plain: bool) -> None:
    """Until the end of the input."""
    said: list[tuple[str, str]] = []
    for line in _lines(sys.stdin.isatty()):
        said.append(("user", line))
        said.append(("assistant", _say(run, tokenizer, tokenizer.prompt(said, plain=plain))))


def _lines(is_terminal: bool) -> Iterator[str]:
    while True:
        if is_terminal:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _shown(text: str) -> str:
    """Text as a terminal may have it: what would control it is left out."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable())
