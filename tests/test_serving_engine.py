"""The transformers engine: rows of all experts in one batch say what each would alone; nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from loramix.errors import ConfigError, ModelError
from loramix.serving.ask import Ask, EngineError, Piece
from loramix.serving.cache import FIRST_COLUMNS, SharedCache
from loramix.serving.sampling import Chooser, Sampling
from loramix.serving.text import TextStream
from loramix.serving.transformers_engine import TransformersEngine
from loramix.tuner.held import held_together, rows_held
from tests import serving_case, tiny
from tests.serving_case import GREEDY, answers, ask_for, idle, served
from tests.test_architectures import ARCHS, base_of


def _prompts(count: int, vocab: int = 64, longest: int = 30) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [tuple(torch.randint(3, vocab, (length,), generator=generator).tolist()) for length in lengths]


def _alone(model: Any, prompt: tuple[int, ...], tokens: int, **told: Any) -> list[int]:
    ids = torch.tensor([prompt])
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None, **told
    )
    return written[0, len(prompt) :].tolist()


MODELS: dict[str, dict[str, Any]] = {
    "last": {},
    "vote": {"decision": "vote"},
    "layer:1": {"decision": "layer:1"},
    "per_layer": {"decision": "per_layer"},
    "running model": {"router": {"reads": "experts"}},
    "running model, per_layer": {"router": {"reads": "experts"}, "decision": "per_layer"},
}


@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_all_experts_in_one_batch_say_what_each_says_alone(kind: str):
    """24 requests for 6 places come one after the other: routed, pinned and for the base, of all lengths."""
    model = served(**MODELS[kind])
    pins = [None, "red", "base", "blue"] * 6
    prompts = _prompts(24)
    asks = [
        Ask(prompt, replace(GREEDY, max_tokens=4 + number), pin)
        for number, (prompt, pin) in enumerate(zip(prompts, pins, strict=True))
    ]
    found = answers(model, asks, apart=0.005)
    for ask, got in zip(asks, found, strict=True):
        told = {"decision": model.decision} if ask.expert is None else {"expert": ask.expert}
        assert got.tokens[0] == _alone(model.model, ask.prompt_ids, ask.sampling.max_tokens, **told)
        assert got.reasons == ["length"]
        route = model.model.route(input_ids=torch.tensor([ask.prompt_ids]), **told)[0]
        assert got.routed is not None
        assert (got.routed.expert, got.routed.decision) == (route.expert, route.decision)
        assert got.routed.probabilities == pytest.approx(route.probabilities, abs=1e-6)
    assert len({got.routed.expert for got in found if got.routed}) >= 4, "an expert that never answers proves nothing"
    assert len({tuple(got.tokens[0][:4]) for got in found}) > 12


METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "mosld": {"allocation": "24", "target_modules": ["q_proj", "v_proj"]},
    "mola": {"allocation": "24"},
    "mixlora": {"num_experts": 3},
    "molora": {"num_experts": 3},
    "sira": {"num_experts": 3},
    "moelora-task": {"num_experts": 2, "domains": tiny.EXPERTS},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_settle_no_expert_are_served_too(method: str):
    model = served(method, **METHODS[method])
    told = method == "moelora-task"
    pins = ["green", "red", "base"] if told else [None, None, "base"]
    serving_case.lively(model.model, std=0.1)  # more, and last bits of a cached step grow into other tokens
    asks = [Ask(prompt, GREEDY, pins[number % 3]) for number, prompt in enumerate(_prompts(9))]
    for ask, got in zip(asks, answers(model, asks, places=4), strict=True):
        if ask.expert == "base":
            with model.model.disable_adapter():
                want = _alone(model.model, ask.prompt_ids, 16)
        else:
            ids = {"domain_ids": torch.tensor([tiny.EXPERTS.index(ask.expert)])} if ask.expert else {}
            want = _alone(model.model, ask.prompt_ids, 16, **ids)
        assert got.tokens[0] == want
        assert got.routed is not None
        assert got.routed.decision == ("pinned" if ask.expert == "base" else "told" if told else "token")


def test_a_method_that_is_told_the_domain_says_so_when_it_is_not():
    model = served("moelora-task", **METHODS["moelora-task"])
    with pytest.raises(EngineError, match="told the domain: ask for one of red, green, blue") as told:
        answers(model, [Ask((5, 6, 7), GREEDY)])
    assert told.value.status == 400


@pytest.mark.parametrize("arch", ["mistral", "gemma2", "gemma3", "phi3", "neox", "gpt2", "opt", "falcon", "bloom"])
def test_every_architecture_continues_rows_of_different_length(arch: str):
    """Sliding windows, learned positions, ALiBi: what they see of left-padded rows is what `generate` sees."""
    assert arch in ARCHS
    model = served(model=serving_case.mixture(base=base_of(arch)))
    asks = [Ask(prompt, replace(GREEDY, max_tokens=9 + n), None) for n, prompt in enumerate(_prompts(7, longest=20))]
    for ask, got in zip(asks, answers(model, asks, places=3), strict=True):
        assert got.tokens[0] == _alone(model.model, ask.prompt_ids, ask.sampling.max_tokens)


def test_more_columns_than_there_is_room_for_at_first():
    """Rows outgrow the cache, a long prompt joins short rows, and rows that stay see nothing of it."""
    model = served(model=serving_case.mixture(base=tiny.llama(vocab=259)))
    long = tuple(_prompts(1, longest=3)[0] * 120)[:230]
    asks = [
        Ask((5, 6, 7), replace(GREEDY, max_tokens=FIRST_COLUMNS), "red"),
        Ask((8, 9), replace(GREEDY, max_tokens=40), "blue"),
        Ask(long, replace(GREEDY, max_tokens=50), "green"),
        Ask((4, 4), replace(GREEDY, max_tokens=100), "red"),
    ]
    for ask, got in zip(asks, answers(model, asks, places=3, apart=0.05), strict=True):
        assert got.tokens[0] == _alone(model.model, ask.prompt_ids, ask.sampling.max_tokens, expert=ask.expert)


def test_what_rows_hold_is_put_together_again():
    model = served(decision="per_layer").model
    guide = model.base_model.guide
    ids = torch.tensor(_prompts(1)[:1] * 4)
    from loramix.tuner.settling import Wish, settle_prompts

    _, held = settle_prompts(guide, ids, {}, Wish(decision="per_layer"))
    rows = rows_held(held)
    assert len(rows) == 4
    again = held_together([rows[1], 2, -1], list(held), torch.device("cpu"))
    for scope, routing in again.items():
        assert routing.ids[0, 0] == held[scope].ids[1, 0]
        assert routing.ids[1:, 0].tolist() == [2, 0]
        assert routing.weights[:, 0].tolist() == [1, 1, 0]
    assert held_together([0, -1], [], torch.device("cpu")).tolist() == [0, -1]


def test_several_answers_to_one_prompt_differ_and_a_seed_repeats_them():
    drawn = Sampling(12, temperature=1.0, seed=7, ignore_end=True)
    ask = Ask((5, 6, 7, 8), drawn, "red", answers=3)
    first, again, other = answers(served(), [ask, ask, replace(ask, sampling=replace(drawn, seed=8))])
    assert len({tuple(tokens) for tokens in first.tokens}) == 3
    assert first.tokens == again.tokens
    assert first.tokens != other.tokens
    assert first.reasons == ["length"] * 3


def test_a_chooser_follows_its_request():
    logits = torch.tensor([1.0, 3.0, 2.0, 0.0])
    assert Chooser(Sampling(4, temperature=0)).choose(logits, 1).token == 1
    told = Chooser(Sampling(4, temperature=0, logprobs=2)).choose(logits, 1)
    assert told.logprob == pytest.approx(float(logits.log_softmax(0)[1]))
    assert [token for token, _ in told.top] == [1, 2]
    assert Chooser(Sampling(4, temperature=0, logit_bias={3: 9.0})).choose(logits, 1).token == 3
    penal = Chooser(Sampling(4, temperature=0, presence_penalty=0.6, frequency_penalty=0.5))
    assert [penal.choose(logits, 1).token for _ in range(5)] == [1, 2, 1, 1, 0]
    narrow = Chooser(Sampling(4, temperature=1, top_p=0.5, seed=0))
    assert {narrow.choose(logits, 1).token for _ in range(50)} == {1}
    drawn = Chooser(Sampling(4, temperature=2.0, seed=0))
    counts = torch.bincount(torch.tensor([drawn.choose(logits, 1).token for _ in range(4000)]), minlength=4) / 4000
    assert torch.allclose(counts, (logits / 2).softmax(0), atol=0.03)


@pytest.mark.parametrize("stop", [(), ("ab",), ("\n", "zz"), ("é",)])
def test_text_comes_as_it_is_decoded_and_ends_before_a_stop_text(stop: tuple[str, ...]):
    """Random bytes, most of them no text, in random pieces: what is handed out is what the whole decodes to."""
    tokenizer = tiny.tokenizer()
    generator = torch.Generator().manual_seed(1)
    texts = ["ab", "x\ny", "é数🎉 zz", "aab", "a" * 9, "🎉ab🎉"]
    samples = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    samples += [torch.randint(0, 259, (12,), generator=generator).tolist() for _ in range(200)]
    for ids in samples:
        stream = TextStream(tokenizer, stop)
        pieces = []
        for token in ids:
            pieces.append(stream.push(token))
            if stream.stopped:
                break
        text = "".join(pieces) + stream.finish()
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        cut = min((whole.find(one) for one in stop if one in whole), default=len(whole))
        assert text == whole[:cut]
        assert stream.stopped == (cut < len(whole))


def test_a_stop_text_ends_an_answer():
    model = served()
    ask = Ask((5, 6, 7), replace(GREEDY, max_tokens=40), "red")
    whole = answers(model, [ask])[0].texts[0]
    stop = whole[5:7]
    got = answers(model, [replace(ask, sampling=replace(ask.sampling, stop=(stop,)))])[0]
    assert got.texts[0] == whole[: whole.find(stop)]
    assert got.reasons == ["stop"]
    assert len(got.tokens[0]) < 40


def test_an_answer_ends_at_the_end_token():
    model = served()
    end = _alone(model.model, (5, 6, 7), 3, expert="red")[2]
    model.ends = {end}
    got = answers(model, [Ask((5, 6, 7), replace(GREEDY, ignore_end=False), "red")])[0]
    assert got.reasons == ["stop"]
    assert len(got.tokens[0]) == 2


def _engine_run(work: Any, model: Any = None, **settings: Any) -> Any:
    async def run() -> Any:
        engine = TransformersEngine(served() if model is None else model, **settings)
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.stop()

    return asyncio.run(run())


LONG = Ask((5, 6, 7), replace(GREEDY, max_tokens=400), "red")


def test_a_full_queue_refuses_with_the_time_to_wait_and_those_admitted_are_answered():
    async def work(engine: TransformersEngine) -> None:
        ask = Ask((5, 6, 7), replace(GREEDY, max_tokens=60))
        tasks = [asyncio.create_task(ask_for(engine, ask)) for _ in range(12)]
        done = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [one for one in done if isinstance(one, EngineError)]
        assert len(refused) >= 12 - 2 - 4 - 2
        assert all(one.status == 429 and one.retry_after and one.retry_after >= 1 for one in refused)
        rest = [one for one in done if not isinstance(one, BaseException)]
        assert len(rest) + len(refused) == 12
        assert len({tuple(one.tokens[0]) for one in rest}) == 1

    _engine_run(work, places=2, queue=4)


def test_who_leaves_frees_the_place_at_once():
    async def work(engine: TransformersEngine) -> None:
        for _ in range(20):
            events = engine.answer(LONG)
            async for _ in events:
                break
            await events.aclose()
        task = asyncio.create_task(ask_for(engine, LONG))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await asyncio.to_thread(idle, engine)
        assert (await ask_for(engine, replace(LONG, sampling=GREEDY))).reasons == ["length"]

    _engine_run(work, places=2, queue=4)


def _slowly(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token takes the model 50 ms at least."""
    step = model.step

    def slow(*args: Any) -> Any:
        time.sleep(0.05)
        return step(*args)

    monkeypatch.setattr(model, "step", slow)


