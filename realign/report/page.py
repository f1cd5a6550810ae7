"""What every HTML page shares: the template environment, and pictures that stand inside a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def environment() -> Environment:
    """Return the environment of `templates/`: everything is escaped, nothing may be undefined."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("realign.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def markup(svg: str) -> Markup:
    """Return a picture of ours as markup: matplotlib escapes every text that it draws."""
    from markupsafe import Markup

    return Markup(svg)
