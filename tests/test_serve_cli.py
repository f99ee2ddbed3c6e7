"""`loramix serve` as a command: what it refuses before it loads anything, and a real process from start to end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
import yaml

from loramix.cli.main import run as loramix
from tests import tiny


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    tiny.save_base(folder / "base")
    data = {"domains": tiny.toy_domains(folder / "data", train=8, test=2), "max_length": 64}
    for method, adapter in (("moa", {"r": 2}), ("mola", {"r": 2, "allocation": "2222"}), ("full", None)):
        settings = {
            "output_dir": str(folder / method),
            "method": method,
            "controls": [],
            "model_name_or_path": str(folder / "base"),
            "data": data,
            "training": {"max_steps": 1},
            **({} if adapter is None else {"adapter": adapter}),
        }
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(settings))
        assert loramix(["train", str(folder / f"{method}.yaml")]) == 0
    return folder


WRONG = {
    "no key for others": (["--host", "0.0.0.0"], "needs a key"),  # noqa: S104
    "engine": (["--engine", "tgi"], "expected transformers or vllm"),
    "numbers": (["--max-batch", "0", "--max-tokens", "0", "--timeout", "0"], "--timeout 0"),
    "name": (["--name", "a:b"], "without a colon"),
    "decision": (["--decision", "best"], "decision = 'best'"),
    "keys": (["--keys", "nothing.yaml"], "cannot be read"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_options_end_with_code_2(kind: str, runs: Path, capsys: pytest.CaptureFixture[str]):
    options, said = WRONG[kind]
    assert loramix(["serve", str(runs / "moa"), *options]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_vllm_is_refused_where_experts_are_chosen_by_token(runs: Path, capsys: pytest.CaptureFixture[str]):
    assert loramix(["serve", str(runs / "mola"), "--engine", "vllm"]) == 2
    assert "token by token" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("method", ["moa", "mola", "full"])
def test_a_run_is_served_until_it_is_interrupted(method: str, runs: Path):
    environment = {**os.environ, "LORAMIX_API_KEY": "k" * 20}
    command = [sys.executable, "-m", "loramix", "serve", str(runs / method), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    try:
        lines: list[str] = []
        address = None
        deadline = time.monotonic() + 120
        while address is None and time.monotonic() < deadline:
            assert process.stdout is not None
            lines.append(process.stdout.readline())
            assert process.poll() is None, lines
            if found := re.search(r"running on (http://[\d.:]+)", lines[-1]):
                address = found[1]
        assert address, lines
        assert httpx2.get(f"{address}/health").json() == {"status": "ok"}
        assert httpx2.get(f"{address}/v1/models").status_code == 401
        headers = {"authorization": "Bearer " + "k" * 20}
        names = [one["id"] for one in httpx2.get(f"{address}/v1/models", headers=headers).json()["data"]]
        experts = ["moa:adds", "moa:greets", "moa:shouts", "moa:base"]
        assert names == {"moa": ["moa", *experts], "mola": ["mola", "mola:base"], "full": ["full"]}[method]
        body = {"model": method, "messages": [{"role": "user", "content": "secret words"}], "max_tokens": 4}
        reply = httpx2.post(f"{address}/v1/chat/completions", headers=headers, json=body, timeout=60)
        assert reply.status_code == 200
        assert (reply.json()["routing"]["expert"] is None) == (method != "moa")
        streamed = httpx2.post(
            f"{address}/v1/chat/completions", headers=headers, json={**body, "stream": True}, timeout=60
        )
        assert streamed.text.endswith("data: [DONE]\n\n")
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    log = "".join(lines) + rest
    assert log.count("/v1/chat/completions expert=") == 2  # whole and streamed
    assert "secret words" not in log
    assert "kkkk" not in log
    assert "Traceback" not in log


@pytest.mark.parametrize("command", ["/bin/false", "/no/such/vllm"])
def test_vllm_that_does_not_start_is_told_in_a_line(command: str, runs: Path):
    options = ["serve", str(runs / "moa"), "--engine", "vllm", "--vllm", command, "--port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "loramix", *options], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode in (2, 4)
    assert "Traceback" not in done.stderr
    assert "vLLM" in next(line for line in done.stderr.splitlines() if line.startswith("error: "))