def test_an_answer_that_takes_too_long_is_given_up(monkeypatch):
    model = served()
    _slowly(model, monkeypatch)

    async def work(engine: TransformersEngine) -> None:
        waits = replace(LONG, seconds=0.0)
        with pytest.raises(EngineError) as told:
            await ask_for(engine, waits)
        assert told.value.status in (503, 504)
        slow = replace(LONG, seconds=2.0)  # its 400 tokens would take 20
        with pytest.raises(EngineError, match="took too long") as told:
            await ask_for(engine, slow)
        assert told.value.status == 504
        assert engine.queue[1] == 0

    _engine_run(work, model, places=2, queue=4)


class Gate:
    """The model reads no prompts before it is opened, and fails on every batch with a prompt that begins with 63.

    Attributes:
        sizes: how many prompts were read together each time.
    """

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self._reached, self._opened = threading.Event(), threading.Event()
        prefill = model.prefill

        def gated(prompts: Any, *args: Any) -> Any:
            self._reached.set()
            assert self._opened.wait(60)
            self.sizes.append(len(prompts))
            if any(prompt[0] == 63 for prompt in prompts):
                raise RuntimeError("a secret of ours")
            return prefill(prompts, *args)

        monkeypatch.setattr(model, "prefill", gated)

    async def opened_for(self, engine: TransformersEngine, first: Ask, asks: Sequence[Ask]) -> list[asyncio.Task[Any]]:
        """Asks one thing, and when its prompt is about to be read all the others, so that they come together."""
        tasks = [asyncio.create_task(ask_for(engine, first))]
        assert await asyncio.to_thread(self._reached.wait, 60)
        tasks += [asyncio.create_task(ask_for(engine, ask)) for ask in asks]
        while engine.queue[1] < len(asks):
            await asyncio.sleep(0.01)
        self._opened.set()
        return tasks


