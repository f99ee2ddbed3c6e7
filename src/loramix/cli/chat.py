"""`loramix chat RUN`: talk to a run's model in the terminal; each turn is routed on the whole conversation."""

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
    expert: Annotated[
        str | None, typer.Option(help="Pin one expert instead of routing; for moelora-task, the domain.")
    ] = None,
    abstain: Annotated[
        bool | None,
        typer.Option("--abstain/--no-abstain", help="Leave prompts unlike all domains to the base; on if calibrated."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.")] = 128,
) -> None:
    quiet_libraries()
    from transformers import TextStreamer

    from loramix.data.prompts import encode_prompts
    from loramix.data.records import Message
    from loramix.errors import ConfigError
    from loramix.methods import method_named
    from loramix.opening import open_model, open_run

    folder, experiment = open_run(run)
    model, tokenizer = open_model(experiment, folder)
    settled_by = method_named(experiment.method).settled_by
    told = _told(model, settled_by, expert)
    if abstain and settled_by != "prompt":
        raise ConfigError(f"--abstain: method {experiment.method} settles no expert for a prompt. Leave it out.")
    console = result_console()
    if sys.stdin.isatty():
        console.print(f"{experiment.method}. An empty line ends.", highlight=False)
    turns: list[Message] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not text.strip():
            return
        turns.append(Message("user", text))
        batch = {k: v.to(model.device) for k, v in encode_prompts(tokenizer, [turns]).items()}
        if settled_by == "prompt":
            route = model.route(**batch, expert=expert, abstain=abstain)[0]
            told = {"expert": route.expert}
            sure = "" if route.probability is None else f" {route.probability:.0%}"
            about = f"[{route.expert}{sure}] "
            console.print(about, end="", markup=False, highlight=False)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        written = model.generate(
            **batch,
            **told,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
        )
        answer = tokenizer.decode(written[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        turns.append(Message("assistant", answer))


def _told(model: Any, settled_by: str, expert: str | None) -> dict[str, Any]:
    """Returns what each generation is told of the expert."""
    import torch

    from loramix.errors import ConfigError

    if settled_by == "domain":
        domains = model.peft_config["default"].domains
        if expert not in domains:
            said = "is missing" if expert is None else f"{expert} is no domain of it"
            raise ConfigError(f"--expert {said}: this method is told the domain. Expected one of {', '.join(domains)}.")
        return {"domain_ids": torch.tensor([domains.index(expert)], device=model.device)}
    if settled_by == "nothing" and expert is not None:
        raise ConfigError(f"--expert {expert}: this method pins no expert. Leave it out.")
    return {}
