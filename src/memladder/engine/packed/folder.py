"""A packed model as a folder: its index, a packed file a layer, one for the rest, a tokenizer.

memladder.json          what the model is, its files with their sizes and SHA-256, what each lost
layer-00000.safetensors … as `packed_layer` has them
rest.safetensors        embeddings, norms, head (`rest`)
tokenizer.json …        what the checkpoint has of a tokenizer, copied
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memladder import formats
from memladder.core import digests
from memladder.core.errors import FormatError, MemladderError
from memladder.core.files import write_atomic
from memladder.core.serial import from_json, to_json
from memladder.engine.packed import rest
from memladder.engine.packed.packed_layer import Contents
from memladder.models.ends import Ends

INDEX, REST = "memladder.json", "rest.safetensors"
VERSION = 1
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("generation_config.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
"""Files of a checkpoint that are copied; no code is among them."""
# The index of 4096 layers has 4 MB.
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Matrix:
    """One matrix of a file; `sqnr_db` is None where nothing was lost."""

    name: str
    format: str
    rows: int
    columns: int
    nbytes: int
    sqnr_db: float | None


@dataclass(frozen=True)
class Packed:
    """One file of the folder; `parameters` are all that it holds, `sqnr_db` that of its matrices
    together."""

    file: str
    file_bytes: int
    sha256: str
    nbytes: int
    parameters: int
    sqnr_db: float | None
    matrices: tuple[Matrix, ...]
    window: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """Scales, vectors and padding included."""
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True)
class Options:
    """How a model is packed: the same for all of its files.

    format of layers' matrices; those that a pattern of `kept` fits stay in fp16;
    head_format of the head, and of embeddings that are the head too; `embedding_format` of others.
    """

    format: str
    kept: tuple[str, ...] = ()
    head_format: str = "fp16"
    embedding_format: str = "fp16"


@dataclass(frozen=True)
class Index:
    """What `memladder.json` says. `layers` are those that are packed, in order, of `layer_count`;
    `rest` is the last to come. `source` is the digest of what was packed: the configuration, and
    names, shapes and files of all tensors."""

    memladder_model: int
    config: Mapping[str, Any]
    options: Options
    source: str
    ends: Ends
    sizes: Mapping[str, tuple[int, ...]]
    layer_count: int
    layers: tuple[Packed, ...]
    rest: Packed | None
    tokenizer: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return self.rest is not None and len(self.layers) == self.layer_count

    def rest_contents(self) -> Contents:
        """Of the rest's file."""
        options = self.options
        kinds = formats.get(options.embedding_format), formats.get(options.head_format)
        return rest.contents(self.ends, *kinds, self.sizes)

    def save(self, folder: Path) -> None:
        """Write the index. Raises UsageError."""
        text = json.dumps(to_json(self), indent=1, allow_nan=False) + "\n"
        write_atomic(folder / INDEX, text)


def layer_file(number: int) -> str:
    """The file of a layer."""
    return f"layer-{number:05d}.safetensors"


def read(folder: Path) -> Index | None:
    """The folder's index, whole or not; None where there is none.

    Raises FormatError for one that is damaged, or of another version.
    """
    path = folder / INDEX
    try:
        if not path.exists():
            return None
        if path.stat().st_size > _MAX_BYTES:
            raise FormatError(f"{path}: too large to be an index")
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise FormatError(f"{path}: not JSON") from None
    version = raw.get("memladder_model") if isinstance(raw, dict) else None
    if version != VERSION or isinstance(version, bool):
        raise FormatError(f"{path}: version {str(version)[:20]!r}; this memladder reads {VERSION}")
    try:
        found = from_json(Index, raw)
        names = [layer_file(number) for number in range(len(found.layers))]
        if [packed.file for packed in found.layers] != names or len(names) > found.layer_count:
            raise ValueError("its layers are not in order")
        found.rest_contents()
    except (ValueError, KeyError, TypeError, MemladderError) as error:
        raise FormatError(f"{path}: damaged: {' '.join(str(error).split())[:200]}") from None
    return found


def opened(folder: Path) -> Index:
    """The index of a folder whose files are all there, in their sizes.

    Raises FormatError for any other folder.
    """
    found = read(folder) if folder.is_dir() else None
    if found is None:
        raise FormatError(
            f"{folder}: no {INDEX} there; `memladder quantize CHECKPOINT --all --out {folder}` "
            "makes such a folder"
        )
    if not found.is_whole or found.rest is None:
        raise FormatError(
            f"{folder}: {len(found.layers)} of {found.layer_count} layers are packed; the same "
            "`memladder quantize --all` does the rest"
        )
    for packed in (*found.layers, found.rest):
        path = folder / packed.file
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise FormatError(f"{path}: no such file, which {INDEX} names")
        if size != packed.file_bytes:
            raise FormatError(f"{path}: {size} bytes, {packed.file_bytes} by {INDEX}")
    return found


def verify(folder: Path, index: Index, full: bool) -> None:
    """Raise FormatError unless every file has its digest; see `digests.fault` for `full`."""
    assert index.rest is not None
    for packed in (*index.layers, index.rest):
        digests.require(folder / packed.file, packed.sha256, full=full)
