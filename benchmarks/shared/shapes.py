"""Shapes of models, and models of random weights in them."""

from pathlib import Path

import msgspec
import torch
import transformers

from aioengine.model.spec import ModelSpec, RopeSpec

LLAMA_8B = ModelSpec(
    family="llama", vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, intermediate_size=14336, rms_norm_eps=1e-5, max_position=131072, rope=RopeSpec(),
    tie_embeddings=False,
)  # fmt: skip
SMOL = msgspec.structs.replace(
    LLAMA_8B, vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    intermediate_size=1536, tie_embeddings=True,
)  # fmt: skip
SHAPES = {"llama-8b": LLAMA_8B, "smol": SMOL}


def random_model(home: Path, shapes: str, layers: int) -> Path:
    """Write a Llama of random weights in bfloat16; does nothing if it is there. Returns its folder."""
    folder, spec = home.absolute() / f"{shapes}-{layers}", SHAPES[shapes]
    if not (folder / "config.json").exists():
        config = transformers.LlamaConfig(
            vocab_size=spec.vocab_size, hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size, num_hidden_layers=layers,
            num_attention_heads=spec.num_heads, num_key_value_heads=spec.num_kv_heads,
            head_dim=spec.head_dim, max_position_embeddings=8192, tie_word_embeddings=spec.tie_embeddings,
            dtype="bfloat16",
        )  # fmt: skip
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = transformers.LlamaForCausalLM(config).bfloat16()
        model.save_pretrained(folder)
    return folder
