"""From adapters that exist already to one routed model and back: import, teach, add, remove, rename, extract."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from loramix.adapters.adapter import read_adapter
from loramix.cli.main import run
from loramix.data.demo import demo_data
from loramix.lifecycle.export import equal, read_export
from loramix.models import load_base
from loramix.models.base import base_folder
from loramix.opening import load_adapter
from tests import tiny

DOMAINS = ("adds", "greets", "shouts")


def stock(folder: Path, base: str, files: dict[str, str], steps: int) -> dict[str, str]:
    """Returns LoRA folders of PEFT's own making, by domain; made in a process that never imports loramix."""
    domains = [f"{name}={file}" for name, file in files.items()]
    script = str(Path(__file__).with_name("stock_peft.py"))
    command = [sys.executable, script, base, str(folder), str(steps), *domains]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: str(folder / name) for name in files}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, toy data, and three LoRAs of different make that stock PEFT trained."""
    folder = tmp_path_factory.mktemp("lifecycle")
    tiny.save_base(folder / "base")
    data = tiny.toy_domains(folder / "data")
    (folder / "loras").mkdir()
    stock(folder / "loras", str(folder / "base"), {d: f"{data[d]}/train.jsonl" for d in DOMAINS}, 24)
    return folder


def sources(project: Path) -> list[str]:
    return [f"{domain}={project / 'loras' / domain}" for domain in DOMAINS]


def files_of(project: Path, domains: tuple[str, ...] = DOMAINS) -> list[str]:
    return [f"data.domains.{domain}={project / 'data' / domain}" for domain in domains]


@pytest.fixture(scope="module")
def composed(project: Path) -> Path:
    """A MoA made of the three, its routers taught from a few prompts of each domain."""
    out = project / "composed"
    assert run(["experts", "import", *sources(project), "-o", str(out)]) == 0
    few = ["data.max_train_examples=12", "data.max_length=64", "adapter.router.pooling=mean"]
    assert run(["train", str(out), "--stage", "routers", *files_of(project), *few]) == 0
    return out


def logits(model: torch.nn.Module, **how: object) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.ids(2, 9, vocab=200), **how).logits


def hashes(folder: Path, without: tuple[str, ...] = ("log.jsonl",)) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in without
    }


def test_imported_experts_compute_what_stock_peft_computes(project: Path, composed: Path):
    model = load_adapter(load_base(str(project / "base")), composed / "model")
    for position, domain in enumerate(DOMAINS):
        theirs = PeftModel.from_pretrained(load_base(str(project / "base")), str(project / "loras" / domain)).eval()
        told = torch.full((2,), position)
        assert (logits(model, domain_ids=told) - logits(theirs)).abs().max() <= 1e-5


def test_routers_are_taught_in_seconds_with_the_experts_as_they_are(composed: Path):
    results = json.loads((composed / "results.json").read_text())
    assert results["router_accuracy_overall"]["last"] >= 0.9
    assert {row["model"] for row in results["rows"]} == {"single", "moa_oracle", "moa_routed"}
    assert results["stages"]["routers"]["steps"] == 300
    taught = read_adapter(composed / "model")
    for position, domain in enumerate(DOMAINS):
        expert = read_adapter(composed / "experts" / domain)
        for name, tensor in expert.tensors.items():
            module, _, side = name.removesuffix(".weight").rpartition(".lora_")
            stacked = taught.tensors[f"{module}.loramix_bank.{'A_ERI' if side == 'A' else 'B_EOR'}"]
            assert torch.equal(stacked[position], tensor)


def test_an_untaught_mixture_answers_with_a_pinned_expert_and_refuses_to_guess(project: Path, tmp_path: Path):
    assert run(["experts", "import", *sources(project), "-o", str(tmp_path / "run")]) == 0
    model = load_adapter(load_base(str(project / "base")), tmp_path / "run" / "model")
    assert model.generate(tiny.ids(1, 5, vocab=200), expert="adds", max_new_tokens=2).shape == (1, 7)
    with pytest.raises(ValueError, match="no expert is named"):
        model.generate(tiny.ids(1, 5, vocab=200), max_new_tokens=2)


def test_arrow_needs_no_training_and_lorahub_a_few_examples(project: Path, tmp_path: Path, capsys):
    assert run(["experts", "import", *sources(project), "-o", str(tmp_path / "a"), "--method", "arrow"]) == 0
    assert "Ready" in capsys.readouterr().out
    model = load_adapter(load_base(str(project / "base")), tmp_path / "a" / "model")
    base = load_base(str(project / "base"))
    assert (logits(model) - logits(base)).abs().max() > 1e-4
    hub = str(tmp_path / "h")
    pytest.importorskip("nevergrad")
    assert run(["experts", "import", *sources(project), "-o", hub, "--method", "lorahub", "--json"]) == 0
    files = files_of(project)
    assert run(["train", hub, "--stage", "weights", *files, "search.budget=3", "data.max_length=64"]) == 0
    assert json.loads((tmp_path / "h" / "results.json").read_text())["stages"]["weights"]


def test_going_on_trains_imported_experts_together(project: Path, tmp_path: Path):
    out = str(tmp_path / "run")
    assert run(["experts", "import", *sources(project), "-o", out, "--method", "moe-lora"]) == 0
    assert run(["train", out, "--stage", "joint", *files_of(project), "max_steps=2", "data.max_length=64"]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert {"single", "moe-lora"} == {row["model"] for row in rows}


def test_export_and_import_again_is_the_same_mixture(project: Path, composed: Path, tmp_path: Path, capsys):
    out = tmp_path / "export"
    assert run(["export", str(composed), "-o", str(out)]) == 0
    mixture = read_adapter(composed / "model")
    assert equal(read_export(out), mixture)
    assert run(["experts", "import", str(out), "-o", str(tmp_path / "again")]) == 0
    assert equal(read_adapter(tmp_path / "again" / "model"), mixture)
    assert run(["export", str(tmp_path / "again"), "-o", str(tmp_path / "export2")]) == 0
    assert {k: v for k, v in hashes(out).items() if k != "README.md"} == {
        k: v for k, v in hashes(tmp_path / "export2").items() if k != "README.md"
    }
    capsys.readouterr()
    assert run(["route", str(tmp_path / "again"), "--text", "QRSTWXYZQRSTWZYX", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["expert"] == "shouts"


def test_exported_experts_load_in_stock_peft(project: Path, composed: Path, tmp_path: Path):
    assert run(["export", str(composed), "-o", str(tmp_path / "export")]) == 0
    torch.save(tiny.ids(2, 9, vocab=200), tmp_path / "ids.pt")
    script = (
        "import sys, json, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base, folder, ids, out = sys.argv[1:]\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()\n"
        "with torch.no_grad(): torch.save(model(torch.load(ids)).logits, out)\n"
        "assert 'loramix' not in sys.modules\n"
    )
    model = load_adapter(load_base(str(project / "base")), composed / "model")
    for position, domain in enumerate(DOMAINS):
        out = tmp_path / f"{domain}.pt"
        folder = str(tmp_path / "export" / domain)
        command = [sys.executable, "-c", script, str(project / "base"), folder, str(tmp_path / "ids.pt"), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        ours = logits(model, domain_ids=torch.full((2,), position))
        assert (torch.load(out) - ours).abs().max() <= 1e-5


def test_the_card_says_what_it_is_and_how_to_load_it(composed: Path, tmp_path: Path):
    assert run(["export", str(composed), "-o", str(tmp_path / "export")]) == 0
    text = (tmp_path / "export" / "README.md").read_text()
    for word in ("adds", "12", "moa_routed", "Router accuracy", "PeftModel.from_pretrained", "vllm serve", "loramix"):
        assert word in text


def test_extract_is_the_expert_alone(project: Path, composed: Path, tmp_path: Path, capsys):
    assert run(["experts", "extract", str(composed), "greets", "-o", str(tmp_path / "lora")]) == 0
    alone = PeftModel.from_pretrained(load_base(str(project / "base")), str(tmp_path / "lora")).eval()
    model = load_adapter(load_base(str(project / "base")), composed / "model")
    assert (logits(alone) - logits(model, domain_ids=torch.tensor([1, 1]))).abs().max() <= 1e-5
    assert run(["experts", "extract", str(composed), "greets", "-o", str(tmp_path / "lora")]) == 2
    assert run(["experts", "extract", str(composed), "greet", "-o", str(tmp_path / "x")]) == 2
    assert 'Did you mean "greets"?' in capsys.readouterr().err


@pytest.fixture
def pair(project: Path, tmp_path: Path) -> Path:
    """A MoA of two of the three, taught."""
    out = tmp_path / "pair"
    two = ("adds", "greets")
    some = [source for source in sources(project) if source.partition("=")[0] in two]
    assert run(["experts", "import", *some, "-o", str(out)]) == 0
    few = ["data.max_train_examples=12", "data.max_length=64", "adapter.router.pooling=mean"]
    assert run(["train", str(out), "--stage", "routers", *files_of(project, two), *few]) == 0
    return out


ADD = ["num_train_epochs=4", "learning_rate=1e-2", "router_learning_rate=1e-2"]


def test_add_leaves_the_old_experts_and_scores_as_they_were_and_remove_restores_every_file(project: Path, pair: Path):
    before = hashes(pair, ("log.jsonl", "results.json"))
    base = str(project / "base")
    old = load_adapter(load_base(base), pair / "model")
    at_start = [logits(old, domain_ids=torch.full((2,), e)) for e in range(2)]
    scores = {scope: r.logits for scope, r in _read(old).items()}
    add = ["experts", "add", str(pair), "shouts", "--data", str(project / "data" / "shouts"), *ADD]
    assert run(add) == 0
    new = load_adapter(load_base(base), pair / "model")
    for e in range(2):
        assert torch.equal(at_start[e], logits(new, domain_ids=torch.full((2,), e)))
    for scope, routing in _read(new).items():
        assert routing.logits.shape[1] == 3
        assert torch.allclose(routing.logits[:, :2], scores[scope], atol=1e-6)
    assert run(add) == 2  # the name is taken
    assert run(["experts", "remove", str(pair), "shouts"]) == 0
    assert hashes(pair, ("log.jsonl", "results.json")) == before


def _read(model: PeftModel) -> dict:
    model(tiny.ids(2, 9, vocab=200), decision="per_layer")
    return model.routings


def test_the_new_expert_is_found_and_the_old_ones_still_are(project: Path, pair: Path, capsys):
    capsys.readouterr()
    data = str(project / "data" / "shouts")
    assert run(["experts", "add", str(pair), "shouts", "--data", data, *ADD, "--json"]) == 0
    added = json.loads(capsys.readouterr().out)
    assert added["found"] >= 0.9
    assert set(added["kept"]) == {"adds", "greets"}
    assert min(added["kept"].values()) >= 0.9
    assert added["perplexity"]["expert"] < added["perplexity"]["base"]
    assert added["lost"] == ""
    assert run(["eval", str(pair), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["domains"] == ["adds", "greets", "shouts"]
    assert results["router_accuracy_overall"]["last"] > 0.8
    assert run(["experts", "list", str(pair), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == ["adds", "greets", "shouts"]
    assert all(one["norm"] > 0 and one["stored_prompts"] == 12 for one in listed[:2])


def test_adding_without_stored_prompts_says_what_is_lost(project: Path, pair: Path, capsys):
    capsys.readouterr()
    data = str(project / "data" / "shouts")
    assert run(["experts", "add", str(pair), "shouts", "--data", data, *ADD, "--no-replay", "--json"]) == 0
    added = json.loads(capsys.readouterr().out)
    assert "no stored prompts of adds, greets" in added["lost"]
    assert added["kept"] == {}


def test_an_original_expert_can_leave_and_its_name_be_changed(project: Path, composed: Path, tmp_path: Path, capsys):
    out = tmp_path / "export"
    assert run(["export", str(composed), "-o", str(out)]) == 0
    assert run(["experts", "import", str(out), "-o", str(tmp_path / "run")]) == 0
    folder = tmp_path / "run"
    base = str(project / "base")
    before = load_adapter(load_base(base), folder / "model")
    third, scores = logits(before, domain_ids=torch.tensor([2, 2])), _read(before)
    assert run(["experts", "remove", str(folder), "adds"]) == 0
    after = load_adapter(load_base(base), folder / "model")
    assert torch.equal(third, logits(after, domain_ids=torch.tensor([1, 1])))
    for scope, routing in _read(after).items():
        assert torch.allclose(routing.logits, scores[scope].logits[:, 1:], atol=1e-6)
    assert run(["experts", "rename", str(folder), "greets", "hello"]) == 0
    assert (folder / "experts" / "hello").is_dir()
    capsys.readouterr()
    assert run(["experts", "show", str(folder), "hello", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "hello"
    assert run(["experts", "remove", str(folder), "hello"]) == 2
    assert "which is no mixture" in capsys.readouterr().err
    for wrong in ("../x", "shouts", ""):
        assert run(["experts", "rename", str(folder), "hello", wrong]) == 2


def test_push_reads_the_export_back_and_uses_the_hubs_client(composed: Path, tmp_path: Path, monkeypatch, capsys):
    import huggingface_hub

    calls = []

    class Client:
        def create_repo(self, repository, **how):
            calls.append(("create", repository, how))

        def upload_folder(self, **how):
            calls.append(("upload", how))

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    out = tmp_path / "export"
    assert run(["push", str(out), "me/it"]) == 4
    assert run(["export", str(composed), "-o", str(out)]) == 0
    assert run(["push", str(out), "me/it", "--private"]) == 0
    assert calls[0] == ("create", "me/it", {"private": True, "exist_ok": True})
    assert calls[1][1]["folder_path"] == str(out)
    (out / "adds" / "adapter_config.json").write_text("{}")
    assert run(["push", str(out), "me/it"]) == 4
    assert "was changed after the export" in capsys.readouterr().err


@pytest.mark.real
def test_four_loras_of_stock_peft_become_one_routed_model(tmp_path: Path):
    """The main road on the real base: four adapters by PEFT alone, routers taught, at least 98 % right, exported."""
    base = base_folder("smollm2-135m-instruct")
    folders = demo_data()
    files = {domain: f"{folder}/train.jsonl" for domain, folder in folders.items()}
    loras = stock(tmp_path, base, files, 16)
    out = tmp_path / "run"
    named = [f"{domain}={folder}" for domain, folder in loras.items()]
    assert run(["experts", "import", *named, "-o", str(out)]) == 0
    data = [f"data.domains.{domain}={folder}" for domain, folder in folders.items()]
    limits = ["data.max_train_examples=40", "data.max_test_examples=40", "data.max_length=256"]
    assert run(["train", str(out), "--stage", "routers", *data, *limits]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["router_prompts"] == 160
    assert results["router_accuracy_overall"]["last"] >= 0.98
    assert run(["export", str(out), "-o", str(tmp_path / "export")]) == 0
    model = load_adapter(load_base(), out / "model")
    ids = torch.randint(5, 40000, (1, 24))
    for position, domain in enumerate(loras):
        stocked = PeftModel.from_pretrained(load_base(), str(tmp_path / "export" / domain)).eval()
        with torch.no_grad():
            ours, theirs = model(ids, domain_ids=torch.tensor([position])).logits, stocked(ids).logits
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
