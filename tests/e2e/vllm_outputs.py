"""What real vLLM and transformers compute from a model; run by an interpreter that has both.

Reads a JSON list of jobs from standard input, does each in this one process, and prints a JSON list
of what came out, floats as the hex digits of their bytes, so that equal means equal.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip

TEXTS = ["Paris is the capital of France.", "a sealed model, opened nowhere else"]


def vllm_outputs(job: dict[str, Any]) -> Any:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options = dict(job.get("options", {}))
    engine = LLM(model=job["model"], enforce_eager=True, max_model_len=128, **options)
    try:
        if options.get("runner") == "pooling":
            found = [list(item.outputs.embedding) for item in engine.embed(TEXTS)]
            return [[value.hex() for value in vector] for vector in found]
        how = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True)
        found = [item.outputs[0] for item in engine.generate(TEXTS, how)]
        return [[list(item.token_ids), float(item.cumulative_logprob).hex()] for item in found]
    finally:
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def transformers_outputs(job: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModel

    if "sealed" in job:
        import cai

        with cai.open(job["sealed"], job["key_file"]) as files:
            config = AutoConfig.for_model(**json.loads(files.cat("config.json")))
            weights = files.load_safetensors(framework="pt")
        with torch.device("meta"):
            architecture = type(AutoModel.from_config(config))
        model = architecture.from_pretrained(None, config=config, state_dict=weights)
    else:
        model = AutoModel.from_pretrained(job["model"])
    model = model.eval().to(torch.float32)
    with torch.no_grad():
        hidden = model(input_ids=torch.arange(5, 40).unsqueeze(0)).last_hidden_state
    return hidden.contiguous().view(-1).view(torch.uint8).numpy().tobytes().hex()


def main() -> None:
    jobs = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # the libraries print
    kinds = {"vllm": vllm_outputs, "transformers": transformers_outputs}
    found = [kinds[job["kind"]](job) for job in jobs]
    with os.fdopen(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
