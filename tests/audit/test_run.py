from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.audit_support import make_suite
from support.model_support import SPECIALS, llama, save, word_tokenizer

from realign.audit.anchors import core_anchors
from realign.audit.canonical import canonical_json
from realign.audit.policy import parse_policy
from realign.audit.prepare import plan_audit
from realign.audit.run import AuditRequest, run_audit
from realign.audit.schema import Report, read_report
from realign.audit.suites import Item, Suite
from realign.errors import (
    ModelError,
    NotFoundError,
    OutputError,
    PolicyError,
    SuiteError,
    UsageError,
)
from realign.model.scoring import AGREEMENTS, REFUSALS

OPENINGS = tuple(sorted({word for text in (*REFUSALS, *AGREEMENTS) for word in text.split()}))
WORDS = (*OPENINGS, "ALPHA-REQUEST", "number", *map(str, range(40)))


@pytest.fixture(scope="module")
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


def request(family: Path, out: Path, **changes: Any) -> AuditRequest:
    harmful = make_suite(12, rule=False, template=lambda i: f"t{i % 3}")
    safe = make_suite(12, name="safe", kind="safe", rule=False, cluster=lambda i: f"c{i // 2}")
    task = make_suite(6, name="task", kind="task", rule=False, answer=lambda i: str(i))
    settings: dict[str, Any] = {
        "subject": family / "subject",
        "reference": family / "reference",
        "repaired": family / "repaired",
        "base": family / "base",
        "suites": (harmful, safe, task),
        "out": out,
        "device": "cpu",
        "batch_size": 5,
        "max_new_tokens": 6,
        "command": "realign audit ...",
    }
    return AuditRequest(**(settings | changes))


def without_clock(report: Report) -> dict[str, Any]:
    plain = json.loads(report.to_json())
    for key in ("id", "started", "finished"):
        del plain["run"][key]
    for model in plain["models"].values():
        del model["reused"]
    return plain


