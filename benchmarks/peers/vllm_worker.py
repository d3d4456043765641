"""Times vLLM on cases given as JSON; `beside_vllm.py` runs this with the Python that has vLLM.

    python vllm_worker.py MODEL_DIR ADAPTERS_DIR CASES LORA REPEATS

CASES is a JSON list of [name, requests, prompt tokens, output tokens, adapters], LORA how many adapters it
has room for (0: LoRA off). Prints a JSON object, the seconds of every repeat by case, as its last line.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model, adapters = sys.argv[1:3]
    cases, room, repeats = json.loads(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    lora = (
        {"enable_lora": True, "max_loras": room, "max_lora_rank": 16, "max_cpu_loras": room} if room else {}
    )
    engine = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=2304,
        max_num_seqs=64,
        enable_prefix_caching=False,
        **lora,
    )
    rng = random.Random(0)
    seconds = {}
    for name, requests, prompt, output, count in cases:
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        using = None
        if count:
            using = [
                LoRARequest(f"a{i % count}", 1 + i % count, f"{adapters}/{i % count}")
                for i in range(requests)
            ]
        found = []
        for _ in range(repeats + 1):  # the first one warms up
            ids = [[rng.randrange(100, 40_000) for _ in range(prompt)] for _ in range(requests)]
            prompts = [{"prompt_token_ids": one} for one in ids]
            start = time.perf_counter()
            engine.generate(prompts, params, lora_request=using, use_tqdm=False)
            found.append(time.perf_counter() - start)
        seconds[name] = found[1:]
    print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
