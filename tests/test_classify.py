"""The text classifiers routers are compared with: they name domains of unseen prompts, in English and Chinese."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from loramix import ConfigError
from loramix.data.classify import TF_IDF, fit, sentence_encoder

# Telling words and templates around them; held-out prompts pair the words in other ways than training prompts.
WORDS = {
    "finance": ["bond", "dividend", "broker", "mortgage", "tax", "shares"],
    "medicine": ["fever", "tablet", "doctor", "headache", "rash", "dose"],
    "法律": ["合同", "法院", "原告", "判决", "律师", "诉讼"],
    "医学": ["发烧", "药物", "医生", "头痛", "剂量", "皮疹"],
}
ASKED = ["What does {} mean for {}?", "How is {} tied to {}?", "请问{}和{}有什么关系", "为什么{}需要{}"]


def _prompts(held: bool) -> tuple[list[str], list[int]]:
    """Returns prompts and labels; the pairs of words of held-out prompts do not occur in training."""
    prompts, labels = [], []
    for label, words in enumerate(WORDS.values()):
        templates = ASKED[2:] if label > 1 else ASKED[:2]
        for i, first in enumerate(words):
            for j, second in enumerate(words):
                if i != j and ((i + j) % 3 == 0) == held:
                    prompts.append(templates[(i * 7 + j) % 2].format(first, second))
                    labels.append(label)
    return prompts, labels


def test_tf_idf_names_domains_of_unseen_prompts_in_english_and_chinese():
    classify = fit(TF_IDF, *_prompts(held=False))
    prompts, labels = _prompts(held=True)
    assert not set(prompts) & set(_prompts(held=False)[0])
    chosen = classify(prompts)
    assert chosen == labels
    assert all(type(one) is int for one in chosen)


def test_labels_are_returned_as_they_were_given():
    classify = fit(TF_IDF, ["red apple", "green pear", "fast car", "slow truck"], [7, 7, 3, 3])
    assert classify(["apple and pear", "a truck and a car"]) == [7, 3]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A tiny random BERT in a folder, with a token for every word of the English prompts."""
    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word.strip("?") for prompt in _prompts(False)[0] for word in prompt.split()} | {"?"})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def test_embeddings_are_the_normalised_mean_over_the_prompt(encoder):
    embed = sentence_encoder(encoder)
    one = embed(["What does bond mean for tax?"])
    model = BertModel.from_pretrained(encoder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder)
    ids = torch.tensor([tokenizer("What does bond mean for tax?")["input_ids"]])
    assert ids.shape[1] == 7
    with torch.no_grad():
        mean = model(ids).last_hidden_state[0].mean(dim=0).numpy()
    assert one[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


def test_embeddings_do_not_depend_on_their_neighbours(encoder):
    embed = sentence_encoder(encoder)
    texts = ["bond", *(f"How is {'fever ' * (i % 9)}tied to dose?" for i in range(70))]  # three batches, padded
    together = embed(texts)
    assert together.shape == (71, 32)
    for position in (0, 1, 40, 70):
        assert together[position] == pytest.approx(embed([texts[position]])[0], abs=1e-5)
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(71), abs=1e-5)


def test_a_sentence_encoder_serves_as_a_classifier(encoder):
    prompts, labels = _prompts(held=False)
    english = [(prompt, label) for prompt, label in zip(prompts, labels, strict=True) if label < 2]
    classify = fit(encoder, [prompt for prompt, _ in english], [label for _, label in english])
    asked = [(prompt, label) for prompt, label in zip(*_prompts(held=True), strict=True) if label < 2]
    chosen = classify([prompt for prompt, _ in asked])
    right = sum(one == label for one, (_, label) in zip(chosen, asked, strict=True)) / len(asked)
    assert right >= 0.9  # random features of words; chance is a half


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match=r"measure.classifier = .*folder with a sentence encoder"):
        fit(str(tmp_path), ["a", "b"], [0, 1])
