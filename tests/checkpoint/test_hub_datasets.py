"""Files of Hub datasets against a server on the loopback: pinned or refused, then offline."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_server import Hub, Repository, serve

from realign.audit.suite_sources import read_suites
from realign.checkpoint.hub_datasets import fetch_dataset_file
from realign.errors import NotFoundError, SuiteError, UsageError

OLD, NEW = "a" * 40, "b" * 40
AT = "hf://datasets/org/rows"


def rows(*prompts: str) -> bytes:
    return ("prompt,category\n" + "".join(f"{prompt},x\n" for prompt in prompts)).encode()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    plain = b'{"id": "1", "prompt": "Wie?", "language": "de"}\n'
    commits = {
        OLD: {"data/hard.csv": rows("old"), "own.jsonl": plain},
        NEW: {"data/hard.csv": rows("new", "newer")},
    }
    shelf = {
        "org/rows": Repository(commits, {"main": NEW, "v1": OLD}),
        "org/gated": Repository({NEW: {"a.csv": b""}}, {"main": NEW}, token="t", gated=True),
    }
    with serve(Hub(datasets=shelf)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_a_pinned_file_is_read_and_its_commit_is_on_record(hub: Hub) -> None:
    (suite,) = read_suites(f"or-bench={AT}@{OLD}/data/hard.csv")
    assert [item.prompt for item in suite.items] == ["old"]
    assert (suite.source, suite.revision) == (f"{AT}@{OLD}/data/hard.csv", OLD)
    (own,) = read_suites(f"safe={AT}@{OLD}/own.jsonl")
    assert (own.name, own.kind, own.revision) == ("own", "safe", OLD)
    assert own.items[0].language == "de"
    assert not any("own.jsonl" in line and NEW in line for line in hub.requests)


@pytest.mark.parametrize(
    ("pin", "commit"), [("", NEW), ("@main", NEW), ("@v1", OLD), ("@" + OLD[:12], None)]
)
def test_what_is_not_pinned_is_refused_with_the_commit(
    hub: Hub, pin: str, commit: str | None
) -> None:
    if commit is None:
        with pytest.raises(NotFoundError, match=f"has no revision {OLD[:12]}"):
            read_suites(f"or-bench={AT}{pin}/data/hard.csv")
        return
    with pytest.raises(UsageError, match="pinned to a commit") as caught:
        read_suites(f"or-bench={AT}{pin}/data/hard.csv")
    assert f"{AT}@{commit}/data/hard.csv" in str(caught.value.hint)
    assert not any("resolve" in line for line in hub.requests)


def test_offline_the_cache_answers_and_no_socket_is_opened(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{AT}@{OLD}/data/hard.csv"
    first = fetch_dataset_file(text)
    count = len(hub.requests)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert fetch_dataset_file(text, offline=True) == first
    assert fetch_dataset_file(text) == first  # a commit that is here needs no network either
    with pytest.raises(NotFoundError, match="not in the local cache") as caught:
        fetch_dataset_file(f"{AT}@{NEW}/data/hard.csv", offline=True)
    assert "--repo-type dataset" in str(caught.value.hint)
    with pytest.raises(UsageError, match="pinned to a commit") as unpinned:
        fetch_dataset_file(f"{AT}/data/hard.csv", offline=True)
    assert f"{AT}@COMMIT/data/hard.csv" in str(unpinned.value.hint)
    assert len(hub.requests) == count


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (f"{AT}@{OLD}/none.csv", NotFoundError, "none.csv"),
        (f"{AT}@{'c' * 40}/a.csv", NotFoundError, "has no revision"),
        (f"hf://datasets/org/none@{OLD}/a.csv", NotFoundError, "there is no dataset org/none"),
        (f"hf://datasets/org/gated@{NEW}/a.csv", NotFoundError, "gated"),
        ("hf://datasets/org/rows", UsageError, "names no file"),
        (f"{AT}@{OLD}/../a.csv", UsageError, "names no file"),
        (f"hf://org/model@{OLD}/a.csv", UsageError, "is no dataset"),
    ],
)
def test_what_cannot_be_had(hub: Hub, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_suites(f"or-bench={text}")


def test_a_download_that_breaks_off(hub: Hub) -> None:
    hub.cut = "hard.csv"
    with pytest.raises(NotFoundError) as caught:
        read_suites(f"or-bench={AT}@{OLD}/data/hard.csv")
    assert "dataset" in str(caught.value.hint) or "again" in str(caught.value.hint)


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotFoundError):
        read_suites(f"or-bench={AT}@{OLD}/data/hard.csv")


def test_a_row_of_the_hub_is_named_with_its_file(hub: Hub) -> None:
    with pytest.raises(SuiteError, match=r"hard\.csv:2: AdvBench needs the column 'goal'"):
        read_suites(f"advbench={AT}@{OLD}/data/hard.csv")
