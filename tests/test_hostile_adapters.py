"""Adapters that mean harm, or are broken: each is refused with its reason before a base is loaded; no code runs."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from loramix.cli.main import run
from loramix.errors import ModelError
from loramix.lifecycle import importing
from loramix.methods import method_named
from loramix.opening import check_trained, open_run
from tests import tiny

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two good LoRAs, a run and an export made of them."""
    folder = tmp_path_factory.mktemp("hostile")
    tiny.save_base(folder / "base")
    from transformers import AutoModelForCausalLM

    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(folder / name)
    assert run(["experts", "import", f"one={folder / 'one'}", f"two={folder / 'two'}", "-o", str(folder / "run")]) == 0
    assert run(["export", str(folder / "run"), "-o", str(folder / "export")]) == 0
    return folder


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.file, "code ran"))


def _config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def _pickle_only(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(folder / "canary")))


def _hidden_pickle(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / "weights.mdl").write_bytes(pickle.dumps(Canary(folder / "canary")))


def _pickle_named_safetensors(folder: Path) -> None:
    (folder / TENSORS).write_bytes(pickle.dumps(Canary(folder / "canary")))


def _nan(folder: Path) -> None:
    _tensors(folder, lambda t: t[next(iter(t))].fill_(float("nan")))


def _infinite(folder: Path) -> None:
    _tensors(folder, lambda t: t[next(iter(t))].fill_(float("inf")))


def _unused(folder: Path) -> None:
    _tensors(folder, lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}))


def _half(folder: Path) -> None:
    _tensors(folder, lambda t: t.pop(next(name for name in t if "lora_B" in name)))


def _escaping_tensor(folder: Path) -> None:
    _tensors(folder, lambda t: t.update({"../../etc/passwd": torch.zeros(2, 2)}))


def _big_header(folder: Path) -> None:
    with (folder / TENSORS).open("r+b") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(90_000_100)


def _cut(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:200])


def _many_tensors(folder: Path) -> None:
    header = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(1_000_000)}
    raw = json.dumps(header).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(raw)) + raw)


def _integers(folder: Path) -> None:
    _tensors(folder, lambda t: t.update({"x.lora_A.weight": torch.zeros(2, 2, dtype=torch.int64)}))


def _link(folder: Path) -> None:
    secret = folder.parent / "secret.safetensors"
    (folder / TENSORS).rename(secret)
    (folder / TENSORS).symlink_to(secret)


