"""The same greedy answers alone, in a full batch of strangers, streamed or whole, with a cache or without.

    python benchmarks/serving_equality.py --run runs/demo [--prompts 200] [--tokens 12]

Each prompt of the run's domains is asked of the server by itself and whole; again among 15 others of all domains, every
second one as a stream; and of the model's own `generate` by itself without a cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import torch
from serving import prompts
from tests.serving_case import running

from loramix.cli.output import quiet_libraries
from loramix.experiment import load
from loramix.opening import open_model
from loramix.run_folder import RunFolder
from loramix.serving.prompts import PromptEncoder
from loramix.serving.protocol import ChatMessage
from loramix.serving.starting import Options, server_of

BATCH = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=12)
    args = parser.parse_args()
    quiet_libraries()
    asks = prompts(args.run, str(args.tokens))
    asked = [asks[n % len(asks)].messages for n in range(args.prompts)]
    with running(server_of(args.run, Options(places=BATCH, queue=BATCH), {})) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
        name = client.models.list().data[0].id
        alone = [said(client, name, one, args.tokens, stream=False) for one in asked]
        with ThreadPoolExecutor(BATCH) as pool:
            together = list(
                pool.map(
                    lambda pair: said(client, name, pair[1], args.tokens, stream=pair[0] % 2 == 0), enumerate(asked)
                )
            )
    plain = without_cache(args.run, asked, args.tokens)
    found = {
        "prompts": len({json.dumps(one) for one in asked}),
        "asked": len(asked),
        "in a batch of 16, half of them streamed": sum(a == b for a, b in zip(alone, together, strict=True)),
        "by generate, alone, without a cache": sum(a == b for a, b in zip(alone, plain, strict=True)),
        "experts": sorted({expert for expert, _ in alone}),
    }
    print(json.dumps(found))
    return int(together != alone or plain != alone)


def said(client: openai.OpenAI, name: str, messages: Any, tokens: int, *, stream: bool) -> tuple[str, str]:
    """Returns which expert answered and what."""
    how = {"model": name, "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": stream}
    if not stream:
        whole = client.chat.completions.create(**how)
        return whole.routing["expert"], whole.choices[0].message.content
    pieces = list(client.chat.completions.create(**how))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    return next(routing["expert"] for piece in pieces if (routing := getattr(piece, "routing", None))), text


def without_cache(run: Path, asked: list[Any], tokens: int) -> list[tuple[str, str]]:
    """Returns the same of the model's own `generate`."""
    folder = RunFolder.opened(run)
    model, tokenizer = open_model(load(folder.config, with_data=False).experiment, folder)
    encoder = PromptEncoder(tokenizer)
    answers = []
    for number, messages in enumerate(asked):
        ids = torch.tensor([encoder.chat([ChatMessage(**one) for one in messages])])
        told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "do_sample": False}
        written = model.generate(ids, use_cache=False, **told)
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        answers.append((model.route(input_ids=ids)[0].expert, text))
        print(f"\r{number + 1} of {len(asked)}", end="", file=sys.stderr)
    return answers


if __name__ == "__main__":
    raise SystemExit(main())
