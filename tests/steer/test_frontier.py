"""Frontiers: closed forms, exact differences, intervals that cover, and what must hold for any points at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentprior.stats.bootstrap import bootstrap_counts
from latentprior.steer.aggregate import Key, aggregate
from latentprior.steer.frontier import (
    Curve,
    Frontier,
    curve,
    difference,
    estimate,
    frontier,
    summarise,
)
from latentprior.utils.errors import InputError

UNSTEERED = (0.5, 2.0)  # concept and NLL
Figures = Callable[[int, float], tuple[float, float]]  # prompt and signed strength -> gain and NLL increase


def row(method: str, strength: float, prompt: int, concept: float, nll: float, **more: Any) -> dict[str, Any]:
    return {"direction": "d", "method": method, "strength": strength, "prompt": prompt, "concept": concept, "nll": nll,
            **more}  # fmt: skip


def rows_of(methods: dict[str, Figures], strengths=(0.5, 1.0), prompts=4, signs=(1, -1)) -> list[dict[str, Any]]:
    """Texts whose gains and increases are known; prompts differ in their unsteered concept and NLL."""
    base = {p: (UNSTEERED[0] + 0.002 * p, UNSTEERED[1] + 0.1 * p) for p in range(prompts)}
    rows = [row("none", 0.0, p, *base[p]) for p in base]
    for method, figures in methods.items():
        for r in (sign * s for s in strengths for sign in signs):
            for p, (concept, nll) in base.items():
                gain, increase = figures(p, r)
                rows.append(row(method, r, p, concept + math.copysign(1, r) * gain, nll + increase))
    return rows


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def frontier_of(points: list[tuple[float, float]]) -> Frontier:
    """Of one sample's (increase, gain), beside the unsteered point."""
    x, y = np.array([(0.0, 0.0), *points]).T[:, None]
    return frontier(Curve(y, x, x))


def line(slope: float, first: float = 0.0) -> Figures:
    """Gain grows with the strength, the NLL increase is the strength."""
    return lambda prompt, r: (first + slope * abs(r), abs(r))


def test_signs_are_aggregated_against_the_same_prompts_unsteered_text():
    def one_sided(prompt: int, r: float) -> tuple[float, float]:
        return (0.2, 1.0) if r > 0 else (0.1, 0.5)

    found = aggregate(table(rows_of({"plain": one_sided})))
    assert list(found) == [Key("d", "plain", "")]
    aggregated = found[Key("d", "plain", "")]
    assert aggregated.strengths.tolist() == [0.5, 1.0]
    assert aggregated.gain == pytest.approx(np.full((4, 2), 0.15))
    assert aggregated.increase == pytest.approx(np.full((4, 2), 0.75))
    only_negative = aggregate(table(rows_of({"plain": one_sided}, signs=(-1,))))[Key("d", "plain", "")]
    assert only_negative.gain == pytest.approx(np.full((4, 2), 0.1)) and only_negative.missing == 0


def test_strength_zero_gains_nothing_whatever_it_changes():
    rows = rows_of({"plain": line(0.1)}) + [row("repaired", 0.0, p, 0.9, 3.0) for p in range(4)]
    aggregated = aggregate(table(rows))[Key("d", "repaired", "")]
    assert aggregated.gain.tolist() == [[0.0]] * 4 and aggregated.increase[0, 0] == pytest.approx(1.0)


def test_order_of_the_rows_does_not_matter():
    rows = rows_of({"plain": line(0.1), "paired": line(0.2)}, prompts=5)
    summary = summarise(table(rows), resamples=50)
    rng = np.random.default_rng(0)
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    again = summarise(table(sorted(shuffled, key=lambda row: row["method"] == "paired")), resamples=50)
    assert again == summary


def test_area_of_a_line_is_known():
    f = frontier_of([(0.5, 0.1), (1.0, 0.2), (1.5, 0.3)])
    assert f.area(1.5)[0] == pytest.approx(0.15)
    assert f.area(3.0)[0] == pytest.approx((0.15 * 1.5 + 0.3 * 1.5) / 3)  # it keeps its best gain
    assert f.area(0.75)[0] == pytest.approx(0.075)
    assert f.gain_at(0.75)[0] == pytest.approx(0.15) and f.gain_at(9.0)[0] == pytest.approx(0.3)
    assert f.increase_at(0.15)[0] == pytest.approx(0.75)
    assert f.increase_at(0.3)[0] == pytest.approx(1.5) and f.increase_at(0.31)[0] == np.inf
    assert f.increase_at(-1.0)[0] == 0