def _link_of_config(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/etc/passwd")


def _pipe(folder: Path) -> None:
    import os

    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def _deep(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 100_000 + "]" * 100_000)


def _list(folder: Path) -> None:
    (folder / CONFIG).write_text("[1]")


def _empty(folder: Path) -> None:
    for name in (CONFIG, TENSORS):
        (folder / name).unlink()


def settings(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _config(folder, **changes)


LORAS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle only": (_pickle_only, "weights as pickle only"),
    "hidden pickle": (_hidden_pickle, "weights as pickle only"),
    "pickle under a safe name": (_pickle_named_safetensors, "header|no safetensors"),
    "wrong base": (settings(base_model_name_or_path="someone/else-7b"), "was trained on 'someone/else-7b'"),
    "wrong rank": (settings(r=8), "are not of rank 8"),
    "absurd rank": (settings(r="8; rm"), "expected a number above 0"),
    "rank pattern that is no mapping": (settings(rank_pattern=[1]), "rank_pattern"),
    "NaN": (_nan, "holds NaN or infinity"),
    "infinity": (_infinite, "holds NaN or infinity"),
    "unused tensor": (_unused, "is no matrix of a plain LoRA"),
    "half an expert": (_half, "is missing"),
    "escaping tensor name": (_escaping_tensor, "is no tensor's name"),
    "auto_map": (settings(auto_map={"AutoModel": "evil.Model"}), "names code to be run"),
    "auto_map, nested": (settings(loftq_config={"auto_map": "x"}), "names code to be run"),
    "internal key": (settings(_attn_implementation_internal="evil/kernel"), "internal to a library"),
    "trust_remote_code": (settings(trust_remote_code=True), "names code to be run"),
    "unknown setting": (settings(new_magic=3), "changes what the adapter computes"),
    "DoRA": (settings(use_dora=True), "changes what the adapter computes"),
    "PiSSA": (settings(init_lora_weights="pissa_niter_4"), "changes the base's weights"),
    "another method": (settings(peft_type="IA3"), "Expected LORA"),
    "90 MB header": (_big_header, "header is 90 MB long"),
    "cut off": (_cut, "is cut off"),
    "a million tensors": (_many_tensors, "header is"),
    "integers": (_integers, "Expected weights"),
    "link": (_link, "out of the folder"),
    "link of the settings": (_link_of_config, "out of the folder"),
    "pipe": (_pipe, "no plain file"),
    "settings of depth 100,000": (_deep, "is no JSON"),
    "settings that are a list": (_list, "expected settings by name"),
    "empty folder": (_empty, "is missing"),
}


@pytest.mark.parametrize("what", LORAS)
def test_a_hostile_lora_is_refused_before_anything_is_loaded(
    what: str, good: Path, tmp_path: Path, capsys, monkeypatch
):
    spoil, reason = LORAS[what]
    folder = tmp_path / "evil"
    shutil.copytree(good / "one", folder)
    spoil(folder)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a base was loaded")

    monkeypatch.setattr(importing, "without_data", never)
    named = [f"evil={folder}", f"two={good / 'two'}"]
    base = ["--base", str(good / "base")]
    assert run(["experts", "import", *named, *base, "-o", str(tmp_path / "run")]) == 4
    said = capsys.readouterr().err
    assert any(part in said for part in reason.split("|")), said
    assert not (tmp_path / "run").exists()
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("name", ["../evil", "/etc/x", "a/b", "..", "", "a\x00b", "~", "con\n"])
def test_a_name_that_is_a_path_is_refused(name: str, good: Path, tmp_path: Path):
    code = run(["experts", "import", f"{name}={good / 'one'}", f"two={good / 'two'}", "-o", str(tmp_path / "run")])
    assert code in (2, 4)
    assert not (tmp_path / "run").exists()


def test_the_same_adapter_twice_is_refused(good: Path, tmp_path: Path, capsys):
    shutil.copytree(good / "one", tmp_path / "copy")
    named = [f"one={good / 'one'}", f"copy={tmp_path / 'copy'}"]
    assert run(["experts", "import", *named, "-o", str(tmp_path / "run")]) == 4
    assert "copy and one hold the same tensors" in capsys.readouterr().err
    assert run(["experts", "import", f"one={good / 'one'}", f"one={good / 'two'}", "-o", str(tmp_path / "run")]) == 2


def test_a_base_of_other_sizes_is_refused_whatever_it_is_called(good: Path, tmp_path: Path, capsys):
    base = tmp_path / "other"
    made = tiny.tokenizer()
    tiny.llama(vocab=len(made), hidden=48, layers=4).save_pretrained(base)
    named = [f"one={good / 'one'}", f"two={good / 'two'}", "--base", str(base)]
    assert run(["experts", "import", *named, "-o", str(tmp_path / "run")]) == 4
    assert "was trained on" in capsys.readouterr().err
    assert run(["experts", "import", *named, "--any-base-name", "-o", str(tmp_path / "run")]) == 4
    assert "has (in, out) features (32, 32), the base (48, 48)" in capsys.readouterr().err


def test_all_problems_of_all_adapters_come_at_once(good: Path, tmp_path: Path, capsys):
    shutil.copytree(good / "one", tmp_path / "a")
    shutil.copytree(good / "two", tmp_path / "b")
    _nan(tmp_path / "a")
    _config(tmp_path / "b", use_dora=True, r=16)
    assert run(["experts", "import", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", "-o", str(tmp_path / "run")]) == 4
    said = capsys.readouterr().err
    assert "NaN" in said
    assert "use_dora" in said
    assert "rank 16" in said


def test_the_hubs_own_cache_of_links_is_read(good: Path, tmp_path: Path):
    """The Hub's client keeps each file as a link to a blob two folders up; such folders are good."""
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate((CONFIG, TENSORS)):
        shutil.copy(good / "one" / name, blobs / str(number))
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    assert importing.read_loras({"one": str(snapshot), "two": str(good / "two")}).keys() == {"one", "two"}


def test_of_a_hub_repository_two_files_are_fetched(good: Path, tmp_path: Path, monkeypatch, capsys):
    import huggingface_hub

    asked = []

    def fetched(name: str, **how: Any) -> None:
        asked.append((name, how["allow_patterns"]))
        shutil.copytree(good / "one", how["local_dir"], dirs_exist_ok=True)

    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path / "cache"))
    named = ["one=owner/name", f"two={good / 'two'}", "-o", str(tmp_path / "run")]
    assert run(["experts", "import", *named]) == 4  # tests are offline
    assert "not to be had from the Hub" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert run(["experts", "import", *named]) == 0
    assert asked == [("owner/name", [CONFIG, TENSORS])]
    for wrong in ("owner/na me", "../x/y", "nowhere", "https://evil/x"):
        assert run(["experts", "import", f"one={wrong}", f"two={good / 'two'}", "-o", str(tmp_path / "no")]) == 4


def _drop_routers(folder: Path) -> None:
    _tensors(folder, lambda t: [t.pop(name) for name in list(t) if "loramix_router" in name])


def _drop_one_router(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        door = next(name for name in tensors if "loramix_router" in name).partition(".loramix_router")[0]
        for name in [name for name in tensors if name.startswith(f"{door}.loramix_router")]:
            del tensors[name]

    _tensors(folder, change)


def _one_expert_less(folder: Path) -> None:
    _tensors(folder, lambda t: t.update({n: x[:1].clone() for n, x in t.items() if "loramix_bank" in n}))


MIXTURES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle only": (_pickle_only, "weights as pickle only"),
    "missing routers": (_drop_routers, "no routers, expected one"),
    "one missing router": (_drop_one_router, "no routers, expected one"),
    "wrong rank": (settings(r=8), "adapter_config.json says 8"),
    "fewer experts": (_one_expert_less, "1 experts, adapter_config.json names 2"),
    "NaN": (_nan, "holds NaN or infinity"),
    "unused tensor": (_unused, "is not used by a loramix adapter"),
    "duplicated experts": (settings(experts=["one", "one"]), "given more than once"),
    "path as a name": (settings(experts=["one", "../two"]), "is no name"),
    "newer file format": (settings(schema_version=99), "Upgrade loramix"),
    "unknown setting": (settings(hook="evil"), "no setting of a loramix adapter"),
    "auto_map": (settings(auto_map={"AutoModel": "evil.Model"}), "names code to be run"),
    "internal key": (settings(_attn_implementation_internal="evil"), "internal to a library"),
    "unknown method": (settings(method="evil"), "no such method"),
    "90 MB header": (_big_header, "header is 90 MB long"),
    "link": (_link, "out of the folder"),
}


@pytest.mark.parametrize("what", MIXTURES)
def test_a_hostile_mixture_is_refused_before_anything_is_loaded(what: str, good: Path, tmp_path: Path):
    spoil, reason = MIXTURES[what]
    shutil.copytree(good / "run", tmp_path / "run")
    spoil(tmp_path / "run" / "model")
    folder, experiment = open_run(tmp_path / "run")
    with pytest.raises(ModelError, match=reason):
        check_trained(folder, method_named(experiment.method))
    assert run(["experts", "list", str(tmp_path / "run")]) == 4
    assert run(["route", str(tmp_path / "run"), "--text", "x"]) == 4
    assert not (tmp_path / "run" / "model" / "canary").exists()


def _manifest(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, **changes}))


