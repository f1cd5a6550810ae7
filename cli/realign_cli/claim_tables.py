"""Tables of `realign lab claims` for what is measured on weights and on models that are moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from realign.report.tables import plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from realign.lab.claim_figures import Mean
    from realign.lab.claims_moved import MovedClaims
    from realign.lab.claims_weights import Association, WeightClaims


def directions(found: WeightClaims) -> Table:
    """LoX and AsFT: one row per update."""
    right = ("complied", "norm / norm(V)", "R_ft / R_align", "cos with V", "excess in U_k")
    table = plain_table(
        "Against V = aligned - base (LoX, AsFT): means over matrices", left=["update"], right=right
    )
    for name, each in found.directions.items():
        table.add_row(
            name,
            "-" if each.complied is None else f"{100 * each.complied:.1f}",
            f"{each.distance:.2f}",
            _mean(each.ratio),
            _mean(each.cosines, digits=3),
            _mean(each.excess, digits=1),
        )
    return table


def associations(found: WeightClaims) -> Table:
    """What goes with what, over the models of the family."""
    right = ("Spearman", "p", "models")
    table = plain_table("Over the models of this family", left=["pair"], right=right)
    for name, each in (
        ("R_ft / R_align and compliance", found.ratio_and_harm),
        ("R_ft / R_align and norm(D)", found.ratio_and_distance),
        ("cos(D, V) and compliance", found.cosine_and_harm),
    ):
        table.add_row(name, *_association(each))
    return table


def moved(found: MovedClaims) -> Table:
    """One row per perturbation."""
    right = ("norm / norm(V)", "cos with V", "complied", "other", "over-refusal", "general")
    table = plain_table("The aligned model, moved", left=["by"], right=right)
    for name, each in found.models.items():
        harmful, benign = each.rates["harmful"], each.rates["lookalikes"]
        rates = (
            harmful["complied"],
            harmful["other"],
            benign["refused"],
            each.rates["general"]["correct"],
        )
        shown = [f"{100 * rate['rate']:.1f}" for rate in rates]
        table.add_row(name, f"{each.norm:.2f}", f"{each.cosine:+.3f}", *shown)
    return table


def _mean(mean: Mean | None, *, digits: int = 2) -> str:
    if mean is None:
        return "-"
    return f"{mean.value:.{digits}f} ({mean.low:.{digits}f} to {mean.high:.{digits}f})"


def _association(found: Association | None) -> tuple[str, str, str]:
    if found is None:
        return "-", "-", "-"
    return f"{found.correlation:+.2f}", f"{found.p:.2g}", str(found.n)
