"""Trains one LoRA for each of several domains with PEFT alone. Run as a script, in a process that never sees loramix.

python stock_peft.py BASE OUT STEPS DOMAIN=FILE ...    FILE: lines with prompt and completion
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

KINDS = (
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    {"r": 6, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 2}},
)


def main() -> None:
    base, out, steps, *domains = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(base)
    for number, domain in enumerate(domains):
        name, _, file = domain.partition("=")
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.05, **KINDS[number % 4]))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-3)
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        for step in range(int(steps)):
            row = rows[step % len(rows)]
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
            )
            ids = (list(prompt) + tokenizer(row["completion"], add_special_tokens=False)["input_ids"])[:256]
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            if len(ids) <= len(prompt):
                continue
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(f"{out}/{name}")
    assert not any(module.startswith("loramix") for module in sys.modules)


if __name__ == "__main__":
    main()
