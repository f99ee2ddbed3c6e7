"""A plain text classifier that names the domain of a prompt: what learned routers are compared with.

The MoA paper sets its routers beside "a specific classifier" without saying which (Table 3; methods.md 1.7). Here:
TF-IDF of character n-grams within words, which need no tokenizer and so serve English and Chinese alike, or sentence
embeddings of an encoder in a local folder; both with scikit-learn's logistic regression.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from loramix.errors import ConfigError

TF_IDF = "tf-idf"
Classifier = Callable[[Sequence[str]], list[int]]
"""Prompts -> the position of each one's domain."""


def fit(kind: str, prompts: Sequence[str], labels: Sequence[int], *, seed: int = 0) -> Classifier:
    """Returns a classifier fitted to prompts.

    Args:
        kind: "tf-idf", or the folder of a transformers encoder.
        prompts, labels: what it learns.
        seed: of the regression's solver.

    Raises:
        ConfigError: the folder holds no encoder.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if kind == TF_IDF:
        vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True)
        features: Any = vectorizer.fit_transform(prompts)
        embed: Callable[[Sequence[str]], Any] = vectorizer.transform
    else:
        embed = sentence_encoder(kind)
        features = embed(prompts)
    regression = LogisticRegression(max_iter=2000, random_state=seed)
    regression.fit(features, list(labels))
    return lambda texts: [int(label) for label in regression.predict(embed(texts))]


def sentence_encoder(folder: str) -> Callable[[Sequence[str]], Any]:
    """Returns a function from texts to normalised mean-pooled embeddings, float32 (N, H), of an encoder in a folder.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoModel, AutoTokenizer

    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"measure.classifier = {folder!r}: expected {TF_IDF!r}, or a folder with a sentence encoder.")
    if not list(Path(folder).glob("*.safetensors")):
        raise ConfigError(
            f"measure.classifier = {folder!r}: holds no weights as safetensors. Save the encoder as such."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
    ).eval()

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> Any:
        parts = []
        for start in range(0, len(texts), 32):
            batch = tokenizer(
                list(texts[start : start + 32]), padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            hidden_BTH = model(**batch).last_hidden_state
            mask_BT1 = batch["attention_mask"].unsqueeze(2).to(hidden_BTH.dtype)
            pooled_BH = (hidden_BTH * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)
            parts.append(torch.nn.functional.normalize(pooled_BH, dim=1))
        return torch.cat(parts).numpy()

    return embed
