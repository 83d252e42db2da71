"""A deterministic Llama with random weights, a byte tokenizer and a chat template, for loaders.

Every byte follows from this file: the weights come from SHAKE-256 and not from a random generator
whose stream a new version may change. It is large enough for several chunks of a sealed object,
and small enough to run on a processor.

    python -m tests.models.tiny_llama DIR
"""

from __future__ import annotations

import json
import sys
from hashlib import shake_256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 128, 384, 2, 4, 2
VOCABULARY = 320
BEGIN, END, USER, ASSISTANT = "<s>", "</s>", "<|user|>", "<|assistant|>"
SPECIAL = (BEGIN, END, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{% else %}<|assistant|>{% endif %}"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS,
    "vocab_size": VOCABULARY, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False, "dtype": "float32", "torch_dtype": "float32",
    "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.02, "use_cache": True,
}  # fmt: skip


def weights() -> dict[str, NDArray[np.float32]]:
    """Every tensor by the name that transformers gives it."""
    kv = HIDDEN * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN),
    }  # fmt: skip
    for number in range(LAYERS):
        base = f"model.layers.{number}"
        shapes |= {
            f"{base}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{base}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"{base}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"{base}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{base}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{base}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{base}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
    made = {name: _random(name, shape) for name, shape in shapes.items()}
    norms = [f"model.layers.{n}.{which}_layernorm.weight"
             for n in range(LAYERS) for which in ("input", "post_attention")]  # fmt: skip
    for name in (*norms, "model.norm.weight"):
        made[name] = np.ones(HIDDEN, dtype=np.float32)
    return made


def write(directory: Path) -> Path:
    """Write the model into a directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights(), directory / "model.safetensors", metadata={"format": "pt"})
    _json(directory / "config.json", CONFIG)
    _json(directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    _tokenizer().save(str(directory / "tokenizer.json"))
    _json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END,
            "model_max_length": 512, "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
        },
    )  # fmt: skip
    return directory


def _random(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    count = int(np.prod(shape))
    drawn = np.frombuffer(shake_256(b"tiny llama 1 " + name.encode()).digest(2 * count), "<u2")
    scale = np.float32(2.0 / np.sqrt(shape[-1]))
    unit = drawn.astype(np.float32) / np.float32(65535) - np.float32(0.5)
    return np.ascontiguousarray((unit * scale).reshape(shape))


def _tokenizer() -> Tokenizer:
    """One token for each byte, after the special ones; no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    made.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]
    )
    return made


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