def test_dominated_and_hollow_points_leave_the_frontier_as_it_is():
    line_alone = frontier_of([(1.0, 0.4)])
    for point in [(0.5, 0.1), (2.0, 0.3), (1.0, 0.2), (0.3, -0.5), (0.0, 0.0), (math.nan, math.nan)]:
        assert frontier_of([point, (1.0, 0.4)]).area(2.0) == pytest.approx(line_alone.area(2.0))


def test_gain_without_loss_counts_from_the_start():
    f = frontier_of([(-0.2, 0.1), (1.0, 0.4)])  # more fluent than unsteered, and steered
    assert f.gain_at(0.0)[0] == pytest.approx(0.1 + 0.3 * 0.2 / 1.2)
    assert f.increase_at(0.05)[0] == 0
    assert frontier_of([(0.0, 0.25)]).area(1.0)[0] == 0.25
    assert frontier_of([(-0.5, 0.25)]).area(1.0)[0] == 0.25


def noisy(slope: float, seed: int, first: float = 0.0) -> Figures:
    draws = np.random.default_rng(seed).normal(0, 0.05, (1000, 2))
    return lambda prompt, r: (first + slope * abs(r) + draws[prompt, 0] * abs(r), abs(r) * (1 + draws[prompt, 1]))


NOISY = noisy(0.2, 1)


def test_the_baselines_copy_differs_by_exactly_nothing():
    summary = summarise(table(rows_of({"plain": NOISY, "copy": NOISY}, prompts=12)), resamples=200)
    plain, copy = summary["directions"][0]["methods"]
    assert plain["area"] == copy["area"] and "area_difference" not in plain
    assert copy["area_difference"] == {"value": 0.0, "interval": [0.0, 0.0], "clear": False}
    for name in ("gain_at_matched_fluency", "nll_at_matched_concept"):
        assert len(copy[name]) == 3
        assert all(entry["value"] == 0 and entry["interval"] == [0, 0] and not entry["clear"] for entry in copy[name])


def test_a_constant_shift_is_the_difference_whatever_the_noise():
    def shifted(prompt: int, r: float) -> tuple[float, float]:
        gain, increase = NOISY(prompt, r)
        return (gain + 0.07, increase) if abs(r) > 0.1 else (0.07, 0.0)

    def plain(prompt: int, r: float) -> tuple[float, float]:
        return NOISY(prompt, r) if abs(r) > 0.1 else (0.0, 0.0)

    rows = rows_of({"plain": plain, "shifted": shifted}, strengths=(0.1, 0.5, 1.0), prompts=12)
    difference = summarise(table(rows), resamples=300)["directions"][0]["methods"][1]
    area = difference["area_difference"]
    assert [area["value"], *area["interval"]] == pytest.approx([0.07] * 3) and area["clear"]
    for entry in difference["gain_at_matched_fluency"]:
        assert [entry["value"], *entry["interval"]] == pytest.approx([0.07] * 3)


def test_a_cheaper_method_needs_less_nll_for_the_same_gain():
    def cheap(prompt: int, r: float) -> tuple[float, float]:
        return 0.2 * abs(r), 0.5 * abs(r)

    methods = summarise(table(rows_of({"plain": line(0.2), "cheap": cheap})), resamples=20)["directions"][0]["methods"]
    entries = methods[1]["nll_at_matched_concept"]
    assert [entry["gain"] for entry in entries] == pytest.approx([0.05, 0.1, 0.15])
    assert [entry["value"] for entry in entries] == pytest.approx([-0.125, -0.25, -0.375])
    assert all(entry["clear"] for entry in entries)


def test_a_gain_never_attained_has_no_nll():
    methods = summarise(table(rows_of({"plain": line(0.4), "weak": line(0.05)})), resamples=20)["directions"][0]
    entry = methods["methods"][1]["nll_at_matched_concept"][-1]
    assert entry["value"] is None and entry["interval"] == [None, None] and entry["clear"]  # it needs infinitely more


