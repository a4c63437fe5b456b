"""Means over scenes and the table of methods."""

from __future__ import annotations

from subspace3d.evaluation.table import (
    ALIGNMENTS,
    METRICS,
    format_protocols,
    format_table,
    is_comparable,
    mean_over_scenes,
    partial_means,
    scenes_in_mean,
)


def results(**methods: dict) -> dict:
    return {"scenes": ["a", "b"], "skipped": [], "methods": methods}


def test_mean_is_over_the_scenes_where_a_metric_is_defined():
    per_scene = {"a": {"accuracy": 1.0, "abs_rel": None}, "b": {"accuracy": 2.0, "abs_rel": 0.5}}
    means, counts = mean_over_scenes(per_scene), scenes_in_mean(per_scene)
    assert (counts["accuracy"], counts["abs_rel"], counts["chamfer"]) == (2, 1, 0)
    assert means["accuracy"] == 1.5
    assert means["abs_rel"] == 0.5
    assert means["chamfer"] is None
    assert list(means) == list(METRICS)


def test_best_values_are_marked():
    base = {"mean": {"accuracy": 0.2, "normal_consistency": 0.6, "abs_rel": 0.123456}, "trainable_parameters": 0}
    lora = {"mean": {"accuracy": 0.1, "normal_consistency": 0.9, "abs_rel": 0.123456}, "trainable_parameters": 12345}
    lines = format_table(results(base=base, lora=lora)).splitlines()
    assert lines[0].split()[:4] == ["method", "trained", "Acc", "v"]
    base_row, lora_row = lines[2].split(), lines[3].split()
    assert base_row[:3] == ["base", "0", "0.2000"]
    assert lora_row[:3] == ["lora", "12,345", "0.1000*"]
    assert "0.9000*" in lora_row
    assert "0.6000" in base_row
    # equal values are both best, missing ones are dashes
    assert "0.1235*" in base_row
    assert "0.1235*" in lora_row
    assert base_row.count("-") == sum(metric.main for metric in METRICS.values()) - 3


def test_columns_are_aligned():
    base = {"mean": {"accuracy": 123.4, "rotation_error_deg": 1.0}, "trainable_parameters": 0}
    other = {"mean": {"accuracy": 1e-5, "rotation_error_deg": 170.0}, "trainable_parameters": None}
    lines = format_table(results(base=base, a_longer_name=other)).splitlines()[:4]
    ends = [
        index
        for index in range(len(lines[1]))
        if lines[1][index] == "-" and lines[1][index + 1 : index + 2] in ("", " ")
    ]
    for line in lines:
        padded = line.ljust(len(lines[1]))
        assert all(padded[end + 1 : end + 2] in ("", " ") for end in ends)


def test_what_was_left_out_is_said():
    table = format_table(
        {
            "scenes": ["a"],
            "skipped": [{"scene": "empty", "reason": "no depth"}],
            "methods": {
                "base": {"mean": {}, "backbone": {"name": "vggt-nano", "sha256": "1", "seed": 0}},
                "lora": {
                    "mean": {},
                    "failed": {"b": "not finite"},
                    "backbone": {"name": "vggt-nano", "sha256": "2", "seed": 0},
                },
            },
        }
    )
    assert "mean over 1 scene;" in table
    assert "skipped empty: no depth" in table
    assert "lora failed on b: not finite" in table
    assert "lora started from other weights than base" in table


def test_every_metric_says_what_is_fitted_first():
    assert {metric.alignment for metric in METRICS.values()} == set(ALIGNMENTS)
    for name, metric in METRICS.items():
        assert name.endswith("_raw") == (metric.alignment == "raw"), name
    # a value after an alignment of the prediction to the truth has a raw one beside it, whatever the alignment
    for name in ("accuracy", "completeness", "chamfer", "normal_consistency", "abs_rel", "delta_1_25", "point_rel"):
        assert f"{name}_raw" in METRICS


def test_a_method_that_failed_on_the_hardest_scene_is_not_the_best():
    base = {"per_scene": {"a": {"abs_rel": 0.1}, "hard": {"abs_rel": 0.7}}, "mean": {"abs_rel": 0.4}}
    lora = {"per_scene": {"a": {"abs_rel": 0.2}}, "mean": {"abs_rel": 0.2}, "failed": {"hard": "not finite"}}
    # another that is defined nowhere takes nothing from the comparison of the others
    none = {"per_scene": {"a": {"abs_rel": None}}, "mean": {"abs_rel": None}}
    table = format_table(results(base=base, lora=lora, none=none))
    assert "0.2000" in table and "0.2000*" not in table and "0.4000*" not in table
    assert "means of lora are over 1 of 2 scenes in AbsRel: not to be compared" in table
    assert "means of base" not in table and "means of none" not in table
    whole = {**lora, "per_scene": {"a": {"abs_rel": 0.2}, "hard": {"abs_rel": 0.2}}}
    table = format_table(results(base=base, lora=whole, none=none))
    assert "0.2000*" in table and "means of" not in table


def test_methods_that_miss_one_scene_each_are_not_compared():
    methods = {
        "base": {"per_scene": {"a": {"accuracy": 1.0, "abs_rel": 0.1}}},
        "lora": {"per_scene": {"b": {"accuracy": 2.0, "abs_rel": 0.3}}},
    }
    assert not is_comparable(methods.values(), "accuracy")
    assert partial_means(methods, {"accuracy": "Acc", "abs_rel": "AbsRel"}) == [
        "means of base are over 1 of 2 scenes in all metrics: not to be compared",
        "means of lora are over 1 of 2 scenes in all metrics: not to be compared",
    ]


def test_protocols_mark_only_what_is_over_the_same_scenes():
    def under(**scenes: float) -> dict:
        mean = sum(scenes.values()) / len(scenes)
        record = {"per_scene": {name: {"auc_30": value} for name, value in scenes.items()}, "mean": {"auc_30": mean}}
        return {"protocols": {"pi3": record}}

    protocols = {"pi3": {"metrics": {"auc_30": {}}, "alignment": "none"}}
    same = {"base": under(a=0.4, b=0.2), "lora": under(a=0.6, b=0.6)}
    assert "0.6000*" in format_protocols({"protocols": protocols, "methods": same})
    other = {"base": under(a=0.4, b=0.2), "lora": under(a=0.6)}
    text = format_protocols({"protocols": protocols, "methods": other})
    assert "*" not in text
    assert "pi3: means of lora are over 1 of 2 scenes in all metrics: not to be compared" in text
