"""A layer's weights: random, the same for everyone with the same seed, made once per cache.

The values are chosen so that every parameter matters to the output: matrices are normal with
standard deviation 1/sqrt(in), which keeps attention and MLP of the residual's size at any width;
norm weights are 1 + 0.1·normal, biases 0.1·normal. All are float16.

The file is safetensors (https://github.com/huggingface/safetensors#format): 8 bytes of header
length, a JSON header, the tensors back to back. The header is padded with blanks so that the
data starts at a multiple of 4096 bytes, which lets every reader map it.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memladder.core import digests
from memladder.core.case import Workload
from memladder.models import LayerConfig, cache, hidden_size, tensor_shapes

FILE_NAME = "weights.safetensors"
_ALIGNMENT = 4096
_CHUNK = 1 << 20
_ITEM_BYTES = 2
# Part of the header: a file made by another recipe is another file.
_RECIPE = "1"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in the file: absolute byte offset, length, shape."""

    offset: int
    length: int
    shape: tuple[int, ...]


def header(config: LayerConfig, seed: int) -> bytes:
    """The file's beginning up to the data, a multiple of 4096 bytes long."""
    table: dict[str, object] = {
        "__metadata__": {"memladder": _RECIPE, "digest": config.digest, "seed": str(seed)}
    }
    end = 0
    for name, shape in tensor_shapes(config).items():
        start, end = end, end + _ITEM_BYTES * math.prod(shape)
        table[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table).encode()
    text = text.ljust(-(-(len(text) + 8) // _ALIGNMENT) * _ALIGNMENT - 8)
    return len(text).to_bytes(8, "little") + text


def entries(config: LayerConfig, seed: int) -> dict[str, Entry]:
    """Where each tensor lies in the file of `ensure`."""
    offset = len(header(config, seed))
    found = {}
    for name, shape in tensor_shapes(config).items():
        length = _ITEM_BYTES * math.prod(shape)
        found[name] = Entry(offset, length, shape)
        offset += length
    return found


def weight_bytes(config: LayerConfig) -> int:
    """Bytes of all parameters at two bytes each."""
    return _ITEM_BYTES * sum(math.prod(shape) for shape in tensor_shapes(config).values())


def ensure(
    config: LayerConfig, cache_dir: Path, seed: int, progress: Progress | None = None
) -> Path:
    """The layer's weights file, made if it is not there yet.

    `progress` is called with bytes done and bytes in all. Raises CacheError where the folder
    can't be written or the disk is too small. A damaged file is made anew, with a warning.
    """
    return cache.made(
        cache.layer_dir(config, cache_dir, seed) / FILE_NAME,
        lambda part: _write(part, config, seed, progress),
        nbytes=len(header(config, seed)) + weight_bytes(config),
        fits=lambda path: _fits(path, config, seed),
    )


def hidden_states(config: LayerConfig, shape: Workload, seed: int) -> np.ndarray:
    """The layer's input: standard normal float16 [batch_size, seq_len, hidden_size]."""
    states = np.empty((shape.batch_size, shape.seq_len, hidden_size(config)), np.float16)
    fill_hidden_states(states, seed)
    return states


def past_states(config: LayerConfig, tokens: int, seed: int) -> np.ndarray:
    """The layer's inputs of earlier passes: standard normal float16 [1, tokens, hidden_size].

    All sequences of a batch have the same past.
    """
    states = np.empty((1, tokens, hidden_size(config)), np.float16)
    _fill(states, seed, "past_states")
    return states


def fill_hidden_states(states: np.ndarray, seed: int) -> None:
    """Write the hidden states of the seed over a contiguous float16 array of their size."""
    _fill(states, seed, "hidden_states")


def sequence_states(config: LayerConfig, workload: Workload, seed: int) -> np.ndarray:
    """Past and new hidden states of whole sequences: float16 [batch_size, length, hidden_size]."""
    new = hidden_states(config, workload, seed)
    if not workload.past:
        return new
    past = past_states(config, workload.past, seed)
    return np.concatenate([np.repeat(past, workload.batch_size, axis=0), new], axis=1)


def _fill(states: np.ndarray, seed: int, name: str) -> None:
    flat = states.reshape(-1)
    for chunk in range(-(-flat.size // _CHUNK)):
        part = flat[chunk * _CHUNK : (chunk + 1) * _CHUNK]
        part[:] = _normal(seed, name, chunk, part.size)


def _fits(path: Path, config: LayerConfig, seed: int) -> bool:
    wanted = header(config, seed)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != len(wanted) + weight_bytes(config):
                return False
            return file.read(len(wanted)) == wanted
    except OSError:
        return False


def _write(path: Path, config: LayerConfig, seed: int, progress: Progress | None) -> None:
    """Fill the file chunk by chunk; a chunk's values depend on nothing but its own coordinates."""
    total = weight_bytes(config)
    done = 0
    with path.open("w+b") as file, ThreadPoolExecutor(min(16, _cores())) as pool:
        begin = file.write(header(config, seed))
        file.flush()
        digest = digests.Digest(file.fileno())
        jobs = [
            pool.submit(_write_chunk, file.fileno(), name, entry, seed, chunk)
            for name, entry in entries(config, seed).items()
            for chunk in range(-(-entry.length // (_CHUNK * _ITEM_BYTES)))
        ]
        try:
            for job in jobs:
                done += job.result()
                digest.up_to(begin + done)
                if progress is not None:
                    progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    digests.note(path, digest.hex())


def _write_chunk(file: int, name: str, entry: Entry, seed: int, chunk: int) -> int:
    start = chunk * _CHUNK * _ITEM_BYTES
    size = min(_CHUNK, (entry.length - start) // _ITEM_BYTES)
    values = _normal(seed, name, chunk, size)
    if len(entry.shape) > 1:
        values *= np.float32(1 / math.sqrt(entry.shape[-1]))
    else:
        values *= np.float32(0.1)
        # A norm's: no other vector is called a weight.
        if name.endswith("weight"):
            values += np.float32(1)
    data = values.astype("<f2").tobytes()
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], entry.offset + start + written)
    return written


def _normal(seed: int, name: str, chunk: int, size: int) -> np.ndarray:
    entropy = [seed, zlib.crc32(name.encode()), chunk]
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(entropy)))
    return generator.standard_normal(size, dtype=np.float32)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
