"""Every figure of a comparison against dense float64, for all ways in which models differ."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoint_support import LLAMA, Notes, llama_tensors, load_folder, write_model
from support.diff_support import dense, difference, oracle, stacked

from realign.diff.result import Difference, Row
from realign.errors import MismatchError, UsageError

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "small"
EMBEDDINGS = "model.embed_tokens.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def row(found: Difference, name: str) -> Row:
    (result,) = [each for each in found.rows if each.name == name]
    return result


def assert_figures(figures: Any, expected: dict[str, float]) -> None:
    got = asdict(figures)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-12, abs=1e-15), name


@pytest.fixture(scope="module")
def family() -> Difference:
    return difference(FIXTURES / "aligned", FIXTURES / "howto", reference=FIXTURES / "base")


def test_every_tensor_of_a_real_family_against_dense_float64(family: Difference) -> None:
    a, b, r = (load_folder(FIXTURES / name) for name in ("aligned", "howto", "base"))
    assert {each.name for each in family.rows} == set(a)
    for each in family.rows:
        one, two, three = dense(a[each.name]), dense(b[each.name]), dense(r[each.name])
        assert each.figures is not None
        if each.status == "identical":
            assert np.array_equal(one, two) and each.figures.cosine == 1.0
            continue
        assert_figures(each.figures, oracle(one, two))
        task, alignment = two - one, one - three
        cosine = task @ alignment / (np.linalg.norm(task) * np.linalg.norm(alignment))
        assert each.figures.cosine_reference == pytest.approx(cosine, rel=1e-12, abs=1e-14)


def test_sums_over_layers_modules_and_everything(family: Difference) -> None:
    a, b = (load_folder(FIXTURES / name) for name in ("aligned", "howto"))
    assert_figures(family.total.figures, oracle(stacked(a, list(a)), stacked(b, list(a))))
    for layer in family.layers:
        names = [name for name in a if f".layers.{layer.key}." in name]
        assert layer.tensors == len(names) > 0
        assert_figures(layer.figures, oracle(stacked(a, names), stacked(b, names)))
    for module in family.modules:
        names = [name for name in a if name.split(".")[-2] == module.key]
        assert_figures(module.figures, oracle(stacked(a, names), stacked(b, names)))


def test_spectra_against_numpys_singular_values(family: Difference) -> None:
    a, b = (load_folder(FIXTURES / name) for name in ("aligned", "howto"))
    seen = 0
    for each in family.rows:
        for found in each.spectra:
            delta = (b[each.name].double() - a[each.name].double()).numpy()
            sigma = np.linalg.svd(delta, compute_uv=False)
            energy = sigma**2
            p = energy[energy > 0] / energy.sum()
            assert found.singular_values == pytest.approx(sigma[:8].tolist(), rel=1e-9)
            assert found.stable_rank == pytest.approx(energy.sum() / energy[0], rel=1e-9)
            assert found.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-7)
            assert found.top_share == pytest.approx(energy[:8].sum() / energy.sum(), rel=1e-9)
            assert found.shape == delta.shape
            seen += 1
    assert seen == sum(1 for name in a if a[name].ndim == 2 and not torch.equal(a[name], b[name]))


def test_a_model_is_identical_to_itself() -> None:
    found = difference(FIXTURES / "howto", FIXTURES / "howto")
    assert found.identical and found.same_weights and found.files == ()
    assert set(found.counts) == {"identical"}
    figures = found.total.figures
    assert (figures.relative, figures.cosine, figures.largest, figures.changed) == (
        0.0,
        1.0,
        0.0,
        0,
    )
    assert not any(each.spectra for each in found.rows)


def test_swapping_the_sides_swaps_the_norms(family: Difference) -> None:
    back = difference(FIXTURES / "howto", FIXTURES / "aligned")
    for one, two in zip(family.rows, back.rows, strict=True):
        f, g = one.figures, two.figures
        assert f is not None and g is not None
        assert (f.norm_a, f.norm_b, f.norm_delta) == (g.norm_b, g.norm_a, g.norm_delta)
        assert (f.cosine, f.largest, f.changed) == (g.cosine, g.largest, g.changed)


def test_sharding_and_pieces_change_nothing(tmp_path: Path) -> None:
    a, b = llama_tensors(seed=1), llama_tensors(seed=2)
    names = list(a)
    whole = difference(write_model(tmp_path / "a", a), write_model(tmp_path / "b", b))
    sharded = difference(
        write_model(tmp_path / "sa", a, shards=[names[:3], names[3:]]),
        write_model(tmp_path / "sb", b, shards=[names[7:], names[:2], names[2:7]]),
        piece_bytes=40,
    )
    for name in names:
        one, two = row(whole, name), row(sharded, name)
        assert one.figures is not None and two.figures is not None
        assert_figures(two.figures, oracle(dense(a[name]), dense(b[name])))
        assert [s.singular_values for s in one.spectra] == [s.singular_values for s in two.spectra]


def test_types_that_differ_are_compared_by_value(tmp_path: Path) -> None:
    a = llama_tensors(seed=1)
    b = {name: tensor.to(torch.bfloat16) for name, tensor in a.items()}
    b["model.norm.weight"] = a["model.norm.weight"].half()
    b["lm_head.weight"] = a["lm_head.weight"].double()
    found = difference(write_model(tmp_path / "a", a), write_model(tmp_path / "b", b))
    assert set(found.counts) == {"dtype_differs"}
    for name in a:
        figures = row(found, name).figures
        assert figures is not None
        if name == "lm_head.weight":
            assert figures.changed == 0 and figures.relative == 0.0
        else:
            assert_figures(figures, oracle(dense(a[name]), dense(b[name])))


def test_an_extended_vocabulary_is_compared_on_the_rows_of_both(tmp_path: Path) -> None:
    a, b = llama_tensors(seed=1), llama_tensors(seed=2, vocabulary=13)
    found = difference(write_model(tmp_path / "a", a), write_model(tmp_path / "b", b))
    each = row(found, EMBEDDINGS)
    assert (each.status, each.rows_compared) == ("shape_differs", 10)
    assert_figures(each.figures, oracle(dense(a[EMBEDDINGS]), dense(b[EMBEDDINGS][:10])))
    assert any(f"{EMBEDDINGS}: the first 10 rows" in remark for remark in found.remarks)


def test_other_shapes_are_said_and_not_compared(tmp_path: Path) -> None:
    a, b = llama_tensors(seed=1), llama_tensors(seed=1)
    b[Q] = torch.ones(8, 6)
    found = difference(write_model(tmp_path / "a", a), write_model(tmp_path / "b", b))
    each = row(found, Q)
    assert (each.status, each.figures, each.shape_b) == ("shape_differs", None, (8, 6))
    assert found.total.tensors == len(a) - 1 and not found.same_weights


def test_tensors_of_one_side(tmp_path: Path) -> None:
    a, b = llama_tensors(seed=1), llama_tensors(seed=1)
    a["model.layers.0.self_attn.q_proj.bias"] = torch.ones(8)
    b["model.layers.0.self_attn.k_proj.bias"] = torch.ones(4)
    found = difference(write_model(tmp_path / "a", a), write_model(tmp_path / "b", b))
    assert row(found, "model.layers.0.self_attn.q_proj.bias").status == "only_a"
    assert row(found, "model.layers.0.self_attn.k_proj.bias").status == "only_b"
    assert found.counts == {"identical": 12, "only_a": 1, "only_b": 1}


@pytest.mark.parametrize("tied", ["a", "b"])
def test_a_head_tied_on_one_side_is_compared_with_the_embeddings(tmp_path: Path, tied: str) -> None:
    sides = {"a": llama_tensors(seed=1), "b": llama_tensors(seed=2)}
    head = sides["b" if tied == "a" else "a"]["lm_head.weight"]
    del sides[tied]["lm_head.weight"]
    folders = {
        side: write_model(
            tmp_path / side, tensors, config={**LLAMA, "tie_word_embeddings": side == tied}
        )
        for side, tensors in sides.items()
    }
    found = difference(folders["a"], folders["b"])
    each = row(found, "lm_head.weight")
    pair = (dense(sides["a"].get("lm_head.weight", sides["a"][EMBEDDINGS])),
            dense(sides["b"].get("lm_head.weight", sides["b"][EMBEDDINGS])))  # fmt: skip
    assert_figures(each.figures, oracle(*pair))
    assert each.status == "changed" and each.figures is not None
    assert each.figures.entries == head.numel()
    assert any(f"to which {tied.upper()} ties its head" in remark for remark in found.remarks)
    assert [change.name for change in found.files] == ["config.json"]
    assert [(k.path, k.a, k.b) for k in found.files[0].keys] == [
        ("tie_word_embeddings", str(tied == "a").lower(), str(tied == "b").lower())
    ]


def test_an_adapter_is_compared_merged(tmp_path: Path) -> None:
    found = difference(FIXTURES / "aligned", f"{FIXTURES / 'aligned'}+{FIXTURES / 'lora_p5'}")
    assert found.b.kind == "adapter" and not found.same_weights
    changed = [each for each in found.rows if each.status == "changed"]
    config = json.loads((FIXTURES / "lora_p5" / "adapter_config.json").read_text())
    assert {each.module for each in changed} == set(config["target_modules"])
    for each in changed:
        (spectrum,) = each.spectra
        # A merged LoRA of rank r has r directions; the rest is rounding of the sum.
        assert spectrum.effective_rank <= config["r"] + 0.01
        assert spectrum.top_share == pytest.approx(1.0, abs=1e-6) or config["r"] > 8


def test_nan_is_named_and_left_out_of_the_sums(tmp_path: Path) -> None:
    a, b = llama_tensors(seed=1), llama_tensors(seed=2)
    b[Q][3, 3] = float("nan")
    found = difference(write_model(tmp_path / "a", a), write_model(tmp_path / "b", b))
    each = row(found, Q)
    assert each.figures is not None and each.spectra == ()
    assert (each.figures.norm_b, each.figures.relative, each.figures.largest) == (None, None, None)
    assert each.figures.norm_a == pytest.approx(float(a[Q].norm()), rel=1e-6)
    others = [name for name in a if name != Q]
    assert_figures(found.total.figures, oracle(stacked(a, others), stacked(b, others)))
    assert f"{Q} holds NaN or infinity: left out of the sums" in found.remarks
    json.dumps(found.to_json(), allow_nan=False)
    same = difference(tmp_path / "b", tmp_path / "b")
    assert same.identical, "NaN with the same bits is the same"


def test_bits_count_as_changed_and_integers_are_compared(tmp_path: Path) -> None:
    a, b = llama_tensors(seed=1), llama_tensors(seed=1)
    a[Q][0, :4], b[Q][0, :4] = 0.0, -0.0
    a["steps"], b["steps"] = torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3])
    a["flags"], b["flags"] = torch.tensor([True, False]), torch.tensor([True, True])
    a["empty"], b["empty"] = torch.zeros(0, 4), torch.zeros(0, 4)
    a["scalar"], b["scalar"] = torch.tensor(2.0), torch.tensor(3.0)
    found = difference(write_model(tmp_path / "a", a), write_model(tmp_path / "b", b))
    q = row(found, Q).figures
    assert row(found, Q).status == "changed" and q is not None
    assert (q.changed, q.relative, q.largest) == (4, 0.0, 0.0)
    for name, changed, norm in (("steps", 1, 3.0), ("flags", 1, 1.0), ("scalar", 1, 1.0)):
        figures = row(found, name).figures
        assert figures is not None
        assert (figures.changed, figures.norm_delta) == (changed, norm), name
    assert row(found, "empty").status == "identical"
    assert found.total.tensors == len(a) - 2, "integers are in no sum"


def test_another_architecture_is_refused_with_the_key(tmp_path: Path) -> None:
    write_model(tmp_path / "a", llama_tensors())
    write_model(tmp_path / "b", llama_tensors(), config={**LLAMA, "num_hidden_layers": 2})
    with pytest.raises(MismatchError, match=r"num_hidden_layers = 1.*2: they are different"):
        difference(tmp_path / "a", tmp_path / "b")


def test_only_some_tensors(tmp_path: Path) -> None:
    found = difference(FIXTURES / "aligned", FIXTURES / "howto", only=["*.q_proj.*", "*norm*"])
    assert {each.module for each in found.rows} == {
        "q_proj", "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"named like \*\.x"):
        difference(FIXTURES / "aligned", FIXTURES / "howto", only=["*.x"])


def test_configs_and_tokenizers_are_compared_by_key(tmp_path: Path) -> None:
    tensors = llama_tensors()
    a = write_model(tmp_path / "a", tensors, config={**LLAMA, "rope": {"theta": 1, "same": 0}})
    b = write_model(tmp_path / "b", tensors, config={**LLAMA, "rope": {"theta": 2, "same": 0},
                                                     "eos": [1, 2]})  # fmt: skip
    vocabulary = {f"t{i}": i for i in range(40)}
    for folder, shift in ((a, 0), (b, 1)):
        (folder / "README.md").write_text(folder.name)
        (folder / "chat_template.jinja").write_text(f"{{{{ {shift} }}}}")
        vocab = {key: value + shift for key, value in vocabulary.items()}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    (b / "generation_config.json").write_text("{}")
    found = difference(a, b)
    assert found.same_weights and not found.identical
    assert [(f.name, f.status) for f in found.files] == [
        ("config.json", "changed"), ("chat_template.jinja", "changed"),
        ("generation_config.json", "only_b"), ("tokenizer.json", "changed"),
    ]  # fmt: skip
    config, _, _, tokenizer = found.files
    assert [(k.path, k.a, k.b) for k in config.keys] == [
        ("rope.theta", "1", "2"), ("eos", None, "[1, 2]")
    ]  # fmt: skip
    ((vocab),) = tokenizer.keys
    assert (vocab.path, vocab.count) == ("model.vocab", 40)


def test_fused_projections_have_a_spectrum_per_part(tmp_path: Path) -> None:
    config = {
        "model_type": "phi3", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
        "tie_word_embeddings": False,
    }  # fmt: skip
    name = "model.layers.0.self_attn.qkv_proj.weight"
    generator = torch.Generator().manual_seed(3)
    a = {name: torch.randn(16, 8, generator=generator)}
    b = {name: a[name] + torch.randn(16, 8, generator=generator)}
    found = difference(
        write_model(tmp_path / "a", a, config=config), write_model(tmp_path / "b", b, config=config)
    )
    spectra = row(found, name).spectra
    assert [s.key for s in spectra] == [
        f"{name}[{part}]" for part in ("q_proj", "k_proj", "v_proj")
    ]
    for part, rows in zip(spectra, ((0, 8), (8, 12), (12, 16)), strict=True):
        delta = (b[name].double() - a[name].double())[slice(*rows)].numpy()
        sigma = np.linalg.svd(delta, compute_uv=False)
        assert part.singular_values == pytest.approx(sigma[:8].tolist(), rel=1e-9)


def test_progress_counts_the_bytes_of_both(tmp_path: Path) -> None:
    a, b = llama_tensors(seed=1), llama_tensors(seed=2)
    notes = Notes()
    difference(write_model(tmp_path / "a", a), write_model(tmp_path / "b", b), spectra="none",
               progress=notes)  # fmt: skip
    assert notes.done == 2 * sum(tensor.nbytes for tensor in a.values())


def test_what_the_reference_lacks_is_in_none_of_its_cosines(tmp_path: Path) -> None:
    a, b, r = (llama_tensors(seed=seed) for seed in (1, 2, 3))
    # What R cannot be held against changes most: its norm must not dilute the cosine.
    for name in (EMBEDDINGS, "lm_head.weight", Q):
        b[name] = a[name] + 5.0
    r[EMBEDDINGS], r["lm_head.weight"] = r[EMBEDDINGS][:7], r["lm_head.weight"][:7]
    r[Q][0, 0] = float("inf")
    folders = [write_model(tmp_path / key, t) for key, t in (("a", a), ("b", b), ("r", r))]
    found = difference(*folders[:2], reference=folders[2])
    shared = [name for name in a if name not in (EMBEDDINGS, "lm_head.weight", Q)]

    def cosine(names: list[str]) -> float:
        x, y, z = (stacked(each, names) for each in (a, b, r))
        return float((y - x) @ (x - z) / (np.linalg.norm(y - x) * np.linalg.norm(x - z)))

    groups = [(found.total, shared)]
    groups += [(g, [n for n in shared if f".layers.{g.key}." in n]) for g in found.layers]
    groups += [(g, [n for n in shared if n.split(".")[-2] == g.key]) for g in found.modules]
    for group, names in groups:
        expected = pytest.approx(cosine(names), rel=1e-12, abs=1e-14) if names else None
        assert group.figures.cosine_reference == expected, group.key
    assert_figures(found.total.figures, oracle(stacked(a, list(a)), stacked(b, list(a))))
    for name in (EMBEDDINGS, "lm_head.weight", Q):
        figures = row(found, name).figures
        assert figures is not None and figures.cosine_reference is None
    assert found.remarks[-2:] == (
        f"{Q} holds NaN or infinity in the reference: left out of its cosines",
        "lm_head.weight and 1 more: no counterpart that fits in the reference, left out of its "
        "cosines",
    )


@pytest.mark.parametrize(("rows_b", "rows_r"), [(10, 13), (13, 13), (13, 10), (8, 9)])
def test_a_reference_with_all_rows_that_are_compared_takes_part(
    tmp_path: Path, rows_b: int, rows_r: int
) -> None:
    a = llama_tensors(seed=1)
    b, r = llama_tensors(seed=2, vocabulary=rows_b), llama_tensors(seed=3, vocabulary=rows_r)
    folders = [write_model(tmp_path / key, t) for key, t in (("a", a), ("b", b), ("r", r))]
    found = difference(*folders[:2], reference=folders[2])
    rows = min(10, rows_b)
    x, y, z = (dense(each[EMBEDDINGS][:rows]) for each in (a, b, r))
    figures = row(found, EMBEDDINGS).figures
    assert figures is not None
    assert figures.cosine_reference == pytest.approx(
        (y - x) @ (x - z) / (np.linalg.norm(y - x) * np.linalg.norm(x - z)), rel=1e-12
    )
    assert not any("reference" in remark for remark in found.remarks)
