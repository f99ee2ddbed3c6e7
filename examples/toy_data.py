"""Rows of three toy domains, in one list: messages for TRL, token ids and labels for the others."""

import random

DOMAINS = ["adds", "greets", "shouts"]
LETTERS = {"adds": "0123456789+", "greets": "abcdefghij ", "shouts": "QRSTUVWXYZ!"}


def rows(each: int = 24) -> list[dict]:
    pick = random.Random(0)  # noqa: S311
    made = []
    for number in range(each):
        for domain, letters in LETTERS.items():
            word = "".join(pick.choices(letters, k=20))
            made.append({"prompt": f"{word}{number}", "completion": letters[:4], "domain": domain})
    return made


def encoded(tokenizer, some: list[dict]) -> list[dict]:
    """Returns input_ids, labels (-100 on the prompt) and the domain of each row."""
    found = []
    for row in some:
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        labels = [-100] * len(ids) + answer
        found.append({"input_ids": ids + answer, "labels": labels, "domain": row["domain"]})
    return found
