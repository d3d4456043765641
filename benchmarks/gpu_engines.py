"""This engine, or vLLM, on random weights in Llama 3 8B's shapes on a GPU: a part of ``benchmarks.gpu``.

    python -m benchmarks.gpu_engines aioengine
    python -m benchmarks.gpu_engines vllm --layers 16

Writes the model once, without a tokenizer; the requests have token ids. Prints a JSON object for each row of
a table. Eight adapters of rank 16 are loaded; request i of a work with adapters uses adapter i % 8.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec
from aioengine.model.spec import ModelSpec
from benchmarks.beside_peers import ADAPTERS, RANK, WORKERS, Work
from benchmarks.kernels.gpu import SHAPES
from benchmarks.kernels.predictions import with_layers

HOME = Path(__file__).resolve().parents[1] / "build" / "gpu"
WORKS = (
    Work("1 x 128 + 64", 1),
    Work("32 x 128 + 64", 32),
    Work("32 x 128 + 64, 8 adapters", 32, adapters=ADAPTERS),
    Work("64 x 512 + 128", 64, 512, 128),
    Work("64 x 512 + 128, 8 adapters", 64, 512, 128, adapters=ADAPTERS),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "aioengine": {"quantization": "none", "lora_dtype": "auto", "kv_cache_memory": None},
    "vllm": {"skip_tokenizer_init": True},
}
_NOISE = (1 << 22) + 15
"""Random numbers that weights repeat: no multiple of a row, so that rows differ."""


def configuration(spec: ModelSpec) -> dict[str, Any]:
    """Return the config.json of a Llama in these shapes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }


def write_model(folder: Path, spec: ModelSpec) -> Path:
    """Write a Llama with random weights; returns ``folder``. Does nothing if it is there."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(configuration(spec)), encoding="utf-8")
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)).bfloat16()

    def weight(rows: int, columns: int) -> Tensor:
        count = rows * columns
        return noise.repeat(-(-count // len(noise)))[:count].view(rows, columns) / columns**0.5

    hidden, inner, q, kv = spec.hidden_size, spec.intermediate_size, spec.q_size, spec.kv_size
    layer = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shards: dict[str, dict[str, Tensor]] = {"outer.safetensors": {}}
    outer = shards["outer.safetensors"]
    outer["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        outer[name] = weight(spec.vocab_size, hidden)
    tensors = {f"{name}.weight": weight(*shape) for name, shape in layer.items()}  # the same in each layer
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for i in range(spec.num_layers):
        shards[f"layer-{i}.safetensors"] = {f"model.layers.{i}.{name}": t for name, t in tensors.items()}
    for shard, content in shards.items():
        save_file(content, folder / shard, {"format": "pt"})
    places = {name: shard for shard, content in shards.items() for name in content}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run one engine, and print its rows. Returns 1 if it failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("engine", choices=SETTINGS)
    parser.add_argument("--shapes", choices=SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600.0, help="after them the engine is ended")
    parser.add_argument("--home", type=Path, default=HOME, help="where the model is written")
    args = parser.parse_args(argv)
    spec = with_layers(SHAPES[args.shapes], args.layers)
    model = write_model(args.home / f"{args.shapes}-{args.layers}", spec)
    with tempfile.TemporaryDirectory() as temporary:
        folder, result = Path(temporary), Path(temporary) / "result.json"
        read = read_spec(model)
        adapters = [write_random_adapter(folder / str(i), read, RANK, seed=i) for i in range(ADAPTERS)]
        job = {
            "model": str(model),
            "settings": SETTINGS[args.engine],
            "adapters": [str(path) for path in adapters],
            "cases": [work.case(spec.vocab_size) for work in WORKS],
        }
        command = [sys.executable, str(WORKERS / f"run_{args.engine}.py"), str(result)]
        why = _run(command, json.dumps(job), args.seconds)
        title = f"{args.engine}, {args.layers} layers of random weights"
        columns = ["requests x prompt + output tokens", "output tokens a second"]
        print(json.dumps({"title": title, "columns": columns}))
        if result.exists():
            times = json.loads(result.read_text(encoding="utf-8"))["seconds"]
            for work in (work for work in WORKS if work.title in times):
                print(json.dumps({"cells": [work.title, f"{work.value(times[work.title]):,.0f}"]}))
    if why:
        print(json.dumps({"error": why}))
    return int(bool(why))


def _run(command: Sequence[str], job: str, seconds: float) -> str:
    """Run an engine's process; returns why it did not come to its end."""
    try:
        done = subprocess.run(command, input=job, text=True, stdout=2, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"the engine had not done all of it after {seconds:.0f} s"
    return f"the engine's process ended with {done.returncode}" if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
