"""The form of a bank: what its experts share, what is dropped, how they are added up."""

from __future__ import annotations

from dataclasses import dataclass

SHARES = (None, "down", "up")
COMBINES = ("outputs", "matrices")


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """Choices of a bank."""

    share: str | None = None
    """None: each expert has its own A and B. "down": one A for all, a B each (MoSLD, HydraLoRA). "up": one B for all,
    an A each."""
    weight_dropout: float = 0.0
    """Probability of dropping an entry of the shared matrix in training: one mask for each forward, the same for all
    experts and tokens, kept entries scaled by 1 / (1 - p); none at evaluation."""
    combine: str = "outputs"
    """"outputs": sum_e g_e B_e A_e x. "matrices": (sum_e g_e B_e)(sum_e g_e A_e) x, as LoRAHub adds them."""
    split_rank: bool = False
    """Whether each of the E experts has rank r / E, so that all together have r (MOELoRA)."""

    def problems(self) -> list[str]:
        """Returns what is wrong with the values."""
        found = []
        if self.share not in SHARES:
            found.append(f"bank.share = {self.share!r}: expected null, 'down' or 'up'.")
        if self.combine not in COMBINES:
            found.append(f"bank.combine = {self.combine!r}: expected one of {', '.join(COMBINES)}.")
        if not 0 <= self.weight_dropout < 1:
            found.append(f"bank.weight_dropout = {self.weight_dropout}: expected a probability from 0 to below 1.")
        if self.weight_dropout > 0 and self.share is None:
            found.append("bank.weight_dropout is on the shared matrix, but bank.share is null. Set share to 'down'.")
        return found
