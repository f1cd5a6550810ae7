"""Silence for the libraries underneath: their progress bars and log lines, for a while only.

What is worth saying we say ourselves, through `Progress` or an error. Nothing is changed at import,
and the state found is the state left behind.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries() -> Generator[None]:
    """Hide transformers' and huggingface_hub's bars and everything below an error, then restore."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    if bars:
        _without_warnings(transformers_logging.disable_progress_bar)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            _without_warnings(transformers_logging.enable_progress_bar)
            if not hub_bars:
                _without_warnings(disable_progress_bars)


def ignore_deprecations() -> None:
    """Ignore what one library says to another, within the caller's `catch_warnings`.

    peft asks transformers for `is_gradient_checkpointing`, an old name.
    """
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")


def _without_warnings(switch: object) -> None:
    """Call a switch that warns where the environment variable has the last word: so be it."""
    assert callable(switch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        switch()
