"""realign: repair and audit fine-tuned language models that lost their safety training."""

from realign._version import __version__

__all__ = ["__version__"]
