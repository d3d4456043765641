"""Times transformers' `generate` on a static batch, with PEFT's mixed batches: see `job.py`. No settings."""

from job import read_job, run


def main(job):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16).eval()
    version = transformers.__version__
    if job["adapters"]:
        import peft

        version += f", peft {peft.__version__}"
        first, *others = enumerate(job["adapters"])
        model = peft.PeftModel.from_pretrained(model, first[1], adapter_name=str(first[0]))
        for i, path in others:
            model.load_adapter(path, adapter_name=str(i))
        model.eval()

    @torch.inference_mode()
    def generate(case):
        ids = torch.tensor(case.prompts)
        mixed = {"adapter_names": [str(i) for i in case.adapters]} if job["adapters"] else {}
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=case.output,
            min_new_tokens=case.output,
            do_sample=False,
            pad_token_id=0,
            **mixed,
        )
        return found[:, ids.shape[1] :].tolist()

    run(job, version, generate)


if __name__ == "__main__":
    main(read_job())
