"""The lines that begin with /: what each does."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loramix.cli.chatting.conversation import Conversation
from loramix.cli.chatting.session import Session, note
from loramix.cli.chatting.voices import AUTO, Routed
from loramix.cli.route import print_route
from loramix.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        usage: how it is written.
        help: what it does.
        run: does it, given the session and what stands behind the command's name.
    """

    usage: str
    help: str
    run: Callable[[Session, str], None]


def obey(session: Session, line: str) -> None:
    """Does what a line that begins with / says.

    Raises:
        LoramixError: it is no command, or cannot be done; nothing has changed then.
    """
    name, _, rest = line.strip().partition(" ")
    command = COMMANDS.get(name.lower())
    if command is None:
        near = did_you_mean(name, COMMANDS)
        raise ConfigError(f"{name}: no such command.{near} /help lists all; a prompt that begins with / is written //.")
    command.run(session, rest.strip())


def _expert(session: Session, name: str) -> None:
    voices = session.voices
    if name:
        voices.chosen = voices.named(name)
        note(f"{voices.chosen} answers from now on." if voices.chosen else "the routers choose from now on.")
        return
    for one in voices.listed():
        print(f"{'*' if one == voices.chosen else ' '} {one}")
    note(f"{voices.chosen} answers (*)." if voices.chosen else "none is pinned: the routers choose.")


def _route(session: Session, text: str) -> None:
    voices = session.voices
    if not isinstance(voices, Routed):
        raise ConfigError(f"method {voices.itself} settles no expert for a prompt, so there is nothing to show.")
    asked = Conversation(session.conversation.system).asking(text) if text else session.conversation.asking_again()
    print_route(session.shown(asked.prompt), voices.route(session.read(asked).batch))


def _compare(session: Session, names: str) -> None:
    try:
        chosen = shlex.split(names)
    except ValueError as error:
        raise ConfigError(f"/compare {names}: {error}. Names with spaces stand between quotes.") from error
    session.compare(chosen)


def _history(session: Session, _: str) -> None:
    conversation = session.conversation
    if conversation.system is not None:
        print(session.shown(f"system: {conversation.system}"))
    for turn in conversation.turns:
        print(session.shown(f"> {turn.prompt}\n{turn.answer.label}{turn.answer.text}{' [cut]' * turn.answer.cut}"))
    if not conversation.turns:
        note("nothing was said yet.")


def _clear(session: Session, _: str) -> None:
    session.start_anew()
    note("the conversation begins anew.")


def _undo(session: Session, _: str) -> None:
    session.conversation.asking_again()  # refuses where there is no turn
    turn = session.conversation.turns.pop()
    note(f"taken back: {session.shown(turn.prompt)}")


def _save(session: Session, name: str) -> None:
    if not name:
        raise ConfigError("/save needs a file: /save talk.jsonl, for example.")
    path = Path(name).expanduser()
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise ConfigError(f"{path}: ending {path.suffix!r}. Expected .jsonl or .json, so that it can be read as data.")
    if path.exists() and path.absolute() != session.saved:
        raise ConfigError(f"{path} is there already, and was not written by this chat. Name another file.")
    row = session.conversation.as_row()
    lines = path.suffix.lower() == ".jsonl"
    text = json.dumps(row, ensure_ascii=False) if lines else json.dumps([row], ensure_ascii=False, indent=2)
    making = path.with_name(f"{path.name}.{os.getpid()}.making")
    try:
        making.write_text(text + "\n", encoding="utf-8")
        making.replace(path)
    except OSError as error:
        making.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written ({error.strerror}).") from error
    session.saved = path.absolute()
    note(f"wrote {path}")


def _help(session: Session, _: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    for command in COMMANDS.values():
        print(f"{command.usage:<{width}}  {command.help}")
    print("A prompt that begins with / is written with //. Ctrl-C stops an answer. An empty line ends.")


def _quit(session: Session, _: str) -> None:
    session.over = True


COMMANDS = {
    "/expert": Command(f"/expert [NAME|{AUTO}]", "pin an expert, or route again; alone: list them", _expert),
    "/route": Command("/route [TEXT]", "what the routers say of TEXT, or of the last prompt", _route),
    "/compare": Command(
        "/compare [NAME ...]", "the last prompt again by each; alone: as routed, and the base", _compare
    ),
    "/history": Command("/history", "the conversation", _history),
    "/undo": Command("/undo", "take the last prompt and its answer back", _undo),
    "/clear": Command("/clear", "begin anew", _clear),
    "/save": Command("/save FILE", "write the conversation as data (.jsonl, .json)", _save),
    "/help": Command("/help", "this list", _help),
    "/quit": Command("/quit", "end", _quit),
}
