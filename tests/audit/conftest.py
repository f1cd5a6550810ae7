"""A family of random models and one whole audit of it, made once; tests only read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.model_support import SPECIALS, llama, save, word_tokenizer
from support.run_support import WORDS, request

from realign.audit.run import run_audit
from realign.audit.schema import Report


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, reference, subject and repaired: random models that differ a little."""
    folder = tmp_path_factory.mktemp("family")
    tokenizer = word_tokenizer(words=WORDS)
    size = len(SPECIALS) + len(WORDS)
    for name, seed, scale in (
        ("base", 1, 0.2),
        ("reference", 0, 0.0),
        ("subject", 2, 0.3),
        ("repaired", 2, 0.05),
    ):
        model = llama(vocabulary=size)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    noise = torch.randn_like(parameter) * parameter.std()
                    parameter.add_(scale * noise)
        save(folder / name, model, tokenizer)
    return folder


@pytest.fixture(scope="session")
def plain(family: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("plain") / "audit"
    return run_audit(request(family, out)), out
