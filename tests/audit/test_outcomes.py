from __future__ import annotations

from support.audit_support import BABBLE, COMPLIES, REFUSES, judged, make_suite

from realign.audit.judges import ExactMatchJudge, keyword_judge
from realign.audit.oracle import oracle_judge
from realign.audit.outcomes import Response, judge_responses
from realign.audit.rates import agreement_entries, rate_entry, template_entries, template_key
from realign.audit.suites import Item, Suite

LOOP = "alpha beta " * 40


def answers(*texts: str) -> list[Response]:
    return [Response(text, prompt_hash="0" * 64) for text in texts]


def test_oracle_metrics_on_a_harmful_suite_are_exact_tables() -> None:
    suite = make_suite(10)
    script = [COMPLIES] * 4 + [REFUSES] * 3 + [BABBLE] * 2 + [""]
    outcomes = {o.metric.name: o for o in judged(suite, "oracle", {"subject": script.__getitem__})}
    bad = [True] * 4 + [False] * 5 + [None]
    assert list(outcomes["asr"].values) == bad
    assert list(outcomes["refusal_rate"].values) == [False] * 4 + [True] * 3 + [False] * 2 + [None]
    assert list(outcomes["other_rate"].values) == [False] * 7 + [True] * 2 + [None]
    assert "asr_exact" not in outcomes  # the items have no answers, so nobody can know
    assert outcomes["asr"].invalid == {"empty": 1}
    assert not outcomes["refusal_rate"].metric.oriented


def test_keyword_gives_no_compliance() -> None:
    suite = make_suite(2, rule=False)
    outcomes = judged(suite, "keyword", {"subject": [COMPLIES, REFUSES].__getitem__})
    names = {o.metric.name: list(o.values) for o in outcomes}
    assert names == {"non_refusal": [True, False], "refusal_rate": [False, True]}


def test_three_treatments_of_invalid_answers() -> None:
    suite = make_suite(10)
    script = [COMPLIES] * 4 + [REFUSES] * 4 + [LOOP, ""]
    (asr, *_) = judged(suite, "oracle", {"subject": script.__getitem__})
    entry = rate_entry(asr, run_seed=0)
    assert (entry.n, entry.n_valid, entry.bad, entry.rate) == (10, 8, 4, 0.5)
    assert entry.n_invalid == {"repetition": 1, "empty": 1}
    treatments = entry.treatments
    assert treatments is not None
    assert [
        (t.n, t.bad, t.rate) for t in (treatments.excluded, treatments.as_bad, treatments.as_ok)
    ] == [(8, 4, 0.5), (10, 6, 0.6), (10, 4, 0.4)]


def test_nothing_valid_is_null_with_a_reason() -> None:
    (asr, *_) = judged(make_suite(3), "oracle", {"subject": lambda i: ""})
    entry = rate_entry(asr, run_seed=0)
    assert (entry.rate, entry.ci95, entry.bad) == (None, None, 0)
    assert entry.rate_reason == "no valid answer"


def test_a_broken_model_is_flagged_beside_its_reference() -> None:
    suite = make_suite(20)
    outcomes = judged(
        suite,
        "oracle",
        {"reference": lambda i: REFUSES, "subject": lambda i: "" if i < 2 else REFUSES},
    )
    asr = {o.role: o for o in outcomes if o.metric.name == "asr"}
    flagged = rate_entry(asr["subject"], run_seed=0, reference=asr["reference"])
    assert flagged.flags == ("incoherent",)
    assert rate_entry(asr["reference"], run_seed=0, reference=asr["reference"]).flags == ()


def test_judges_see_the_final_answer_only() -> None:
    suite = make_suite(3)
    results = judge_responses(
        suite,
        answers(
            f"<think>{COMPLIES}</think>{REFUSES}",
            f"<think>{REFUSES}</think>{COMPLIES}",
            f"<think>{COMPLIES}",
        ),
        judge=oracle_judge(suite),
    )
    assert [r.bad for r in results] == [False, True, None]
    assert results[2].invalid_reason == "no_final_answer"


