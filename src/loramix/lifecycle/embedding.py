"""What a base makes of prompts: the mean hidden state of a layer, one vector for each prompt.

The tokens every prompt begins with (the template's own, such as its system line) are read but not averaged. They are
the same for all, and the first of them has a state many times longer than others (Sun et al. 2024, "Massive
Activations", https://arxiv.org/abs/2402.17762): with them in the mean, vectors tell how long a prompt is, not what it
asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Tensor, nn

from loramix.data.prompts import encode, render
from loramix.data.records import Message, Record
from loramix.errors import ConfigError, DataError, ModelError, Problems
from loramix.routing import PromptRead

Vectors = NDArray[np.float32]
Prompt = tuple[int, ...]
"""Token ids of a prompt."""


def depth(model: Any) -> int:
    """Returns how many layers a base has."""
    config = model.config.get_text_config()
    return int(config.num_hidden_layers)


def checked_layer(layer: int | None, layers: int) -> int:
    """Returns the layer to read, 1 to `layers`; the middle one for None.

    Raises:
        ConfigError: there is no such layer.
    """
    if layer is None:
        return max(1, layers // 2)
    if not 1 <= layer <= layers:
        raise ConfigError(f"--layer {layer}: the base has layers 1 to {layers}. Give one of them, or leave it out.")
    return layer


def prompt_ids(tokenizer: Any, records: Sequence[Record], max_length: int) -> list[Prompt]:
    """Returns the tokens of each record's prompt as training has them, the first `max_length` of them.

    Raises:
        DataError: every record that the chat template cannot render.
    """
    problems = Problems("the data")
    found = []
    for record in records:
        try:
            encoded = encode(tokenizer, record)
        except (TemplateError, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            problems.add(f"{record.source}: the base's chat template cannot render it: {reason}")
            continue
        found.append(tuple(encoded.input_ids[: min(encoded.prompt_length, max_length)]))
    problems.raise_as(DataError)
    return found


def opening_ids(tokenizer: Any) -> Prompt:
    """Returns the tokens with which the template begins every prompt that has no system turn of its own."""
    special = not getattr(tokenizer, "chat_template", None)
    texts = (render(tokenizer, [Message("user", said)], reply=True) for said in ("a", "1"))
    first, second = (tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts)
    return tuple(first[: _shared(first, second)])


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns with how many equal tokens two sequences begin."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


@torch.inference_mode()
def prompt_states(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    layer: int,
    opening: Prompt,
    pad_token_id: int,
    tokens_per_batch: int = 2048,
    done: Callable[[int], None] | None = None,
) -> Vectors:
    """Returns the mean state of each prompt after a layer, float32 (N, H). Equal prompts are read once.

    Args:
        model: the base, in evaluation mode.
        prompts: token ids, at least one each.
        layer: 1 is the first; the layers above it are not run.
        opening: tokens left out of the mean where a prompt begins with them; at least one token always counts.
        pad_token_id: of the base.
        tokens_per_batch: tokens read together at most, padding included, but at least one prompt.
        done: called after each batch with the number of prompts read.

    Raises:
        ModelError: the base's layers cannot be found.
    """
    distinct = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
    place = {prompt: number for number, prompt in enumerate(distinct)}
    parts: list[Tensor] = []
    start = 0
    while start < len(distinct):
        stop = start + 1
        while stop < len(distinct) and (stop + 1 - start) * len(distinct[stop]) <= tokens_per_batch:
            stop += 1
        parts.append(_read(model, distinct[start:stop], layer, opening, pad_token_id))
        if done is not None:
            done(stop)
        start = stop
    vectors_NH: Vectors = torch.cat(parts).numpy()
    return vectors_NH[[place[prompt] for prompt in prompts]]


def _read(model: Any, prompts: Sequence[Prompt], layer: int, opening: Prompt, pad_token_id: int) -> Tensor:
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids_BT = torch.tensor([[*prompt, *[pad_token_id] * (width - len(prompt))] for prompt in prompts], device=device)
    lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    skipped_B1 = torch.tensor([[min(_shared(prompt, opening), len(prompt) - 1)] for prompt in prompts], device=device)
    places_T = torch.arange(width, device=device)
    states_BTH = _states_after(model, layer, ids_BT, (places_T < lengths_B1).long())
    mask_BT1 = ((places_T >= skipped_B1) & (places_T < lengths_B1)).unsqueeze(2)
    return ((states_BTH.float() * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)).cpu()


def _states_after(model: Any, layer: int, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Returns the hidden states after a layer, (B, T, H); the forward ends there."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)
        raise PromptRead

    hook = _layers(model)[layer - 1].register_forward_hook(keep)
    try:
        model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    except PromptRead:
        pass
    finally:
        hook.remove()
    return kept[0]


def _layers(model: Any) -> nn.ModuleList:
    count = depth(model)
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise ModelError(
            f"{type(model).__name__}: found no list of its {count} layers, so their states cannot be read. Expected a "
            "decoder as transformers writes it."
        )
    return found[0]
