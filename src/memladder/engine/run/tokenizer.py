"""Text to token ids and back, by the tokenizer that a packed folder has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memladder.core.errors import FormatError
from memladder.engine.packed import folder as folders


class Tokenizer:
    """`stop` are the tokens after which an answer ends."""

    def __init__(self, folder: Path, inner: Any, stop: frozenset[int]) -> None:
        self._folder, self._inner, self.stop = folder, inner, tuple(sorted(stop))

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """The folder's own. Raises FormatError, saying that ids do without, where it has none."""
        index = folders.opened(folder)
        if not (folder / "tokenizer.json").is_file():
            raise FormatError(
                f"{folder}: the checkpoint has no tokenizer.json; give token ids: --ids 1,2,3"
            )
        from transformers import PreTrainedTokenizerFast

        said = folder / "generation_config.json"
        try:
            inner = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            told = json.loads(said.read_bytes()) if said.is_file() else {}
        except Exception as error:  # tokenizers raises bare exceptions
            reason = " ".join(str(error).split())[:200]
            raise FormatError(f"{folder}: its tokenizer can't be read: {reason}") from None
        stop = {inner.eos_token_id} - {None}
        for source in (index.config, told if isinstance(told, dict) else {}):
            found = source.get("eos_token_id")
            for token in found if isinstance(found, list) else [found]:
                if isinstance(token, int) and not isinstance(token, bool):
                    stop.add(token)
        return cls(folder, inner, frozenset(stop))

    def prompt(self, said: Sequence[tuple[str, str]], *, plain: bool = False) -> list[int]:
        """Ids of a conversation, of (role, text) each, up to where the answer begins: in the chat
        template, or, where there is none, and if `plain`, the texts one after the other."""
        if plain or self._inner.chat_template is None:
            return self.ids("\n".join(text for _, text in said))
        messages = [{"role": role, "content": text} for role, text in said]
        try:
            text = self._inner.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())[:200]
            raise FormatError(
                f"{self._folder}: its chat template fails: {reason}; --plain does without"
            ) from None
        # The template has written all special tokens itself.
        return list(self._inner(text, add_special_tokens=False)["input_ids"])

    def ids(self, text: str) -> list[int]:
        """Ids of a text, with what the tokenizer puts at its beginning."""
        return list(self._inner(text)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        found: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return found
