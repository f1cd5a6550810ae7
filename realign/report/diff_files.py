"""The files of a comparison: JSON, page and pictures in a folder of their own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from realign._version import __version__
from realign.checkpoint.writer import OutputFolder
from realign.diff.result import Difference
from realign.report.diff import (
    by_change,
    compared,
    decimal,
    effective_ranks,
    headline,
    key_text,
    percent,
    ranked,
    share,
    short,
    status_text,
)
from realign.report.diff_pictures import diff_picture
from realign.report.page import environment, markup
from realign.report.pictures import save, to_svg

_MOST_ROWS = 400


def write_diff_files(
    found: Difference, folder: Path, *, inputs: Sequence[Path] = ()
) -> tuple[Path, ...]:
    """Write the comparison as JSON, page and pictures; the folder appears as a whole or not at all.

    Args:
        found: the comparison.
        folder: must not exist.
        inputs: folders of the checkpoints, in which it must not lie.

    Returns:
        The files, `diff.json` first. Without changed weights there are no pictures.

    Raises:
        OutputError: the folder exists, lies in an input or cannot be written.
    """
    names = ["diff.json", "diff.html"]
    with OutputFolder(folder, fingerprint="diff", inputs=inputs) as output:
        output.write_json("diff.json", found.to_json())
        output.write_bytes("diff.html", render_page(found).encode("utf-8"))
        picture = diff_picture(found)
        if picture is not None:
            for name in ("diff.png", "diff.svg"):
                save(picture, output.partial / name)
                names.append(name)
        target = output.commit()
    return tuple(target / name for name in names)


def render_page(found: Difference) -> str:
    """Return the comparison as one HTML file: no network, no scripts, the picture inside."""
    picture = diff_picture(found)
    sides = (("A", found.a), ("B", found.b), ("R", found.reference))
    rows = ranked(found.rows, order="relative")
    spectra = (each for row in rows for each in row.spectra)
    return (
        environment()
        .get_template("diff.html.j2")
        .render(
            found=found,
            layers=compared(found.layers),
            modules=by_change(found.modules),
            version=__version__,
            sides=[(label, side) for label, side in sides if side is not None],
            headline=list(headline(found)),
            picture=picture
            and markup(to_svg(picture, label="Relative change by layer and module")),
            rows=rows[:_MOST_ROWS],
            total=len(rows),
            spectra=list(islice(spectra, _MOST_ROWS)),
            layer_ranks=effective_ranks(found, "layer"),
            module_ranks=effective_ranks(found, "module"),
            percent=percent,
            decimal=decimal,
            short=short,
            share=share,
            status_text=status_text,
            key_text=key_text,
        )
    )