def test_a_request_the_model_fails_on_takes_no_other_with_it(monkeypatch):
    """Neither those that are being written, nor those whose prompts are read together with its own."""
    model = served()
    gate = Gate(model, monkeypatch)

    async def work(engine: TransformersEngine) -> None:
        asks = [
            Ask((63, 5), GREEDY, "red"),
            Ask((5, 6, 7), GREEDY, "red"),
            Ask((63, 5), GREEDY, "base"),
            Ask((8, 9), GREEDY),
        ]
        tasks = await gate.opened_for(engine, replace(LONG, sampling=replace(GREEDY, max_tokens=60)), asks)
        first, bad, good, other, alone = await asyncio.gather(*tasks, return_exceptions=True)
        for told in (bad, other):
            assert isinstance(told, EngineError)
            assert told.status == 500
            assert "secret" not in str(told)
        for got, tokens in ((first, 60), (good, GREEDY.max_tokens), (alone, GREEDY.max_tokens)):
            assert not isinstance(got, BaseException), got
            assert len(got.tokens[0]) == tokens
        assert await asyncio.to_thread(idle, engine)

    _engine_run(work, model, places=6, queue=6)
    assert max(gate.sizes) > 1, "prompts that fail were read together with others"


def test_a_request_that_fails_while_it_begins_takes_no_other_with_it(monkeypatch):
    """Its prompt was read with others, and its first token cannot be chosen."""
    model = served()
    gate = Gate(model, monkeypatch)
    choose = Chooser.choose

    def failing(self: Chooser, logits: Any, likeliest: int) -> Any:
        if self._sampling.max_tokens == 7:
            raise RuntimeError("no such choice")
        return choose(self, logits, likeliest)

    monkeypatch.setattr(Chooser, "choose", failing)

    async def work(engine: TransformersEngine) -> None:
        asks = [Ask((5, 6), replace(GREEDY, max_tokens=most), "red") for most in (5, 7, 9)]
        tasks = await gate.opened_for(engine, replace(LONG, sampling=replace(GREEDY, max_tokens=60)), asks)
        first, short, failed, long = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(failed, EngineError)
        assert [len(one.tokens[0]) for one in (first, short, long)] == [60, 5, 9]
        assert await asyncio.to_thread(idle, engine)

    _engine_run(work, model, places=6, queue=6)
    assert gate.sizes == [1, 3]


