"""A MoA in a loop of one's own, by accelerate.   python examples/plain_loop.py [BASE] [OUT]

`accelerate launch --num_processes 2 examples/plain_loop.py` runs it on two processes."""

import sys

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from toy_data import DOMAINS, encoded, rows
from transformers import DataCollatorForSeq2Seq

import loramix


def main(base: str = "smollm2-135m-instruct", out: str = "runs/plain-loop", steps: int = 60) -> list[float]:
    tokenizer = loramix.load_tokenizer(base)
    config = loramix.LoramixConfig(method="moa", experts=DOMAINS, r=4, router={"pooling": "mean"})
    model = get_peft_model(loramix.load_base(base), config)
    attached = loramix.attach_losses(model, {"routing_cross_entropy": 1.0})
    collator = loramix.DomainCollator(DataCollatorForSeq2Seq(tokenizer), DOMAINS)
    batches = DataLoader(encoded(tokenizer, rows()), batch_size=6, shuffle=True, collate_fn=collator)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    parallel, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    parallel.train()
    losses: list[float] = []
    while len(losses) < steps:
        for batch in batches:
            loss = parallel(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if len(losses) == steps:
                break
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}", {k: float(v) for k, v in attached.values.items()})
    if accelerator.is_main_process:
        model.save_pretrained(f"{out}/adapter", save_embedding_layers=False)
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
