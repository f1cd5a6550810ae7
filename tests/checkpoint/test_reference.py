"""What a user may type, and what is said where it leads nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from realign.checkpoint.reference import Reference, parse_reference
from realign.errors import NotFoundError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "model", "revision", "adapter", "subfolder"),
    [
        ("org/name", "org/name", None, None, None),
        ("hf://org/name", "org/name", None, None, None),
        ("org/name@main", "org/name", "main", None, None),
        (f"hf://org/na.me-1_2@{COMMIT}", "org/na.me-1_2", COMMIT, None, None),
        ("org/name@refs/pr/7", "org/name", "refs/pr/7", None, None),
        ("hf://org/name@v1/sub/dir", "org/name", "v1", None, "sub/dir"),
        ("hf://org/name/sub", "org/name", None, None, "sub"),
        ("org/name@v1+org/adapter@v2", "org/name", "v1", "org/adapter@v2", None),
    ],
)
def test_hub_ids(
    text: str, model: str, revision: str | None, adapter: str | None, subfolder: str | None
) -> None:
    expected = Reference(text, model, revision, adapter, False, subfolder)
    assert parse_reference(text) == expected


def test_an_existing_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("org/name", "with space", "a+b", "ünï"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "with space", "a+b", "ünï", str(tmp_path)):
        assert parse_reference(name).is_local
        assert parse_reference(Path(name)) == parse_reference(name)
    assert not parse_reference("hf://org/name").is_local


def test_a_model_and_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "base+x").mkdir()
    (tmp_path / "lora").mkdir()
    text = f"{tmp_path / 'base+x'}+{tmp_path / 'lora'}"
    found = parse_reference(text)
    assert (found.model, found.adapter) == (str(tmp_path / "base+x"), str(tmp_path / "lora"))
    mixed = parse_reference(f"org/name+{tmp_path / 'lora'}")
    assert (mixed.model, mixed.adapter, mixed.is_local) == (
        "org/name",
        str(tmp_path / "lora"),
        False,
    )
    with pytest.raises(NotFoundError, match="lorra does not exist") as caught:
        parse_reference(f"{tmp_path / 'base+x'}+{tmp_path / 'lorra'}")
    assert f"did you mean {tmp_path / 'lora'}" in caught.value.hint


def test_a_mistyped_path_gets_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fixtures" / "small").mkdir(parents=True)
    with pytest.raises(NotFoundError) as caught:
        parse_reference(str(tmp_path / "fixtures" / "smal"))
    assert "did you mean" in caught.value.hint and "fixtures/small" in caught.value.hint
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError) as caught:  # looks like a Hub id, but small is right there
        parse_reference("fixtures/smal")
    assert "fixtures/small" in caught.value.hint and "hf://fixtures/smal" in caught.value.hint
    assert not parse_reference("fixtures/something-else").is_local


@pytest.mark.parametrize("text", ["/no/where/model", "./x", "~/x/y/z", "gone", "a/b/c", "x" * 5000])
def test_what_is_neither_path_nor_id(text: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        parse_reference(text)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["a/b@../x", "a/b@x/../..", "a/..b", "hf://only", "hf://", "a/b@"])
def test_malformed_ids(text: str) -> None:
    with pytest.raises(NotFoundError):
        parse_reference(text)


@pytest.mark.parametrize("text", ["", "  "])
def test_nothing_at_all(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)
