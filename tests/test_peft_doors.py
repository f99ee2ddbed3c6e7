"""Every way PEFT and transformers offer in and out: build, save, load, switch, delete; strict about files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from loramix import ConfigError, LoramixConfig, ModelError
from tests import tiny


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A base and an adapter on disk, and the logits they must give."""
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    model = tiny.moa(type(base).from_pretrained(tmp_path / "base").eval())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model(input_ids=tiny.ids()).logits


def _base(folder: Path) -> torch.nn.Module:
    return type(tiny.llama()).from_pretrained(folder / "base").eval()


def test_all_loading_doors_are_bit_equal(saved):
    folder, wanted = saved
    adapter = str(folder / "adapter")
    ids = tiny.ids()
    by_peft = PeftModel.from_pretrained(_base(folder), adapter)
    low_memory = PeftModel.from_pretrained(_base(folder), adapter, low_cpu_mem_usage=True)
    by_auto = AutoPeftModelForCausalLM.from_pretrained(adapter)
    by_transformers = _base(folder)
    by_transformers.load_adapter(adapter)
    from transformers import AutoModelForCausalLM

    straight = AutoModelForCausalLM.from_pretrained(adapter)
    for model in (by_peft, low_memory, by_auto, by_transformers, straight):
        assert torch.equal(model.eval()(input_ids=ids).logits, wanted)


def test_transformers_door_generates_as_pefts(saved):
    folder, _ = saved
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}
    wanted = PeftModel.from_pretrained(_base(folder), str(folder / "adapter")).generate(input_ids=tiny.ids(), **how)
    model = _base(folder)
    model.load_adapter(str(folder / "adapter"))
    assert torch.equal(model.generate(input_ids=tiny.ids(), **how), wanted)


def test_transformers_add_adapter_trains(saved):
    model = tiny.llama().train()
    model.add_adapter(LoramixConfig(experts=tiny.EXPERTS, init_lora_weights=False))
    out = model(input_ids=tiny.ids(), labels=tiny.labels(tiny.ids()), domain_ids=torch.tensor([0, 1, 2]))
    out.loss.backward()
    assert sum(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None) > 0


def test_same_adapter_gives_the_same_files(saved, tmp_path):
    folder, _ = saved
    PeftModel.from_pretrained(_base(folder), str(folder / "adapter")).save_pretrained(tmp_path / "again")
    first, again = (
        json.loads((f / "adapter_config.json").read_text()) for f in (folder / "adapter", tmp_path / "again")
    )
    assert {k: v for k, v in first.items() if k != "inference_mode"} == {
        k: v for k, v in again.items() if k != "inference_mode"
    }
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == (
        tmp_path / "again/adapter_model.safetensors"
    ).read_bytes()


DAMAGES = {
    "router missing": (lambda t: t.pop(next(k for k in t if "router" in k)), "is missing"),
    "expert missing": (lambda t: t.pop(next(k for k in t if "A_ERI" in k)), "is missing"),
    "unused tensor": (lambda t: t.update(stray=torch.zeros(1)), "stray is not used"),
    "wrong rank": (lambda t: t.update({next(k for k in t if "A_ERI" in k): torch.zeros(3, 9, 32)}), "has shape"),
    "NaN": (lambda t: t[next(k for k in t if "B_EOR" in k)].fill_(float("nan")), "NaN or infinity"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_peft(saved, damage):
    folder, _ = saved
    harm, message = DAMAGES[damage]
    file = folder / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    harm(tensors)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=message):
        PeftModel.from_pretrained(_base(folder), str(folder / "adapter"))


@pytest.mark.parametrize("damage", ["router missing", "expert missing", "unused tensor", "NaN"])
def test_damaged_files_are_refused_by_transformers(saved, damage):
    folder, _ = saved
    harm, message = DAMAGES[damage]
    file = folder / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    harm(tensors)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=message):
        _base(folder).load_adapter(str(folder / "adapter"))


def test_a_newer_file_is_refused(saved):
    folder, _ = saved
    file = folder / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": 99}))
    with pytest.raises(ConfigError, match="newer loramix"):
        PeftModel.from_pretrained(_base(folder), str(folder / "adapter"))


def test_two_adapters_switch_and_delete():
    ids = tiny.ids()
    model = tiny.moa()
    first = model(input_ids=ids).logits
    torch.manual_seed(5)
    model.add_adapter(
        "other", LoramixConfig(experts=["x", "y"], r=2, init_lora_weights=False, target_modules=["v_proj"])
    )
    assert torch.equal(model(input_ids=ids).logits, first)
    model.set_adapter("other")
    second = model(input_ids=ids).logits
    assert model.experts == ["x", "y"]
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(model(input_ids=ids).logits, first)
    with pytest.raises(ConfigError, match="one mixture at a time"):
        model.base_model.set_adapter(["default", "other"])
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(model(input_ids=ids).logits, first)
    assert torch.equal(model.unload()(ids).logits, tiny.llama()(ids).logits)


def test_merging_a_routed_mixture_is_refused():
    with pytest.raises(ConfigError, match="depends on its input"):
        tiny.moa().merge_and_unload()


def test_training_without_labels_is_refused():
    model = tiny.moa().train()
    with pytest.raises(ConfigError, match="domain_ids"):
        model(input_ids=tiny.ids())


