"""Times vLLM: see `job.py`. Settings: arguments of `vllm.LLM`; all else that is not about the work is its
default."""

import os

from job import read_job, run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main(job):
    import vllm
    from vllm.lora.request import LoRARequest

    paths = job["adapters"]
    lora = {"enable_lora": True, "max_loras": len(paths), "max_lora_rank": 16} if paths else {}
    engine = vllm.LLM(
        model=job["model"],
        dtype="bfloat16",
        max_model_len=4352,
        max_num_seqs=64,
        enable_prefix_caching=False,
        **lora,
        **job["settings"],
    )
    has_tokenizer = not job["settings"].get("skip_tokenizer_init")

    def generate(case):
        params = vllm.SamplingParams(
            temperature=0, max_tokens=case.output, ignore_eos=True, detokenize=has_tokenizer
        )
        prompts = [{"prompt_token_ids": ids} for ids in case.prompts]
        using = [None if i is None else LoRARequest(f"a{i}", 1 + i, paths[i]) for i in case.adapters]
        found = engine.generate(prompts, params, lora_request=using if paths else None, use_tqdm=False)
        return [one.outputs[0].token_ids for one in found]

    run(job, vllm.__version__, generate)


if __name__ == "__main__":
    main(read_job())
