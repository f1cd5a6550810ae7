"""The streaming benchmark runs, measures what it says, and its page holds what the data say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

pytestmark = [
    pytest.mark.skipif(
        not Path("/proc/self/io").exists(), reason="the benchmark reads memory from /proc"
    ),
    pytest.mark.timeout(600),  # ten processes that import torch: half a minute, minutes when busy
]


def run_module(name: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.streaming{name}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.streaming.family import SHAPES, build

        build(folder, SHAPES["toy"])
    finally:
        sys.path.remove(str(ROOT))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return LlamaForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def test_the_family_loads_and_its_vectors_have_the_stated_size(family: Path) -> None:
    base, aligned, finetuned = (weights(family / role) for role in ("base", "aligned", "finetuned"))
    assert base.keys() == aligned.keys() == finetuned.keys()
    assert {tensor.dtype for tensor in base.values()} == {torch.bfloat16}
    assert len(list((family / "base").glob("model-*.safetensors"))) == 2
    name = "model.layers.1.mlp.down_proj.weight"
    w_b, w_a, w_f = (each[name].double() for each in (base, aligned, finetuned))
    assert 0.015 < float((w_a - w_b).norm() / w_b.norm()) < 0.025
    safety = torch.linalg.svdvals(w_a - w_b).square()
    # Half of the energy is in eight directions; noise of this shape has about an eighth there.
    assert float(safety[:8].sum() / safety.sum()) > 0.4
    # The fine-tune lost part of it.
    lost = float(((w_f - w_b) * (w_a - w_b)).sum() / (w_a - w_b).square().sum())
    assert 0.4 < lost < 0.95
    tokenizer = AutoTokenizer.from_pretrained(family / "finetuned")
    assert tokenizer("a b")["input_ids"] == [3, 4]


def test_the_same_seed_gives_the_same_bytes(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.streaming.family import SHAPES, build

    build(tmp_path / "same", SHAPES["toy"])
    build(tmp_path / "other", SHAPES["toy"], seed=1)
    file = "finetuned/model-00002-of-00002.safetensors"
    expected = (family / file).read_bytes()
    assert (tmp_path / "same" / file).read_bytes() == expected
    assert (tmp_path / "other" / file).read_bytes() != expected


def launch(tmp_path: Path, code: str) -> Mapping[str, Any]:
    launcher = ROOT / "benchmarks" / "streaming" / "launch.py"
    command = [sys.executable, "-I", "-S", "-c", code]
    subprocess.run(
        [sys.executable, "-I", "-S", launcher, tmp_path / "result", tmp_path / "log", *command],
        check=True,
        timeout=60,
    )
    return json.loads((tmp_path / "result").read_text())


def test_the_launcher_measures_the_child_and_not_its_own_parent(tmp_path: Path) -> None:
    ballast = torch.ones(75 * 2**20)  # 300 MiB of this process
    small = launch(tmp_path, "pass")
    assert small["exit"] == 0
    assert small["peak_rss"] < 60 * 2**20 < ballast.nbytes
    code = "import os; block = b'x' * (200 * 2**20); os.write(1, block[:5 * 2**20]); os._exit(3)"
    large = launch(tmp_path, code)
    assert large["exit"] == 3
    assert 200 * 2**20 < large["peak_rss"] < 260 * 2**20
    assert 5 * 2**20 <= large["bytes_written"] < 6 * 2**20


def test_memory_of_grandchildren_counts(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys;"
        "c = \"b = b'x' * (100 * 2**20); import time; time.sleep(0.6)\";"
        "p = [subprocess.Popen([sys.executable, '-I', '-S', '-c', c]) for _ in range(2)];"
        "[each.wait() for each in p]"
    )
    found = launch(tmp_path, code)
    assert found["processes"] == 3
    assert found["peak_tree"] > 200 * 2**20


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything but mergekit and the large shapes, with its page."""
    work = tmp_path_factory.mktemp("bench")
    docs = work / "docs"
    (docs / "data").mkdir(parents=True)
    shutil.copy(DOCS / "benchmarks.md", docs)
    run_module(
        "",
        *("compare", "scaling", "page", "--work", work, "--docs", docs, "--no-mergekit"),
        *("--shape", "toy", "--families", "toy", "--repeats", "1"),
    )
    return docs


def test_the_comparison_measures_every_contender(measured: Path) -> None:
    found = json.loads((measured / "data" / "bench-compare.json").read_text())
    ours = ["realign", "realign, first run"]
    assert list(found["contenders"]) == ["floor", "floor + SHA-256", *ours, "naive"]
    for each in found["contenders"].values():
        assert each["wall"]["median"] > 0
        assert each["bytes_written"]["median"] >= found["checkpoint_bytes"]
    for name in ("floor", "floor + SHA-256", *ours):  # the naive script maps its inputs
        read = found["contenders"][name]["bytes_read"]["median"]
        assert read >= 3 * found["checkpoint_bytes"]
    floor, naive = found["ratios"]["floor"], found["ratios"]["naive"]
    wall = {name: each["wall"]["median"] for name, each in found["contenders"].items()}
    assert floor["wall"]["median"] == pytest.approx(wall["realign"] / wall["floor"])
    assert naive["wall"]["median"] == pytest.approx(wall["naive"] / wall["realign"])
    first = found["ratios_of_first_run"]
    assert set(first) == set(found["ratios"]) == {"floor", "floor + SHA-256", "naive"}
    assert first["naive"]["wall"]["median"] == pytest.approx(
        wall["naive"] / wall["realign, first run"]
    )


