"""How fast a run is served: tokens per second and time to first token at 1, 8 and 32 clients at a time, whose prompts
are of all domains, against other ways to serve the same experts.

    python benchmarks/serving.py --run runs/demo [--clients 1,8,32] [--tokens 16-128] [--rounds 3] [--json --out FILE]
    python benchmarks/serving.py --run runs/demo --sides vllm,vllm-by-hand --vllm .venv-vllm/bin/vllm

Sides: `routed` and `pinned` (loramix, engine transformers: the mixture, and every request pinned to its domain's
expert), `routed-early` (loramix, routed by the earliest layer as good as the best), `adapter-names` (transformers'
generate on stock PEFT LoRAs, a batch at a time, each row's adapter named by hand), `transformers-serve` (one expert),
`vllm` (loramix, engine vllm) and `vllm-by-hand` (vLLM alone, each request's adapter named by hand). Each prompt has an
answer of its own length, drawn between the two of --tokens, the same for every side: the end token is forbidden by
logit_bias, or by min_new_tokens, and a batch of generate runs until its longest answer is done. Every side is up before
the first is measured, and all are asked in turn in each round, so that what else the machine does meets all alike.
Ratios are of medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import httpx2

# By default vLLM takes nearly all memory of the machine, and here are two of it.
VLLM_ARGUMENTS = ("--enforce-eager", "--max-model-len", "1024", "--gpu-memory-utilization", "0.2")
SIDES = ("routed", "routed-early", "pinned", "adapter-names", "transformers-serve")


@dataclass
class Ask:
    """A prompt, its domain, the messages it is sent as, and how many tokens its answer has."""

    domain: str
    messages: list[dict[str, str]]
    tokens: int = 4


@dataclass
class Measured:
    """What one side did with some clients, by round."""

    tokens_per_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    failed: int = 0


Side = Callable[[list[Ask], int], tuple[int, float, list[float], int]]
"""Takes the asks and how many clients; gives tokens, seconds, times to first token, failures."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--tokens", default="16-128", help="of an answer: a number, or a range to draw from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-client", type=int, default=1, help="requests each client sends in a round")
    parser.add_argument("--vllm", default=".venv-vllm/bin/vllm")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    asks = prompts(args.run, args.tokens)
    found: dict[str, dict[int, Measured]] = {}
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        sides = {name: start(name, args, Path(scratch), stack) for name in args.sides.split(",")}
        for name, side in sides.items():
            print(f"{name}: up", file=sys.stderr)
            side(
                [replace(ask, tokens=4) for ask in asks[:2]], 2
            )  # the first requests of a process are not like the others
        for clients in map(int, args.clients.split(",")):
            for number in range(args.rounds):
                wanted = [asks[(number * 7 + n) % len(asks)] for n in range(max(2, clients * args.per_client))]
                for name, side in sides.items():
                    tokens, seconds, first, failed = side(wanted, clients)
                    one = found.setdefault(name, {}).setdefault(clients, Measured())
                    one.tokens_per_s.append(tokens / seconds)
                    one.first_token_s += first
                    one.failed += failed
                    print(
                        f"{clients} clients, round {number + 1}, {name}: {tokens / seconds:.1f} tok/s", file=sys.stderr
                    )
    report(args, found)
    return 0


def prompts(run: Path, tokens: str) -> list[Ask]:
    """Returns held-out prompts of a run's domains in turn, not longer than usual, with the lengths of their answers."""
    from loramix.corpus import read_all
    from loramix.experiment import load

    splits, _ = read_all(load(run / "config.yaml", ["data.max_test_examples=50"]).experiment)
    rows = zip(*(split.test for split in splits.values()), strict=False)
    least, _, most = tokens.partition("-")
    draw = random.Random(0)

    def length() -> int:
        return draw.randint(int(least), int(most or least))

    return [
        Ask(record.domain or "", [{"role": "user", "content": record.prompt[:400]}], length())
        for row in rows
        for record in row
    ]


