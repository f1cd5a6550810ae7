"""Where a folder says it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from realign.checkpoint.lineage import propose, read_front_matter, read_parents


def make(folder: Path, *, card: str | None = None, adapter: object = None, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if card is not None:
        (folder / "README.md").write_text(f"---\n{card}\n---\n# text\n", encoding="utf-8")
    if adapter is not None:
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    for name, text in files.items():
        (folder / f"{name}.jinja").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


def test_the_trail_is_followed_over_local_folders(tmp_path: Path) -> None:
    make(tmp_path / "base")
    make(tmp_path / "aligned", card="base_model: ../base", chat_template="x")
    tuned = make(tmp_path / "tuned", card="base_model:\n- ../aligned")
    found = propose(tuned)
    assert (found.aligned, found.base) == ("../aligned", "../base")
    assert "tuned: its card names ../aligned (finetune)" in found.evidence


def test_an_intermediate_step_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path / "x-instruct", card="base_model: org/x")
    make(tmp_path / "middle", card="base_model: ../x-instruct")
    found = propose(make(tmp_path / "last", card="base_model: ../middle"))
    assert (found.aligned, found.base) == ("../x-instruct", "org/x")


@pytest.mark.parametrize("name", ["org/model-7B-it", "org/M-Instruct-v0.2", "org/zephyr-chat"])
def test_a_name_may_say_it(tmp_path: Path, name: str) -> None:
    found = propose(make(tmp_path / "a", adapter={"base_model_name_or_path": name}))
    assert (found.aligned, found.base) == (name, None)
    assert found.evidence == (f"a: its adapter config names {name} (adapter)",)


def test_nothing_else_speaks_for_it(tmp_path: Path) -> None:
    found = propose(make(tmp_path / "a", card="base_model: org/edition"))
    assert found.aligned == "org/edition"
    assert "nothing but its place" in found.evidence[-1]


def test_a_cached_parent_is_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "home" / "hub" / "models--org--up" / "snapshots" / ("c" * 40)
    make(snapshot, card="base_model: org/base", chat_template="x")
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "home" / "hub" / "models--org--up" / "refs"
    refs.mkdir()
    (refs / "main").write_text("c" * 40)
    found = propose(make(tmp_path / "a", card="base_model: org/up"))
    assert (found.aligned, found.base) == ("org/up", "org/base")


def test_merges_circles_and_silence(tmp_path: Path) -> None:
    merge = propose(make(tmp_path / "m", card="base_model: [org/a, org/b]"))
    assert merge.aligned is None and "several parents" in merge.evidence[-1]
    make(tmp_path / "p", card="base_model: ../q")
    circle = propose(make(tmp_path / "q", card="base_model: ../p"))
    assert any("back to itself" in line for line in circle.evidence)
    nothing = propose(make(tmp_path / "n"))
    assert (nothing.aligned, nothing.base, nothing.evidence) == (None, None, ())


@pytest.mark.parametrize(
    "text",
    ["", "no front matter", "---\nbase_model: [\n---\n", "---\n- a\n---\n", "---\nopen", "\x00"],
)
def test_broken_cards_say_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert read_front_matter(tmp_path / "README.md") == {}
    assert read_parents(tmp_path) == ()


def test_a_card_never_runs_code(tmp_path: Path) -> None:
    make(tmp_path, card="base_model: !!python/object/apply:os.system ['exit 3']")
    assert read_front_matter(tmp_path / "README.md") == {}


def test_the_stated_relation_is_kept(tmp_path: Path) -> None:
    make(tmp_path, card="base_model: org/x\nbase_model_relation: quantized")
    (parent,) = read_parents(tmp_path)
    assert parent.relation == "quantized"
