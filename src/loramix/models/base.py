"""Loads the frozen base and its tokenizer: built-in, local folder, GGUF file or Hub name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from loramix.cache import build_once, cache_dir
from loramix.errors import ModelError
from loramix.models.builtin import LAYERS, NAME, builtin_folder, convert_gguf
from loramix.models.larger import dealt_out, own_device, quantised, refuse_other_sharding
from loramix.models.trust import check_base, read_settings, trusted

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def base_folder(name: str) -> str:
    """Returns what transformers is to load for a base's name: a folder, or a Hub name.

    Raises:
        ModelError: it looks like a path and is not there, or is a folder without a model.
    """
    if name == NAME:
        return str(builtin_folder())
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return str(_converted(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is a folder without config.json. Expected a saved transformers model.")
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"model_name_or_path = {name!r}: no such folder. Expected a folder with config.json, a .gguf file, a Hub "
            f"name such as {'Qwen/Qwen2.5-0.5B'!r}, or the built-in {NAME!r}."
        )
    return name


def _converted(gguf: Path) -> Path:
    if not gguf.is_file():
        raise ModelError(f"model_name_or_path = {str(gguf)!r}: no such file. Expected an existing .gguf file.")
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return build_once(cache_dir() / "models" / f"{gguf.stem}-{key}", lambda making: convert_gguf(gguf, making))


def layers_of(name: str) -> int | None:
    """Returns how many layers a base has, if that can be told without fetching or loading anything; else None."""
    if name == NAME:
        return LAYERS
    file = Path(name).expanduser() / "config.json"
    if not file.is_file():
        return None
    content = read_settings(file)
    inside = content.get("text_config", content)
    found = inside.get("num_hidden_layers", inside.get("n_layer"))
    return found if isinstance(found, int) else None


def load_tokenizer(name: str = NAME) -> Any:
    """Returns the base's tokenizer, with a padding token.

    Raises:
        ModelError: it cannot be found, or its settings name code and it is not trusted (`models/trust.py`).
    """
    from transformers import AutoTokenizer

    where = _checked(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trusted(name))
    except (OSError, ValueError) as error:
        raise ModelError(_not_found(name, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    name: str = NAME,
    *,
    dtype: str = "float32",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    fsdp: bool = False,
    dp_replicate_size: int = 1,
) -> Any:
    """Returns the frozen base in evaluation mode, on this process's device.

    Args:
        name: built-in name, folder, .gguf file or Hub name.
        dtype: "float32", "bfloat16" or "float16". A CPU without bf16 instructions is 9 to 20 times slower in bf16.
        load_in_4bit, load_in_8bit: quantise it with bitsandbytes.
        fsdp: deal its weights out to the processes that were started together.
        dp_replicate_size: with fsdp, groups of processes that each hold the whole base between them.

    Raises:
        ModelError: it cannot be found or loaded, or its settings name code and it is not trusted; bitsandbytes is
            missing.
        ConfigError: accelerate was told to deal the model out in its own way.
    """
    from transformers import AutoModelForCausalLM

    refuse_other_sharding()
    where = _checked(name)
    told: dict[str, Any] = {"dtype": DTYPES[dtype], "trust_remote_code": trusted(name)}
    if load_in_4bit or load_in_8bit:
        told |= quantised(4 if load_in_4bit else 8, DTYPES[dtype])
    elif fsdp:
        told |= dealt_out(dp_replicate_size)
    try:
        model = AutoModelForCausalLM.from_pretrained(where, **told)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(_not_found(name, error)) from error
    if not {"distributed_config", "quantization_config"} & told.keys():
        model.to(own_device())
    return model.requires_grad_(False).eval()


def load_skeleton(name: str = NAME) -> Any:
    """Returns the base without weights (on the meta device): enough to see which modules there are, in a moment.

    Raises:
        ModelError: it cannot be found, or its settings name code and it is not trusted (`models/trust.py`).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = _checked(name)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trusted(name))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted(name))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(_not_found(name, error)) from error


def _checked(name: str) -> str:
    """Returns what transformers is to load, whose settings name no code, or which is trusted."""
    where = base_folder(name)
    try:
        check_base(name, where)
    except OSError as error:
        raise ModelError(_not_found(name, error)) from error
    return where


def _not_found(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    return (
        f"model_name_or_path = {name!r} could not be loaded: {first} Expected a folder with a saved model, a .gguf "
        f"file, a Hub name that can be reached, or the built-in {NAME!r}."
    )
