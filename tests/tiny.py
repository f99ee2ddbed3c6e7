"""Models of a few ten thousand parameters, a byte tokenizer with a chat template, four toy domains."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loramix import LoramixConfig

EXPERTS = ["red", "green", "blue"]
PAD, BOS, EOS = 0, 1, 2
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama(vocab: int = 64, hidden: int = 32, layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden + 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def gpt2(vocab: int = 64) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=BOS, eos_token_id=EOS
    )
    return GPT2LMHeadModel(config).requires_grad_(False).eval()


def moa(base: torch.nn.Module | None = None, **settings: object) -> PeftModel:
    """A mixture whose experts differ from the base and from each other."""
    base = base if base is not None else llama()
    torch.manual_seed(1)
    given = {"method": "moa", "experts": EXPERTS, "r": 4, "init_lora_weights": False, **settings}
    return get_peft_model(base, LoramixConfig(**given)).eval()


def ids(rows: int = 3, length: int = 10, vocab: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, vocab, (rows, length), generator=generator)


def labels(token_ids: torch.Tensor, prompt: int = 3) -> torch.Tensor:
    """Labels that supervise all but the first tokens."""
    return token_ids.masked_fill(torch.arange(token_ids.shape[1]) < prompt, -100)


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, after the special ones."""
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    made.chat_template = CHATML
    return made


def save_base(folder: Path) -> Path:
    """A tiny base with tokenizer in a folder, as a user's own would lie there."""
    made = tokenizer()
    llama(vocab=len(made), layers=4).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def toy_domains(folder: Path, train: int = 24, test: int = 8) -> dict[str, str]:
    """Three domains in alphabets of their own, as folders with train and test files."""
    pick = random.Random(0)
    kinds = {"adds": "0123456789+", "greets": "abcdefghij ", "shouts": "QRSTUVWXYZ!"}
    for domain, letters in kinds.items():
        (folder / domain).mkdir(parents=True)
        for split, count in (("train", train), ("test", test)):
            rows = []
            for number in range(count):
                word = "".join(pick.choices(letters, k=24))
                rows.append({"prompt": f"{word}{split[0]}{number}", "completion": letters[:3] + word[:2]})
            text = "\n".join(map(json.dumps, rows))
            (folder / domain / f"{split}.jsonl").write_text(text + "\n", encoding="utf-8")
    return {domain: str(folder / domain) for domain in kinds}


def in_halves(model: torch.nn.Module) -> None:
    """Turns what is frozen of a model into bfloat16, as a base loaded so has it; experts and routers stay fp32."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
