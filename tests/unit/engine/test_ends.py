"""What stands around the layers of transformers' models: found by what it computes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from memladder.core.errors import ConfigError
from memladder.models import ends
from memladder.models.ends import Ends, Norm
from tests.hf_layers import LAYERS

pytestmark = pytest.mark.filterwarnings("default")


def found(name: str, **values: Any) -> Ends:
    from transformers import AutoConfig

    kind, own = LAYERS[name]
    given = {"vocab_size": 50, "num_hidden_layers": 2, **own, **values}
    raw: dict[str, Any] = AutoConfig.for_model(kind, **given).to_dict()
    return ends.find(raw)


def test_llama() -> None:
    norm = Norm("rms", 1e-6, "model.norm.weight")
    assert found("llama") == Ends(
        vocabulary=50,
        hidden_size=64,
        embedding="model.embed_tokens.weight",
        factor=1.0,
        positions=None,
        offset=0,
        embedding_norm=None,
        final_norm=norm,
        head="lm_head.weight",
        head_bias=None,
        logit_factor=1.0,
        softcap=0.0,
    )
    assert found("llama", tie_word_embeddings=True).is_tied


def test_a_norm_after_the_embeddings() -> None:
    bloom = found("bloom")
    assert bloom.embedding_norm is not None
    assert bloom.embedding_norm.kind == "layer"
    assert bloom.embedding_norm.bias == "transformer.word_embeddings_layernorm.bias"
    assert bloom.is_tied


def test_learned_positions() -> None:
    opt, gpt2 = found("opt"), found("gpt2")
    # OPT's table has two rows before the first position's.
    assert (opt.positions, opt.offset) == ("model.decoder.embed_positions.weight", 2)
    assert (gpt2.positions, gpt2.offset) == ("transformer.wpe.weight", 0)


def test_numbers_that_multiply() -> None:
    """Gemma: √hidden_size; its norms store the weight less 1, and logits are capped. Cohere and
    Granite scale logits."""
    gemma = found("gemma2")
    assert gemma.factor == pytest.approx(math.sqrt(64), rel=1e-6)
    assert gemma.final_norm is not None
    assert (gemma.final_norm.shift, gemma.softcap) == (1.0, 30.0)
    assert found("cohere").logit_factor == pytest.approx(0.0625, rel=1e-6)
    granite = found("granite", embedding_multiplier=12.0, logits_scaling=8.0)
    assert (granite.factor, granite.logit_factor) == pytest.approx((12.0, 0.125), rel=1e-6)


def test_a_bias_of_the_head() -> None:
    assert found("phi").head_bias == "lm_head.bias"


@pytest.mark.parametrize("name", ["gpt_neox", "falcon", "qwen3", "gemma3", "mpt", "nemotron"])
def test_others_are_found(name: str) -> None:
    assert found(name).final_norm is not None


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("llama", {"vocab_size": -5}, "vocab_size '-5'"),
        ("xglm", {}, "embeddings are changed in an unknown way"),
        ("opt", {"word_embed_proj_dim": 32}, "outside its layers|no embeddings and head|can't"),
    ],
)
def test_what_is_refused(name: str, values: dict[str, Any], words: str) -> None:
    from transformers import AutoConfig

    kind, own = LAYERS[name]
    raw = AutoConfig.for_model(kind, **{"num_hidden_layers": 2, **own}).to_dict() | values
    with pytest.raises(ConfigError, match=words) as caught:
        ends.find(raw)
    assert "\n" not in str(caught.value)


def test_a_type_that_is_none() -> None:
    with pytest.raises(ConfigError, match="model type 'nonsense'"):
        ends.find({"model_type": "nonsense", "vocab_size": 5})
