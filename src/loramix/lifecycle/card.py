"""The model card of an export: what it is, what it learned, what was measured, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramix.methods import method_named
from loramix.run_folder import RunFolder

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""


def card(manifest: Mapping[str, Any], run: RunFolder | None) -> str:
    """Returns README.md of an export, as the Hub reads it.

    Args:
        manifest: of the export.
        run: with data.json and results.json, where there are any; what is not known is left out.
    """
    method = method_named(str(manifest["method"]))
    base, experts = manifest["base"], list(manifest["experts"])
    front = ["---", "library_name: peft", "tags: [lora, loramix, mixture-of-loras]"]
    if isinstance(base, str) and base.count("/") == 1 and not base.startswith(("/", ".")):
        front.append(f"base_model: {base}")
    lines = [
        *front,
        "---",
        "",
        f"# {', '.join(experts)}: {method.title}",
        "",
        f"{len(experts)} LoRA expert{'s' if len(experts) > 1 else ''} for `{base}`, made with loramix "
        f"{manifest['loramix']}. {method.title}: {method.summary} ([paper]({method.paper})).",
        "",
        "## Domains",
        "",
        *_domains(experts, _read(run.data) if run is not None else {}),
        "",
        *_measured(_read(run.results) if run is not None else {}),
        *_loading(str(base), experts, int(manifest["adapter_config"]["r"]), method.router is not None),
    ]
    return "\n".join(lines) + "\n"


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _domains(experts: list[str], data: Mapping[str, Any]) -> list[str]:
    rows = ["| expert | folder | training examples | supervised tokens | held out |", "|---|---|---|---|---|"]
    for name in experts:
        train, test = (data.get(name, {}).get(part, {}) for part in ("train", "test"))
        counts = [train.get("examples"), train.get("supervised_tokens"), test.get("examples")]
        rows.append(f"| {name} | `{name}/` | {' | '.join('' if c is None else f'{c:,}' for c in counts)} |")
    return rows


def _measured(results: Mapping[str, Any]) -> list[str]:
    if not results.get("rows"):
        return []
    domains = list(results["domains"])
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    cells = {(row["domain"], row["model"]): row["perplexity"] for row in results["rows"]}
    lines = [
        "## Measured",
        "",
        "Perplexity of held-out responses, lower is better.",
        "",
        f"| domain | {' | '.join(models)} |",
        f"|---|{'---|' * len(models)}",
    ]
    for domain in domains:
        values = [cells.get((domain, model)) for model in models]
        lines.append(f"| {domain} | {' | '.join('' if v is None else f'{v:.3f}' for v in values)} |")
    overall = results.get("router_accuracy_overall")
    if overall:
        said = ", ".join(f"{decision} {value:.1%}" for decision, value in overall.items())
        lines += ["", f"Router accuracy on {results['router_prompts']} held-out prompts, by decision: {said}."]
    return [*lines, ""]


def _loading(base: str, experts: list[str], rank: int, routed: bool) -> list[str]:
    first = experts[0]
    most = next((one for one in VLLM_RANKS if one >= rank), VLLM_RANKS[-1])
    lines = [
        "## Loading",
        "",
        "One expert, with PEFT alone:",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{first}")  # the folder of one expert',
        "```",
        "",
        "All of them in vLLM, chosen by `model` in each request:",
        "",
        "```sh",
        # One slot more than adapters: on a CPU vLLM 0.32 answers the base's requests with what is in the last.
        f"vllm serve {base} --enable-lora --max-loras {len(experts) + 1} --max-lora-rank {most} \\",
        f"  --lora-modules {' '.join(f'{name}=./{name}' for name in experts)}",
        "```",
        "",
    ]
    if routed:
        lines += [
            "Routed, as it was trained (`pip install loramix`):",
            "",
            "```sh",
            "loramix experts import . --output-dir runs/mixture",
            "loramix chat runs/mixture",
            "```",
            "",
            "The choice of an expert is a guess from the prompt. It is no access control.",
            "",
        ]
    return lines