def report(args: argparse.Namespace, found: dict[str, dict[int, Measured]]) -> None:
    rows = [
        {
            "side": name,
            "clients": clients,
            "tokens_per_s": round(median(one.tokens_per_s), 2),
            "all_tokens_per_s": [round(value, 2) for value in one.tokens_per_s],
            "first_token_s": round(median(one.first_token_s), 3) if one.first_token_s else None,
            "failed": one.failed,
        }
        for name, by_clients in found.items()
        for clients, one in by_clients.items()
    ]
    speed = {(row["side"], row["clients"]): row["tokens_per_s"] for row in rows}
    ratios = {
        f"{one} / {other}, {clients} clients": round(speed[one, clients] / speed[other, clients], 3)
        for one, other in (
            ("routed", "pinned"),
            ("routed-early", "pinned"),
            ("routed", "adapter-names"),
            ("routed", "transformers-serve"),
            ("vllm", "vllm-by-hand"),
        )
        for clients in sorted({row["clients"] for row in rows})
        if (one, clients) in speed and speed.get((other, clients))
    }
    content = {
        "date": time.strftime("%F"),
        "machine": f"{platform.processor() or platform.machine()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}",
        "run": str(args.run),
        "tokens": args.tokens,
        "rounds": args.rounds,
        "rows": rows,
        "ratios": ratios,
    }
    if args.out:
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(content))
        return
    for row in rows:
        first = "-" if row["first_token_s"] is None else f"{row['first_token_s']:.2f} s"
        print(f"{row['side']:<20}{row['clients']:>4} clients {row['tokens_per_s']:>8.1f} tok/s   first token {first}")
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")


# ---- the sides -------------------------------------------------------------------------------------------------------


def start(name: str, args: argparse.Namespace, scratch: Path, stack: contextlib.ExitStack) -> Side:
    """Starts a side and returns how to ask it."""
    from loramix.experiment import load

    run = args.run
    if name in ("routed", "pinned", "routed-early", "vllm"):
        from loramix.serving.first_layers import earliest_layer

        more = []
        if name == "routed-early":
            accuracy = json.loads((run / "results.json").read_text())["router_accuracy_by_layer"]
            more = ["--decision", earliest_layer(accuracy) or "last"]
        if name == "vllm":
            more = ["--engine", "vllm", "--vllm", args.vllm, "--vllm-args", " ".join(VLLM_ARGUMENTS)]
        port = _free_port()
        command = ["serve", str(run), "--name", "m", "--port", str(port), "--max-batch", "32", *more]
        stack.enter_context(_server([sys.executable, "-m", "loramix", *command], port, scratch / f"{name}.log"))
        if name == "pinned":
            return _openai(f"http://127.0.0.1:{port}/v1", lambda ask: f"m:{ask.domain}", end=_end(run))
        return _openai(f"http://127.0.0.1:{port}/v1", lambda ask: "m", end=_end(run))
    export = scratch / "export"
    if not export.exists():
        subprocess.run([sys.executable, "-m", "loramix", "export", str(run), "-o", str(export)], check=True)
    manifest = json.loads((export / "manifest.json").read_text())
    manifest["base"] = load(run / "config.yaml", with_data=False).experiment.model_name_or_path
    if name == "adapter-names":
        return _adapter_names(manifest, export)
    if name == "transformers-serve":
        return _transformers_serve(manifest, export, scratch, stack, run)
    if name == "vllm-by-hand":
        return _vllm_by_hand(manifest, export, args, scratch, stack)
    raise SystemExit(f"--sides {name}: no such side.")


def _end(run: Path) -> list[int]:
    """Returns the base's end tokens."""
    from loramix.experiment import load
    from loramix.models import load_skeleton, load_tokenizer

    base = load(run / "config.yaml", with_data=False).experiment.model_name_or_path
    found = load_skeleton(base).generation_config.eos_token_id
    return sorted({load_tokenizer(base).eos_token_id, *(found if isinstance(found, list) else [found])} - {None})