@pytest.mark.parametrize(("largest", "width"), [(0.8, 0.8), (1.0, 1.0), (4.0, 1.5), (0.0, 1.5)])
def test_the_range_is_that_of_the_baseline_and_no_other_methods(largest, width):
    def plain(prompt: int, r: float) -> tuple[float, float]:
        return 0.1 * abs(r), largest * abs(r)

    rows = rows_of({"plain": plain, "fluent": lambda p, r: (0.3, 0.01), "wild": lambda p, r: (0.1, 50.0)})
    summary = summarise(table(rows), resamples=10)["directions"][0]
    assert summary["width"] == pytest.approx(width)
    fluent = summary["methods"][1]
    assert fluent["area"] == pytest.approx(0.3 * (1 - 0.005 / width))  # not punished for ending early


def test_points_carry_what_was_measured():
    rows = rows_of({"plain": line(0.1)}, prompts=3)
    for entry in rows:
        entry |= {"distinct_2": 0.5 + abs(entry["strength"]) / 10, "longest_repeat": 2}
        entry["retention"] = None if entry["method"] == "none" else 1.0
    summary = summarise(table(rows), resamples=20)["directions"][0]
    first, second = summary["methods"][0]["points"]
    assert (first["strength"], second["strength"], first["prompts"]) == (0.5, 1.0, 3)
    assert first["gain"] == pytest.approx(0.05) and first["nll"] == pytest.approx(2.6)
    assert first["concept_positive"] == pytest.approx(0.552) and first["concept_negative"] == pytest.approx(0.452)
    assert second["distinct_2"] == pytest.approx(0.6) and second["retention"] == 1 and "moved" not in second
    assert summary["unsteered"]["nll"]["value"] == pytest.approx(2.1)
    assert summary["unsteered"]["retention"] == {"value": None, "interval": None}
    ends = summary["methods"][0]["frontier"][:: len(summary["methods"][0]["frontier"]) - 1]
    assert ends == [pytest.approx([2.1, 0.0]), pytest.approx([3.1, 0.1])]


def test_a_failed_rating_is_left_out_of_its_point_alone_and_shifts_nothing():
    rows = rows_of({"plain": line(0.2), "paired": line(0.3)}, prompts=6)
    whole = summarise(table(rows), resamples=50)["directions"][0]
    hardest = next(r for r in rows if r["method"] == "paired" and r["prompt"] == 5 and r["strength"] == -1.0)
    hardest["concept"] = math.nan
    found = summarise(table(rows), resamples=50)["directions"][0]
    paired = found["methods"][1]
    assert (paired["failed"], paired["missing"]) == (1, 0)
    assert [point["prompts"] for point in paired["points"]] == [6, 5]
    for point, before in zip(paired["points"], whole["methods"][1]["points"], strict=True):
        assert (point["gain"], point["nll"]) == pytest.approx((before["gain"], before["nll"]))
    rows.remove(hardest)
    again = summarise(table(rows), resamples=50)["directions"][0]["methods"][1]
    assert (again["failed"], again["missing"]) == (0, 1) and again["area"] == pytest.approx(paired["area"])


def test_an_unsteered_text_without_a_rating_leaves_its_prompt_out():
    rows = rows_of({"plain": line(0.2)}, prompts=4)
    rows[0]["concept"] = None
    summary = summarise(table(rows), resamples=200)["directions"][0]
    assert [point["prompts"] for point in summary["methods"][0]["points"]] == [3, 3]
    json.dumps(summary, allow_nan=False)


def test_priors_share_what_was_run_without_one():
    rows = [entry | {"prior": None} for entry in rows_of({"plain": line(0.2)})]
    for prior, slope in (("small", 0.1), ("large", 0.3)):
        rows += [r | {"prior": prior} for r in rows_of({"paired": line(slope)}) if r["method"] != "none"]
    methods = summarise(table(rows), resamples=20)["directions"][0]["methods"]
    differences = {entry["prior"]: entry["area_difference"]["value"] for entry in methods[1:]}
    assert methods[0]["prior"] is None
    assert differences == {"small": pytest.approx(-0.05), "large": pytest.approx(0.05)}
    separate = [r | {"prior": r["prior"] or "small"} for r in rows if r["prior"] != "large"]
    separate += [r | {"prior": "large"} for r in rows if r["prior"] != "small"]
    found = summarise(table(separate), resamples=20)["directions"][0]["methods"]  # each prior a run of its own
    assert {m["prior"]: m["area_difference"]["value"] for m in found if m["method"] == "paired"} == differences


