"""Scripted models for the audit's tests: responses by item, through the real pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from realign.audit.comparisons import comparison_entries
from realign.audit.families import family_entries
from realign.audit.gates import Results
from realign.audit.instruments import Generation, Instrument, JudgeIdentity
from realign.audit.judges import ExactMatchJudge, keyword_judge
from realign.audit.oracle import load_rule, oracle_judge
from realign.audit.outcomes import Outcome, Response, Scores, judge_responses, outcomes_of
from realign.audit.pairing import Key, Pairing, pair_all
from realign.audit.policy import Policy, parse_policy
from realign.audit.rates import agreement_entries
from realign.audit.schema import ComparisonEntry, Role
from realign.audit.suites import Item, Suite, SuiteKind

Script = Callable[[int], str]
"""The response to item number i."""

COMPLIES = "to make alpha, mix beta with gamma and then stir it."
REFUSES = "i'm sorry, but i cannot help with alpha."
BABBLE = "alpha beta gamma delta."


def make_suite(
    n: int,
    *,
    name: str = "harmful",
    kind: SuiteKind = "harmful",
    rule: bool = True,
    cluster: Callable[[int], str | None] = lambda i: None,
    **fields: Callable[[int], str],
) -> Suite:
    items = tuple(
        Item(
            id=f"{name}-{i:04d}",
            prompt=f"ALPHA-REQUEST number {i}",
            cluster=cluster(i),
            **{key: value(i) for key, value in fields.items()},
        )
        for i in range(n)
    )
    reference = load_rule().reference if rule else None
    return Suite(name=name, kind=kind, items=items, rule=reference, max_new_tokens=16)


def instrument(suite: Suite, judge: str) -> Instrument:
    rules = {
        "oracle": lambda: oracle_judge(suite).judge_hash,
        "keyword": lambda: keyword_judge().judge_hash,
        "exact-match": lambda: ExactMatchJudge().judge_hash,
        "logprob": lambda: "f" * 64,
    }
    kind = {"keyword": "lexicon", "logprob": "logprob"}.get(judge, "exact")
    return Instrument(
        suite=suite,
        generation=Generation(mode="greedy", max_new_tokens=16),
        judge=JudgeIdentity(name=judge, kind=kind, judge_hash=rules[judge]()),  # type: ignore[arg-type]
    )


def judged(suite: Suite, judge: str, scripts: Mapping[Role, Script]) -> list[Outcome]:
    maker = {
        "oracle": lambda: oracle_judge(suite),
        "keyword": keyword_judge,
        "exact-match": ExactMatchJudge,
    }[judge]
    results = {
        role: judge_responses(
            suite,
            [Response(script(i), prompt_hash="0" * 64) for i in range(len(suite.items))],
            judge=maker(),
        )
        for role, script in scripts.items()
    }
    return outcomes_of(instrument(suite, judge), results)


def columns_of(columns: Sequence[Outcome | Scores]) -> dict[Key, dict[Role, Outcome | Scores]]:
    found: dict[Key, dict[Role, Outcome | Scores]] = {}
    for column in columns:
        metric = column.metric if isinstance(column, Scores) else column.metric.name
        key = (column.instrument.suite.name, column.instrument.judge.name, metric)
        found.setdefault(key, {})[column.role] = column
    return found


def compared(
    columns: Sequence[Outcome | Scores],
    *,
    policy: Policy | None = None,
    primary: Mapping[str, str] | None = None,
    seed: int = 0,
) -> tuple[list[Pairing], list[ComparisonEntry]]:
    table = {
        key: by_role
        for key, by_role in columns_of(columns).items()
        if not isinstance(c := next(iter(by_role.values())), Outcome) or c.metric.oriented
    }
    pairings = pair_all(table, run_seed=seed)
    entries = comparison_entries(
        pairings,
        columns=table,
        policy=policy,
        primary=primary or {},
        self_churn={},
        run_seed=seed,
    )
    return pairings, entries


def gate_results(
    columns: Sequence[Outcome | Scores],
    *,
    policy: Policy,
    primary: Mapping[str, str],
    secondary: tuple[str, ...] = (),
) -> Results:
    pairings, entries = compared(columns, policy=policy, primary=primary)
    return Results(
        columns=columns_of(columns),
        comparisons=entries,
        families=family_entries(pairings, primary=primary),
        agreement=agreement_entries([c for c in columns if isinstance(c, Outcome)]),
        primary=primary,
        secondary=secondary,
        run_seed=0,
        reasons={},
    )


def policy_of(gates: str, *, head: str = "") -> Policy:
    return parse_policy(f'schema = "realign/policy/1"\n{head}\ngate = [{gates}]')


def two_by_two(e: int, b: int, c: int, d: int) -> tuple[Script, Script]:
    """Comparator and candidate whose paired table of compliance is e, b, c, d."""

    def first(i: int) -> str:
        return COMPLIES if i < e or e + b <= i < e + b + c else REFUSES

    def second(i: int) -> str:
        return COMPLIES if i < e + b else REFUSES

    assert d >= 0
    return first, second
