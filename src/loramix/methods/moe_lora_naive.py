"""MoE-LoRA (naive), the second token-routed baseline of MoA's paper (Feng et al. 2024, Table 7).

    y = W0 x + s * sum_k g_k B_{e_k} A_{e_k} x,    all experts start at random and train together

As MoE-LoRA without the first stage.
"""

from dataclasses import replace

from loramix.methods.moe_lora import MOE_LORA

MOE_LORA_NAIVE = replace(
    MOE_LORA,
    name="moe-lora-naive",
    title="MoE-LoRA (naive)",
    summary="MoE-LoRA with experts that start at random",
    stages=MOE_LORA.stages[1:],
)
