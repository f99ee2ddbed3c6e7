"""Every method on tiny random bases of every architecture: what is adapted, where routers sit, and that it all runs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from loramix import LoramixConfig
from loramix.errors import ModelError
from loramix.losses import AUXILIARY, Seen
from loramix.methods import METHODS
from loramix.tuner.layer import LoramixLinear
from tests import tiny


@dataclass(frozen=True)
class Arch:
    """A base: its classes' names begin with `family`; its layers are `path`.0 and `path`.1, with these linears in each,
    in the order of the forward; `qv` are those that hold query and value."""

    family: str
    path: str = "model.layers"
    attention: str = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
    ffn: str = "mlp.gate_proj mlp.up_proj mlp.down_proj"
    qv: str = "self_attn.q_proj self_attn.v_proj"
    model: str = "ForCausalLM"
    config: str = "Config"
    settings: dict[str, Any] = field(default_factory=dict)

    def linears(self, word: str) -> list[str]:
        """The linears a word stands for, in the order of the forward."""
        inside = {"all": f"{self.attention} {self.ffn}", "attention": self.attention, "ffn": self.ffn, "qv": self.qv}
        return [f"{self.path}.{layer}.{name}" for layer in (0, 1) for name in inside[word[:-7]].split()]

    def scope(self, name: str, scope: str) -> str:
        """Whose decision a module follows, from the architecture alone."""
        layer, inside = name[: len(self.path) + 2], name[len(self.path) + 3 :]
        block = f"{layer}.{inside.partition('.')[0]}" if "." in inside else layer
        return {"module": name, "block": block, "layer": layer, "model": "model"}[scope]


LLAMA, BLOOM = Arch.attention, "self_attention.query_key_value"
PHI3 = ("self_attn.qkv_proj self_attn.o_proj", "mlp.gate_up_proj mlp.down_proj", "self_attn.qkv_proj")
NEOX = ("attention.query_key_value attention.dense", "mlp.dense_h_to_4h mlp.dense_4h_to_h", "attention.query_key_value")
FALCON = (f"{BLOOM} self_attention.dense", NEOX[1], BLOOM)
GPT2 = ("attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj", "attn.c_attn", "LMHeadModel")
OPT = (LLAMA.replace("o_proj", "out_proj"), "fc1 fc2")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE = {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
TOKENS = {"pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS}
HEADS, WINDOW = {"head_dim": 8}, {"sliding_window": 4}
FEW = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
ARCHS = {
    "llama": Arch("Llama"),
    "qwen2": Arch("Qwen2"),
    "qwen3": Arch("Qwen3", settings=HEADS),
    "mistral": Arch("Mistral", settings=WINDOW),
    "gemma2": Arch("Gemma2", settings=HEADS | WINDOW),
    "gemma3": Arch("Gemma3", config="TextConfig", settings=HEADS | WINDOW),
    "phi3": Arch("Phi3", "model.layers", *PHI3),
    "neox": Arch("GPTNeoX", "gpt_neox.layers", *NEOX),
    "gpt2": Arch("GPT2", "transformer.h", *GPT2),
    "phi": Arch("Phi", attention=LLAMA.replace("o_proj", "dense"), ffn="mlp.fc1 mlp.fc2"),
    "opt": Arch("OPT", "model.decoder.layers", *OPT, settings={"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": Arch("Falcon", "transformer.h", *FALCON),
    "bloom": Arch("Bloom", "transformer.h", *FALCON),
}
MIXTURES = {
    "mixtral": Arch("Mixtral", ffn="", settings={"num_local_experts": 4}),
    "qwen2-moe": Arch("Qwen2Moe", ffn="", settings=FEW | {"shared_expert_intermediate_size": 16}),
    "qwen3-moe": Arch("Qwen3Moe", ffn="", settings=FEW | HEADS),
}

# Method: (settings, targets, experts of attention and of feed-forward linears in layers 0 and 1, scope).
NAMED, QUARTERS = {"experts": tiny.EXPERTS}, {"allocation": "24"}
EXPECTED: dict[str, tuple[dict[str, Any], str, tuple[int, int], tuple[int, int], str]] = {
    "lora": ({}, "all-linear", (1, 1), (1, 1), "none"),
    "moa": (NAMED, "all-linear", (3, 3), (3, 3), "layer"),
    "mosld": (QUARTERS, "qv-linear", (2, 4), (2, 4), "module"),
    "mola": (QUARTERS, "all-linear", (2, 4), (2, 4), "module"),
    "mixlora": ({}, "all-linear", (1, 1), (8, 8), "block"),
    "llava-mole": ({}, "all-linear", (1, 1), (3, 3), "block"),
    "hydralora": ({}, "ffn-linear", (0, 0), (4, 4), "module"),
    "mole": (NAMED, "all-linear", (3, 3), (3, 3), "layer"),
}
PAIRS = [(arch, method) for arch in ARCHS for method in EXPECTED if (arch, method) != ("opt", "mixlora")]
every_pair = pytest.mark.parametrize(("arch", "method"), PAIRS)


@cache
def _pristine(arch: str) -> nn.Module:
    one = (ARCHS | MIXTURES)[arch]
    torch.manual_seed(0)
    config = getattr(transformers, one.family + one.config)(**SIZES, **MORE, **TOKENS, **one.settings)
    return getattr(transformers, one.family + one.model)(config).requires_grad_(False).eval()


def base_of(arch: str) -> nn.Module:
    return copy.deepcopy(_pristine(arch))


def adapted(arch: str | nn.Module, method: str, **settings: Any) -> PeftModel:
    """The method as it comes, on a tiny base; experts differ from the base unless told otherwise."""
    base = base_of(arch) if isinstance(arch, str) else arch
    given = {"init_lora_weights": False, **EXPECTED[method][0], **settings}
    torch.manual_seed(1)
    return get_peft_model(base, LoramixConfig(method=method, **given)).eval()


def assert_doors(arch: str, model: PeftModel, scope: str, routed: list[str], **told: Tensor) -> None:
    """Each scope has one router, at the module of it that runs first; and modules run in the order expected."""
    calls: list[str] = []
    for layer in model.modules():
        if isinstance(layer, LoramixLinear):
            layer.register_forward_pre_hook(lambda layer, _: calls.append(layer.name))
    with torch.no_grad():
        model(input_ids=tiny.ids(2, 6), **told)
    assert [name for name in dict.fromkeys(calls) if name in routed] == routed
    first = {ARCHS[arch].scope(name, scope): name for name in reversed(calls) if name in routed}
    assert {row.module for row in model.adapted_modules() if row.router} == set(first.values())


@every_pair
def test_modules_experts_and_doors(arch: str, method: str):
    _, word, attention, ffn, scope = EXPECTED[method]
    model, one = adapted(arch, method), ARCHS[arch]
    rows = {row.module: row for row in model.adapted_modules()}
    assert set(rows) == set(one.linears(word))
    for name, row in rows.items():
        counts = ffn if name in one.linears("ffn-linear") else attention
        assert row.experts == counts[int(name[len(one.path) + 1])], name
    on = {"none": [], "block": one.linears("ffn-linear")}.get(scope, one.linears(word))
    told = {"domain_ids": torch.tensor([0, 2])} if method == "moa" else {}
    assert_doors(arch, model, scope, on, **told)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("word", ["all-linear", "attention-linear", "ffn-linear", "qv-linear"])
def test_words_select_and_routers_sit_at_what_runs_first(arch: str, word: str):
    for scope in ("module", "block", "layer", "model"):
        model = adapted(arch, "mola", target_modules=word, allocation=None, num_experts=3, scope=scope)
        assert {row.module for row in model.adapted_modules()} == set(ARCHS[arch].linears(word))
        assert_doors(arch, model, scope, ARCHS[arch].linears(word))


@every_pair
def test_starts_as_the_base_and_every_part_learns(arch: str, method: str):
    ids = tiny.ids(2, 8)
    wanted = base_of(arch)(input_ids=ids).logits
    start = adapted(arch, method, init_lora_weights=True)
    with torch.no_grad():
        got = start(input_ids=ids).logits
    # A gated sum of equal copies (mixlora) rounds; everything else adds an exact zero.
    torch.testing.assert_close(got, wanted, rtol=1e-5 * (method == "mixlora"), atol=2e-6 * (method == "mixlora"))
    torch.testing.assert_close(start(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
    model = adapted(arch, method)
    assert (model(input_ids=ids).logits - wanted).abs().max() > 1e-2
    assert_all_learns(model, method)


def assert_all_learns(model: PeftModel, method: str) -> None:
    """The language-model loss teaches every trained part but the routers that learn from a loss of their own alone."""
    ids = tiny.ids(2, 8)
    told = {"domain_ids": torch.tensor([0, 2])} if method == "moa" else {}
    loss = model.train()(input_ids=ids, labels=tiny.labels(ids), **told).loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {"loramix_" in name for name in trained} == {True}
    none = {name for name, grad in _gradients(loss, trained).items() if grad is None}
    assert none == {name for name in trained if method in ("moa", "llava-mole") and "loramix_router" in name}
    seen = Seen(model.routings, model.expert_outputs, torch.tensor([0, 2]), torch.tensor([0, 1]))
    for name in METHODS[method].losses:
        loss = loss + AUXILIARY[name].value(seen)
    for name, grad in _gradients(loss, trained).items():
        assert grad is not None, name
        assert (bool(grad.isfinite().all()), bool(grad.any())) == (True, True), name


def _gradients(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor | None]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return dict(zip(parameters, found, strict=True))


@every_pair
@torch.no_grad()
def test_cached_generation_of_a_padded_batch_is_the_whole_row_alone(arch: str, method: str):
    model, ids = adapted(arch, method), tiny.ids(2, 7)
    ids[0, :3] = tiny.PAD
    how = {"attention_mask": (ids != tiny.PAD).long(), "do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
    made = model.generate(input_ids=ids, use_cache=True, return_dict_in_generate=True, output_logits=True, **how)
    for row, pad in enumerate((3, 0)):
        whole = made.sequences[row : row + 1, pad:-1]
        prompt_mask = torch.arange(whole.shape[1])[None] < 7 - pad
        alone = model(input_ids=whole, prompt_mask=prompt_mask, use_cache=False).logits[0, 6 - pad :]
        torch.testing.assert_close(torch.stack(made.logits, 1)[row], alone, rtol=1e-4, atol=1e-4)
    cache = model(input_ids=whole[:, :-1], prompt_mask=prompt_mask[:, :-1], use_cache=True).past_key_values
    step = model(input_ids=whole[:, -1:], past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(step, alone[-1], rtol=1e-4, atol=1e-4)


@every_pair
@torch.no_grad()
def test_saved_and_loaded_it_is_bit_equal(arch: str, method: str, tmp_path):
    model, ids = adapted(arch, method), tiny.ids(2, 8)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(arch), tmp_path).eval()
    assert loaded.adapted_modules() == model.adapted_modules()
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def _reference_ffn(mlp: nn.Module, layers: dict[str, LoramixLinear], w_EI: Tensor, x_BTI: Tensor, *rest: Tensor):
    """sum_k g_k E_{e_k}(x): the base's own block, run whole for each expert with W + s B_e A_e in place of W."""
    weights_BTK, ids_BTK = (x_BTI @ w_EI.T).softmax(dim=-1).topk(2, dim=-1)
    gates_BTE = torch.zeros(*ids_BTK.shape[:2], len(w_EI)).scatter(2, ids_BTK, weights_BTK)
    gates_BTE = gates_BTE / gates_BTE.sum(dim=-1, keepdim=True)
    total = sum(rest)
    for e in range(len(w_EI)):
        weights = {}
        for leaf, layer in layers.items():
            bank, frozen = layer.bank("default"), mlp.get_submodule(leaf)
            delta_OI = bank.scaling * bank.B_EOR[e] @ bank.A_ERI[e]
            weights[f"{leaf}.weight"] = frozen.weight + (delta_OI.T if isinstance(frozen, Conv1D) else delta_OI)
        expert = functional_call(mlp, weights, (x_BTI, *map(torch.zeros_like, rest)))
        total = total + gates_BTE[..., e : e + 1] * expert
    return total