def test_no_memory_for_a_longer_cache_fails_all_rows_and_the_next_begin_anew(monkeypatch):
    """Some layers may have been moved: going on with them would answer from wrong tokens."""
    model = served()
    _slowly(model, monkeypatch)
    lay_out = SharedCache._lay_out

    class NoMemory:
        @property
        def is_initialized(self) -> bool:
            raise MemoryError

    def failing(self: SharedCache, before: int, after: int) -> None:
        self._layers.append(NoMemory())  # all others are moved before
        try:
            lay_out(self, before, after)
        finally:
            self._layers.pop()

    async def work(engine: TransformersEngine) -> None:
        wanted = await ask_for(engine, Ask((5, 6, 7), GREEDY, "red"))
        with monkeypatch.context() as patched:
            patched.setattr(SharedCache, "_lay_out", failing)
            running = engine.answer(replace(LONG, sampling=replace(GREEDY, max_tokens=100)))  # no move for itself
            async for event in running:
                if isinstance(event, Piece):
                    break
            with pytest.raises(EngineError, match="not enough memory"):
                await ask_for(engine, Ask((5,) * (FIRST_COLUMNS + 1), GREEDY, "red"))
            with pytest.raises(EngineError, match="failed on this request"):
                async for _ in running:
                    pass
        assert await asyncio.to_thread(idle, engine)
        assert (await ask_for(engine, Ask((5, 6, 7), GREEDY, "red"))).tokens == wanted.tokens

    _engine_run(work, model, places=4, queue=4)


