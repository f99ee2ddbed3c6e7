"""The built-in base and the demo data, for real; needs pip's index the first time. `make test-real`"""

from __future__ import annotations

import math

import pytest
import torch

from loramix import LoramixConfig

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def base():
    from loramix.models import load_base, load_tokenizer

    return load_base(), load_tokenizer()


def test_builtin_base_speaks_english(base):
    model, tokenizer = base
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    text = "The heart pumps blood through the body. It beats about one hundred thousand times a day."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert math.exp(model(input_ids=ids, labels=ids).loss) < 30
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert "Paris" in tokenizer.decode(written[0])


def test_demo_domains_are_whole_and_apart():
    from loramix.data.demo import DOMAINS, demo_data
    from loramix.data.domains import read_domains

    splits = read_domains({domain: str(folder) for domain, folder in demo_data().items()})
    assert tuple(splits) == DOMAINS
    for split in splits.values():
        assert len(split.train) >= 450
        assert len(split.test) >= 100
        assert not {r.prompt for r in split.train} & {r.prompt for r in split.test}


def test_a_mixture_on_the_real_base_is_the_base_at_the_start(base):
    from peft import get_peft_model

    model, tokenizer = base
    ids = tokenizer("What is a stock split?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        mixture = get_peft_model(model, LoramixConfig(experts=["a", "b", "c", "d"])).eval()
        assert torch.equal(mixture(input_ids=ids).logits, wanted)
    assert len(mixture.adapted_modules()) == 210
    mixture.unload()
