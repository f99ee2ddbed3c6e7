"""A MoA in transformers' own Trainer.   python examples/hf_trainer.py [BASE] [OUT]"""

import sys

from peft import get_peft_model
from toy_data import DOMAINS, encoded, rows
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import loramix


def main(base: str = "smollm2-135m-instruct", out: str = "runs/hf-trainer", steps: int = 60) -> Trainer:
    tokenizer = loramix.load_tokenizer(base)
    config = loramix.LoramixConfig(method="moa", experts=DOMAINS, r=4, router={"pooling": "mean"})
    model = get_peft_model(loramix.load_base(base), config)
    arguments = TrainingArguments(
        out,
        max_steps=steps,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        remove_unused_columns=False,  # the domain column must reach the collator
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    loramix.attach_losses(model, {"routing_cross_entropy": 1.0}, accumulation=arguments.gradient_accumulation_steps)
    collator = loramix.DomainCollator(DataCollatorForSeq2Seq(tokenizer), DOMAINS)
    trainer = Trainer(model, arguments, train_dataset=encoded(tokenizer, rows()), data_collator=collator)
    trainer.train()
    model.save_pretrained(f"{out}/adapter", save_embedding_layers=False)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
