"""A loramix model as lm-eval sees one: likelihoods, rolling likelihoods, generation, chat template.

The only file that needs lm-eval to be imported; `benchmarks` imports it when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from loramix.data.prompts import render
from loramix.data.records import Message
from loramix.errors import ConfigError
from loramix.evaluation.asking import asking_of
from loramix.evaluation.continuations import likelihoods

_MOST_WRITTEN = 256  # tokens, where a task does not say; lm-eval's own number


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A base or a PeftModel of any method, for `lm_eval.simple_evaluate(model=...)`.

    A model that settles experts by prompt settles them by the context of each request alone, or follows the pinned
    expert. Text is encoded as lm-eval's own HFLM does, but for prompts that end where the assistant begins: those, and
    what follows them, are encoded apart, as in training. lm-eval would move the line break at their end to the
    continuation, and a router that reads the last prompt token would meet one it was never taught on.

    Args:
        model: ready to answer.
        tokenizer: of the base.
        expert: the expert to pin, or the domain for a model that must be told it.
        batch_size: requests answered together at most.
        share_prompts: read a question once for all its options, where that gives the same.
        max_length: tokens read at most; the base's own by default.
        about: what is written into lm-eval's results about the model.

    Raises:
        ConfigError: from `asking_of`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        expert: str | None = None,
        batch_size: int = 8,
        share_prompts: bool = True,
        max_length: int | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.asking = asking_of(model, expert)
        self.batch_size = batch_size
        self.share_prompts = share_prompts
        self.max_length = max_length or _room(model, tokenizer)
        self.about = dict(about or {})
        self._device = next(model.parameters()).device
        self._reply_begins = _reply_begins(tokenizer)

    # ---- what lm-eval asks about the model -----------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self._pad)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        begin = self.tokenizer.bos_token_id
        return int(begin) if begin is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval keeps requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Returns what is written into the results."""
        return self.about

    @property
    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    # ---- text ----------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the turns as the base's prompt; the last one is left open where no reply is to begin."""
        if getattr(self.tokenizer, "chat_template", None):
            text: str = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return text
        turns = [Message(turn["role"], turn["content"]) for turn in chat_history]
        if add_generation_prompt or turns[-1].role != "assistant":
            return render(self.tokenizer, turns, reply=True)
        return render(self.tokenizer, turns[:-1], reply=True) + turns[-1].content

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the ids of a text. Where a template wrote the special tokens none are added."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None and self._is_prompt(string):
            add_special_tokens = not getattr(self.tokenizer, "chat_template", None)
        elif add_special_tokens is None and begin and string.startswith(begin):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer(string, **special)["input_ids"]
        return ids

    def _is_prompt(self, text: str) -> bool:
        """Whether a text ends where the assistant begins."""
        return bool(self._reply_begins) and text.endswith(self._reply_begins)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not self._is_prompt(context):
            before, after = super()._encode_pair(context, continuation)
            if after or not continuation:
                return before, after
            # One token spans the border, so lm-eval's cut leaves nothing to score (its issues 1053 and 1297).
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)

    # ---- likelihoods ---------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Returns (log-probability, greedy) of each request; an empty continuation is certain."""
        asked = [i for i, (_, _, continuation) in enumerate(requests) if continuation]
        with tqdm(total=len(asked), disable=disable_tqdm, desc="likelihoods") as bar:
            found = likelihoods(
                self.model,
                [(requests[i][1] or [self.prefix_token_id], requests[i][2]) for i in asked],
                asking=self.asking,
                pad_token_id=self._pad,
                max_length=self.max_length,
                batch_size=self.batch_size,
                share_prompts=self.share_prompts,
                done=bar.update,
            )
        answers = [(0.0, True)] * len(requests)
        for i, one in zip(asked, found, strict=True):
            answers[i] = one.log_probability, one.greedy
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of whole texts, each token predicted once, in lm-eval's windows.

        A window begins with what its first token is predicted from (the beginning token, or the token before); a model
        that settles experts by prompt settles them by that, so pin an expert to measure one of them.
        """
        texts = [request.args[0] for request in requests]
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(texts)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    # ---- generation ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns what the model writes after each context, up to a stop text, which is left out."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}  # by how they are to be generated
        for i, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="answers") as bar:
            for places in alike.values():
                ids = {i: self.tok_encode(requests[i].args[0]) for i in places}
                places.sort(key=lambda i: -len(ids[i]))
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    how = requests[batch[0]].args[1]
                    for i, text in zip(batch, self._written([ids[i] for i in batch], how), strict=True):
                        answers[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return answers

    def _written(self, contexts: list[list[int]], how: Mapping[str, Any]) -> list[str]:
        """Returns the answers to some contexts that are to be generated in the same way."""
        settings = dict(normalize_gen_kwargs(dict(how), _MOST_WRITTEN))
        stops = handle_stop_sequences(settings.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        most = settings.pop("max_gen_toks")
        room = self.max_length - most
        if room < 1:
            raise ConfigError(
                f"the task asks for up to {most} new tokens, the model reads {self.max_length} in all. Expected room "
                "for a prompt; set generation_kwargs.max_gen_toks lower."
            )
        if not settings["do_sample"]:  # a base's own sampling settings would only be warned about
            settings.update(temperature=None, top_p=None, top_k=None)
        contexts = [(ids or [self.prefix_token_id])[-room:] for ids in contexts]
        batch = self.tokenizer.pad({"input_ids": contexts}, padding=True, padding_side="left", return_tensors="pt")
        width = batch["input_ids"].shape[1]
        with torch.no_grad():  # as in scoring
            written = self.model.generate(
                **{name: batch[name].to(self._device) for name in ("input_ids", "attention_mask")},
                **self.asking.of_generation(len(contexts), self._device),
                max_new_tokens=most,
                stopping_criteria=stop_sequences_criteria(self.tokenizer, stops, width, len(contexts)),
                pad_token_id=self._pad,
                **settings,
            )
        texts = self.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        return [postprocess_generated_text(text, stop=stops, think_end_token=None) for text in texts]


def _reply_begins(tokenizer: Any) -> str:
    """Returns what stands between the user's words and the assistant's in a prompt of this base."""
    asked = "question"
    text = render(tokenizer, [Message("user", asked)], reply=True)
    return text[text.rindex(asked) + len(asked) :]


def _room(model: nn.Module, tokenizer: Any) -> int:
    """Returns how many tokens a model reads at most; the trained positions of a prefix take some of them."""
    configs = getattr(model, "peft_config", {}).values()
    taken = max((getattr(config, "num_virtual_tokens", None) or 0 for config in configs), default=0)
    return int(resolve_max_length(model.config, tokenizer)) - taken
