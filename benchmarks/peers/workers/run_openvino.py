"""Times OpenVINO GenAI's continuous batching: see `job.py`. Settings: `model`, the exported folder.

All prompts of a batch have the same adapter there: with adapters, each adapter's prompts are a batch.
"""

from job import read_job, run


def main(job):
    import numpy
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = False
    adapters = [genai.Adapter(f"{path}/adapter_model.safetensors") for path in job["adapters"]]
    properties = {"INFERENCE_PRECISION_HINT": "bf16"}
    if adapters:
        properties["adapters"] = genai.AdapterConfig(adapters)
    pipeline = genai.ContinuousBatchingPipeline(job["settings"]["model"], scheduler, "CPU", properties)

    def batch(prompts, output, adapter):
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output
        config.ignore_eos = True
        config.do_sample = False
        if adapter is not None:
            # alpha / rank: OpenVINO reads the file of tensors alone, which does not say.
            config.adapters = genai.AdapterConfig(adapters[adapter], 2.0)
        tensors = [openvino.Tensor(numpy.array([ids], dtype=numpy.int64)) for ids in prompts]
        found = pipeline.generate(tensors, [config] * len(prompts))
        return [one.m_generation_ids[0] for one in found]

    def generate(case):
        outputs = [None] * len(case.prompts)
        for adapter, members in case.by_adapter().items():
            found = batch([case.prompts[i] for i in members], case.output, adapter)
            for i, tokens in zip(members, found, strict=True):
                outputs[i] = tokens
        return outputs

    run(job, genai.__version__, generate)


if __name__ == "__main__":
    main(read_job())
