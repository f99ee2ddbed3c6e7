"""From a finished run to a service that is ready to start."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loramix.errors import ConfigError, Problems
from loramix.methods import method_named
from loramix.models.base import base_folder
from loramix.opening import open_model, open_run
from loramix.run_folder import RunFolder
from loramix.serving.app import Service, create_app
from loramix.serving.ask import Engine
from loramix.serving.catalog import Catalog
from loramix.serving.first_layers import earliest_layer, keep_first_layers
from loramix.serving.guard import LOOPBACK, Guard
from loramix.serving.keys import VARIABLE, Keys, read_keys
from loramix.serving.limits import Limits
from loramix.serving.metrics import Metrics
from loramix.serving.model import ServedModel
from loramix.serving.prompts import PromptEncoder
from loramix.serving.shapes import TokenTexts
from loramix.serving.transformers_engine import TransformersEngine
from loramix.serving.vllm_engine import VllmEngine
from loramix.serving.vllm_process import VllmOptions, VllmProcess
from loramix.settings import Experiment

_LOG = logging.getLogger("loramix.serving")


@dataclass(frozen=True)
class Options:
    """How a run is served.

    Attributes:
        name: what clients call it; the run folder's name by default.
        host: to listen on.
        keys: file with keys, see `read_keys`.
        decision: how experts are settled; the run's own by default, for vLLM the earliest layer as good as the best.
        places: answers written at a time.
        queue: requests that may wait.
        max_tokens: of one answer.
        context: tokens of prompt and answer; the base's own limit by default.
        seconds: from a request to its end.
        device: the model's; an accelerator if there is one, by default.
        log_prompts: whether prompts and answers go to the log.
    """

    name: str | None = None
    host: str = "127.0.0.1"
    keys: Path | None = None
    decision: str | None = None
    places: int = 16
    queue: int = 64
    max_tokens: int = 1024
    context: int | None = None
    seconds: float = 120.0
    device: str | None = None
    log_prompts: bool = False

    def check(self) -> None:
        """Raises a ConfigError with all that is impossible."""
        problems = Problems("the options")
        for name, value, least in (
            ("--max-batch", self.places, 1),
            ("--max-queue", self.queue, 0),
            ("--max-tokens", self.max_tokens, 1),
            ("--context", self.context or 2, 2),
            ("--timeout", self.seconds, 1),
        ):
            if value < least:
                problems.add(f"{name} {value}: expected at least {least}.")
        if self.name is not None and (":" in self.name or not self.name.strip()):
            problems.add(f"--name {self.name!r}: expected a name without a colon; it stands before an expert's name.")
        problems.raise_as(ConfigError)


@dataclass(frozen=True)
class VllmStart:
    """What the vLLM engine needs beside the run: an export of it, and how to start vLLM."""

    export: Path
    options: VllmOptions


def server_of(path: Path, options: Options, environment: Mapping[str, str], vllm: VllmStart | None = None) -> Guard:
    """Returns the ASGI app that serves a run.

    Args:
        path: the run's folder.
        options: how.
        environment: of the process; LORAMIX_API_KEY is read from it.
        vllm: to let vLLM answer instead of transformers.

    Raises:
        ConfigError: impossible options, wrong keys, no key where one is needed, a run that cannot be served.
        ModelError: the run's model is missing or damaged.
    """
    options.check()
    if options.host not in LOOPBACK and options.keys is None and VARIABLE not in environment:
        raise ConfigError(
            f"--host {options.host}: other machines could use this server, so it needs a key. Set {VARIABLE}, or name "
            "a file with --keys."
        )
    run, experiment = open_run(path)
    model, tokenizer = open_model(experiment, run)
    method = method_named(experiment.method)
    decision = options.decision
    if vllm is not None and decision is None:
        decision = earliest_layer(_results(run).get("router_accuracy_by_layer") or {})
    served = ServedModel(model, tokenizer, method, decision=decision)
    keys = read_keys(options.keys, environment, served.experts)
    if vllm is not None:
        engine: Engine = _vllm(served, experiment, options, vllm)
    else:
        model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        served.device = next(model.parameters()).device
        engine = TransformersEngine(served, places=options.places, queue=options.queue)
    service = Service(
        catalog=Catalog(options.name or run.path.resolve().name, served.experts, has_base=served.has_base),
        engine=engine,
        encoder=PromptEncoder(tokenizer),
        texts=TokenTexts(tokenizer),
        limits=Limits(
            context=min(options.context or served.most_tokens, served.most_tokens),
            max_tokens=options.max_tokens,
            seconds=options.seconds,
            answers=min(Limits.answers, options.places),
        ),
        metrics=Metrics(lambda: engine.queue),
        vocabulary=int(model.get_input_embeddings().num_embeddings),
        log_prompts=options.log_prompts,
    )
    return create_app(service, keys, any_host=bool(keys))


def _vllm(served: ServedModel, experiment: Experiment, options: Options, start: VllmStart) -> VllmEngine:
    manifest = json.loads((start.export / "manifest.json").read_text(encoding="utf-8"))
    process = VllmProcess(
        base_folder(experiment.model_name_or_path),
        start.export,
        served.experts,
        rank=int(manifest["adapter_config"]["r"]),
        places=options.places,
        dtype=experiment.dtype,
        options=start.options,
    )
    engine = VllmEngine(served, process, places=options.places, queue=options.queue)
    if (served.decision or "").startswith("layer:"):
        layers = keep_first_layers(served.model, served.decision or "")
        _LOG.info("routing by %s: the first %d layers of the base read each prompt", served.decision, layers)
    return engine


def _results(run: RunFolder) -> dict[str, Any]:
    return json.loads(run.results.read_text(encoding="utf-8")) if run.results.is_file() else {}


__all__ = ["Keys", "Options", "VllmStart", "server_of"]
