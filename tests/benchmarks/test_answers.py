"""The works that learn from answers, on a tiny random model: our sides end to end, and what is made of both sides' figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import prefer
import prefer_ours
import pytest
import rollouts
import rollouts_ours

from tunesmith.bases import load_base

PAIRS = {"batch": 4, "steps": 3, "warm": 1, "lr": 1e-2}
ROLLOUTS = {**rollouts.SETTINGS, "prompts": 2, "pool": 2, "samples": 4, "tokens": 6, "words": 5, "lr": 1e-2}


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a side ends with."""
    return dict(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))


@pytest.mark.parametrize("name", prefer.NAMES)
def test_our_side_learns_from_pairs_and_says_losses_and_speed(
    name: str, tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    useful = prefer.write_work(tmp_path, name, load_base(str(tiny_base_folder), dtype="fp32"), PAIRS)
    prefer_ours.main(tmp_path, str(tiny_base_folder), "fp32", "off")
    found = said(capsys)
    assert len(found["losses"]) == len(found["seconds"]) == 3 and found["pairs_per_second"] > 0 and useful > 0
    if name == "dpo":
        assert found["losses"][0] == pytest.approx(math.log(2), abs=1e-6), "policy and reference are the same as the run begins"
        assert found["losses"][1] != found["losses"][0] and found["reading"] > 0
    else:
        assert found["losses"][0] != pytest.approx(math.log(2), abs=1e-6), "a head with values prefers something"


def test_what_the_reference_took_counts_for_the_pairs_that_count(capsys: pytest.CaptureFixture[str]) -> None:
    prefer.say([0.7] * 3, [10.0, 1.0, 1.0], 3.0, {"warm": 1, "batch": 8}, 100.0, "fp32")
    assert said(capsys)["pairs_per_second"] == pytest.approx(2 * 8 / (2 * 1.0 + 2 / 3 * 3.0))


def test_our_side_samples_and_learns_and_records_what_the_peer_is_given(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts.write_work(tmp_path, load_base(str(tiny_base_folder), dtype="fp32"), ROLLOUTS)
    rollouts_ours.main(tmp_path, str(tiny_base_folder), "fp32", "record", "off")
    found, recorded = said(capsys), json.loads((tmp_path / "said.json").read_text())
    assert len(found["losses"]) == len(found["norms"]) == len(recorded) == rollouts.REPLAYED
    assert found["losses"][0] == pytest.approx(0.0, abs=1e-6) and found["norms"][0] > 0, "advantages add up to 0 as a step begins"
    assert all([len(ids) for ids in answers] == [6] * 4 for step in recorded for answers in step.values()), "no answer ends early"
    assert all(len(step) == 2 for step in recorded)


def test_dynamic_sampling_counts_tokens_of_groups_that_are_not_all_alike(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts.write_work(tmp_path, load_base(str(tiny_base_folder), dtype="fp32"), ROLLOUTS)
    rollouts_ours.main(tmp_path, str(tiny_base_folder), "fp32", "dynamic", "off")
    found = said(capsys)
    share = found["useful_tokens_per_second"] / found["sampled_tokens_per_second"]
    assert share == pytest.approx(found["useful_share"]) and 0 <= share <= 1 and found["rounds"] >= 1


def test_losses_and_gradient_norms_of_both_sides_are_held_against_each_other() -> None:
    found = rollouts.apart({"losses": [0.0, 0.1], "norms": [2.0, 1.0]}, {"losses": [0.0, 0.2], "norms": [2.0, 0.5]})
    assert found["largest_loss_difference_fp32"] == pytest.approx(0.1)
    assert found["largest_gradient_norm_difference_fp32"] == pytest.approx(1.0)


def test_a_row_of_the_table_is_made_of_medians() -> None:
    pairs = [({"rate": rate, "peak_mb": 10.4}, {"rate": 2.0, "peak_mb": 40.0}) for rate in (4.0, 8.0, 6.0)]
    row = prefer.compared("dpo", "pairs/s", "rate", pairs, 0.05)
    assert (row["ours"], row["peer"], row["ratio"], row["ours_peak_mb"], row["limit_share"]) == (6.0, 2.0, 3.0, 10, 0.3)
    assert prefer.fastest({("fp32", "live"): {"rate": 1.0}, ("bf16", "live"): {"rate": 2.0}}, "rate") == ("bf16", "live")


def test_every_work_can_be_named() -> None:
    from run import OTHERS

    assert {"dpo", "reward", "grpo"} <= set(OTHERS)
