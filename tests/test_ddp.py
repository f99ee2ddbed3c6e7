"""Two processes with gloo: experts that got no token are no unused parameters, and gradients are the joint batch's."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loramix.losses import load_balance
from tests import method_cases as cases
from tests import tiny

RANKS = 2
IDS = tiny.ids(RANKS, 4)
"""One row for each process: 4 tokens cannot use 8 experts at one choice each."""


def _mixture() -> nn.Module:
    settings = {"allocation": None, "num_experts": 8, "router": {"top_k": 1, "weighting": "probability"}}
    return cases.build("mola", tiny.llama(layers=2), **settings).train()


def _language_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def _two_steps(rank: int) -> None:
    """Trains with the balance loss; DDP complains at the second step if a parameter got no gradient in the first."""
    model = _mixture()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(2):
        loss = _language_loss(parallel, IDS[rank : rank + 1].roll(step, 1))
        used = [set(routing.ids.flatten().tolist()) for routing in model.routings.values()]
        assert all(len(experts) < 8 for experts in used), "no expert was idle, so nothing is shown"
        (loss + load_balance(model.routings.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    own = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    start = torch.cat([p.detach().flatten() for p in _mixture().parameters() if p.requires_grad])
    everyones = [torch.empty_like(own) for _ in range(RANKS)]
    dist.all_gather(everyones, own)
    assert torch.equal(*everyones)
    assert not torch.equal(own, start)


def _joint_gradient(rank: int) -> None:
    """The mean over processes is the gradient of one process on both rows (each has as many tokens)."""
    model, alone = _mixture(), _mixture()
    parallel = DistributedDataParallel(model)
    _language_loss(parallel, IDS[rank : rank + 1]).backward()
    _language_loss(alone, IDS).backward()
    compared = 0
    for (name, got), wanted in zip(model.named_parameters(), alone.parameters(), strict=True):
        if got.requires_grad:
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            compared += 1
    assert compared == 2 * 7 * 3


def _process(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    try:
        _two_steps(rank)
        _joint_gradient(rank)
    finally:
        dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path):
    torch.multiprocessing.spawn(_process, args=(str(tmp_path / "meeting"),), nprocs=RANKS)