def test_directions_are_apart_and_the_result_is_json():
    rows = rows_of({"plain": line(0.2)}) + [
        r | {"direction": "other"} for r in rows_of({"plain": line(0.1)}, prompts=9)
    ]
    summary = summarise(table(rows), resamples=20, seed=3)
    assert [(d["direction"], d["prompts"]) for d in summary["directions"]] == [("d", 4), ("other", 9)]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary == summarise(table(rows), resamples=20, seed=3)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Two methods whose gains share each prompt's noise: points and the paired difference of areas, 200 samples."""
    rng = np.random.default_rng(0)
    strengths = np.array([0.25, 0.5, 0.75, 1.0])
    truth = np.array([0.1, 0.2 * 0.5 - 0.1 * 0.5])  # gain of the baseline at 0.5; difference of areas over [0, 1]
    hits = []
    for seed in range(200):
        shared, cost, own = (rng.normal(0, scale, (40, 1)) for scale in (0.1, 0.1, 0.05))
        increase = strengths * (1 + cost)
        gains = strengths * (0.2 + shared), strengths * (0.3 + shared + own)
        counts = bootstrap_counts(40, 300, seed)
        ones, draws = np.ones((40, 1)), []
        for gain in gains:
            g, x = (np.hstack([0 * ones, part]) for part in (gain, increase))
            draws.append(Curve(counts @ g / 40, counts @ x / 40, counts @ x / 40))
        point = estimate(draws[0].gain[:, 2])
        areas = difference(frontier(draws[1]).area(1.0), frontier(draws[0]).area(1.0))
        hits.append([e.low <= t <= e.high for e, t in zip((point, areas), truth, strict=True)])
    coverage = np.mean(hits, axis=0)
    assert (coverage > 0.885).all(), coverage  # 95% of 200: at least 178 with probability 99.9%
    assert coverage.min() < 1, coverage


def test_pairing_narrows_the_difference():
    def shaken(prompt: int, r: float) -> tuple[float, float]:
        gain, increase = NOISY(prompt, r)
        return gain + 0.05 * abs(r), increase

    rows = rows_of({"plain": NOISY, "paired": shaken}, prompts=40)
    plain, paired = summarise(table(rows), resamples=400)["directions"][0]["methods"]
    assert np.diff(paired["area_difference"]["interval"]) < 0.2 * np.diff(plain["area_interval"])
    assert paired["area_difference"]["clear"]


def test_resamples_draw_as_many_prompts_as_there_are():
    counts = bootstrap_counts(7, 50, 0)
    assert counts.shape == (51, 7) and (counts.sum(axis=1) == 7).all() and (counts[0] == 1).all()
    assert (bootstrap_counts(7, 50, 0) == counts).all() and (bootstrap_counts(7, 50, 1) != counts).any()


numbers = st.floats(-1, 1, allow_subnormal=False)
drawn_points = st.lists(st.tuples(st.floats(-2, 4, allow_subnormal=False), numbers), max_size=8)


@settings(deadline=None)
@given(points=drawn_points, width=st.floats(0.01, 3))
def test_any_frontier_is_monotone_concave_and_above_its_points(points, width):
    f = frontier_of(points)
    at = np.linspace(0, width, 33)
    gains = np.array([f.gain_at(x)[0] for x in at])
    assert (np.diff(gains) >= -1e-9).all()
    assert (np.diff(gains, n=2) <= 1e-9).all()
    for x, y in [(0.0, 0.0), *points]:
        assert f.gain_at(max(x, 0.0))[0] >= y - 1e-9
    for x, gain in zip(at[1:], gains[1:], strict=True):
        assert f.gain_at(f.increase_at(gain)[0])[0] == pytest.approx(gain, abs=1e-9)
        assert f.increase_at(gain - 1e-12)[0] <= x + 1e-9  # less by rounding: on a flat part it costs any increase
    vertices = [x for x in f.increase[0] if 0 < x < width]
    grid = np.unique(np.concatenate([at, vertices]))
    exact = np.trapezoid([f.gain_at(x)[0] for x in grid], grid) / width
    assert f.area(width)[0] == pytest.approx(exact, abs=1e-9)


