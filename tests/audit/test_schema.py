from __future__ import annotations

import json
from pathlib import Path

import pytest

from realign.audit import schema, schema_inputs, schema_results
from realign.audit.schema import (
    GateCounts,
    Report,
    Run,
    atomic_write,
    finite,
    parse_report,
    read_report,
    write_report,
)
from realign.errors import OutputError, UsageError

EXAMPLE = Path(__file__).parent / "data" / "report-example.json"


def test_the_published_example_is_a_report() -> None:
    report = parse_report(EXAMPLE.read_text(encoding="utf-8"))
    assert report.exit_code == 0
    drift, residual = report.comparisons
    assert (drift.verdict, residual.verdict) == ("drift", "within_margin")
    assert residual.recovered_fraction == 1.090909
    assert report.weights is not None and report.weights.global_["alignment_retained"] == 0.542857
    assert report.summary.gates == GateCounts.model_validate({"pass": 1})
    assert report.models["repaired"].content_digest is not None


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = parse_report(EXAMPLE.read_text(encoding="utf-8"))
    path = tmp_path / "audit.json"
    write_report(report, path)
    assert read_report(path) == report
    plain = json.loads(path.read_text(encoding="utf-8"))
    assert plain["schema"] == "realign/audit-report/1" and plain["summary"]["gates"]["pass"] == 1
    assert list(plain) == sorted(plain)
    assert [p.name for p in tmp_path.iterdir()] == ["audit.json"]


def test_every_field_of_the_example_is_kept() -> None:
    example = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    written = json.loads(parse_report(example).to_json())

    def contained(part: object, whole: object) -> None:
        if isinstance(part, dict):
            assert isinstance(whole, dict)
            for key, value in part.items():
                contained(value, whole[key])
        elif isinstance(part, list):
            assert isinstance(whole, list) and len(part) == len(whole)
            for one, other in zip(part, whole, strict=True):
                contained(one, other)
        else:
            assert part == whole

    contained(example, written)


def test_unknown_fields_are_ignored_and_wrong_ones_named(tmp_path: Path) -> None:
    example = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    parse_report(example | {"new_in_1": [1]})
    for change, named in [
        ({"schema": "realign/audit-report/2"}, "schema"),
        ({"limits": []}, "limits"),
        ({"rates": [{"instrument_id": "x"}]}, "rates"),
        ({"summary": {"headline": ["x"] * 6}}, "headline"),
    ]:
        with pytest.raises(UsageError, match=named):
            parse_report(example | change)
    with pytest.raises(UsageError, match=r"absent\.json"):
        read_report(tmp_path / "absent.json")


def test_numbers_are_finite_or_null() -> None:
    example = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    example["rates"][0]["rate"] = float("nan")
    with pytest.raises(UsageError, match="rate"):
        parse_report(example)
    assert finite(float("inf")) is None and finite(None) is None and finite(1) == 1.0


def test_exit_codes_are_three() -> None:
    fields = parse_report(EXAMPLE.read_text(encoding="utf-8")).run.model_dump()
    for code in (0, 1, 2):
        assert Run.model_validate(fields | {"exit_code": code}).exit_code == code
    with pytest.raises(ValueError):
        Run.model_validate(fields | {"exit_code": 3})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    atomic_write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "new \ud800")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OutputError):
        atomic_write(tmp_path / "missing" / "audit.json", "x")


def test_the_schema_can_be_published() -> None:
    schema = Report.model_json_schema(by_alias=True)
    assert {"schema", "rates", "comparisons", "limits"} <= set(schema["properties"])


def test_every_part_can_be_imported_beside_the_report() -> None:
    for part in (schema_inputs, schema_results):
        own = {
            name
            for name, value in vars(part).items()
            if isinstance(value, type) and value.__module__ == part.__name__ and name != "Part"
        }
        assert own <= set(schema.__all__)
