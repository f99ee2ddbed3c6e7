"""How a base is loaded that is too large to lie whole, in 16 bits, on each device: in fewer bits, or dealt out."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from loramix import processes
from loramix.errors import ConfigError, ModelError


def own_device() -> torch.device:
    """Returns the device this process computes on: the accelerator of its place on the machine, else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    place = processes.place() % torch.accelerator.device_count()
    torch.accelerator.set_device_index(place)
    return torch.device(torch.accelerator.current_accelerator().type, place)  # type: ignore[union-attr]


def quantised(bits: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what transformers is to be told to load a base in few bits, by bitsandbytes.

    Args:
        bits: 8, or 4 (nf4 with quantised constants, as QLoRA has it).
        dtype: in which the products are worked out.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"load_in_{bits}bit: bitsandbytes is not installed. Install it with pip install 'loramix[quant]', or leave "
            f"load_in_{bits}bit out and set dtype to bfloat16."
        )
    from transformers import BitsAndBytesConfig

    few = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    told = {**few, "bnb_4bit_compute_dtype": dtype} if bits == 4 else {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(**told), "device_map": {"": own_device()}}


def dealt_out(replicas: int) -> dict[str, Any]:
    """Returns what transformers is to be told to load a part of every weight into each process (FSDP2). The forward
    gathers one layer at a time. Nothing is to be told where this process is alone.

    Args:
        replicas: groups of processes that each hold the whole base between them.

    Raises:
        ModelError: so many groups cannot be made of the processes.
    """
    count = processes.count()
    if count % replicas:
        raise ModelError(
            f"dp_replicate_size = {replicas}: the {count} processes cannot be dealt into {replicas} groups of one "
            "size. Expected a divisor of the number of processes; the number of machines is a good one."
        )
    if count // replicas == 1:
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=count // replicas, dp_replicate_size=replicas)}


def refuse_other_sharding() -> None:
    """Refuses what `accelerate launch` may have been told beside: its FSDP wraps the model for one training, and here
    a base goes through several, and is measured between them.

    Raises:
        ConfigError: it was told to deal the model out.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise ConfigError(
            "accelerate was told to use FSDP (--use_fsdp, or its own configuration file). Here the run's file says so: "
            "set fsdp to true there, and launch with --multi_gpu alone."
        )


def is_dealt_out(model: object) -> bool:
    """Returns whether a base, or what is built on it, was loaded in parts."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))