def test_our_output_is_the_float32_reference(measured: Path) -> None:
    found = json.loads((measured / "data" / "bench-compare.json").read_text())["agreement"]
    for name in ("realign", "realign, first run", "naive"):
        assert found[name]["elements"] == 158_016
        assert found[name]["identical_to_reference"] == 1.0
        assert found[name]["error_over_edit"] == 0.0


def test_the_scaling_run_records_prediction_and_bound(measured: Path) -> None:
    (found,) = json.loads((measured / "data" / "bench-scaling.json").read_text())["runs"]
    assert found["measured"]["peak_memory"] < found["bound"] == 400e6
    ratio = found["predicted"]["peak_memory"] / found["measured"]["peak_memory"]
    assert found["predicted_over_measured"]["peak_memory"] == ratio
    assert 0.6 < ratio < 1.6


def test_a_measurement_gets_onto_the_page(measured: Path) -> None:
    text = (measured / "benchmarks.md").read_text()
    found = json.loads((measured / "data" / "bench-compare.json").read_text())
    wall = found["contenders"]["realign"]["wall"]["median"]
    assert f"| realign | {wall:.2f} (" in text
    assert (measured / "pictures" / "bench-compare.png").stat().st_size > 10_000
    assert "](pictures/bench-compare.png)" in text


def copy_of_the_page(folder: Path) -> Path:
    shutil.copytree(DOCS / "data", folder / "data")
    shutil.copytree(DOCS / "pictures", folder / "pictures")
    shutil.copy(DOCS / "benchmarks.md", folder)
    return folder / "benchmarks.md"


def test_the_page_holds_what_the_data_say(tmp_path: Path) -> None:
    page = copy_of_the_page(tmp_path)
    run_module(".page", tmp_path)
    assert page.read_text() == (DOCS / "benchmarks.md").read_text()


def test_pictures_are_linked_where_they_exist(tmp_path: Path) -> None:
    page = copy_of_the_page(tmp_path)
    for name in ("compare", "scaling", "memory"):
        (tmp_path / "pictures" / f"bench-{name}.png").unlink(missing_ok=True)
    run_module(".page", tmp_path)
    assert "](pictures/" not in page.read_text()
    (tmp_path / "pictures" / "bench-memory.png").write_bytes(b"drawn")
    run_module(".page", tmp_path)
    assert page.read_text().count("](pictures/") == 1
    assert "![Peak memory: measured, predicted, and the bound](pictures/bench-memory.png)" in (
        page.read_text()
    )


def test_a_figure_that_was_edited_by_hand_is_noticed(tmp_path: Path) -> None:
    """The test above can fail: the script puts an altered row back."""
    page = copy_of_the_page(tmp_path)
    text = page.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| Peak RSS"))
    page.write_text(text.replace(row, "| Peak RSS | 0 |", 1))
    run_module(".page", tmp_path)
    assert page.read_text() == text


def test_the_fit_finds_a_straight_line_and_its_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.streaming.scaling import fit

    def row(name: str, gb: float, wall: float, peak: float) -> dict[str, Any]:
        return {
            "family": name,
            "method": "resta",
            "moved_bytes": gb * 1e9,
            "wall": {"median": wall},
            "peak_rss": {"median": peak},
        }

    exact = [row("a", 1, 2.5, 300), row("b", 2, 3.0, 300), row("c", 8, 6.0, 330)]
    straight, bent = fit(exact), fit([*exact[:2], row("d", 8, 9.0, 330)])
    assert straight is not None
    assert bent is not None
    assert straight["seconds_at_zero"] == pytest.approx(2.0)
    assert straight["seconds_per_gb"] == pytest.approx(0.5)
    assert straight["largest_relative_residual"] < 1e-9
    assert straight["peak_rss_most_over_least"] == pytest.approx(1.1)
    assert bent["largest_relative_residual"] > 0.05
    assert bent["r_squared"] < straight["r_squared"]
    assert fit(exact[:2]) is None


def test_targets_say_met_missed_and_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.streaming.targets import rows

    assert {row.met for row in rows({})} == {None}

    def ratio(value: float) -> dict[str, Any]:
        spread = {"median": value, "min": value, "max": value}
        return {"wall": spread, "wall_without_start_up": spread, "peak_rss": spread}

    compare = {
        "parameters": 1.1e9,
        "contenders": {"realign": {"peak_rss": {"max": 401e6}}},
        "ratios": {"floor": ratio(1.4), "mergekit": ratio(2.49), "naive": ratio(20)},
    }
    other = {"targets": [{"what": "GPU: end to end", "target": "1.3x", "measured": None}]}
    found = rows({"compare": compare, "gpu": other})
    met = {row.what: row.met for row in found}
    assert met["Element-wise repair (RESTA), wall over the read-write floor"] is True
    assert met["Element-wise repair (RESTA), wall against mergekit"] is False
    assert met["Peak RSS of an element-wise repair"] is False
    assert met["Peak RSS against the naive script"] is True
    assert [row.what for row in found if row.what.startswith("GPU")] == ["GPU: end to end"]