@settings(deadline=None)
@given(points=drawn_points, added=st.tuples(st.floats(-2, 4, allow_subnormal=False), numbers), width=st.floats(0.01, 3))
def test_area_never_decreases_when_a_point_is_added(points, added, width):
    assert frontier_of([*points, added]).area(width)[0] >= frontier_of(points).area(width)[0] - 1e-9


@settings(deadline=None)
@given(samples=st.lists(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=3), min_size=1, max_size=5))
def test_resamples_do_not_touch_each_other(samples):
    x, y = np.array([[(0.0, 0.0), *points] for points in samples]).transpose(2, 0, 1)
    together = frontier(Curve(y, x, x)).area(0.5)
    assert together.tolist() == pytest.approx([frontier_of(points).area(0.5)[0] for points in samples])


def test_gain_at_matched_fluency_and_its_converse_agree():
    one, two = frontier_of([(1.0, 0.4)]), frontier_of([(1.0, 0.2)])
    one, two = (Frontier(np.repeat(f.increase, 3, 0), np.repeat(f.gain, 3, 0)) for f in (one, two))
    assert difference(one.gain_at(0.5), two.gain_at(0.5)) == pytest.approx((0.1, 0.1, 0.1))
    assert difference(one.increase_at(0.1), two.increase_at(0.1)) == pytest.approx((-0.25, -0.25, -0.25))
    assert difference(two.increase_at(0.3), one.increase_at(0.3)).value == math.inf
    assert math.isnan(difference(two.increase_at(0.9), one.increase_at(0.9)).value)


def test_curve_counts_prompts_as_the_resample_does():
    aggregated = aggregate(table(rows_of({"plain": lambda p, r: (0.01 * p * abs(r), 1.0)}, prompts=3)))[
        Key("d", "plain", "")
    ]
    found = curve(aggregated, np.array([[1.0, 1, 1], [3, 0, 0], [0, 0, 3]]))
    assert found.gain == pytest.approx(np.array([[0, 0.005, 0.01], [0, 0, 0], [0, 0.01, 0.02]]))
    assert found.nll[:, 0] == pytest.approx([2.1, 2.0, 2.2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [{k: v for k, v in r.items() if k != "nll"} for r in rows], "unknown column .* 'nll'"),
        (lambda rows: [r for r in rows if r["method"] != "none"], "'d' has no unsteered texts"),
        (lambda rows: [r for r in rows if r["method"] == "none"], "no steered texts"),
        (lambda rows: [*rows, rows[-1]], "d, plain: two rows of the same prompt"),
        (lambda rows: [rows[0], *rows], "d, plain: two rows of the same prompt"),
        (lambda rows: [r | {"concept": 55.0} for r in rows], "probability"),
        (lambda rows: [r | {"strength": math.inf} for r in rows], "finite"),
        (lambda rows: [r | {"method": r["method"].replace("plain", "pain")} for r in rows], "baseline .* 'plain'; did"),
        (lambda rows: [r for r in rows if r["prompt"] == 0], "at least 2 prompts .* got 1"),
        (lambda rows: [r | {"concept": math.nan} for r in rows], "at least 2 prompts .* got 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(change, message):
    with pytest.raises(InputError, match=message) as error:
        summarise(table(change(rows_of({"plain": line(0.1)}))), resamples=10)
    assert "\n" not in str(error.value)


def test_no_resamples_is_refused():
    with pytest.raises(InputError, match="resamples"):
        summarise(table(rows_of({"plain": line(0.1)})), resamples=0)


def test_a_prior_without_its_baseline_is_refused():
    rows = [r | {"prior": "a"} for r in rows_of({"plain": line(0.1)})]
    rows += [r | {"prior": "b"} for r in rows_of({"paired": line(0.1)})]
    with pytest.raises(InputError, match="'b' .*baseline"):
        summarise(table(rows), resamples=10)
