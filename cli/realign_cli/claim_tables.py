"""Tables of `realign lab claims` for what is measured on weights and on models that are moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from realign.report.tables import figures_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from realign.lab.claim_figures import Mean
    from realign.lab.claims_moved import MovedClaims
    from realign.lab.claims_weights import Association, WeightClaims


def directions(found: WeightClaims, *, width: int = 80) -> RenderableType:
    """LoX and AsFT: one row per update."""
    titles = (
        "update", "complied", "norm / norm(V)", "R_ft / R_align", "cos with V", "excess in U_k"
    )  # fmt: skip
    rows = [
        (
            name,
            "-" if each.complied is None else f"{100 * each.complied:.1f}",
            f"{each.distance:.2f}",
            _mean(each.ratio),
            _mean(each.cosines, digits=3),
            _mean(each.excess, digits=1),
        )
        for name, each in found.directions.items()
    ]
    title = "Against V = aligned - base (LoX, AsFT): means over matrices"
    return figures_table(title, titles, rows, width=width)


def associations(found: WeightClaims, *, width: int = 80) -> RenderableType:
    """What goes with what, over the models of the family."""
    titles = ("pair", "Spearman", "p", "models")
    pairs = (
        ("R_ft / R_align and compliance", found.ratio_and_harm),
        ("R_ft / R_align and norm(D)", found.ratio_and_distance),
        ("cos(D, V) and compliance", found.cosine_and_harm),
    )
    rows = [(name, *_association(each)) for name, each in pairs]
    return figures_table("Over the models of this family", titles, rows, width=width)


def moved(found: MovedClaims, *, width: int = 80) -> RenderableType:
    """One row per perturbation."""
    titles = (
        "by", "norm / norm(V)", "cos with V", "complied", "other", "over-refusal", "general"
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for name, each in found.models.items():
        harmful, benign = each.rates["harmful"], each.rates["lookalikes"]
        rates = (
            harmful["complied"],
            harmful["other"],
            benign["refused"],
            each.rates["general"]["correct"],
        )
        shown = [f"{100 * rate['rate']:.1f}" for rate in rates]
        rows.append((name, f"{each.norm:.2f}", f"{each.cosine:+.3f}", *shown))
    return figures_table("The aligned model, moved", titles, rows, width=width)


def _mean(mean: Mean | None, *, digits: int = 2) -> str:
    if mean is None:
        return "-"
    return f"{mean.value:.{digits}f} ({mean.low:.{digits}f} to {mean.high:.{digits}f})"


def _association(found: Association | None) -> tuple[str, str, str]:
    if found is None:
        return "-", "-", "-"
    return f"{found.correlation:+.2f}", f"{found.p:.2g}", str(found.n)
