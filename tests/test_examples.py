"""Every example is a spec that can be read, short enough to be taken in at a glance."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.ladder.demo import demo_spec
from tunesmith.ladder.rungs import make_rungs
from tunesmith.pipeline import load_pipeline
from tunesmith.spec import load_spec, read_values

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_valid_spec_of_at_most_thirty_lines(path: Path) -> None:
    specs = load_pipeline(path).stages.values() if "stages" in read_values(path) else [load_spec(path)]
    assert all(spec.name.split("/")[0] == path.stem and make_rungs(spec.climb.rungs) for spec in specs)
    assert len(path.read_text().splitlines()) <= 30


def test_there_are_examples() -> None:
    assert EXAMPLES


def test_the_demo_climbs_five_rungs_on_at_least_four_hundred_questions_with_its_own_worked_examples() -> None:
    spec = demo_spec()
    assert [expression.split("(")[0] for expression in spec.climb.rungs] == ["zero_shot", "few_shot", "nearest", "chain_of_thought", "sft"]
    assert int(str(spec.data.test)) >= 400
    assert spec.climb.demonstrations is not None
    assert Path(spec.climb.demonstrations).is_file()


def test_the_demo_takes_overrides() -> None:
    assert demo_spec(["train.lr=1e-4"]).train.lr == 1e-4
