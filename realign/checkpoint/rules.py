"""The numbered rules about weight files: what is refused, what is only remarked, and what helps.

An id stands for one fault for ever: it is never given to another. Severity C (different readers see
different things, or content is hidden) and E (corrupt, incomplete) refuse a checkpoint before any
tensor is read; W (review) and N (note) are remarks, which a plan prints. Here: the table, and the
two ways to use it. Not here: the checks themselves (`headers`, `weights`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from realign.errors import HeaderError

Severity = Literal["C", "E", "W", "N"]


@dataclass(frozen=True)
class Rule:
    """One rule."""

    id: str
    severity: Severity
    what: str
    """The fault, for a table; a message names the file and the detail instead."""
    fix: str
    """The next step."""


_AGAIN = "download or export the file again"
_RESAVE = "re-save the checkpoint with the safetensors library"
_INDEX = "rebuild the index: load and save the model with transformers"

RULES: Mapping[str, Rule] = {
    rule.id: rule
    for rule in (
        Rule("RA001", "E", "the file is shorter than the 8-byte length of its header", _AGAIN),
        Rule(
            "RA002",
            "E",
            "the header's length exceeds 100,000,000 bytes, the format's limit",
            "the file is corrupt or no safetensors file; " + _AGAIN,
        ),
        Rule(
            "RA003",
            "W",
            "the header's length exceeds 25,000,000 bytes: the Hub's client refuses to read it",
            "shard the model",
        ),
        Rule("RA004", "E", "the file ends inside its header", _AGAIN),
        Rule("RA005", "E", "the header does not start with `{`", _RESAVE),
        Rule("RA006", "E", "the header is not valid UTF-8", _RESAVE),
        Rule("RA007", "E", "the header is not a valid table of tensors", _RESAVE),
        Rule(
            "RA008",
            "C",
            "a key stands twice in a header or index: different readers see different tensors",
            "do not load this file; obtain it again from its author",
        ),
        Rule(
            "RA009",
            "W",
            "unusual content of the header: padding that is not blank, null metadata, extra keys",
            "re-save to normalise it",
        ),
        Rule(
            "RA010",
            "E",
            "a tensor has a type that realign does not know",
            "upgrade realign, or convert the checkpoint to bfloat16, float16 or float32",
        ),
        Rule("RA011", "E", "a tensor's shape and type need other bytes than it has", _RESAVE),
        Rule(
            "RA012",
            "E",
            "bytes between tensors are unused, or tensors overlap",
            _RESAVE + "; holes can hide content",
        ),
        Rule("RA013", "E", "the file is truncated", "resume or repeat the download"),
        Rule(
            "RA014",
            "C",
            "bytes follow the last tensor: the file may be two files at once",
            "do not distribute this file; " + _RESAVE,
        ),
        Rule("RA015", "E", "`__metadata__` does not map strings to strings", _RESAVE),
        Rule(
            "RA016",
            "N",
            "tensor data do not start on an 8-byte boundary",
            "re-save for loading without copies",
        ),
        Rule("RA017", "W", "a file holds no tensors", "remove it, or check the export"),
        Rule(
            "RA018",
            "W",
            "a tensor's name has control or path characters, or exceeds 256 bytes",
            "rename the tensor",
        ),
        Rule("RA020", "E", "the index is not a JSON object with a `weight_map` of names", _INDEX),
        Rule(
            "RA021",
            "E",
            "the index names a file that is missing",
            "download the missing file, or rebuild the index",
        ),
        Rule("RA022", "E", "the index places a tensor in a file without it", _INDEX),
        Rule("RA023", "E", "a tensor stands in two files", "delete the stale file"),
        Rule("RA024", "W", "tensors are not in the index", "rebuild the index, or delete them"),
        Rule("RA025", "W", "a file of weights is not in the index", "delete it if it is left over"),
        Rule(
            "RA026",
            "E",
            "the numbering of the files has gaps or mixes two sets",
            "download the missing files, or delete those of another export",
        ),
        Rule("RA027", "W", "the folder holds several sets of weights", "keep one"),
        Rule(
            "RA028",
            "C",
            "a name leads outside of the folder",
            "do not load this checkpoint; the name is never followed",
        ),
        Rule(
            "RA029",
            "W",
            "`total_size` of the index is not the sum of its tensors' bytes",
            "rebuild the index",
        ),
        Rule(
            "RA035",
            "E",
            "low-bit weights without a `quantization_config`",
            "use the unquantised checkpoint in bfloat16, float16 or float32",
        ),
        Rule(
            "RA040",
            "E",
            "the only weights are pickles, which are never loaded: they can run any code",
            "convert them in an isolated environment: load with transformers, then "
            "model.save_pretrained(FOLDER), which writes safetensors",
        ),
    )
}
"""Every rule about weight files, by id."""


@dataclass(frozen=True)
class Remark:
    """A rule of severity W or N that applies to one file."""

    rule: str
    file: Path
    detail: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.file}: {self.detail}"


def refuse(rule: str, file: Path, detail: str, fix: str | None = None) -> HeaderError:
    """The error of a rule of severity C or E: id, file, detail; `fix` replaces the table's."""
    found = RULES[rule]
    assert found.severity in "CE", rule
    return HeaderError(f"{rule}: {file}: {detail}", found.fix if fix is None else fix)


def remark(rule: str, file: Path, detail: str) -> Remark:
    """What a rule of severity W or N has to say."""
    assert RULES[rule].severity in "WN", rule
    return Remark(rule, file, detail)


def merged(remarks: Iterable[Remark]) -> tuple[str, ...]:
    """One line per rule and detail: a hundred files do not say one thing a hundred times."""
    files: dict[tuple[str, str], list[Path]] = {}
    for each in remarks:
        files.setdefault((each.rule, each.detail), []).append(each.file)
    return tuple(
        f"{rule}: {of[0]}{f' and {len(of) - 1} more' if len(of) > 1 else ''}: {detail}"
        for (rule, detail), of in files.items()
    )
