"""Times llama.cpp's library: see `job.py`. Settings: `model`, a GGUF file; `ftype`, what to quantize it to.

It is driven as its own `llama-batched-bench -fa on` does, with the prompts given: prompts in batches of 2,048
tokens, then a token of every sequence in each step. A context has one set of adapters: with adapters, each
adapter's prompts are a batch. The adapters are GGUF files.
"""

import ctypes
import os

from job import read_job, run

MOST = 2048
"""Tokens in a batch."""


class Context:
    """A model with a cache for 64 sequences."""

    def __init__(self, path, adapters):
        import llama_cpp

        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = 64 * 256, MOST, 64
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.flash_attn_type = 1
        params.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.adapters = [llama_cpp.llama_adapter_lora_init(self.model, one.encode()) for one in adapters]
        if not self.context or not all(self.adapters):
            raise RuntimeError(f"llama.cpp cannot load {path} or its adapters: see the log")
        self.batch = llama_cpp.llama_batch_init(MOST, 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def use(self, adapter):
        """Has all that follows computed with this adapter, or with none."""
        chosen = [] if adapter is None else [self.adapters[adapter]]
        array = (self.lib.llama_adapter_lora_p_ctypes * len(chosen))(*chosen)
        scales = (ctypes.c_float * len(chosen))(*[1.0] * len(chosen))
        if self.lib.llama_set_adapters_lora(self.context, array, len(chosen), scales):
            raise RuntimeError("llama.cpp refuses the adapter")

    def clear(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def decode(self, tokens):
        """Compute (token, position, sequence, whether logits are wanted); returns {sequence: next token}."""
        import numpy

        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp cannot decode {len(tokens)} tokens")
        found = {}
        for i, (_, _, sequence, wanted) in enumerate(tokens):
            if wanted:
                logits = self.lib.llama_get_logits_ith(self.context, i)
                found[sequence] = int(numpy.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())
        return found

    def generate(self, prompts, output):
        """The greedy continuations of all prompts at once."""
        self.clear()
        last, outputs = {}, [[] for _ in prompts]
        whole = [
            (token, position, sequence, position == len(ids) - 1)
            for sequence, ids in enumerate(prompts)
            for position, token in enumerate(ids)
        ]
        for start in range(0, len(whole), MOST):
            last |= self.decode(whole[start : start + MOST])
        for step in range(output):
            for sequence, token in last.items():
                outputs[sequence].append(token)
            if step < output - 1:
                last = self.decode([(t, len(prompts[s]) + step, s, True) for s, t in last.items()])
        return outputs


def quantized(path, ftype):
    """The model in another type, beside the original; made once."""
    import llama_cpp

    target = f"{path}.{ftype}"
    if not os.path.exists(target):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
        if llama_cpp.llama_model_quantize(path.encode(), f"{target}.part".encode(), params):
            raise RuntimeError(f"llama.cpp cannot quantize {path} to {ftype}")
        os.rename(f"{target}.part", target)
    return target


def main(job):
    import llama_cpp

    path, ftype = job["settings"]["model"], job["settings"]["ftype"]
    context = Context(path if ftype == "BF16" else quantized(path, ftype), job["adapters"])

    def generate(case):
        outputs = [None] * len(case.prompts)
        for adapter, members in case.by_adapter().items():
            context.use(adapter)
            found = context.generate([case.prompts[i] for i in members], case.output)
            for i, tokens in zip(members, found, strict=True):
                outputs[i] = tokens
        return outputs

    run(job, f"llama-cpp-python {llama_cpp.__version__}", generate)


if __name__ == "__main__":
    main(read_job())
