"""A packed model that runs: prompts into a key-value cache, then a token at a time.

All memory is taken when the model is loaded: weights, the cache of the stated context, one arena
for all layers and for prompts and steps alike. After that none is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memladder.core.case import Workload
from memladder.core.errors import OverflowedError, UsageError
from memladder.engine.run.driver import CudaGraph
from memladder.engine.run.sampling import Sampler
from memladder.engine.run.stage import Stage, lengths


@dataclass(frozen=True)
class Limits:
    """What a loaded model is for: sequences at once, tokens of each, tokens of a run."""

    batch_size: int
    context: int
    chunk: int


class RunnableModel:
    """Sequences are numbered from 0; each has a slot of the cache.

    `folder` is what it was loaded from. `memory` says bytes by category, of each device.
    """

    def __init__(
        self, folder: Path, stages: Sequence[Stage], limits: Limits, vocabulary: int
    ) -> None:
        self.folder, self.limits, self.vocabulary = folder, limits, vocabulary
        self._stages = tuple(stages)
        self._past = [0] * limits.batch_size
        self._active: list[int] = []
        self._graphs: list[CudaGraph] | None = None
        self._lock = threading.RLock()
        self._step_shape = Workload(limits.batch_size, 1)
        if all(stage.device.type == "cuda" for stage in stages):
            with self._running():
                # All sequences are idle: nothing is written into the cache.
                self._graphs = [self._recorded(stage) for stage in stages]

    @property
    def memory(self) -> Mapping[str, Mapping[str, int]]:
        """Bytes by device: `weights`, `cache`, `arena`. They do not change."""
        found: dict[str, dict[str, int]] = {}
        for stage in self._stages:
            own = found.setdefault(str(stage.device), dict.fromkeys(stage.memory, 0))
            for name, nbytes in stage.memory.items():
                own[name] += nbytes
        return found

    @property
    def past(self) -> tuple[int, ...]:
        """Tokens of each sequence in the cache."""
        return tuple(self._past)

    def step_bytes(self) -> int:
        """What the next step reads at least: weights, and what the cache holds of sequences."""
        weights = sum(stage.step_weight_bytes() for stage in self._stages)
        cache = sum(stage.memory["cache"] for stage in self._stages)
        held = sum(self._past[sequence] for sequence in self._active)
        return weights + cache * held // (self.limits.batch_size * self.limits.context)

    def bandwidth(self) -> float | None:
        """Bytes a second that the first device's memory gives at most; None where nobody says."""
        device = self._stages[0].device
        if device.type == "cpu":
            return None
        found = torch.cuda.get_device_properties(device)
        # Both edges of a clock in kHz, a bus in bits.
        return 2e3 * found.memory_clock_rate * found.memory_bus_width / 8

    def prefill(self, token_ids: Sequence[Sequence[int]], *, keep: bool = False) -> Tensor:
        """Sequences from 0 on, of any lengths, into the cache; float32 [sequences, vocabulary], on
        the CPU: the logits of each one's last token.

        They begin anew, or, with `keep`, after what the cache has of each. Raises UsageError, and
        changes nothing, for anything else, or where the context is too short.
        """
        with self._lock, self._running():
            self._check(token_ids, keep)
            if not keep:
                self._past = [0] * self.limits.batch_size
            self._active = list(range(len(token_ids)))
            out = torch.empty(len(token_ids), self.vocabulary)
            for done, shape in self._rounds(token_ids):
                logits = self._stages[-1].execution(shape).output
                for row, (sequence, at, _) in enumerate(done):
                    if at == len(token_ids[sequence]):
                        out[sequence].copy_(logits[row])
            return _finite(out)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """float32 [tokens, vocabulary], on the CPU: the logits of every token of one sequence,
        which begins anew. Raises UsageError unless the model was loaded with `every_logits`."""
        if not self._stages[-1].planned.around.every:
            raise UsageError(
                "this model was loaded for last logits; load it with every_logits=True"
            )
        with self._lock, self._running():
            self._check([token_ids], False)
            self._past = [0] * self.limits.batch_size
            self._active = [0]
            parts = []
            for done, shape in self._rounds([token_ids]):
                count = done[0][2]
                output = self._stages[-1].execution(shape).output
                parts.append(output[:count].to("cpu", copy=True))
            return _finite(torch.cat(parts))

    def decode(self, token_ids: Sequence[int]) -> Tensor:
        """One token more for each sequence of the last `prefill`; logits as `prefill` gives them.

        Raises UsageError, and changes nothing, for another number of tokens, for one that is none,
        and where the context is full.
        """
        with self._lock, self._running():
            self._write(token_ids, self._active)
            self._step(self._active)
            shape = self._step_shape
            return _finite(self._stages[-1].execution(shape).output[self._active].cpu())

    def generate(
        self,
        token_ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] = (),
        keep: bool = False,
    ) -> list[list[int]]:
        """New tokens after each sequence's own, at most so many; one of `stop` is its last. See
        `stream`."""
        found: list[list[int]] = [[] for _ in token_ids]
        for step in self.stream(
            token_ids,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            keep=keep,
        ):
            for sequence, token in step.items():
                found[sequence].append(token)
        return found

    def stream(
        self,
        token_ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] = (),
        keep: bool = False,
    ) -> Iterator[Mapping[int, int]]:
        """A step's new tokens, by sequence, as they come: those that have not ended.

        Greedy with temperature 0, else drawn as `Sampler` says. The last tokens are not in the
        cache. Raises UsageError where the context does not hold all tokens that there may be.
        """
        sampler = Sampler(temperature, top_p, seed, len(token_ids))
        self._check(token_ids, keep, max_new_tokens)
        return self._streamed(token_ids, max_new_tokens, sampler, frozenset(stop), keep)

    def close(self) -> None:
        """Give CUDA graphs back; the model is of no use afterwards."""
        for graph in self._graphs or ():
            graph.close()
        self._graphs = None

    def _streamed(
        self,
        token_ids: Sequence[Sequence[int]],
        count: int,
        sampler: Sampler,
        stop: frozenset[int],
        keep: bool,
    ) -> Iterator[Mapping[int, int]]:
        alive = list(range(len(token_ids)))
        tokens = dict(zip(alive, sampler(self.prefill(token_ids, keep=keep), alive), strict=True))
        is_written = False
        for number in range(count):
            yield tokens
            alive = [sequence for sequence in alive if tokens[sequence] not in stop]
            if not alive or number + 1 == count:
                return
            with self._lock, self._running():
                if not is_written:
                    self._write([tokens[sequence] for sequence in alive], alive)
                self._step(alive)
                if sampler.is_greedy:
                    chosen = self._stages[-1].chosen(self._step_shape).flatten().tolist()
                    tokens = {sequence: chosen[sequence] for sequence in alive}
                    if max(tokens.values()) >= self.vocabulary:
                        raise _overflowed()
                    # On one device they already are where the next step reads them.
                    is_written = len(self._stages) == 1
                else:
                    logits = self._stages[-1].execution(self._step_shape).output
                    drawn = sampler(_finite(logits[alive].cpu()), alive)
                    tokens = dict(zip(alive, drawn, strict=True))

    def _check(self, token_ids: Sequence[Sequence[int]], keep: bool, more: int = 0) -> None:
        limits = self.limits
        if not 1 <= len(token_ids) <= limits.batch_size:
            raise UsageError(
                f"{len(token_ids)} sequences; this model was loaded for 1 to {limits.batch_size}"
            )
        if more < 0:
            raise UsageError(f"{more} new tokens; 0 or more are wanted")
        for sequence, ids in enumerate(token_ids):
            if not len(ids):
                raise UsageError(f"sequence {sequence} has no tokens")
            self._check_ids(ids)
            past = self._past[sequence] if keep else 0
            # The last new token is never read.
            needed = past + len(ids) + max(0, more - 1)
            if needed > limits.context:
                held = f"{past} tokens in the cache, " if past else ""
                asked = f", {more} new ones" if more else ""
                raise UsageError(
                    f"sequence {sequence}: {held}a prompt of {len(ids)}{asked} need a context of "
                    f"{needed} tokens; this model was loaded with one of {limits.context}"
                )

    def _check_ids(self, ids: Sequence[int]) -> None:
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocabulary:
            raise UsageError(
                f"token {low if low < 0 else high} is none of 0 … {self.vocabulary - 1}"
            )

    def _rounds(
        self, token_ids: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[tuple[int, int, int]], Workload]]:
        """Runs until all tokens are in the cache: after each, of every row of it, which sequence it
        was, how many of its tokens are in now, and how many of them came by this run."""
        limits = self.limits
        at = [0] * len(token_ids)
        while waiting := [s for s, ids in enumerate(token_ids) if at[s] < len(ids)]:
            left = min(limits.chunk, len(token_ids[waiting[0]]) - at[waiting[0]])
            seq_len = next(n for n in lengths(limits.chunk) if n >= left)
            most = max(1, min(limits.batch_size, limits.chunk // seq_len))
            some = waiting[:most]
            shape = Workload(1 if len(some) == 1 else most, seq_len)
            ids = torch.zeros(shape.batch_size, seq_len, dtype=torch.int32)
            done = []
            for row, sequence in enumerate(some):
                new = min(seq_len, len(token_ids[sequence]) - at[sequence])
                part = token_ids[sequence][at[sequence] : at[sequence] + new]
                ids[row, :new] = torch.tensor(part, dtype=torch.int32)
                at[sequence] += new
                done.append((sequence, at[sequence], new))
            self._place(shape, [(sequence, new) for sequence, _, new in done])
            self._run(shape, ids.view(-1, 1))
            for sequence, _, new in done:
                self._past[sequence] += new
            yield done, shape

    def _place(self, shape: Workload, rows: Sequence[tuple[int, int]]) -> None:
        """Of the next run at the shape: a row for each sequence with its number of new tokens, the
        other rows idle."""
        idle = shape.batch_size - len(rows)
        slots = [*(sequence for sequence, _ in rows), *[0] * idle]
        past = [*(self._past[sequence] for sequence, _ in rows), *[0] * idle]
        new = [*(count for _, count in rows), *[0] * idle]
        for stage in self._stages:
            stage.positions(shape).set(slots, past, new)

    def _run(self, shape: Workload, x: Tensor) -> None:
        for stage in self._stages:
            execution = stage.execution(shape)
            execution.input.copy_(x)
            execution.run()
            x = execution.output

    def _write(self, token_ids: Sequence[int], sequences: Sequence[int]) -> None:
        """What the next step reads."""
        if len(token_ids) != len(sequences):
            raise UsageError(f"{len(token_ids)} tokens for {len(sequences)} sequences")
        self._check_ids(token_ids)
        ids = torch.zeros(self.limits.batch_size, 1, dtype=torch.int32)
        ids[list(sequences), 0] = torch.tensor(list(token_ids), dtype=torch.int32)
        self._stages[0].execution(self._step_shape).input.copy_(ids)

    def _step(self, sequences: Sequence[int]) -> None:
        """One token more of these sequences; the others are idle."""
        shape = self._step_shape
        for sequence in sequences:
            if self._past[sequence] >= self.limits.context:
                raise UsageError(
                    f"sequence {sequence} has {self._past[sequence]} tokens, and the context is "
                    f"{self.limits.context}: there is no room for another"
                )
        wanted = [
            [slot, self._past[slot] if slot in sequences else 0, int(slot in sequences)]
            for slot in range(self.limits.batch_size)
        ]
        for stage in self._stages:
            positions = stage.positions(shape)
            if positions.host.tolist() != wanted:
                positions.set(*zip(*wanted, strict=True))
        x: Tensor | None = None
        for number, stage in enumerate(self._stages):
            execution = stage.execution(shape)
            if x is not None:
                execution.input.copy_(x)
            if self._graphs is None:
                stage.step(shape)
            else:
                self._graphs[number].run()
            # The device has done the same.
            host = stage.positions(shape).host
            host[:, 1] += host[:, 2]
            x = execution.output
        for sequence in sequences:
            self._past[sequence] += 1

    def _recorded(self, stage: Stage) -> CudaGraph:
        execution = stage.execution(self._step_shape)
        execution.input.copy_(torch.zeros(execution.input.shape, dtype=execution.input.dtype))
        with torch.cuda.device(stage.device):
            return CudaGraph(lambda: stage.step(self._step_shape), stage.device)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Kernels are launched on the current GPU."""
        with torch.inference_mode():
            yield


def _finite(logits: Tensor) -> Tensor:
    """Raise OverflowedError for NaN, which is what values beyond float16 become."""
    if logits.isnan().any():
        raise _overflowed()
    return logits


def _overflowed() -> OverflowedError:
    return OverflowedError(
        "logits are NaN: values within this model are beyond float16, in which the engine computes"
    )
