"""`tunesmith objectives`."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.described import OTHERS, by_family, notation


def test_objectives_are_listed_by_what_they_learn_from_with_what_divides_their_sums(tunesmith: Any) -> None:
    shown = tunesmith("objectives")
    assert shown.exit_code == 0
    lines = {line.strip().split("  ")[0]: line for line in shown.stdout.splitlines() if line.strip()}
    assert "pairs of the step" in lines["dpo"] and "chosen rejected reference soft" in lines["dpo"]
    assert "tokens of the step" in lines["dapo"] and "actions" in lines["dapo"] and "labels" in lines["classify"]
    places = [list(lines).index(name) for name in ("pairs of answers", "dpo", "orpo", "rankings of answers", "sampled answers", "grpo")]
    assert places == sorted(places)
    listed = json.loads(tunesmith("objectives", "--json").stdout)
    assert {each["name"] for each in listed} == set(OBJECTIVES) and all(each["denominator"] for each in listed)


def test_one_objective_is_explained_with_its_equation_paper_and_defaults(tunesmith: Any) -> None:
    shown = tunesmith("objectives", "dpo").stdout
    assert shown.startswith("dpo(beta=0.1, label_smoothing=0.0)\n") and "-s(beta D)" in shown
    assert "https://arxiv.org/abs/2305.18290" in shown and "pairs of the step" in shown
    explained = json.loads(tunesmith("objectives", "dr_grpo", "--json").stdout)
    assert explained["options"]["max_tokens"] is None and explained["options"]["clip_high"] == "none"
    assert explained["papers"] == ["2503.20783"] and "reference" in explained["reads"]


def test_an_unknown_objective_names_the_nearest_ones(tunesmith: Any) -> None:
    shown = tunesmith("objectives", "gropo")
    assert shown.exit_code == 2 and "unknown objective 'gropo'" in shown.stderr and "grpo" in shown.stderr


def test_every_objective_has_a_family_and_says_which_paper_its_options_are_from() -> None:
    families = by_family()
    assert OTHERS not in families and sum(map(len, families.values())) == len(list(OBJECTIVES))
    assert all(notation(family) for family in families)
    aligned = [each for family, entries in families.items() if family != "task heads" for each in entries if each.name != "sft"]
    assert all(each.papers for each in aligned)
    undescribed = [f"{each.name}({option})" for each in aligned for option in each.options if option not in each.text]
    shared = {"clip", "clip_high", "dual_clip", "beta", "kl", "aggregation", "max_tokens"}  # explained once, at grpo
    assert [each for each in undescribed if each.split("(")[1][:-1] not in shared] == []
