"""Methods by name, their settings and their errors, plug-ins, and the safety vector."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from realign.errors import UsageError
from realign.repair.method import Method, settle_safety_vector
from realign.repair.methods.delta_svd import DeltaSvd
from realign.repair.methods.lssf import Lssf
from realign.repair.methods.replace import Replace
from realign.repair.methods.resta import Resta
from realign.repair.methods.wise_ft import WiseFt
from realign.repair.parameters import Either, Integer, Real
from realign.repair.registry import METHODS, build_method, find_method, method_names

ALL = list(METHODS.values())


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_every_parameter_is_described_and_its_default_is_legal(method: type[Method]) -> None:
    parameters = method.parameters()
    assert [p.name for p in parameters] == [f.name for f in dataclasses.fields(method)]
    for each in parameters:
        assert each.domain.admits(each.default), each.name
        assert each.description.endswith("."), each.name
        assert each.source, each.name
    assert method().settings() == {p.name: p.default for p in parameters}


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("lssf", ["eta=0.9", "standardize=token"], Lssf(eta=0.9, standardize="token")),
        ("lssf", ["rank_rule=12", "max_rank=none"], Lssf(rank_rule=12)),
        ("lssf", ["max_rank = 4"], Lssf(max_rank=4)),
        ("delta_svd", ["rank=entropy"], DeltaSvd(rank="entropy")),
        ("delta_svd", {"rank": 6, "alpha": "1.25"}, DeltaSvd(rank=6, alpha=1.25)),
        ("resta", ["gamma=1"], Resta(gamma=1.0)),
        ("wise_ft", ["a=1e-1"], WiseFt(a=0.1)),
        ("replace", ["side=left", "rank=4"], Replace(side="left", rank=4)),
        ("replace", (), Replace()),
    ],
)
def test_settings_become_a_method(name: str, settings: object, expected: Method) -> None:
    assert build_method(name, settings) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "settings", "message", "hint"),
    [
        ("lssf", ["eta=1.5"], "eta = 1.5 is out of range for lssf", "a number in [0, 1]"),
        ("lssf", ["eta=nan"], "eta = nan", "a number in [0, 1]"),
        ("lssf", ["eta=high"], "eta = high", "default 0.85"),
        ("lssf", ["standardize=row"], "standardize = row", "`neuron`, `token` or `none`"),
        ("lssf", ["min_tokens=0"], "min_tokens = 0", "a whole number >= 1"),
        ("lssf", ["min_tokens=2.5"], "min_tokens = 2.5", "a whole number >= 1"),
        ("delta_svd", ["rank=0"], "rank = 0", "a whole number >= 1, or `energy` or `entropy`"),
        ("delta_svd", ["rank=stable"], "rank = stable", "`energy` or `entropy`"),
        ("resta", ["gamma=-1"], "gamma = -1", "a number >= 0"),
        ("resta", ["gamma=inf"], "gamma = inf", "a number >= 0"),
        ("wise_ft", ["a=1.01"], "a = 1.01", "a number in [0, 1]"),
        ("wise_ft", {"a": True}, "a = True", "a number in [0, 1]"),
        ("replace", ["rank=-1"], "rank = -1", "a whole number >= 0"),
        ("lssf", ["etta=0.9"], "lssf has no parameter etta", "did you mean eta?"),
        ("lssf", ["eta"], "'eta' is not of the form name=value", "--set"),
        ("lssf", ["eta=0.9", "eta=0.8"], "eta is set twice", "--set"),
        ("lsff", [], "there is no method lsff", "did you mean lssf?"),
    ],
)
def test_wrong_settings_are_refused_with_the_legal_range(
    name: str, settings: object, message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        build_method(name, settings)  # type: ignore[arg-type]
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_constructed_method_is_checked_as_well() -> None:
    with pytest.raises(UsageError, match="alpha1 = -1"):
        Lssf(alpha1=-1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Lssf().eta = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_strength_is_a_finite_number_from_zero(strength: float) -> None:
    with pytest.raises(UsageError, match="strength"):
        Resta().validate_strength(strength)
    Resta().validate_strength(0.0)
    Resta().validate_strength(3.0)


def test_domains_read_and_describe() -> None:
    both = Either((Integer(1, 3), Real(0.0)))
    assert both.parse("2") == 2
    assert both.parse("2.5") == 2.5
    assert both.admits(2.5)
    assert not both.admits("2")
    assert Integer(1, 3).describe() == "a whole number in [1, 3]"
    assert Real(high=2.0).describe() == "a number <= 2"
    assert Real().describe() == "a number"


# ---- the safety vector ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "available", "kind", "deviates"),
    [
        (Lssf(), {"base", "unaligned"}, "unaligned", False),
        (Lssf(), {"base"}, "base", True),
        (Resta(), {"unaligned"}, "unaligned", False),
        (DeltaSvd(), {"base", "unaligned"}, "base", False),
        (DeltaSvd(), {"unaligned"}, "unaligned", True),
        (Replace(), {"base", "unaligned"}, "base", False),
        (Replace(safety_vector="auto"), {"unaligned"}, "unaligned", True),
        (Lssf(safety_vector="base"), {"base", "unaligned"}, "base", True),
    ],
)
def test_auto_takes_the_papers_vector_if_it_can(
    method: Method, available: set[str], kind: str, deviates: bool
) -> None:
    settled = settle_safety_vector(method, available)
    assert settled.method.vector_kind == kind
    assert settled.method.required_roles() == {"aligned", kind}
    assert settled.note.startswith("deviation") is deviates
    if deviates:
        assert f"aligned - {kind}" in settled.note.split("this run uses")[1]


def test_a_vector_that_nobody_gave_is_refused() -> None:
    with pytest.raises(UsageError, match="resta needs a safety vector") as caught:
        settle_safety_vector(Resta(), set())
    assert "--base" in caught.value.hint
    with pytest.raises(UsageError, match="needs the unaligned model"):
        settle_safety_vector(Lssf(safety_vector="unaligned"), {"base"})


def test_methods_without_a_vector_need_only_the_aligned_model() -> None:
    settled = settle_safety_vector(WiseFt(), set())
    assert settled.method.vector_kind is None
    assert settled.method.required_roles() == {"aligned"}
    assert settled.note == ""


# ---- plug-ins ------------------------------------------------------------------------------------

PLUGIN = '''
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
from realign.repair.edit import Dense, Edit, Layer
from realign.repair.method import Card, Method
from realign.repair.preparation import Statistics
from realign.repair.parameters import Real, parameter

@dataclass(frozen=True, kw_only=True)
class Halve(Method):
    name: ClassVar[str] = "halve"
    card: ClassVar[Card] = Card(
        title="t", source="s", summary="s", idea="i", equations="e", inputs="i", touches="t",
        edit_kind="dense", cost="c",
    )
    by: float = parameter(0.5, Real(0.0, 1.0), source="a test")
    """How much."""

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        return Dense(layer.finetuned.float() * -self.by)

NOT_A_METHOD = 3
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real installed distribution, as a pip of a third party would leave it."""
    (tmp_path / "halving_plugin.py").write_text(PLUGIN, encoding="utf-8")
    info = tmp_path / "halving-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halving\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[realign.methods]\n"
        "halve = halving_plugin:Halve\n"
        "broken = no_such_module_at_all:Thing\n"
        "odd = halving_plugin:NOT_A_METHOD\n"
        "lssf = halving_plugin:Halve\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "halving_plugin", raising=False)


@pytest.mark.usefixtures("plugin")
def test_a_third_party_adds_a_method_by_an_entry_point() -> None:
    assert method_names()[: len(METHODS)] == tuple(METHODS)
    assert {"halve", "broken", "odd"} <= set(method_names())
    assert build_method("halve", ["by=0.25"]).settings() == {"by": 0.25}
    assert [p.description for p in find_method("halve").parameters()] == ["How much."]


@pytest.mark.usefixtures("plugin")
def test_plug_ins_cannot_break_or_take_over_the_rest() -> None:
    assert find_method("lssf") is Lssf
    with pytest.raises(UsageError, match=r"the method broken .* cannot be loaded"):
        find_method("broken")
    with pytest.raises(UsageError, match="is not a repair method"):
        find_method("odd")
