"""`loramix serve RUN`: an OpenAI-compatible server, routed per request, with a chat page."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loramix.cli.output import quiet_libraries, result_console

if TYPE_CHECKING:
    from loramix.serving.starting import VllmStart


def add_to(app: typer.Typer) -> None:
    app.command("serve", help="Serve a run: OpenAI's API, routed per request, and a chat page.")(serve)


def serve(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than this machine's needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call it as model; the folder's name by default.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="YAML file with keys and their experts; one key alone: LORAMIX_API_KEY.")
    ] = None,
    decision: Annotated[
        str | None, typer.Option(help="last, vote, per_layer, layer:k; the run's own by default.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Answers written at a time.")] = 16,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Length of an answer at most.")] = 1024,
    context: Annotated[int | None, typer.Option(help="Prompt and answer together; the base's own by default.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds from a request to its end.")] = 120.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; an accelerator if there is one.")] = None,
    engine: Annotated[str, typer.Option(help="transformers: all methods. vllm: sequence-routed ones, faster.")] = (
        "transformers"
    ),
    vllm: Annotated[str, typer.Option("--vllm", help="The vllm command, for --engine vllm.")] = "vllm",
    vllm_args: Annotated[str, typer.Option(help="Further arguments of `vllm serve`, in one quoted text.")] = "",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and answers to the log.")] = False,
) -> None:
    quiet_libraries()
    from loramix.errors import ConfigError

    try:
        import uvicorn

        from loramix.serving.starting import Options, server_of
    except ModuleNotFoundError as error:
        raise ConfigError(f'{error.name} is missing. Install it with `pip install "loramix[serve]"`.') from error
    if engine not in ("transformers", "vllm"):
        raise ConfigError(f"--engine {engine}: expected transformers or vllm.")
    options = Options(
        name, host, keys, decision, max_batch, max_queue, max_tokens, context, timeout, device, log_prompts
    )
    with tempfile.TemporaryDirectory(prefix="loramix-serve-") as folder:
        start = _vllm_start(run, Path(folder), vllm, vllm_args) if engine == "vllm" else None
        app = server_of(run, options, os.environ, start)
        shown = f"[{host}]" if ":" in host else host
        result_console().print(f"http://{shown}:{port}  (chat page at /, OpenAI's API at /v1)", highlight=False)
        try:
            uvicorn.run(app, host=host, port=port, server_header=False, timeout_graceful_shutdown=10, log_config=_log())
        except SystemExit:
            if app.failed is not None:
                raise app.failed from None
            raise


def _vllm_start(run: Path, folder: Path, command: str, arguments: str) -> VllmStart:
    """Returns what vLLM is started with: the experts, exported into a folder that goes when the server does."""
    import shlex

    from loramix.lifecycle.editing import mixture_of
    from loramix.lifecycle.export import export_experts
    from loramix.lifecycle.importing import sizes_of
    from loramix.methods import method_named
    from loramix.opening import open_run
    from loramix.serving.starting import VllmStart
    from loramix.serving.vllm_engine import check_vllm
    from loramix.serving.vllm_process import VllmOptions

    opened, experiment = open_run(run)
    check_vllm(method_named(experiment.method))
    linears = list(sizes_of(experiment.model_name_or_path))
    export_experts(mixture_of(opened, experiment), folder / "experts", opened, linears)
    return VllmStart(folder / "experts", VllmOptions(command, folder / "vllm.log", shlex.split(arguments)))


def _log() -> dict[str, Any]:
    """Returns the settings of the log: one line a request, to standard error, without prompts."""
    stream = {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stderr"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(message)s"}},
        "handlers": {"stderr": stream},
        "loggers": {name: {"handlers": ["stderr"], "level": "INFO"} for name in ("uvicorn", "loramix.serving")},
    }
