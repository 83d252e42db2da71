"""A tiny random BERT, written by the tests so that they need no download."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "key", "opens", "a", "door", "model"]
WIDTH, HEADS, INNER, LAYERS, POSITIONS, LONGEST = 24, 3, 40, 2, 16, 12


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    tensors = {
        "embeddings.word_embeddings.weight": matrix(len(WORDS), WIDTH),
        "embeddings.position_embeddings.weight": matrix(POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": matrix(2, WIDTH),
        "embeddings.LayerNorm.weight": matrix(WIDTH) + 1,
        "embeddings.LayerNorm.bias": matrix(WIDTH),
    }
    for number in range(LAYERS):
        base = f"encoder.layer.{number}."
        for part in ("query", "key", "value"):
            tensors[f"{base}attention.self.{part}.weight"] = matrix(WIDTH, WIDTH)
            tensors[f"{base}attention.self.{part}.bias"] = matrix(WIDTH)
        for part, shape in (
            ("attention.output", (WIDTH, WIDTH)),
            ("intermediate", (INNER, WIDTH)),
            ("output", (WIDTH, INNER)),
        ):
            tensors[f"{base}{part}.dense.weight"] = matrix(*shape)
            tensors[f"{base}{part}.dense.bias"] = matrix(shape[0])
            if part != "intermediate":
                tensors[f"{base}{part}.LayerNorm.weight"] = matrix(WIDTH) + 1
                tensors[f"{base}{part}.LayerNorm.bias"] = matrix(WIDTH)
    return tensors


CONFIG = {
    "model_type": "bert", "hidden_act": "gelu", "hidden_size": WIDTH, "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS, "intermediate_size": INNER, "max_position_embeddings": POSITIONS,
    "vocab_size": len(WORDS), "layer_norm_eps": 1e-12,
}


def write_tiny_bert(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LONGEST}))
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=LONGEST)  # published tokenizers pad; the engine must not
    tokenizer.save(str(directory / "tokenizer.json"))
    save_file(weights(), directory / "model.safetensors")
    return directory


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("tiny") / "tiny-bert")
