"""`loramix chat RUN`: talk to a routed model in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from loramix.cli.output import quiet_libraries, result_console


def add_to(app: typer.Typer) -> None:
    app.command("chat", help="Talk to a run's model; each answer says which expert gave it.")(chat)


def chat(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    expert: Annotated[str | None, typer.Option(help="Pin one expert instead of routing.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.")] = 128,
) -> None:
    quiet_libraries()
    from loramix.experiment import load
    from loramix.pipeline import open_model
    from loramix.run_folder import RunFolder

    folder = RunFolder.opened(run)
    model, tokenizer = open_model(load(folder.config).experiment, folder)
    console = result_console()
    if sys.stdin.isatty():
        console.print(f"Experts: {', '.join(model.experts)}. An empty line ends.", highlight=False)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not text.strip():
            return
        route = model.route([text], tokenizer, expert=expert)[0]
        console.print(
            f"[{route.expert} {route.probabilities[route.expert]:.0%}] ", end="", markup=False, highlight=False
        )
        _answer(model, tokenizer, text, route.expert, max_new_tokens)


def _answer(model: Any, tokenizer: Any, text: str, expert: str, max_new_tokens: int) -> None:
    """Streams one answer, the tokens as they come."""
    from transformers import TextStreamer

    from loramix.data.prompts import encode_prompts

    model.generate(
        **encode_prompts(tokenizer, [text]),
        expert=expert,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
