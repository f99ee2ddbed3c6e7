"""Which modules of a base carry experts, as rows and as a table."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

from torch import nn

from loramix.tuner.layer import LoramixLinear


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module: its name, I and O, the number and rank of its experts, the scope whose routing it follows,
    whether that scope's router sits here, and the number of parameters the adapter added."""

    module: str
    inputs: int
    outputs: int
    experts: int
    rank: int
    scope: str
    router: bool
    parameters: int


def adapted_modules(model: nn.Module) -> list[AdaptedModule]:
    """Returns one row for each module that the active adapter is on, in the order of the model."""
    rows = []
    for name, module in model.named_modules():
        if not isinstance(module, LoramixLinear) or not module.active_adapters:
            continue
        adapter = module.active_adapters[0]
        if adapter not in module.loramix_bank:
            continue
        bank, has_router = module.bank(adapter), adapter in module.loramix_router
        parts = [bank, module.router(adapter)] if has_router else [bank]
        rows.append(
            AdaptedModule(
                module=name,
                inputs=module.in_features,
                outputs=module.out_features,
                experts=int(bank.num_experts),
                rank=int(bank.rank),
                scope=module.loramix_places[adapter].scope or "-",
                router=has_router,
                parameters=sum(p.numel() for part in parts for p in part.parameters()),
            )
        )
    return rows


def as_table(rows: list[AdaptedModule]) -> str:
    """Returns the rows as text with a head and a sum, for printing."""
    if not rows:
        return "no adapted modules"
    heads = [field.name for field in fields(AdaptedModule)]
    cells = [
        [{True: "yes", False: ""}.get(v, str(v)) if isinstance(v, bool) else str(v) for v in astuple(r)] for r in rows
    ]
    widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(heads))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [heads, *cells]]
    return "\n".join(lines) + f"\n{len(rows)} modules, {sum(row.parameters for row in rows):,} parameters"