def test_memory_that_is_not_there_is_said_and_the_next_request_is_answered(monkeypatch):
    model = served()
    step, failures = model.step, [MemoryError()]

    def failing(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return step(*args)

    monkeypatch.setattr(model, "step", failing)

    async def work(engine: TransformersEngine) -> None:
        with pytest.raises(EngineError, match="not enough memory") as told:
            await ask_for(engine, LONG)
        assert told.value.status == 503
        assert (await ask_for(engine, Ask((5, 6), GREEDY, "red"))).reasons == ["length"]

    _engine_run(work, model, places=4, queue=4)


def test_an_engine_that_stops_tells_those_who_wait():
    async def work(engine: TransformersEngine) -> None:
        tasks = [asyncio.create_task(ask_for(engine, LONG)) for _ in range(4)]
        await asyncio.sleep(0.05)
        await engine.stop()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [one.status for one in done if isinstance(one, EngineError)] == [503] * 4
        with pytest.raises(EngineError, match="not running"):
            await ask_for(engine, LONG)

    _engine_run(work, places=2, queue=4)


def test_an_expert_that_is_not_allowed_never_answers():
    """1,000 prompts under a key that lacks an expert: its probability is exactly 0, nor is the base taken."""
    model = served()
    allowed = frozenset({"red", "blue"})

    async def work(engine: TransformersEngine) -> list[Any]:
        asks = [Ask(prompt, GREEDY, allowed=allowed) for prompt in _prompts(1000, vocab=259, longest=12)]
        return [await engine.route(ask) for ask in asks]

    free = [one.expert for one in _engine_run(_free, model, places=4, queue=4)]
    assert "green" in free, "an expert that is never chosen would prove nothing"
    routed = _engine_run(work, model, places=4, queue=4)
    assert {one.expert for one in routed} == {"red", "blue"}
    assert all(one.probabilities["green"] == 0.0 for one in routed)


async def _free(engine: TransformersEngine) -> list[Any]:
    return [await engine.route(Ask(prompt, GREEDY)) for prompt in _prompts(100, vocab=259, longest=12)]


@pytest.mark.parametrize("kind", ["vote", "per_layer", "running model, per_layer"])
def test_an_expert_that_is_not_allowed_is_in_no_layer(kind: str):
    model = served(**MODELS[kind])
    asks = [Ask(prompt, GREEDY, allowed=frozenset({"red"})) for prompt in _prompts(8)]
    for settled in model.settle(asks):
        held = settled.held if isinstance(settled.held, dict) else {"all": settled.held}
        assert set(held.values()) == {0}
        assert settled.routed.probabilities == {"red": 1.0, "green": 0.0, "blue": 0.0}
    only_base = model.settle([Ask((5, 6), GREEDY, allowed=frozenset({"base"}))])[0]
    assert (only_base.routed.expert, only_base.held) == ("base", -1)


def test_a_long_queue_is_worked_off_in_order():
    async def work(engine: TransformersEngine) -> None:
        ends: list[int] = []

        async def one(number: int) -> None:
            await ask_for(engine, Ask((5, 6, number + 3), replace(GREEDY, max_tokens=3)))
            ends.append(number)

        await asyncio.gather(*map(one, range(30)))
        assert ends == sorted(ends, key=lambda number: number // 2)

    _engine_run(work, places=2, queue=40)


def test_what_cannot_be_served_is_refused_with_its_reason():
    from loramix.methods import method_named
    from loramix.serving.model import ServedModel

    with pytest.raises(ConfigError, match="key-value prefix"):
        ServedModel(object(), None, method_named("prefix"))
    with pytest.raises(ConfigError, match="settles no expert"):
        served("mola", allocation="24", decision=None, model=None) and ServedModel(
            serving_case.mixture("mola", allocation="24"), tiny.tokenizer(), method_named("mola"), decision="last"
        )


def test_a_base_with_states_of_another_kind_is_refused(monkeypatch):
    from transformers.cache_utils import LinearAttentionLayer

    from loramix.serving import cache

    class Fake:
        layers = (LinearAttentionLayer(),)

    monkeypatch.setattr(cache, "DynamicCache", lambda config: Fake())
    with pytest.raises(ModelError, match="LinearAttentionLayer"):
        cache.attention_layers(tiny.llama())
