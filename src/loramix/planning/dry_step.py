"""A stage's step on shapes alone, as its settings have it; of the whole base and of few of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loramix.planning.dry_run import DryRun, LongRow, dry_run
from loramix.planning.layers_again import checkpoint_layers
from loramix.planning.shapes_attention import ShapesAttention, attending
from loramix.training.settings import TrainingSettings
from loramix.training.while_learning import while_learning


@dataclass(frozen=True)
class DryStep:
    """What a stage does in a step; called with a model on the meta device, it returns the model's dry run.

    Attributes:
        settings: of the stage.
        row: that is learned at once.
        ahead: whether prompts are read before the stage.
        later: whether a step has several parts.
    """

    settings: TrainingSettings
    row: LongRow
    ahead: bool = False
    later: bool = False

    def __call__(self, model: Any) -> DryRun:
        """Returns the dry run.

        Raises:
            ConfigError: the base does not run on shapes alone, or its layers cannot run again in the backward.
        """
        checkpoint_layers(model, self.settings)
        # Which modules share their input is found by a forward, which needs no numbers with an attention of shapes.
        trial = ShapesAttention(share=0.0, rows=1, by_row=False)
        with attending(model.get_base_model(), trial), while_learning(model, self.settings, apart=False):
            return dry_run(model, self.row, ahead=self.ahead, later=self.later)


def long_row(settings: TrainingSettings, tokens: int, learned: float, mean: int) -> LongRow:
    """Returns a long row as a stage learns it.

    Args:
        settings: of the stage.
        tokens: of the long row.
        learned: the share of them that is learned.
        mean: length of the rows it consists of.
    """
    learned_tokens = max(1, round(tokens * learned))
    return LongRow(tokens, learned_tokens, mean, settings.head_chunk, settings.padding_free, settings.bf16)