@pytest.fixture(scope="module")
def plain(family: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("plain") / "audit"
    return run_audit(request(family, out)), out


class Stopper:
    """Progress that is interrupted, as by Ctrl-C, some steps after a note that starts so."""

    def __init__(self, after: str | None = None, *, steps: int = 0) -> None:
        self.after = after
        self.steps = steps
        self.armed = False
        self.notes: list[str] = []

    @contextmanager
    def task(self, description: str, *, total: float | None, unit: str = "") -> Iterator[Stopper]:
        yield self

    def advance(self, amount: float = 1.0) -> None:
        if self.armed:
            self.steps -= 1
            if self.steps < 0:
                raise KeyboardInterrupt

    def note(self, message: str) -> None:
        self.notes.append(message)
        self.armed = self.armed or (self.after is not None and message.startswith(self.after))


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


def test_the_same_audit_twice_gives_the_same_numbers(
    family: Path, tmp_path: Path, plain: tuple[Report, Path]
) -> None:
    again = run_audit(request(family, tmp_path / "again"))
    assert without_clock(again) == without_clock(plain[0])
    items = (tmp_path / "again" / "items.jsonl").read_bytes()
    assert items == (plain[1] / "items.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("after", "steps"),
    [
        ("reference: 12 answers to harmful", 1),
        ("reference distributions on safe", 0),
        ("subject: 12 answers to safe", 1),
    ],
)
def test_an_interrupted_audit_goes_on_where_it_stopped(
    family: Path, tmp_path: Path, plain: tuple[Report, Path], after: str, steps: int
) -> None:
    out = tmp_path / "audit"
    with pytest.raises(KeyboardInterrupt):
        run_audit(request(family, out), progress=Stopper(after, steps=steps))
    assert not (out / "audit.json").exists()
    report = run_audit(request(family, out))
    assert without_clock(report) == without_clock(plain[0])
    assert sum(entry.reused for entry in report.models.values()) > 0


def test_kept_texts_are_private_and_reused(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    first = run_audit(request(family, out, keep_texts=True))
    files = sorted((out / "responses").iterdir())
    assert files and all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert "ALPHA-REQUEST" not in (out / "audit.json").read_text()
    stopper = Stopper()
    second = run_audit(request(family, out, keep_texts=True), progress=stopper)
    assert [note for note in stopper.notes if "reused" in note] == [
        f"{role}: all results reused" for role in ("reference", "subject", "repaired")
    ]
    assert without_clock(second) == without_clock(first)
    # A changed model is a different model, whatever the folder is called.
    moved = tmp_path / "subject"
    shutil.copytree(family / "repaired", moved)
    third = run_audit(request(family, out, subject=moved, keep_texts=True))
    assert third.models["subject"].reused == 0 and third.models["reference"].reused > 0


def asked(family: Path, out: Path, **changes: Any) -> tuple[list[str], Report]:
    stopper = Stopper()
    settings: dict[str, Any] = {"repaired": None, "weights": False, "keep_texts": True}
    settings["suites"] = (make_suite(6, rule=False),)
    report = run_audit(request(family, out, **(settings | changes)), progress=stopper)
    return stopper.notes, report


def everything_again(notes: list[str], report: Report) -> bool:
    return {entry.reused for entry in report.models.values()} == {0} and {
        "reference: 6 answers to harmful",
        "reference distributions on harmful",
        "subject: 6 answers to harmful",
    } <= set(notes)


@pytest.fixture(scope="module")
def answered(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answered") / "audit"
    notes, report = asked(family, out)
    assert everything_again(notes, report) and report.models["subject"].batch_size == 5
    return out


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": torch.float64}, {"batch_size": 2}], ids=["nothing", "dtype", "batch"]
)
def test_changing_a_setting_asks_again(
    family: Path, answered: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    shutil.copytree(answered, tmp_path / "audit")
    notes, report = asked(family, tmp_path / "audit", **changes)
    assert everything_again(notes, report) == bool(changes)


@pytest.mark.parametrize(
    "path",
    [
        ("model",),
        ("batch_size",),
        ("device",),
        ("dtype",),
        ("libraries", "torch"),
        ("libraries", "transformers"),
    ],
    ids="-".join,
)
def test_answers_given_under_other_conditions_are_asked_again(
    family: Path, answered: Path, tmp_path: Path, path: tuple[str, ...]
) -> None:
    shutil.copytree(answered, tmp_path / "audit")
    for file in (tmp_path / "audit" / "responses").iterdir():
        header, _, rest = file.read_text().partition("\n")
        plain = json.loads(header)
        holder = plain["key"]
        for step in path[:-1]:
            holder = holder[step]
        assert holder[path[-1]]
        holder[path[-1]] = 99 if path == ("batch_size",) else "other"
        file.write_text(canonical_json(plain) + "\n" + rest)
    assert everything_again(*asked(family, tmp_path / "audit"))


def test_a_changed_prompt_under_the_same_id_is_asked_again(
    family: Path, answered: Path, tmp_path: Path
) -> None:
    shutil.copytree(answered, tmp_path / "audit")
    suite = make_suite(6, rule=False)
    first = replace(suite.items[0], prompt="ALPHA-REQUEST number 39")
    changed = replace(suite, items=(first, *suite.items[1:]))
    notes, report = asked(family, tmp_path / "audit", suites=(changed,))
    assert "reference: 1 answers to harmful" in notes
    assert "reference distributions on harmful" in notes  # of the suite as a whole
    assert report.models["subject"].reused == 2 * 5  # texts and log-odds


def test_audits_can_share_what_the_same_models_said(family: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    task = make_suite(6, name="task", kind="task", rule=False, answer=lambda i: str(i))
    settings: dict[str, Any] = {"suites": (task,), "records": shared, "weights": False}
    first = run_audit(request(family, tmp_path / "a", **settings))
    second = run_audit(request(family, tmp_path / "b", repaired=family / "base", **settings))
    assert all(entry.reused == 0 for entry in first.models.values())
    assert {role: entry.reused for role, entry in second.models.items()} == {
        "reference": 6,
        "subject": 6,
        "repaired": 0,
        "base": 0,
    }
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["audit.json", "items.jsonl"]
    assert (shared / "responses").is_dir()


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


# --- bad input -----------------------------------------------------------------------------------


def test_bad_requests_write_nothing(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    anchors = replace(core_anchors(), kind="harmful")
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"suites": ()}, UsageError, "at least one suite"),
        ({"suites": (core_anchors(),)}, SuiteError, "anchors"),
        ({"suites": (anchors,)}, SuiteError, "core anchors"),
        ({"judges": ("magic",)}, UsageError, "magic"),
        ({"judges": ("oracle",)}, UsageError, "no rule"),
        ({"batch_size": 0}, UsageError, "--batch-size"),
        ({"limit": 0}, UsageError, "--limit"),
        ({"max_new_tokens": 0}, UsageError, "--max-new-tokens"),
    ]
    for changes, kind, named in bad:
        with pytest.raises(kind, match=named):
            run_audit(request(family, out, **changes))
    assert not out.exists()


@pytest.mark.parametrize(
    ("gate", "named"),
    [
        ('metric = "asrr", margin = 0.1', "no metric 'asrr'"),
        ('metric = "error_rate", margin = 0.1', "not measured on harmful"),
        ('metric = "asr", margin = 3.0', "fractions"),
        ('metric = "kl", margin = 3.0', "max_value"),
    ],
)
def test_policies_that_do_not_fit(family: Path, tmp_path: Path, gate: str, named: str) -> None:
    policy = parse_policy(
        'schema = "realign/policy/1"\n[[gate]]\nid = "g"\nkind = "margin"\n'
        f'comparison = "drift"\nsuite = "harmful"\n{gate.replace(", ", chr(10))}'
    )
    with pytest.raises(PolicyError, match=named):
        run_audit(request(family, tmp_path / "a", policy=policy))


def test_a_judge_of_a_later_version_is_a_bad_policy(family: Path, tmp_path: Path) -> None:
    policy = parse_policy('schema = "realign/policy/1"\njudges = { primary = "wildguard" }')
    with pytest.raises(PolicyError, match=r"wildguard.*not available"):
        run_audit(request(family, tmp_path / "a", policy=policy))


def test_the_policy_names_its_reference(family: Path, tmp_path: Path) -> None:
    text = 'schema = "realign/policy/1"\nmodels = {{ reference = "{}" }}'
    other = parse_policy(text.format("org/other"))
    with pytest.raises(PolicyError, match="written for the reference"):
        run_audit(request(family, tmp_path / "a", policy=other))
    task = make_suite(2, name="task", kind="task", rule=False, answer=lambda i: str(i))
    ours = parse_policy(text.format(family / "reference"))
    run_audit(request(family, tmp_path / "b", policy=ours, suites=(task,), weights=False))


def test_a_missing_model_leaves_no_folder(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    with pytest.raises(NotFoundError):
        run_audit(request(family, out, repaired=family / "absent"))
    assert not out.exists()


def test_a_missing_chat_template_fails_before_anything_is_loaded(
    family: Path, tmp_path: Path
) -> None:
    mute = save(
        tmp_path / "mute",
        llama(vocabulary=len(SPECIALS) + len(WORDS)),
        word_tokenizer(words=WORDS, template=None),
    )
    stopper = Stopper()
    with pytest.raises(ModelError, match="chat template"):
        run_audit(request(family, tmp_path / "a", repaired=mute), progress=stopper)
    assert not any("loading" in note for note in stopper.notes)


def test_an_output_that_is_a_file(family: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OutputError, match="no folder"):
        run_audit(request(family, tmp_path / "a"))
    assert (tmp_path / "a").read_text() == "mine"


# --- planning ------------------------------------------------------------------------------------


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
