"""What a plan says of tokenizers and templates is what transformers finds in the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.model_support import TEMPLATE, word_tokenizer
from transformers import AutoTokenizer

from realign.checkpoint.chat_files import require_template, tokenizer_folder
from realign.errors import ModelError
from realign.model.chat import chat_template

NAMED = [{"name": "tool_use", "template": "{{ tools }}"}]
CASES: dict[str, tuple[object, dict[str, str], bool]] = {
    # entry of tokenizer_config.json, template files, whether the model can be asked
    "none": (None, {}, False),
    "entry": (TEMPLATE, {}, True),
    "blank entry": ("  ", {}, False),
    "named entries": ([*NAMED, {"name": "default", "template": TEMPLATE}], {}, True),
    "no default among the entries": (NAMED, {}, False),
    "file": (None, {"chat_template.jinja": TEMPLATE}, True),
    "blank file before the entry": (TEMPLATE, {"chat_template.jinja": "\n"}, False),
    "file before entries": (NAMED, {"chat_template.jinja": TEMPLATE}, True),
    "named files": (
        None,
        {
            "chat_template.jinja": TEMPLATE,
            "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        },
        True,
    ),
    "a named file hides the entry": (
        TEMPLATE, {"additional_chat_templates/tool_use.jinja": "{{ tools }}"}, False
    ),
    "a file of another name": (None, {"template.jinja": TEMPLATE}, False),
}  # fmt: skip


def _folder(folder: Path, entry: object, files: dict[str, str]) -> Path:
    word_tokenizer(template=None).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(settings | ({} if entry is None else {"chat_template": entry})))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_files_say_what_the_loaded_tokenizer_says(tmp_path: Path, case: str) -> None:
    entry, files, can_be_asked = CASES[case]
    folder = _folder(tmp_path / "model", entry, files)
    assert tokenizer_folder(folder) == folder
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if can_be_asked:
        require_template(folder)
        assert chat_template(loaded)
        return
    with pytest.raises(ModelError) as planned:
        require_template(folder)
    with pytest.raises(ModelError) as run:
        chat_template(loaded)
    assert (planned.value.message, planned.value.hint) == (run.value.message, run.value.hint)
    assert str(folder) in planned.value.message


def test_an_adapters_own_tokenizer_goes_first(tmp_path: Path) -> None:
    base, adapter = _folder(tmp_path / "base", TEMPLATE, {}), tmp_path / "adapter"
    adapter.mkdir()
    assert tokenizer_folder(base, adapter) == base
    assert tokenizer_folder(base, _folder(adapter, None, {})) == adapter
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty holds no tokenizer"):
        tokenizer_folder(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer_config.json", b"{"), ("chat_template.jinja", b"\xff\xfe")],
)
def test_a_damaged_file_is_no_fault_of_ours(tmp_path: Path, name: str, content: bytes) -> None:
    folder = _folder(tmp_path / "model", TEMPLATE, {})
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded"):
        require_template(folder)


def test_nothing_is_said_of_a_tokenizer_with_a_format_of_its_own(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", None, {})
    (folder / "tekken.json").write_text("{}")
    require_template(folder)
