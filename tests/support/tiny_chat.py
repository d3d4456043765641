"""A tiny random model that comes with a tokenizer and a chat template, for tests that send text."""

from __future__ import annotations

import json
from pathlib import Path

from support.byte_tokenizer import byte_tokenizer
from support.tiny_models import build_model

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_chat_model(out_dir: Path) -> Path:
    """Saves a llama whose 256 tokens are the bytes, and returns ``out_dir``."""
    build_model(out_dir, "llama", max_position_embeddings=512)
    byte_tokenizer().save(str(out_dir / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (out_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    return out_dir
