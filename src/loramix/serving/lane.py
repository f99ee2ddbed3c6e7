"""Rows that are continued together, a token a step, whoever asked for them and whichever expert they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from loramix.serving.ask import Ended, Piece
from loramix.serving.cache import SharedCache, attention_layers
from loramix.serving.job import Job
from loramix.serving.model import Lane, ServedModel, Settled
from loramix.serving.sampling import Chooser
from loramix.serving.text import TextStream
from loramix.tuner.held import Held


@dataclass
class Row:
    """One answer being written.

    Attributes:
        job: whose it is.
        answer: which of the job's answers.
        held: what it holds of the routing.
        chooser, text: choose its tokens and turn them into text.
        length: its tokens in the cache.
        last: the token chosen last, not yet in the cache.
        written: how many tokens were chosen.
        ended: whether it is done.
    """

    job: Job
    answer: int
    held: Held | None
    chooser: Chooser
    text: TextStream
    length: int
    last: int = -1
    written: int = 0
    ended: bool = field(default=False)


@dataclass(frozen=True, eq=False)
class Read:
    """Prompts that were read together.

    Attributes:
        filled: their key-value cache, left-padded.
        logits_BV: of what comes next.
        likeliest: the first of these tokens.
    """

    filled: DynamicCache
    logits_BV: Tensor
    likeliest: list[int]


class Rows:
    """The rows of one lane and their cache.

    Args:
        served: the model.
        lane: which.
        places: rows at most.
    """

    def __init__(self, served: ServedModel, lane: Lane, places: int) -> None:
        self._served, self._lane, self._places = served, lane, places
        self._layers = attention_layers(served.model)
        self.clear()

    def clear(self) -> None:
        """Forgets all rows, and lets go of their cache."""
        self.rows: list[Row] = []
        self._cache = SharedCache(self._places, self._layers, self._served.device)

    @torch.inference_mode()
    def read(self, jobs: Sequence[Job], settled: Sequence[Settled]) -> Read:
        """Reads the prompts of some jobs. Nothing is said of it yet, so a batch that fails can be tried in parts."""
        held = [one.held for one in settled]
        filled, logits_BV = self._served.prefill([job.ask.prompt_ids for job in jobs], self._lane, held)
        return Read(filled, logits_BV, logits_BV.argmax(dim=1).tolist())

    @torch.inference_mode()
    def begin(self, read: Read, place: int, job: Job, settled: Settled) -> None:
        """Puts the answers of a job among the rows, each with its first token chosen.

        Args:
            read: what was read together with its prompt.
            place: of its prompt there.
            job: what is asked.
            settled: its routing.
        """
        for answer in range(job.ask.answers):
            chooser = Chooser(job.ask.sampling, answer)
            text = TextStream(self._served.tokenizer, job.ask.sampling.stop)
            row = Row(job, answer, settled.held, chooser, text, len(job.ask.prompt_ids))
            self._take(row, read.logits_BV[place], read.likeliest[place])
            if not row.ended:
                self._cache.join(read.filled, place, row.length)
                self.rows.append(row)

    @torch.inference_mode()
    def step(self) -> None:
        """Writes one more token of every row. Rows that end leave; so do those whose job was given up."""
        self.drop()
        if not self.rows:
            return
        cache, rows = self._cache, self.rows
        cache.begin_step()
        logits_BV = self._served.step(
            [row.last for row in rows],
            [row.length for row in rows],
            cache.mask(),
            cache.cache,
            self._lane,
            [row.held for row in rows],
        )
        cache.end_step()
        for row, logits_V, likeliest in zip(rows, logits_BV, logits_BV.argmax(dim=1).tolist(), strict=True):
            row.length += 1
            self._take(row, logits_V, likeliest)
        self.drop()

    def drop(self) -> None:
        """Takes out rows that have ended or whose job was given up."""
        for place in reversed(range(len(self.rows))):
            if self.rows[place].ended or self.rows[place].job.over:
                last = self.rows.pop()
                if place < len(self.rows):
                    self.rows[place] = last
                self._cache.leave(place, max((row.length for row in self.rows), default=0))

    def _take(self, row: Row, logits_V: Tensor, likeliest: int) -> None:
        """Chooses a row's next token and says what became certain by it."""
        sampling, job = row.job.ask.sampling, row.job
        chosen = row.chooser.choose(logits_V, likeliest)
        row.last, row.written = chosen.token, row.written + 1
        if chosen.token in self._served.ends and not sampling.ignore_end:
            self._end(row, "stop")
            return
        text = row.text.push(chosen.token)
        job.say(Piece(row.answer, text, (chosen,)))
        if row.text.stopped:
            self._end(row, "stop")
        elif row.written >= sampling.max_tokens:
            self._end(row, "length")

    def _end(self, row: Row, reason: str) -> None:
        rest = row.text.finish()
        if rest:
            row.job.say(Piece(row.answer, rest))
        if row.text.stopped:
            reason = "stop"  # what was held back turned out to hold a stop text
        row.ended = True
        row.job.end(Ended(row.answer, reason, row.written))