def test_modules_to_save_come_back(tmp_path):
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    model = tiny.moa(type(base).from_pretrained(tmp_path / "base").eval(), modules_to_save=["lm_head"])
    torch.nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(_base(tmp_path), str(tmp_path / "adapter"))
    assert torch.equal(again(input_ids=tiny.ids()).logits, model(input_ids=tiny.ids()).logits)


ORDERS = {
    "loramix first": "import loramix, peft",
    "peft first": "import peft, loramix",
    "transformers in between": "import loramix; from transformers import Trainer; import peft",
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_loramix_is_enough(saved, order):
    folder, _ = saved
    code = (
        f"{ORDERS[order]}\nfrom peft import PeftConfig\n"
        f"print(type(PeftConfig.from_pretrained({str(folder / 'adapter')!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "LoramixConfig"


def test_importing_loramix_is_enough_for_transformers_alone(saved):
    folder, _ = saved
    code = (
        "import loramix\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder / 'base')!r})\n"
        f"model.load_adapter({str(folder / 'adapter')!r})\n"
        f"print(len(AutoModelForCausalLM.from_pretrained({str(folder / 'adapter')!r}).loramix_guide.mixtures))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_importing_loramix_alone_imports_neither_torch_nor_peft():
    code = "import sys, loramix; print([m for m in ('torch', 'peft', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_peft_lora_still_works_beside():
    from peft import LoraConfig

    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(model.eval()(input_ids=tiny.ids()).logits, tiny.llama()(tiny.ids()).logits)


def test_transformers_own_saving_comes_back(tmp_path):
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base").eval()
    model.add_adapter(LoramixConfig(experts=tiny.EXPERTS, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    again = _base(tmp_path)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(again(input_ids=tiny.ids()).logits, model.eval()(input_ids=tiny.ids()).logits)


def test_a_copy_is_independent():
    import copy

    model = tiny.moa()
    wanted = model(input_ids=tiny.ids()).logits
    twin = copy.deepcopy(model)
    for p in model.parameters():
        p.data.zero_()
    assert torch.equal(twin(input_ids=tiny.ids()).logits, wanted)
    assert twin.routings.keys() == {"layers.0", "layers.1", "layers.2"}
    assert twin.base_model.guide is not model.base_model.guide


def test_wrong_domain_ids_are_explained():
    model = tiny.moa()
    for wrong in (
        torch.tensor([0, 1]),
        torch.tensor([0.0, 1.0, 2.0]),
        torch.tensor([0, 1, 3]),
        torch.tensor([-1, 0, 0]),
    ):
        with pytest.raises(ConfigError, match="domain_ids"):
            model(input_ids=tiny.ids(), domain_ids=wrong)


def test_unknown_experts_and_contradictions_are_explained():
    model = tiny.moa()
    ids = tiny.ids()
    with pytest.raises(ConfigError, match='Did you mean "green"'):
        model.generate(input_ids=ids, expert="gren")
    with pytest.raises(ConfigError, match="2 experts were named for 3 prompts"):
        model.route(input_ids=ids, expert=["red", "blue"])
    with pytest.raises(ConfigError, match="contradict"):
        model.route(input_ids=ids, expert="red", decision="vote")
    with pytest.raises(ConfigError, match="no expert is named"):
        model.route(input_ids=ids, decision="pinned")
    with pytest.raises(ConfigError, match="expected one of last"):
        model.route(input_ids=ids, decision="best")
    with pytest.raises(ConfigError, match="without a tokenizer"):
        model.route(["text"])
    with pytest.raises(ConfigError, match="nothing to route"):
        get_peft_model(tiny.llama(), LoramixConfig(method="lora")).route(input_ids=ids)


def test_a_filled_cache_without_its_routing_is_refused():
    model = tiny.moa()
    ids = tiny.ids()
    cache = model.get_base_model()(input_ids=ids, use_cache=True).past_key_values
    fresh = tiny.moa()
    with pytest.raises(ConfigError, match="filled key-value cache"):
        fresh(input_ids=ids[:, :1], past_key_values=cache, attention_mask=torch.ones(3, 11))


def test_an_adapter_may_be_named_like_a_part_of_the_base(saved):
    folder, wanted = saved
    model = PeftModel.from_pretrained(_base(folder), str(folder / "adapter"))
    model.load_adapter(str(folder / "adapter"), adapter_name="layers")
    model.set_adapter("layers")
    assert torch.equal(model(input_ids=tiny.ids()).logits, wanted)


def test_labels_without_a_prompt_are_refused():
    ids = tiny.ids()
    model = tiny.moa().train()
    how = {"input_ids": ids, "labels": ids, "domain_ids": torch.tensor([0, 1, 2])}
    with pytest.raises(ConfigError, match="supervised from its first token"):
        model(**how)
    model(**how, prompt_mask=torch.arange(10)[None].expand(3, 10) < 4)


def test_generate_attaches_experts_to_embeddings_and_refuses_what_it_cannot_attach():
    model = tiny.moa()
    embedded = model.get_base_model().get_input_embeddings()(tiny.ids())
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}
    red = model.generate(input_ids=None, inputs_embeds=embedded, expert="red", **how)
    blue = model.generate(inputs_embeds=embedded, expert="blue", **how)
    assert not torch.equal(red, blue)
    with pytest.raises(ConfigError, match="no prompt"):
        model.generate(expert="red", **how)
    with pytest.raises(ConfigError, match="domain_ids"):
        model.generate(tiny.ids(), domain_ids=torch.tensor([0, 1, 7]), **how)