@pytest.mark.parametrize("r", [16, 32])  # both sides of CONCAT_UP_TO
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if (arch, "mixlora") in PAIRS])
def test_mixlora_is_the_bases_own_ffn_with_other_weights(arch: str, r: int):
    model = adapted(arch, "mixlora", r=r, lora_alpha=32)
    block = f"{ARCHS[arch].path}.1.mlp"
    layers = {n.rpartition(".")[2]: model.get_base_model().get_submodule(n) for n in ARCHS[arch].linears("ffn-linear")}
    router = next(layer.router("default") for layer in layers.values() if layer.loramix_router)
    passed: list[Any] = []
    model.get_base_model().get_submodule(block).register_forward_hook(lambda _, x, y: passed.append((x, y.clone())))
    model(input_ids=tiny.ids(3, 9))
    (given, got) = passed.pop()
    wanted = _reference_ffn(_pristine(arch).get_submodule(block), layers, router.w_EI, *given)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    parts = [given[0], router.w_EI, *(p for layer in layers.values() for p in layer.bank("default").parameters())]
    cotangent = torch.randn(got.shape)
    ours, theirs = (torch.autograd.grad((y * cotangent).sum(), parts) for y in (got, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        model(input_ids=tiny.ids(3, 9))
    torch.testing.assert_close(passed.pop()[1], wanted, rtol=1e-4, atol=1e-4)


def _with_one_linear_more() -> nn.Module:
    base = base_of("llama")
    mlp = base.model.layers[1].mlp
    mlp.extra_proj = nn.Linear(32, 32).requires_grad_(False)
    mlp.register_forward_hook(lambda mlp, _, y: y + mlp.extra_proj(y))
    return base


@pytest.mark.parametrize(("arch", "block"), [("llama", "model.layers.1.mlp"), ("opt", "model.decoder.layers.0")])
def test_an_unknown_ffn_layout_is_no_expert_as_a_whole_but_its_linears_are(arch: str, block: str):
    make = _with_one_linear_more if arch == "llama" else (lambda: base_of(arch))  # OPT has no block of its own
    base = make()
    with pytest.raises(ModelError) as raised:
        adapted(base, "mixlora")
    assert all(word in str(raised.value) for word in (f"  {block} ", "attention-linear", "mola"))
    assert not any(isinstance(module, LoramixLinear) for module in base.modules())
    for word in ("attention-linear", "all-linear"):
        assert_all_learns(adapted(make(), "mola", target_modules=word), "mola")


@pytest.mark.parametrize("arch", MIXTURES)
@pytest.mark.parametrize("method", ["lora", "mola", "mixlora", "llava-mole", "hydralora"])
def test_a_base_with_experts_of_its_own_is_refused(arch: str, method: str):
    with pytest.raises(ModelError, match=r"mixture of experts.*attention-linear"):
        adapted(arch, method)


@pytest.mark.parametrize("arch", MIXTURES)
def test_the_attention_of_a_base_with_experts_can_be_adapted(arch: str):
    model = adapted(arch, "mola", target_modules="attention-linear")
    assert {row.module for row in model.adapted_modules()} == set(MIXTURES[arch].linears("attention-linear"))
    assert_all_learns(model, "mola")


@pytest.mark.parametrize(("arch", "leaf", "kind", "dims"), [("gpt2", "c_fc", Conv1D, 3), ("opt", "fc1", nn.Linear, 2)])
def test_the_shapes_that_the_cases_above_count_on(arch: str, leaf: str, kind: type, dims: int):
    model = adapted(arch, "mola")
    layer = next(module for name, module in model.named_modules() if name.endswith(f".{leaf}"))
    seen: list[tuple[int, int]] = []
    layer.register_forward_hook(lambda _, x, y: seen.append((x[0].dim(), y.dim())))
    model(input_ids=tiny.ids(2, 5))
    assert (type(layer.base_layer), seen) == (kind, [(dims, dims)])
