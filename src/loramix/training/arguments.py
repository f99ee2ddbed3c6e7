"""Our settings of a stage as transformers' TrainingArguments."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from loramix.training.settings import TrainingSettings


def training_arguments(
    settings: TrainingSettings, output_dir: str, optim: str = "adamw_torch_fused"
) -> TrainingArguments:
    """Returns transformers' arguments for our settings; reporting is ours, so theirs is off."""
    arguments = TrainingArguments(
        output_dir=output_dir,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        torch_compile=settings.torch_compile,
        torch_compile_backend=settings.torch_compile_backend if settings.torch_compile else None,
        activation_checkpointing=settings.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False, **settings.activation_checkpointing_kwargs},
        dataloader_num_workers=settings.dataloader_num_workers,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        optim=optim,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_only_model=True,  # said of transformers' checkpoints, refused with a base in parts; ours hold everything
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # all are used; a search would miss routers that only their own loss reads
        use_cpu=not torch.accelerator.is_available(),  # else several processes on CPUs would not know of each other
    )
    # Several GPUs in one process would mean nn.DataParallel, whose threads share one routing; torchrun is the way.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