def _openai(url: str, model_of: Callable[[Ask], str], *, end: list[int], key: str = "none") -> Side:
    """Asks a server by streams, so many at a time."""

    async def one(client: httpx2.AsyncClient, ask: Ask) -> tuple[int, float | None]:
        started, first, count, pieces = time.monotonic(), None, 0, 0
        body = {
            "model": model_of(ask), "messages": ask.messages, "max_tokens": ask.tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
            "logit_bias": {str(token): -100.0 for token in end},
        }  # fmt: skip
        async with client.stream("POST", f"{url}/chat/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise SystemExit(f"{url}: {chunk['error']}")
                if first is None and any(c["delta"].get("content") for c in chunk.get("choices") or []):
                    first = time.monotonic() - started
                pieces += any(c["delta"].get("content") for c in chunk.get("choices") or [])
                count = (chunk.get("usage") or {}).get("completion_tokens") or count
        return count or pieces, first  # transformers' server tells no usage in a stream: a piece is a token there

    async def all_of(asks: list[Ask], clients: int) -> tuple[int, float, list[float], int]:
        places = asyncio.Semaphore(clients)
        headers = {"authorization": f"Bearer {key}"}
        limits = httpx2.Limits(max_connections=clients)
        async with httpx2.AsyncClient(timeout=None, headers=headers, limits=limits) as client:

            async def placed(ask: Ask) -> tuple[int, float | None]:
                async with places:
                    return await one(client, ask)

            started = time.monotonic()
            done = await asyncio.gather(*map(placed, asks))
        seconds = time.monotonic() - started
        first = [value for _, value in done if value is not None]
        failed = sum(count != ask.tokens for ask, (count, _) in zip(asks, done, strict=True))
        return sum(count for count, _ in done), seconds, first, failed

    return lambda asks, clients: asyncio.run(all_of(asks, clients))


def _adapter_names(manifest: dict[str, Any], export: Path) -> Side:
    """transformers' generate on stock PEFT adapters: a batch of so many rows, each with its adapter."""
    import torch
    from peft import PeftModel

    from loramix.data.prompts import encode_prompts
    from loramix.data.records import Message
    from loramix.models import load_base, load_tokenizer

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    base, tokenizer = load_base(manifest["base"]), load_tokenizer(manifest["base"])
    first, *others = manifest["experts"]
    model = PeftModel.from_pretrained(base, str(export / first), adapter_name=first).eval()
    for expert in others:
        model.load_adapter(str(export / expert), adapter_name=expert)

    def side(asks: list[Ask], clients: int) -> tuple[int, float, list[float], int]:
        started = time.monotonic()
        for begin in range(0, len(asks), clients):
            part = asks[begin : begin + clients]
            turns = [[Message(**message) for message in ask.messages] for ask in part]
            batch = encode_prompts(tokenizer, turns)
            tokens = max(ask.tokens for ask in part)
            model.generate(
                **{name: batch[name] for name in ("input_ids", "attention_mask")},
                adapter_names=[ask.domain for ask in part],
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        return sum(ask.tokens for ask in asks), time.monotonic() - started, [], 0

    return side


def _transformers_serve(
    manifest: dict[str, Any], export: Path, scratch: Path, stack: contextlib.ExitStack, run: Path
) -> Side:
    """transformers' own server: it takes a folder with a base and one adapter, so one expert answers all."""
    from loramix.models.base import base_folder

    folder, port = scratch / "served", _free_port()
    shutil.copytree(base_folder(manifest["base"]), folder)
    for file in (export / manifest["experts"][0]).iterdir():
        shutil.copy(file, folder / file.name)
    command = [
        str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--port", str(port),
        "--dtype", "float32", "--host", "127.0.0.1",
    ]  # fmt: skip
    stack.enter_context(_server(command, port, scratch / "transformers.log"))
    return _openai(f"http://127.0.0.1:{port}/v1", lambda ask: str(folder), end=_end(run))


def _vllm_by_hand(
    manifest: dict[str, Any], export: Path, args: argparse.Namespace, scratch: Path, stack: contextlib.ExitStack
) -> Side:
    """vLLM alone, with the domain's adapter named as the model."""
    from loramix.models.base import base_folder
    from loramix.serving.vllm_process import VllmOptions, VllmProcess

    options = VllmOptions(args.vllm, scratch / "by-hand.log", VLLM_ARGUMENTS)
    process = VllmProcess(
        base_folder(manifest["base"]), export, manifest["experts"], rank=manifest["adapter_config"]["r"], places=32,
        dtype="float32", options=options,
    )  # fmt: skip
    asyncio.run(process.start())
    stack.callback(lambda: asyncio.run(process.stop()))
    return _openai(f"{process.url}/v1", lambda ask: process.models[ask.domain], end=_end(args.run), key=process.key)


@contextlib.contextmanager
def _server(command: list[str], port: int, log: Path) -> Iterator[None]:
    with log.open("wb") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=lines)
        try:
            deadline = time.monotonic() + 900
            while True:
                with contextlib.suppress(httpx2.HTTPError):
                    if httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{' '.join(command)} did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.wait(timeout=60)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    raise SystemExit(main())
