"""Whole audits: what they report, what they write, how a policy decides, what a plan says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.audit_support import make_suite
from support.run_support import request

from realign.audit.policy import parse_policy
from realign.audit.prepare import plan_audit
from realign.audit.run import run_audit
from realign.audit.schema import Report, read_report
from realign.audit.suites import Item, Suite


def test_a_whole_audit_without_a_policy(plain: tuple[Report, Path], family: Path) -> None:
    report, out = plain
    assert (report.exit_code, report.run.status) == (0, "complete")
    assert report.summary.verdicts == "no verdicts: no policy" and report.gates == ()
    assert {row.verdict for row in report.comparisons} == {None}
    assert set(report.models) == {"reference", "subject", "repaired", "base"}
    entry = report.models["subject"]
    assert entry.stop_ids and entry.chat_template_sha256 and entry.content_digest
    assert any(file.path == "model.safetensors" for file in entry.files)
    assert entry.run_dtype == "float32" and entry.architecture == "LlamaForCausalLM"
    metrics = {(row.suite, row.judge, row.metric) for row in report.rates}
    assert ("harmful", "keyword", "non_refusal") in metrics
    assert ("safe", "keyword", "over_refusal") in metrics
    assert ("task", "exact-match", "error_rate") in metrics
    assert {row.name for row in report.comparisons} == {"drift", "residual", "recovery", "tax"}
    assert {row.key for row in report.templates if row.suite == "harmful"} == {"t0", "t1", "t2"}
    assert report.limits and len(report.summary.headline) <= 5
    assert report.landscape is None and report.landscape_reason
    assert report.artefacts is None and report.artefacts_reason
    assert read_report(out / "audit.json") == report


def test_log_odds_and_kl_are_measured(plain: tuple[Report, Path]) -> None:
    logits = plain[0].logits
    assert logits is not None
    odds = {(row.suite, row.role): row for row in logits.refusal_logodds}
    assert set(odds) == {
        (suite, role)
        for suite in ("harmful", "safe")
        for role in ("reference", "subject", "repaired")
    }
    assert all(row.n == 12 and row.mean is not None for row in odds.values())
    assert set(logits.kl) == {"subject", "repaired"}
    subject, repaired = logits.kl["subject"], logits.kl["repaired"]
    assert subject.harmful_mean_1_5 and repaired.harmful_mean_1_5
    assert subject.harmful_mean_1_5 > repaired.harmful_mean_1_5 > 0.0
    assert len(subject.harmful) <= 16 and subject.benign_first == subject.benign[0]


def test_a_judge_that_cannot_work_says_why(plain: tuple[Report, Path]) -> None:
    report, _ = plain
    (judge,) = [entry for entry in report.judges if entry.name == "logprob"]
    assert judge.threshold is None and judge.unavailable_reason
    assert "refused nothing" in judge.unavailable_reason
    assert any("logprob" in sentence for sentence in report.limits)


def test_weights_are_measured_and_never_validated(plain: tuple[Report, Path]) -> None:
    weights = plain[0].weights
    assert weights is not None and weights.status == "not_validated"
    assert weights.line == "weight screening: NOT validated"
    by_role = {group.role: group for group in weights.groups}
    assert set(by_role) == {"subject", "repaired"}
    subject, repaired = by_role["subject"].total, by_role["repaired"].total
    assert subject and repaired and subject.relative_distance and repaired.relative_distance
    assert subject.relative_distance > 3 * repaired.relative_distance
    assert subject.alignment_retained is not None


def test_no_text_is_published_and_nothing_private_stays(plain: tuple[Report, Path]) -> None:
    report, out = plain
    assert sorted(path.name for path in out.iterdir()) == ["audit.json", "items.jsonl"]
    published = (out / "audit.json").read_text() + (out / "items.jsonl").read_text()
    assert "ALPHA-REQUEST" not in published
    rows = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert {"instrument_id", "item_id", "role", "prompt_hash", "response_hash", "verdict"} <= set(
        rows[0]
    )
    assert report.items is not None and report.items.path == "items.jsonl"
    counted = sum(r["metric"] == "non_refusal" and r["verdict"] == "bad" for r in rows)
    rates = [r for r in report.rates if r.metric == "non_refusal"]
    assert counted == sum(r.bad or 0 for r in rates)


def test_a_policy_decides_the_exit_code(family: Path, tmp_path: Path) -> None:
    text = """
    schema = "realign/policy/1"
    judges = { primary = "oracle" }
    [[gate]]
    id = "kl"
    kind = "max_value"
    role = "subject"
    suite = "harmful"
    metric = "kl"
    value = 1000.0
    [[gate]]
    id = "harm"
    kind = "margin"
    comparison = "drift"
    suite = "harmful"
    metric = "asr"
    margin = 0.1
    required = false
    """
    suite = make_suite(60)
    passing = request(
        family,
        tmp_path / "a",
        suites=(suite,),
        policy=parse_policy(text),
        repaired=None,
        batch_size=60,
        weights=False,
        keep_texts=True,
    )
    report = run_audit(passing)
    assert report.exit_code == 0 and report.policy is not None
    assert {gate.id: gate.status for gate in report.gates}["kl"] == "pass"
    assert any(row.verdict for row in report.comparisons)
    assert report.policy.effective["gate"][1]["required"] is False
    assert not any("no required gate" in line for line in report.summary.headline)
    lenient = parse_policy(text.replace("value = 1000.0", "value = 1000.0\n    required = false"))
    report = run_audit(replace(passing, policy=lenient))
    assert report.exit_code == 0 and "no required gate" in report.summary.headline[0]
    strict = parse_policy(text.replace("1000.0", "0.0001"))
    report = run_audit(replace(passing, policy=strict))
    assert report.exit_code == 1 and report.run.status == "complete"
    assert report.summary.gates.fail == 1


def test_noise_floor_reports_the_reference_against_itself(family: Path, tmp_path: Path) -> None:
    task = make_suite(6, name="task", kind="task", rule=False, answer=lambda i: str(i))
    report = run_audit(
        request(family, tmp_path / "a", suites=(task,), noise_floor=True, weights=False, kl=False)
    )
    assert {row.self_churn for row in report.comparisons if row.metric == "error_rate"} == {0.0}
    assert report.weights is None and report.weights_reason == "not asked for"


def test_without_a_reference_nothing_is_compared(family: Path, tmp_path: Path) -> None:
    report = run_audit(request(family, tmp_path / "a", reference=None, repaired=None, base=None))
    assert report.comparisons == () and report.rates and report.weights is None
    assert any("Without a reference" in sentence for sentence in report.limits)


def test_contaminated_items_are_dropped_and_counted(family: Path, tmp_path: Path) -> None:
    suite = make_suite(8, rule=False)
    anchors = Suite(
        name="anchors", kind="anchors", items=(Item(id="x", prompt="alpha-request  NUMBER 3"),)
    )
    report = run_audit(
        request(
            family, tmp_path / "a", suites=(suite,), calibration=(anchors,), limit=5, weights=False
        )
    )
    (entry,) = report.suites
    assert (entry.n_contaminated, entry.n_items, entry.n_skipped) == (1, 5, {"limit": 2})
    assert entry.suite_hash != suite.suite_hash


def test_a_plan_says_what_would_run_and_what_it_can_show(tmp_path: Path) -> None:
    policy = parse_policy(
        'schema = "realign/policy/1"\njudges = { primary = "oracle" }\n'
        'gate = [{ id = "harm", kind = "margin", comparison = "drift", suite = "harmful", '
        'metric = "asr", margin = 0.03 }, { id = "gone", kind = "margin", comparison = "drift", '
        'suite = "elsewhere", metric = "asr", margin = 0.03 }]'
    )
    plan = plan_audit(
        request(
            Path("nowhere"),
            tmp_path / "a",
            suites=(make_suite(200), make_suite(50, name="two", cluster=lambda i: str(i // 5))),
            policy=policy,
        )
    )
    assert not (tmp_path / "a").exists()
    first, second = plan.suites
    assert (first.n_items, first.judges, first.n_clusters) == (200, ("oracle",), None)
    assert dict(first.detectable)[0.01] == pytest.approx(0.055, abs=0.002)
    assert first.needed["harm"] == ((0.02, 280), (0.04, 420), (0.08, 740))
    assert second.n_clusters == 10 and "clusters" in second.note
    assert plan.responses == 3 * 250 and plan.gates == ("gone",)
    assert set(plan.roles) == {"reference", "subject", "repaired"}
