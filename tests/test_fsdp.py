"""Two gloo processes: DDP by accelerate and FSDP2 give the losses of one process, and the adapter is saved whole."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import loramix
from tests import tiny

RANKS, STEPS = 2, 5
IDS = tiny.ids(4, 9)
DOMAIN_IDS = torch.tensor([0, 2, 1, 1])


def built(method: str) -> PeftModel:
    torch.manual_seed(1)
    settings = {"method": method, "r": 4, "lora_dropout": 0.0, "init_lora_weights": False}
    if method == "moa":
        settings["experts"] = tiny.EXPERTS
    else:
        settings |= {"num_experts": 4, "allocation": "uniform", "bank": {"share": "down", "weight_dropout": 0.0}}
    model = get_peft_model(tiny.llama(), loramix.LoramixConfig(**settings)).train()
    # A balance loss looks at a micro-batch, so only losses that are means over rows are the same on two processes.
    loramix.attach_losses(model, {} if method == "moa" else {"load_balance": 0.0})
    return model


def steps_of(model: nn.Module, parameters: list[nn.Parameter], rows: slice) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    losses = []
    for step in range(STEPS):
        ids = IDS.roll(step, 1)[rows]
        loss = model(input_ids=ids, labels=tiny.labels(ids), domain_ids=DOMAIN_IDS[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def end() -> None:
    """Ends this process at once: in gloo's own end, after all was done, one of the two hung now and then."""
    os._exit(0)


def sharded(rank: int, port: int, method: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    model = built(method)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    losses = torch.tensor(steps_of(model, trained(model), slice(2 * rank, 2 * rank + 2)))
    dist.all_reduce(losses)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(losses / RANKS, f"{folder}/losses.pt")
        alone = built(method)
        alone.load_state_dict(whole)
        alone.save_pretrained(f"{folder}/adapter", save_embedding_layers=False)
    end()


def replicated(rank: int, port: int, method: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    model = built(method)
    parallel = nn.parallel.DistributedDataParallel(model)
    losses = torch.tensor(steps_of(parallel, trained(model), slice(2 * rank, 2 * rank + 2)))
    dist.all_reduce(losses)
    if rank == 0:
        torch.save(losses / RANKS, f"{folder}/losses.pt")
    end()


def free_port() -> int:
    import socket

    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def check(how: object, method: str, folder: Path) -> None:
    mp.spawn(how, args=(free_port(), method, str(folder)), nprocs=RANKS)
    model = built(method)
    alone = torch.tensor(steps_of(model, trained(model), slice(0, 4)))
    torch.testing.assert_close(torch.load(folder / "losses.pt"), alone, rtol=1e-5, atol=1e-6)
    if (folder / "adapter").is_dir():
        again = PeftModel.from_pretrained(tiny.llama(), str(folder / "adapter"))
        for (name, got), wanted in zip(again.named_parameters(), model.parameters(), strict=True):
            if "loramix" in name:
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_fsdp2_trains_moa_as_one_process_does_and_saves_it_whole(tmp_path: Path):
    check(sharded, "moa", tmp_path)


def test_fsdp2_trains_a_token_routed_method_as_one_process_does(tmp_path: Path):
    check(sharded, "mosld", tmp_path)


def test_ddp_with_attached_losses_is_one_process(tmp_path: Path):
    check(replicated, "moa", tmp_path)
