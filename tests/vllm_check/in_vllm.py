"""Answers prompts in vLLM, all in one batch, each with its LoRA or none. Runs in vLLM's own environment.

python in_vllm.py ASKED ANSWERED    both JSON

ASKED      {"base": FOLDER, "experts": {NAME: FOLDER}, "rank": R, "max_new_tokens": N,
            "requests": [{"prompt": [ids], "expert": NAME or null}]}
ANSWERED   {"answers": [[ids]], "seconds_to_start": S, "seconds": S, "vllm": VERSION, "loramix_there": false}
"""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from vllm import LLM, SamplingParams, TokensPrompt, __version__
from vllm.lora.request import LoRARequest

KV_CACHE_BYTES = 512 * 2**20
"""20 requests of 280 tokens at 46 kB a token (30 layers, 3 heads of 64, keys and values in fp32) are 258 MB."""

EMPTY_SLOTS = 1
"""On a CPU vLLM 0.32 gives a request without LoRA the index -1, which in its torch code is the last slot: with all
slots taken, the base answers as an expert (vllm-project/vllm#48421; seen here on 2026-11-23). An empty slot is zeros.
"""


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    requests = asked["requests"]
    started = time.monotonic()
    llm = LLM(
        model=asked["base"],
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_loras=len(asked["experts"]) + EMPTY_SLOTS,
        max_lora_rank=asked["rank"],
        max_model_len=512,
        max_num_seqs=len(requests),
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        disable_log_stats=True,
    )
    up = time.monotonic()
    loras = {
        name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(asked["experts"].items(), 1)
    }
    answers = llm.generate(
        [TokensPrompt(prompt_token_ids=one["prompt"]) for one in requests],
        # The length is fixed so that every request is in the batch to the end.
        SamplingParams(temperature=0, max_tokens=asked["max_new_tokens"], ignore_eos=True),
        lora_request=[loras[one["expert"]] if one["expert"] else None for one in requests],
        use_tqdm=False,
    )
    content = {
        "answers": [list(one.outputs[0].token_ids) for one in answers],
        "seconds_to_start": round(up - started, 1),
        "seconds": round(time.monotonic() - up, 1),
        "vllm": __version__,
        "loramix_there": find_spec("loramix") is not None,
    }
    Path(sys.argv[2]).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