def _changed_expert(folder: Path) -> None:
    _tensors(folder / "one", lambda t: t[next(iter(t))].add_(1))


def _linked_expert(folder: Path) -> None:
    shutil.move(folder / "one", folder.parent / "elsewhere")
    (folder / "one").symlink_to(folder.parent / "elsewhere")


EXPORTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed expert": (_changed_expert, "was changed after the export"),
    "missing router": (lambda f: (f / "router.safetensors").unlink(), "is missing"),
    "expert that is a link": (_linked_expert, "is a link"),
    "file out of the folder": (lambda f: _manifest(f, sha256={"../../etc/passwd": "0"}), "leads out of the folder"),
    "whole path": (lambda f: _manifest(f, sha256={"/etc/passwd": "0"}), "leads out of the folder"),
    "name that is a path": (lambda f: _manifest(f, experts=["../one", "two"]), "is no name"),
    "newer format": (lambda f: _manifest(f, version=9), "Upgrade loramix"),
    "another format": (lambda f: _manifest(f, format="x"), "is no manifest of ours"),
    "code in the manifest": (lambda f: _manifest(f, auto_map={"a": "b"}), "names code to be run"),
    "no manifest": (lambda f: (f / "manifest.json").write_text("[]"), "expected settings by name"),
}


@pytest.mark.parametrize("what", EXPORTS)
def test_a_hostile_export_is_refused(what: str, good: Path, tmp_path: Path, capsys):
    spoil, reason = EXPORTS[what]
    shutil.copytree(good / "export", tmp_path / "export")
    spoil(tmp_path / "export")
    assert run(["experts", "import", str(tmp_path / "export"), "-o", str(tmp_path / "run")]) == 4
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
