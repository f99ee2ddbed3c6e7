"""`loramix chat RUN`: talk to a run's model in the terminal; each turn is routed on the whole conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loramix.cli.output import quiet_libraries

if TYPE_CHECKING:
    from loramix.cli.chatting.line_history import LineHistory
    from loramix.cli.chatting.session import Session


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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="How freely tokens are drawn; 0: the likeliest.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn; by default another each time.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Keep typed lines for the arrow keys of the next chat.")
    ] = True,
) -> None:
    quiet_libraries()
    import torch

    from loramix.cli.chatting.answering import Answering
    from loramix.cli.chatting.conversation import Conversation
    from loramix.cli.chatting.session import Session
    from loramix.cli.chatting.voices import voices_of
    from loramix.methods import method_named
    from loramix.opening import open_model, open_run

    folder, experiment = open_run(run)
    model, tokenizer = open_model(experiment, folder)
    voices = voices_of(model, method_named(experiment.method), expert, abstain)
    if system is not None:
        _check_system(tokenizer, system)
    if seed is not None:
        torch.manual_seed(seed)
    at_terminal = sys.stdin.isatty()
    answering = Answering(model, tokenizer, max_new_tokens, temperature)
    session = Session(answering, voices, Conversation(system), at_terminal=at_terminal)
    if not at_terminal:
        _answer_lines(session)
        return
    print(f"{experiment.method}. /help lists the commands. An empty line ends.")
    _talk(session, _lines_kept(history) if sys.stdout.isatty() else None)


def _answer_lines(session: Session) -> None:
    """Answers what comes through a pipe: each line is a prompt, whatever it begins with. An empty line ends."""
    while text := _next_line(""):
        session.ask(text)


def _talk(session: Session, history: LineHistory | None) -> None:
    """Talks with somebody at a terminal. Ctrl-C ends the chat only while it waits for a line."""
    from loramix.cli.chatting.commands import obey
    from loramix.cli.chatting.session import note
    from loramix.errors import LoramixError

    while not session.over and (text := _next_line("> ")):
        if history is not None:
            history.add(text)
        try:
            if text.startswith("/") and not text.startswith("//"):
                obey(session, text)
            else:
                session.ask(text.removeprefix("/"))
        except LoramixError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            note("stopped.")


def _next_line(prompt: str) -> str:
    """Returns the next line; "" where there is none, or nothing in it."""
    try:
        text = input(prompt)
    except (EOFError, KeyboardInterrupt) as end:
        if prompt:
            print()  # whatever comes next on this terminal begins a line of its own
        if isinstance(end, KeyboardInterrupt):
            raise
        return ""
    # Bytes that are no UTF-8 come as half characters, which no tokenizer takes.
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if text.strip() else ""


def _lines_kept(for_the_next_chat: bool) -> LineHistory | None:
    from loramix.cli.chatting.line_history import history_file, opened

    return opened(history_file() if for_the_next_chat else None)


def _check_system(tokenizer: Any, system: str) -> None:
    """Refuses a system text that the base's chat template cannot render."""
    from jinja2 import TemplateError

    from loramix.data.prompts import encode_prompts
    from loramix.data.records import Message
    from loramix.errors import ConfigError

    try:
        encode_prompts(tokenizer, [[Message("system", system), Message("user", "?")]])
    except (TemplateError, ValueError, TypeError) as error:
        raise ConfigError(f"--system: the base's chat template cannot render it: {error}. Leave it out.") from error