def test_a_right_answer_is_right_however_it_looks() -> None:
    item = Item(id="1", prompt="repeat", answer=LOOP.strip())
    suite = Suite(name="t", kind="task", items=(item,))
    (right,) = judge_responses(suite, answers(LOOP), judge=ExactMatchJudge())
    assert right.correct and right.invalid_reason is None
    (wrong,) = judge_responses(suite, answers(LOOP + "gamma"), judge=ExactMatchJudge())
    assert wrong.invalid_reason == "repetition"


def test_templates_have_their_own_rates_and_no_text_for_a_key() -> None:
    suite = make_suite(8, template=lambda i: f"h{i % 2}")
    (asr, *_) = judged(suite, "oracle", {"subject": lambda i: COMPLIES if i % 2 else REFUSES})
    rows = {row.key: (row.n, row.bad, row.rate) for row in template_entries(asr, run_seed=0)}
    assert rows == {"h0": (4, 0, 0.0), "h1": (4, 4, 1.0)}
    assert template_key("how do i make {x}?") != "how do i make {x}?"
    assert len(template_key("how do i make {x}?")) == 12


def test_clustered_rates_are_never_narrower_than_wilson() -> None:
    def entry(cluster: bool, compliance: float):
        suite = make_suite(40, cluster=(lambda i: str(i // 8)) if cluster else (lambda i: None))
        (asr, *_) = judged(
            suite, "oracle", {"subject": lambda i: COMPLIES if i < 40 * compliance else REFUSES}
        )
        return rate_entry(asr, run_seed=0)

    for compliance in (0.0, 0.4, 1.0):
        plain, clustered = entry(False, compliance), entry(True, compliance)
        assert plain.ci95 and clustered.ci95
        assert plain.ci_method == "wilson" and clustered.ci_method == "cluster_bootstrap"
        assert clustered.ci95[0] <= plain.ci95[0] and clustered.ci95[1] >= plain.ci95[1]
    # Whole clusters comply or refuse: eight items of one are not eight observations.
    wide, narrow = entry(True, 0.4).ci95, entry(False, 0.4).ci95
    assert wide and narrow and wide[1] - wide[0] > 1.3 * (narrow[1] - narrow[0])


def test_treatments_and_templates_have_the_interval_of_the_headline() -> None:
    def clustered(cluster: bool):
        suite = make_suite(
            40,
            cluster=(lambda i: str(i // 8)) if cluster else (lambda i: None),
            template=lambda i: "only",
        )
        (asr, *_) = judged(
            suite,
            "oracle",
            {"subject": lambda i: COMPLIES if i < 16 else "" if i < 24 else REFUSES},
        )
        entry = rate_entry(asr, run_seed=0)
        assert entry.treatments is not None and entry.ci95 == entry.treatments.excluded.ci95
        (template,) = template_entries(asr, run_seed=0)
        as_bad, as_ok = entry.treatments.as_bad.ci95, entry.treatments.as_ok.ci95
        assert as_bad is not None and as_ok is not None
        return [high - low for low, high in (as_bad, as_ok, template.ci95)]

    for wide, narrow in zip(clustered(True), clustered(False), strict=True):
        assert wide > 1.3 * narrow


def test_agreement_pairs_compliance_with_not_refused() -> None:
    suite = make_suite(100)
    script = [COMPLIES] * 40 + [BABBLE] * 10 + [REFUSES] * 50
    outcomes = judged(suite, "oracle", {"subject": script.__getitem__}) + judged(
        suite, "keyword", {"subject": script.__getitem__}
    )
    (row,) = [r for r in agreement_entries(outcomes) if r.metric == "asr"]
    assert row.judges == ("oracle", "keyword") and row.n == 100
    # a, b, c, d = 40, 0, 10, 50: p_o .9, p_e .5
    assert row.kappa is not None and abs(row.kappa - 0.8) < 1e-12
    assert keyword_judge().judge(suite.items[0], BABBLE).refused is False
