"""Answers a prompt of each domain with each expert of a run, pinned, and with the bare base; one prompt at a time.

python in_loramix.py RUN EXPORT ASKED ANSWERED    the last two JSON

ASKED      what in_vllm.py is to answer: base, experts' folders, largest rank, requests
ANSWERED   for each request: {"ids": [24 tokens], "margin": smallest lead of a best logit over the next, "text": ...}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from loramix.adapters.adapter import read_adapter
from loramix.adapters.lora import as_lora
from loramix.cli.output import quiet_libraries
from loramix.data.demo import demo_data
from loramix.data.prompts import encode_prompts
from loramix.models.base import base_folder
from loramix.opening import open_model, open_run

NEW_TOKENS = 24
MOST_PROMPT_TOKENS = 256
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as max_lora_rank."""


def main() -> None:
    run, export, asked_file, answered_file = map(Path, sys.argv[1:])
    quiet_libraries()
    folder, experiment = open_run(run)
    assert experiment.dtype == "float32", "the check compares in fp32"
    model, tokenizer = open_model(experiment, folder)
    # As vLLM's ignore_eos: both write the full length, whatever they write.
    model.get_base_model().generation_config.eos_token_id = None
    names = model.experts
    requests = [
        {"domain": domain, "prompt": prompt, "expert": expert}
        for domain, prompt in one_prompt_each(tokenizer).items()
        for expert in [None, *names]
    ]
    largest = max(as_lora(read_adapter(export / name)).rank for name in names)
    asked = {
        "base": base_folder(experiment.model_name_or_path),
        "experts": {name: str((export / name).resolve()) for name in names},
        "rank": min(rank for rank in VLLM_RANKS if rank >= largest),
        "max_new_tokens": NEW_TOKENS,
        "requests": requests,
    }
    asked_file.write_text(json.dumps(asked), encoding="utf-8")
    answers = [answer(model, tokenizer, one["prompt"], one["expert"]) for one in requests]
    answered_file.write_text(json.dumps(answers), encoding="utf-8")


def one_prompt_each(tokenizer: Any) -> dict[str, list[int]]:
    """Returns a prompt of each demo domain as the base reads it; none of them was trained on."""
    prompts = {}
    for domain, folder in demo_data().items():
        with (folder / "test.jsonl").open(encoding="utf-8") as lines:
            row = json.loads(next(lines))
        prompts[domain] = encode_prompts(tokenizer, [row["prompt"]])["input_ids"][0][-MOST_PROMPT_TOKENS:].tolist()
    return prompts


def answer(model: Any, tokenizer: Any, prompt: list[int], expert: str | None) -> dict[str, Any]:
    """Returns the greedy answer of one expert, or of the base."""
    how = {
        "input_ids": torch.tensor([prompt]),
        "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64),
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    if expert is None:
        with model.disable_adapter():
            written = model.generate(**how)
    else:
        written = model.generate(**how, expert=expert)
    best = torch.stack(written.scores)[:, 0].topk(2).values
    ids = written.sequences[0, len(prompt) :].tolist()
    return {"ids": ids, "margin": float((best[:, 0] - best[:, 1]).min()), "text": tokenizer.decode(ids)}


if __name__ == "__main__":
    main()
