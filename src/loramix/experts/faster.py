"""Which of several equal backends is the fastest: measured once for a device and a shape, and kept in the cache folder.

Where all experts' channels for every token stop being cheaper than tokens sorted by expert depends on the machine: at a
width E * R of about 192 on the processor loramix was made on, at several hundred to above a thousand on GPUs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from loramix.cache import build_once, cache_dir
from loramix.environment import environment
from loramix.errors import LoramixError
from loramix.routing import Routing

Apply = Callable[[Tensor, Tensor, Tensor, Tensor, Routing, float], Tensor]

TOKENS, ROUNDS = 512, 5


@dataclass(frozen=True)
class Shape:
    """What the time of token-routed experts depends on.

    Attributes:
        device: as torch names it, "cpu" or "cuda:0".
        dtype: of the experts, as torch prints it.
        down, up: shapes of the stacked A and B, (E, R, I) and (E, O, R); a shared one has E = 1.
        chosen: experts of a token.
    """

    device: str
    dtype: str
    down: tuple[int, ...]
    up: tuple[int, ...]
    chosen: int


@cache
def fastest(shape: Shape, among: tuple[tuple[str, Apply], ...]) -> str | None:
    """Returns the name of the fastest backend, forward and backward of 512 tokens; None where nothing can be kept: a
    choice that changed from run to run would change sums in their last bits.

    Measured the first time, which takes some tenths of a second; of several processes one measures. Another machine,
    torch or number of threads measures anew.

    Args:
        shape: of the experts.
        among: the backends by name.
    """
    about = {
        **asdict(shape),
        "device": torch.device(shape.device).type,
        **_machine(shape),
        "among": [name for name, _ in among],
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def measure(folder: Path) -> None:
        # A thread of its own: autograd, autocast, hooks and counters of whoever is in a forward do not reach it.
        with ThreadPoolExecutor(1) as alone:
            seconds = alone.submit(_seconds, shape, dict(among)).result()
        (folder / "seconds.json").write_text(json.dumps({"of": about, "seconds": seconds}, indent=1), encoding="utf-8")

    try:
        folder = build_once(cache_dir() / "backends" / name, measure)
        seconds: dict[str, float] = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))["seconds"]
    except (LoramixError, OSError, ValueError, RuntimeError):
        return None
    return min(seconds, key=seconds.__getitem__)


def _machine(shape: Shape) -> dict[str, object]:
    kind = torch.device(shape.device).type
    named = environment()["processor"] if kind == "cpu" else torch.get_device_module(kind).get_device_name(shape.device)
    return {"machine": named, "threads": torch.get_num_threads() if kind == "cpu" else 0, "torch": torch.__version__}


def _seconds(shape: Shape, among: Mapping[str, Apply]) -> dict[str, float]:
    """Returns the least seconds of each backend; they take turns."""
    made = torch.Generator().manual_seed(0)
    kind = getattr(torch, shape.dtype.removeprefix("torch."))
    experts, (outputs, inputs) = max(shape.down[0], shape.up[0]), (shape.up[1], shape.down[2])

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=made).to(shape.device, kind).requires_grad_()

    ids_NK = torch.rand(TOKENS, experts, generator=made).topk(shape.chosen).indices.to(shape.device)
    weights_NK = torch.full((TOKENS, shape.chosen), 1 / shape.chosen, device=shape.device, dtype=kind)
    mask = torch.ones(TOKENS, dtype=torch.bool, device=shape.device)
    given = draw(1, TOKENS, outputs), draw(1, TOKENS, inputs), draw(*shape.down), draw(*shape.up)
    found = dict.fromkeys(among, float("inf"))
    for _ in range(ROUNDS):
        for name, apply in among.items():
            routing = Routing(ids=ids_NK, weights=weights_NK, logits=None, level="token", mask=mask)
            _wait(shape)
            begun = time.perf_counter()
            apply(*given, routing, 1.0).sum().backward()  # type: ignore[no-untyped-call]
            _wait(shape)
            found[name] = min(found[name], time.perf_counter() - begun)
    return found


def _wait(shape: Shape) -> None:
    if torch.device(shape.device).type != "cpu":
        torch.accelerator.synchronize()
