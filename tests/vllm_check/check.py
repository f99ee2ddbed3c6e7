"""`make vllm-check`: exported experts give in real vLLM the tokens that loramix gives when pinned to them.

python tests/vllm_check/check.py --vllm .venv-vllm/bin/python [--run RUN] [--out FOLDER]

Four prompts, one of each domain; each is answered by each expert and by the bare base, greedily, in fp32. loramix
answers them one by one, vLLM all in one batch, in which every expert and the base are mixed. Exit code 1 if any token
differs, or if fewer than two experts answer differently from the base: then the check could not fail. Without --run a
small MoA of the four demo domains is trained first, and kept for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
TRAINING = [
    "controls=[]",
    "data.max_train_examples=8",
    "data.max_test_examples=4",
    "training.num_train_epochs=4",
    "training.learning_rate=3e-3",
]
"""Little, at a high rate: the experts need not be good, they must differ from the base and from each other."""
SETTINGS_OF_VLLM = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""Nothing is asked of the network."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm", required=True, help="python of an environment with vLLM")
    parser.add_argument("--run", type=Path, help="a finished run of method moa; by default a small one is trained")
    parser.add_argument("--out", type=Path, default=Path("runs/vllm-check"), help="where everything is kept")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run = args.run or trained(args.out / "run")
    # Each step in a process of its own, so that vLLM finds the memory of the others free.
    export, asked, ours, theirs = (args.out / name for name in ("export", "asked.json", "loramix.json", "vllm.json"))
    shutil.rmtree(export, ignore_errors=True)
    loramix("export", str(run), "--output-dir", str(export))
    print("loramix answers ...", file=sys.stderr)
    script(sys.executable, "in_loramix.py", run, export, asked, ours)
    print("vLLM starts, which takes a minute or two, and answers ...", file=sys.stderr)
    theirs.unlink(missing_ok=True)
    script(args.vllm, "in_vllm.py", asked, theirs, log=args.out / "vllm.log")
    return compared(*(json.loads(file.read_text(encoding="utf-8")) for file in (asked, ours, theirs)), args.out)


def trained(folder: Path) -> Path:
    """Returns a finished run, trained now unless it lies there."""
    if not (folder / "results.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        loramix("demo", "--out", str(folder), *TRAINING)
    return folder


def loramix(*arguments: str) -> None:
    """Runs a verb of loramix; ends with its exit code where it fails."""
    if code := subprocess.run([sys.executable, "-m", "loramix", *arguments], check=False).returncode:
        sys.exit(code)


def script(python: str, name: str, *arguments: Path, log: Path | None = None) -> None:
    """Runs one of the scripts beside this one; ends with the end of its log where it fails."""
    command = [python, str(HERE / name), *map(str, arguments)]
    if log is None:
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(code)
        return
    with log.open("w") as lines:
        environment = {**os.environ, **SETTINGS_OF_VLLM}
        code = subprocess.run(command, env=environment, stdout=lines, stderr=lines, check=False).returncode
    if code:
        sys.exit(f"error: {name} ended with exit code {code}; the end of {log}:\n{log.read_text()[-3000:]}")


def compared(asked: dict[str, Any], ours: list[dict[str, Any]], theirs: dict[str, Any], out: Path) -> int:
    """Prints the table and returns the exit code."""
    length = asked["max_new_tokens"]
    table = Table(title=f"vLLM {theirs['vllm']}, {len(ours)} requests in one batch, {length} tokens each")
    for head in ("prompt of", "answered by", "same tokens", "leaves the base at", "narrowest margin", "begins"):
        table.add_column(head, justify="left" if head in ("prompt of", "answered by", "begins") else "right")
    base: list[int] = []
    rows, differing = [], set()
    for request, our, their in zip(asked["requests"], ours, theirs["answers"], strict=True):
        expert, same = request["expert"], agreeing(our["ids"], their)
        base = our["ids"] if expert is None else base
        leaves = agreeing(our["ids"], base)
        if leaves < length:
            differing.add(expert)
        rows.append({**request, "loramix": our["ids"], "vllm": their, "same": same, "margin": our["margin"]})
        table.add_row(
            request["domain"],
            expert or "(base)",
            f"{same}/{length}",
            "" if expert is None else ("never" if leaves == length else f"token {leaves + 1}"),
            f"{our['margin']:.2g}",
            our["text"][:32].replace("\n", " "),
        )
    Console(width=130).print(table)
    equal = all(row["same"] == length for row in rows)
    found = {"equal": equal, "experts_unlike_the_base": sorted(differing), "vllm": theirs["vllm"]}
    found |= {"seconds_to_start": theirs["seconds_to_start"], "seconds": theirs["seconds"], "date": time.strftime("%F")}
    (out / "result.json").write_text(json.dumps({**found, "rows": rows}, indent=2), encoding="utf-8")
    print(f"vLLM: {theirs['seconds_to_start']} s to start, {theirs['seconds']} s for the batch. Kept in {out}.")
    return verdict(equal, differing, theirs["loramix_there"])


def verdict(equal: bool, differing: set[str], loramix_there: bool) -> int:
    """Returns the exit code and says what is wrong."""
    wrong = []
    if not equal:
        wrong.append("tokens differ. A margin near 0 in that row is a tie; anything else is a mistake of ours.")
    if len(differing) < 2:
        wrong.append(
            f"only {len(differing)} experts answer differently from the base, so the check could not fail. Name a run "
            "whose experts are trained further: make vllm-check RUN=folder."
        )
    if loramix_there:
        wrong.append("loramix is installed beside vLLM; the exported adapters must do without. Make .venv-vllm anew.")
    for one in wrong:
        print(f"error: {one}", file=sys.stderr)
    return 1 if wrong else 0


def agreeing(one: list[int], other: list[int]) -> int:
    """Returns how many tokens are the same before the first that is not."""
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            return number
    return len(one)


if __name__ == "__main__":
    sys.exit(main())
