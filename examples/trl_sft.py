"""A MoA in TRL's SFTTrainer.   python examples/trl_sft.py [BASE] [OUT]      (pip install "loramix[trl]")"""

import sys

from datasets import Dataset
from peft import get_peft_model
from toy_data import DOMAINS, rows
from trl import SFTConfig, SFTTrainer

import loramix


def as_messages(row: dict) -> dict:
    """Conversational prompt and completion, so that TRL puts the base's chat template around them, as routing does."""
    said = {"prompt": ("user", row["prompt"]), "completion": ("assistant", row["completion"])}
    turns = {part: [{"role": role, "content": text}] for part, (role, text) in said.items()}
    return {**turns, "domain": row["domain"]}


def main(base: str = "smollm2-135m-instruct", out: str = "runs/trl", steps: int = 60) -> SFTTrainer:
    tokenizer = loramix.load_tokenizer(base)
    config = loramix.LoramixConfig(method="moa", experts=DOMAINS, r=4, router={"pooling": "mean"})
    model = get_peft_model(loramix.load_base(base), config)
    arguments = SFTConfig(
        out,
        max_steps=steps,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        remove_unused_columns=False,  # else TRL drops the domain column
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    loramix.attach_losses(model, {"routing_cross_entropy": 1.0}, accumulation=arguments.gradient_accumulation_steps)
    data = Dataset.from_list([as_messages(row) for row in rows()])
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.data_collator = loramix.DomainCollator(trainer.data_collator, DOMAINS)
    trainer.train()
    model.save_pretrained(f"{out}/adapter", save_embedding_layers=False)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
