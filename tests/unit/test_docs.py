"""Pages for readers: every command and every example that they show runs; links lead somewhere.

A page's blocks run in its order, in one folder. Files that a page names are narrow ones here:
configurations of layers that are measured, a checkpoint, a text. `results/` is the real one.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

from memladder.cli import main as cli
from tests import whole_models

pytestmark = pytest.mark.filterwarnings("default")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(DOCS)): path
    for folder in ("tutorial", "guides")
    for path in sorted((DOCS / folder).glob("*.md"))
} | {"reference/python.md": DOCS / "reference/python.md"}
# SmolLM2-135M's widths, but for the MLP's.
NARROW = {
    "hidden_size": 576, "intermediate_size": 96, "num_attention_heads": 9, "head_dim": 64,
    "num_key_value_heads": 3, "vocab_size": 300, "num_hidden_layers": 2,
    "max_position_embeddings": 131072,
}  # fmt: skip
STARTS = {
    "memladder": cli.main,
    "memladder-run-all": cli.run_all,
    "memladder-measure-memory": cli.measure_memory,
}
# It says that something could be better; it need not be so here.
MAY_WARN = ("doctor",)


class Block(NamedTuple):
    """One fenced block: its language, its text, and whether it is for the slow tests."""

    language: str
    text: str
    expensive: bool


def blocks(page: Path) -> list[Block]:
    found = re.findall(
        r"^(<!-- expensive -->\n)?```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL
    )
    return [Block(language, text, bool(mark)) for mark, language, text in found]


@pytest.fixture
def folder(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page's blocks run."""
    monkeypatch.setenv("MEMLADDER_CACHE", str(cache_dir))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    shutil.copytree(ROOT / "tests/configs", tmp_path / "tests/configs")
    measured = json.dumps({"model_type": "llama", **NARROW})
    (tmp_path / "tests/configs/llama-3.2-1b.json").write_text(measured)
    return tmp_path


def checkpoint(folder: Path) -> None:
    """A narrow Llama with a tokenizer of bytes, and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = whole_models.saved(whole_models.model("llama", **NARROW), folder / "checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(made)
    (folder / "text.txt").write_text("Memory is where it goes. " * 8)


def play(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, expensive: bool) -> int:
    """Run a page's blocks; how many."""
    shown = [one for one in blocks(page) if expensive or not one.expensive]
    if any("checkpoint" in one.text for one in shown):
        checkpoint(folder)
    ran = 0
    for block in shown:
        if block.language == "bash":
            for line in block.text.splitlines():
                command(line, monkeypatch)
                ran += 1
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), {})
            ran += 1
        else:
            assert block.language == "text", "a fence names bash, python, or text"
    return ran


def command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start, *arguments = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [start, *arguments])
    with pytest.raises(SystemExit) as ended:
        STARTS[start]()
    assert not ended.value.code or arguments[0] in MAY_WARN, line


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_shows_runs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert play(PAGES[name], folder, monkeypatch, expensive=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, page in PAGES.items() if any(b.expensive for b in blocks(page))]
)
def test_all_that_a_page_shows_runs(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "guides/reproduce.md":
        pytest.skip("a layer of LLaMA-2-70B takes minutes and gigabytes")
    play(PAGES[name], folder, monkeypatch, expensive=True)


def links() -> list[tuple[Path, str]]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
    return [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not target.startswith(("http:", "https:", "mailto:"))
    ]


def test_links_lead_somewhere() -> None:
    missing = []
    for page, target in links():
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            missing.append(f"{page.relative_to(ROOT)}: {target}")
    assert not missing, missing


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_page_of_commands_is_what_the_commands_take() -> None:
    path = DOCS / "commands.py"
    spec = importlib.util.spec_from_file_location("docs_commands", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    said = "run: python docs/commands.py > docs/reference/commands.md"
    assert module.page() == (DOCS / "reference/commands.md").read_text(), said
