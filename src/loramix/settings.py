"""The choices of an experiment as validated values. Names are PEFT's and TrainingArguments'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from loramix.training.settings import TrainingSettings

BUILTIN = "smollm2-135m-instruct"
BASE_FORM = ("dtype", "load_in_4bit", "load_in_8bit", "fsdp", "dp_replicate_size")


def _said_as(expected: str) -> WrapValidator:
    """Returns a validator that says once what is expected, instead of one message for each type it may have."""

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            raise PydanticCustomError("one_of", "expected {expected}", {"expected": expected}) from error

    return WrapValidator(check)


Source = Annotated[
    str | list[str] | dict[Literal["train", "validation", "test"], str | list[str]],
    _said_as("a file, folder or Hub name, a list of files, or train, validation, test with one or several each"),
]
Most = Annotated[int | dict[str, int] | None, _said_as("a whole number, or one for each domain")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(_Section):
    """Which examples are learned and measured."""

    domains: dict[str, Source | None] = Field(default_factory=dict)
    """Domain -> file, folder with train and test files, or Hub name; a list of files; or train and test, each with one
    or several. With `path`: the labels allowed (values empty)."""
    root: str | None = None
    """Folder that the paths of `domains`, `unseen` and `path` are relative to; by default where loramix is started."""
    path: str | None = None
    """One source whose rows carry their own label, instead of one source for each domain."""
    domain_column: str | None = None
    """Its column with the label; by default domain, task, channel or task_id."""
    test_fraction: float = Field(0.1, gt=0, lt=1)
    max_train_examples: Most = None
    """For every domain, or by domain: the ratio of data between tasks."""
    max_test_examples: Most = None
    overlap: Literal["report", "drop", "error", "ignore"] = "report"
    """What is done about training rows that occur in test data, word for word or nearly."""
    split_in: dict[str, int] = Field(default_factory=dict)
    """Domain -> how many domains its rows are dealt out to: near-duplicate domains, to study them."""
    label_noise: float = Field(0.0, ge=0, lt=1)
    """Share of every domain's training rows that get another domain's label, to study it."""
    missing_labels: float = Field(0.0, ge=0, lt=1)
    """Share of every domain's training rows whose label is hidden, to study it."""
    missing: Literal["drop", "classify"] = "drop"
    """What is done with rows whose label is hidden: left out, or labelled by a text classifier."""
    unseen: dict[str, Source] = Field(default_factory=dict)
    """Domains that are measured and never learned."""
    seed: int | None = None
    """Which rows are held out and chosen; by default the run's seed."""
    stored_prompts: int = Field(32, ge=0)
    """How many training prompts of each domain a routed run keeps, so that routers can learn a new expert beside the
    old ones (`loramix experts add`); 0 keeps none."""
    max_length: int = Field(512, ge=8)
    truncation: Literal["error", "drop", "left", "right"] = "right"
    loss_on: Literal["response", "all"] = "response"
    mixing: Literal["proportional", "uniform", "temperature", "weights"] = "proportional"
    mixing_temperature: float = Field(2.0, gt=0)
    mixing_weights: dict[str, float] | None = None
    kinds: dict[str, Literal[0, 1]] | None = None
    """Domain -> 0 or 1, for losses that tell two kinds of data apart (loramoe); by default the first half of the
    domains is 0, the second 1."""


class AdapterSettings(_Section):
    """The adapter, in PEFT's words; see LoramixConfig. What is left out takes the method's own default."""

    r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None
    use_rslora: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | None = None
    num_experts: int | None = None
    allocation: str | list[int] | None = None
    bank: dict[str, Any] | None = None
    router: dict[str, Any] | None = None
    scope: str | None = None
    decision: str | None = None
    backend: str = "auto"
    num_virtual_tokens: int | None = Field(default=None, ge=1)
    """For method prefix: trained positions in each layer."""


class SearchSettings(_Section):
    """A search without gradients (method lorahub); what is left out keeps the method's value."""

    budget: int | None = Field(default=None, ge=1)
    examples_per_domain: int | None = Field(default=None, ge=1)
    l1: float | None = Field(default=None, ge=0)
    bound: float | None = Field(default=None, gt=0)


class Experiment(_Section):
    """All choices of one run."""

    output_dir: str
    model_name_or_path: str = BUILTIN
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    load_in_4bit: bool = False
    """The base in 4 bits (bitsandbytes, nf4). Not trained through on a CPU."""
    load_in_8bit: bool = False
    """The base in 8 bits (bitsandbytes)."""
    fsdp: bool = False
    """Of several processes each holds a part of the base (FSDP2), instead of all of it. Experts and routers are whole
    in each."""
    dp_replicate_size: int = Field(1, ge=1)
    """With fsdp: groups of processes that each hold the whole base between them; the number of machines, so that
    weights travel inside a machine only."""
    method: str = "moa"
    seed: int = 0
    data: DataSettings
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    training: dict[str, Any] = Field(default_factory=dict)
    """Settings of every stage; see TrainingSettings."""
    expert_stage: dict[str, Any] = Field(default_factory=dict)
    """Settings of stage 1 that differ from `training`."""
    joint_stage: dict[str, Any] = Field(default_factory=dict)
    """Settings of stage 2, or of the only stage, that differ from `training`."""
    experts_together: bool = False
    """Stage 1 learns the rows of all domains in one batch, each through its own expert, which takes the steps it would
    take alone; one process."""
    search: SearchSettings = Field(default_factory=SearchSettings)
    controls: list[Literal["base", "single_long", "mixed"]] = Field(default_factory=list)
    """What is measured beside the method, to compare: the bare base, each single LoRA trained on for as long as stage
    2, one LoRA trained on all domains for as long as both stages together."""

    def base_form(self) -> dict[str, Any]:
        """Returns in what form the base is loaded: keywords of `models.load_base`."""
        return {name: getattr(self, name) for name in BASE_FORM}

    def settings(self, stage: Mapping[str, Any]) -> TrainingSettings:
        """Returns the training settings of a stage, its own over the common ones."""
        return replace(TrainingSettings(seed=self.seed), **{**self.training, **stage})
