"""Two checkpoints side by side: planted agreement, chance, what is not comparable, and the command's files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from mining.synthetic_adapters import orthonormal, planted_pair, random_pair, write_adapter

from subspace3d.commands import analyze, mine
from subspace3d.commands.analyze import AnalyzeConfig
from subspace3d.commands.mine import MineConfig
from subspace3d.files import write_json
from subspace3d.formats.subspace import ModuleSubspace, SubspaceFile
from subspace3d.mining.compare import compare, random_overlap
from subspace3d.reporting.comparison import agreeing_blocks
from subspace3d.reporting.report import write_report

OUT, IN, K = 60, 50, 3
LAYERS = [f"aggregator.frame_blocks.{layer}.attn.qkv" for layer in range(3)]
# u and v are stored in float32
FLOAT32 = 1e-5


def _file(bases, base_model="m", values=(3.0, 2.0, 1.0, 0.5)):
    modules = {
        name: ModuleSubspace(u.float(), v.float(), torch.tensor(values).double(), torch.ones(2).double())
        for name, (u, v) in bases.items()
    }
    return SubspaceFile(modules, {"base_model": base_model, "k": K})


def _random(rng, names=LAYERS, out=OUT, in_=IN):
    return {name: tuple(torch.from_numpy(orthonormal(rng, size, K)) for size in (out, in_)) for name in names}


def _turned(u, other, degrees):
    """``u`` turned by ``degrees`` towards directions that are orthogonal to it."""
    rest = torch.linalg.qr(other - u @ (u.T @ other)).Q
    return math.cos(math.radians(degrees)) * u + math.sin(math.radians(degrees)) * rest


def test_planted_angles_are_found_block_by_block(rng):
    one, noise = _random(rng), _random(rng)
    mixing = torch.from_numpy(rng.standard_normal((K, K)))
    two = {}
    for name, degrees in zip(LAYERS, (0, 30, 90)):
        u, _ = one[name]
        # other columns of the same span, turned by a known angle; the input side is anew
        two[name] = _turned(u, noise[name][0], degrees) @ mixing, noise[name][1]
    result = compare({"texture": _file(one)}, {"texture": _file(two, "n")}, {})
    output = result["agreement"]["texture"]["output"]
    for name, degrees in zip(LAYERS, (0, 30, 90)):
        row = output["modules"][name]
        assert row["angles"] == pytest.approx([degrees] * K, abs=0.1)
        assert row["overlap"] == pytest.approx(math.cos(math.radians(degrees)) ** 2, abs=FLOAT32)
        assert row["agrees"] == (degrees < 90)
    assert [block["layer"] for block in output["blocks"]] == [0, 1, 2]
    assert [block["agree"] for block in output["blocks"]] == [1, 1, 0]
    assert output["overlap"] == pytest.approx((1 + 0.75) / 3, abs=FLOAT32)
    assert output["random"] == pytest.approx(K / OUT)
    assert result["base_models"] == {"A": "m", "B": "n"}
    assert (
        "2 of 3 output sides of a module and attribute agree (overlap 0.583, random subspaces 0.050)"
        in result["sentence"]
    )


def test_random_subspaces_do_not_agree_and_the_sentence_says_so(rng):
    names = [f"blocks.{layer}.fc" for layer in range(60)]
    one, two = ({a: _file(_random(rng, names)) for a in ("texture", "camera")} for _ in range(2))
    result = compare(one, two, {})
    for attribute in ("texture", "camera"):
        for side, dim in (("output", OUT), ("input", IN)):
            level = result["agreement"][attribute][side]
            assert level["agree"] == 0 and level["measured"] == 60
            # 60 draws of a mean of 9 squared cosines, each of variance below 2 / dim^2
            deviation = math.sqrt(2 / 9 / 60) / dim
            assert level["overlap"] == pytest.approx(K / dim, abs=5 * deviation)
            assert level["others"] == pytest.approx(K / dim, abs=5 * deviation)
    assert result["sentence"].endswith("as between networks that were not trained from one another")


@pytest.mark.parametrize(("dim", "k1", "k2"), [(2, 1, 1), (9, 4, 6), (40, 3, 5), (7, 7, 2), (5, 5, 5), (1, 1, 1)])
def test_the_null_is_that_of_random_subspaces(rng, dim, k1, k2):
    level = random_overlap(dim, k1, k2)
    draws = 4000
    one, two = (np.linalg.qr(rng.standard_normal((draws, dim, k))).Q for k in (k1, k2))
    overlaps = (np.swapaxes(one, 1, 2) @ two) ** 2
    overlaps = overlaps.sum((1, 2)) / min(k1, k2)
    spread = overlaps.std()
    assert level["mean"] == pytest.approx(overlaps.mean(), abs=5 * spread / math.sqrt(draws) + 1e-12)
    # the deviation of a deviation is at most that of a fourth moment of 6, which no bounded overlap here has
    assert level["deviation"] == pytest.approx(spread, abs=5 * spread * math.sqrt(5 / 4 / draws) + 1e-7)
    # of the values above the threshold about 0.1 are expected; a space of two dimensions has all values up to 1
    assert (overlaps > level["threshold"] + 1e-9).sum() <= 3
    assert len(level["angles"]) == min(k1, k2) and sorted(level["angles"]) == level["angles"]
    if max(k1, k2) == dim:
        assert level["angles"] == pytest.approx([0] * min(k1, k2), abs=1e-4)


def test_spaces_that_random_ones_fill_never_agree(rng):
    full = {name: (torch.eye(K).double(), torch.eye(K).double()) for name in LAYERS}
    result = compare({"a": _file(full)}, {"a": _file(full)}, {})
    assert result["agreement"]["a"]["output"]["overlap"] == pytest.approx(1)
    assert result["agreement"]["a"]["output"]["agree"] == 0


def test_modules_nobody_trained_are_not_measured(rng):
    one, two = _random(rng), _random(rng)
    one[LAYERS[1]] = (torch.zeros(OUT, K), torch.zeros(IN, K))
    result = compare({"a": _file(one)}, {"a": _file(two)}, {})
    row = result["agreement"]["a"]["output"]["modules"][LAYERS[1]]
    assert row == {"overlap": None, "angles": [], "random": None, "agrees": False, "others": None}
    assert result["agreement"]["a"]["output"]["measured"] == 2


def test_the_blocks_over_all_frames_of_omega_are_those_of_vggt(rng):
    theirs = _random(rng, ["aggregator.inter_frame_blocks.0.attn.qkv", "dense_head.x"])
    ours = {"aggregator.global_blocks.0.attn.qkv": theirs["aggregator.inter_frame_blocks.0.attn.qkv"]}
    result = compare({"a": _file(ours)}, {"a": _file(theirs)}, {})
    assert list(result["modules"]) == list(ours)
    assert result["left_out"]["modules"] == {"A": [], "B": ["dense_head.x"]}


def test_across_architectures_only_numbers_are_compared(rng):
    names, others = [f"a.{n}.fc" for n in range(4)], [f"b.{n}.fc" for n in range(6)]
    # s^2 = 1, 1, 1, 1: stable rank 4; 4, 1, 0, 0: 1.25
    flat, steep = (1.0, 1.0, 1.0, 1.0), (2.0, 1.0, 0.0, 0.0)
    one = {"texture": _file(_random(rng, names), "m", flat), "camera": _file(_random(rng, names), "m", steep)}
    two = {
        "texture": _file(_random(rng, others, 30, 20), "n", flat),
        "camera": _file(_random(rng, others, 30, 20), "n", steep),
        "zebra": _file(_random(rng, others, 30, 20), "n", steep),
    }
    held_out = {"A": {"texture": 0.1, "camera": 0.3}, "B": {"texture": 0.4, "camera": 0.2, "zebra": 0.1}}
    result = compare(one, two, held_out)
    assert result["agreement"] is None and result["modules"] == {}
    assert result["left_out"]["attributes"] == {"A": [], "B": ["zebra"]}
    for name in "AB":
        assert result["spectra"][name]["texture"]["stable_rank"]["median"] == 4
        assert result["spectra"][name]["camera"]["stable_rank"]["median"] == 1.25
        assert result["spectra"][name]["camera"]["leading"] == {"1": 0.8}
    orders = {order["by"]: order for order in result["order"]}
    assert orders["stable rank"]["A"] == orders["stable rank"]["B"] == ["texture", "camera"]
    assert (orders["stable rank"]["alike"], orders["stable rank"]["pairs"]) == (1, 1)
    left_out = orders["energy shared, of an adapter left out"]
    assert left_out["A"] == ["camera", "texture"] and left_out["B"] == ["texture", "camera"] and left_out["alike"] == 0
    assert "m and n have no module of one name and size, so no directions are compared" in result["sentence"]


def test_one_size_less_is_another_architecture(rng):
    result = compare({"a": _file(_random(rng))}, {"a": _file(_random(rng, out=OUT - 1))}, {})
    assert result["agreement"] is None and len(result["left_out"]["modules"]["A"]) == len(LAYERS)


def test_what_cannot_be_compared_is_refused(rng):
    file = _file(_random(rng))
    with pytest.raises(ValueError, match=r"an attribute in common, got \['a'\] and \['b'\]"):
        compare({"a": file}, {"b": file}, {})
    with pytest.raises(ValueError, match="the files of B must have one base model, got"):
        compare({"a": file, "b": file}, {"a": file, "b": _file(_random(rng), "another")}, {})


@pytest.fixture
def checkpoints(tmp_path, rng):
    """Two checkpoints whose adapters share the output directions of the first layer."""
    first = orthonormal(rng, OUT, K)
    for checkpoint in ("x", "y"):
        for attribute in ("texture", "camera"):
            left = {name: orthonormal(rng, OUT, K) for name in LAYERS} | {LAYERS[0]: first}
            right = {name: orthonormal(rng, IN, K) for name in LAYERS}
            for number in range(3):
                modules = {name: planted_pair(rng, left[name], right[name], 0.02) for name in LAYERS}
                folder = tmp_path / checkpoint / "adapters" / attribute / str(number)
                write_adapter(folder, modules, base_model_name_or_path=checkpoint)
            out = tmp_path / checkpoint / "subspaces" / f"{attribute}.safetensors"
            mine.run(MineConfig(tmp_path / checkpoint / "adapters" / attribute, out, k=K))
    return tmp_path


def test_the_command_writes_figure_numbers_and_tables_once(checkpoints, capsys):
    pair = checkpoints / "x" / "subspaces", checkpoints / "y" / "subspaces"
    config = AnalyzeConfig(checkpoints / "out", compare=pair)
    path = analyze.run(config)
    result = json.loads(path.read_text())
    said = capsys.readouterr().out
    assert result["sentence"] in said and f"next: subspace3d report {checkpoints}" in said
    assert [row["layer"] for row in result["agreement"]["camera"]["output"]["blocks"]] == [0, 1, 2]
    assert [row["agree"] for row in result["agreement"]["camera"]["output"]["blocks"]] == [1, 0, 0]
    # the first layer's output directions are those of every attribute: the control shows it
    assert result["agreement"]["camera"]["output"]["blocks"][0]["others"] == pytest.approx(1, abs=1e-3)
    assert (checkpoints / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    lines = (checkpoints / "out" / "comparison.md").read_text().splitlines()
    assert lines[0] == result["sentence"]
    assert sum(line.startswith("| camera") for line in lines) == 1 + 2 * len(LAYERS)
    made = path.stat().st_mtime_ns
    assert analyze.run(config) == path and path.stat().st_mtime_ns == made
    assert "already made" in capsys.readouterr().out

    adapters = checkpoints / "x" / "adapters", checkpoints / "y" / "adapters"
    again = json.loads(analyze.run(AnalyzeConfig(checkpoints / "out", compare=pair, adapters=adapters)).read_text())
    shared = again["shared"]["A"]["texture"]
    assert shared["held_out"] == pytest.approx(1, abs=0.01) and shared["adapters"] == 3 and shared["rank"] == K
    assert again["same_mining"] is True
    assert {order["by"] for order in again["order"]} >= {"stable rank", "energy shared, of an adapter left out"}


def test_energy_of_an_adapter_left_out_counts_modules_as_the_energy_beside_it_does(tmp_path, rng):
    bases = tuple(np.linalg.qr(rng.standard_normal((size, K)))[0] for size in (40, 40))
    for number in range(3):
        left, right = planted_pair(rng, *bases, 0.0)
        # nearly all energy is in a module where all agree, and none of the others has anything in common
        unrelated = {f"blocks.{layer}.proj": random_pair(rng, 40, 40, K) for layer in range(1, 4)}
        write_adapter(tmp_path / "adapters" / str(number), {"blocks.0.proj": (1e4 * left, right), **unrelated})
    out = mine.run(MineConfig(tmp_path / "adapters", tmp_path / "texture.safetensors", k=K))
    config = AnalyzeConfig(tmp_path / "out", compare=(out, out), adapters=(tmp_path / "adapters",))
    shared = json.loads(analyze.run(config).read_text())["shared"]["A"]["texture"]
    assert 0.25 < shared["held_out"] < 0.3 and shared["held_out"] < shared["explained"] < 0.8


def test_the_report_says_in_which_layers_they_agree(checkpoints, tmp_path):
    pair = checkpoints / "x" / "subspaces", checkpoints / "y" / "subspaces"
    path = analyze.run(AnalyzeConfig(checkpoints / "run" / "comparison", compare=pair))
    record = json.loads(path.read_text())
    # the first layer's output directions were planted in both
    assert agreeing_blocks(record, "camera", "output") == ["frame_blocks.0"]
    assert agreeing_blocks(record, "camera", "input") == []
    write_report(checkpoints / "run", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert record["sentence"] in page and "In which layers do two checkpoints agree?" in page
    assert ">camera</th><td>output</td><td>frame_blocks.0</td><td>1 of 3</td>" in page
    assert "A: x; B: y" in page and page.count("data:image/png;base64,") == 1

    # nothing of another version is drawn; what does not hold together is named
    for change, message in (
        ({"version": 0}, "nothing to report"),
        ({"spectra": {"A": {}, "B": {}}}, r"comparison\.json: spectra\.A must have 'texture'"),
        ({"modules": {}}, r"comparison\.json: agreement\.texture: .* must be one of modules"),
        ({"agreement": {**record["agreement"], "camera": None}}, r"comparison\.json: agreement\.camera"),
        ({"sentence": 3}, r"comparison\.json: sentence must be text"),
    ):
        path.write_text(json.dumps({**record, **change}), encoding="utf-8")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            write_report(checkpoints / "run", tmp_path / "page.html")


def test_the_report_of_two_architectures_compares_no_directions(rng, tmp_path):
    other = _file(_random(rng, ["decoder.0.attn.qkv"]), "pi3")
    result = compare({"texture": _file(_random(rng))}, {"texture": other}, {})
    write_json(tmp_path / "run/comparison.json", {**result, "inputs": {}, "with_adapters": None})
    write_report(tmp_path / "run", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "have no module of one name and size, so no directions are compared" in page
    assert "blocks that agree" not in page and page.count("data:image/png;base64,") == 1


def test_two_files_are_a_pair_whatever_they_are_called(checkpoints):
    pair = checkpoints / "x/subspaces/texture.safetensors", checkpoints / "y/subspaces/camera.safetensors"
    result = json.loads(analyze.run(AnalyzeConfig(checkpoints / "out", compare=pair)).read_text())
    assert result["attributes"] == ["texture"] and set(result["inputs"]["B"]) == {"texture"}


def test_one_of_subspaces_and_compare_is_asked_for(tmp_path):
    for given in ({}, {"subspaces": (tmp_path,), "compare": (tmp_path, tmp_path)}):
        with pytest.raises(ValueError, match="subspaces or compare must be given, one of the two"):
            AnalyzeConfig(tmp_path / "out", **given)


def test_a_checkpoint_is_its_own_twin(rng):
    bases = {name: tuple(map(torch.from_numpy, map(np.asarray, pair))) for name, pair in _random(rng).items()}
    result = compare({"a": _file(bases)}, {"a": _file(bases)}, {})
    for side in ("output", "input"):
        assert result["agreement"]["a"][side]["agree"] == len(LAYERS)
        assert result["agreement"]["a"][side]["overlap"] == pytest.approx(1, abs=FLOAT32)
