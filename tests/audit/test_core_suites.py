"""The suites that ship: what they cover, and that nothing in them calibrates a repair."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from realign.audit.anchors import HAZARDS, core_anchors
from realign.audit.contamination import duplicates, overlap, words_of
from realign.audit.core_suites import CORE_SUITES, core_suite
from realign.audit.suite_sources import read_suites
from realign.audit.suites import Suite, load_suite, require_auditable
from realign.errors import SuiteError

FIXTURES = Path(__file__).parents[2] / "fixtures"
HARMFUL, SAFE = map(core_suite, CORE_SUITES)


def prompts(*suites: Suite) -> dict[str, str]:
    return {item.id: item.prompt for suite in suites for item in suite.items}


def test_both_can_be_named_and_audited() -> None:
    suites = [suite for name in CORE_SUITES for suite in read_suites(name)]
    require_auditable(suites)
    assert [(suite.name, suite.kind) for suite in suites] == [
        ("core-harmful", "harmful"),
        ("core-safe", "safe"),
    ]
    assert [suite.source for suite in suites] == list(CORE_SUITES)
    assert not any(suite.clustered for suite in suites)


@pytest.mark.parametrize("suite", [HARMFUL, SAFE], ids=CORE_SUITES)
def test_26_short_requests_for_each_of_eleven_hazards(suite: Suite) -> None:
    counts = Counter(item.hazard for item in suite.items)
    assert counts == dict.fromkeys(set(HAZARDS) - {"cse"}, 26)
    assert all(3 <= len(item.prompt.split()) <= 25 for item in suite.items)
    assert all(item.prompt.isascii() and "\n" not in item.prompt for item in suite.items)
    assert (suite.license, suite.language) == ("Apache-2.0", "en")


def test_targets_are_openings_without_content() -> None:
    targets = {item.target for item in (*HARMFUL.items, *SAFE.items)}
    assert None not in targets and len(targets) <= 3
    assert all(target.startswith("Sure, ") for target in targets if target)


def test_no_prompt_occurs_twice() -> None:
    assert duplicates(prompts(HARMFUL, SAFE)) == ()


def test_no_anchor_occurs_in_a_core_suite() -> None:
    every = prompts(HARMFUL, SAFE)
    assert overlap(every, [item.prompt for item in core_anchors().items]).ids == ()
    # Nor one that is merely reworded: anchors share few of their rarer words with any item.
    rare = _rare(list(every.values()))
    for anchor in core_anchors().items:
        ours = words_of(anchor.prompt) & rare
        for name, prompt in every.items():
            theirs = words_of(prompt) & rare
            assert len(ours & theirs) <= 0.6 * max(len(ours | theirs), 3), (anchor.id, name)


def test_no_laboratory_prompt_occurs_in_a_core_suite() -> None:
    every = prompts(HARMFUL, SAFE)
    for path in sorted(FIXTURES.glob("small/suites/*.jsonl")):
        assert overlap(every, [item.prompt for item in load_suite(path).items]).ids == (), path


def test_safe_requests_use_words_of_their_harmful_partners() -> None:
    safe = prompts(SAFE)
    rare = {word[:4] for word in _rare([*safe.values(), *prompts(HARMFUL).values()])}
    for item in HARMFUL.items:
        partner = safe[item.id.replace("core-harmful", "core-safe")]
        ours, theirs = ({w[:4] for w in words_of(text)} for text in (item.prompt, partner))
        assert ours & theirs & rare, (item.prompt, partner)


def test_ids_and_content_are_pinned() -> None:
    # Reports are compared by these hashes: another prompt is another instrument.
    assert HARMFUL.suite_hash == "83edee9441c37d49997ed8befe37b3c4760f2c25b7409cf74f93a2a1413dc86d"
    assert SAFE.suite_hash == "54a9c0fdfc69842a887d88e97100bf14a7e3bf86e0ae3dbe8d06e8488e7d98dd"


def test_anchors_by_name_are_refused_with_the_reason() -> None:
    with pytest.raises(SuiteError, match="anchors calibrate repairs"):
        read_suites("core-anchors")


def test_a_file_of_that_name_can_still_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("core-safe").write_text('{"id": "1", "prompt": "Mine"}\n', encoding="utf-8")
    (own,) = read_suites("safe=core-safe")
    assert own.items[0].prompt == "Mine"


def _rare(texts: list[str]) -> set[str]:
    """Words that stand in fewer than one prompt of twenty."""
    counts = Counter(word for text in texts for word in words_of(text))
    return {word for word, n in counts.items() if n < len(texts) / 20 and len(word) > 2}
