"""Several runs in one file, each going on from those before, and what they made held against one another."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Types = Callable[..., Result]

PIPELINE = """
base: {base}
data: {{train: pairs.jsonl, dev: 8, duplicates: drop}}
adapter: lora(rank=4)
train: {{steps: 6, batch: 16, lr: 1e-2}}
stages:
  sft: {{data: {{shape: prompt, columns: {{completion: chosen}}, conflicts: keep}}}}
  reward: {{objective: reward}}
  dpo: {{base: "@sft", objective: dpo}}
  ppo:
    base: "@sft"
    objective: ppo
    data: {{shape: question, columns: {{}}}}
    rewards: ["model(source=@reward)"]
    rollout: {{prompts: 4, samples: 1, max_new_tokens: 6, epochs: 2}}
    train: {{steps: 4}}
compare: {{systems: ["@dpo", "@ppo", "@reward"], questions: held-out.jsonl}}
"""


def pairs(count: int, rng: random.Random) -> list[dict[str, str]]:
    things = ("phone", "film", "book", "soup", "chair", "song")
    prompts = [f"What of the {rng.choice(things)} number {rng.randrange(99)}?" for _ in range(count)]
    return [{"prompt": prompt, "chosen": "I love it", "rejected": "I hate it"} for prompt in prompts]


@pytest.fixture(scope="module")
def types(typed_in: Any, tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[Types]:
    folder, rng = tmp_path_factory.mktemp("pipeline"), random.Random(1)
    for name, count in (("pairs", 40), ("held-out", 16)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(count, rng)))
    (folder / "align.yaml").write_text(PIPELINE.format(base=tiny_base_folder))
    with typed_in(folder) as run:
        yield run


def test_one_file_trains_every_stage_on_what_came_before_and_compares_them(types: Types) -> None:
    told = types("pipeline", "align.yaml")
    assert told.exit_code == 0, told.output
    for stage in ("sft", "reward", "dpo", "ppo"):
        assert json.loads(Path(f"runs/align/{stage}/result.json").read_text())["steps"] > 0
    assert Path("runs/align/ppo/critic/adapter_model.safetensors").is_file()
    assert (
        "runs/align/dpo" in told.stdout and "runs/align/reward" in told.stdout and ("better" in told.stdout or "undecided" in told.stdout)
    )

    written = {path: path.stat().st_mtime_ns for path in Path("runs/align").rglob("adapter_model.safetensors")}
    again = types("pipeline", "align.yaml", "--resume")
    assert again.exit_code == 0 and again.output.count("is finished; nothing to do") == 4
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())


JUDGED = """
base: {base}
data: {{train: judged.jsonl, shape: prompt, columns: {{completion: chosen}}, duplicates: drop}}
task: {{kind: generate, max_new_tokens: 4}}
adapter: lora(rank=2)
train: {{steps: 2, batch: 4}}
stages: {{one: {{}}, two: {{adapter: ia3}}}}
compare: {{systems: ["@one", "@two"], questions: asked.jsonl, data: {{shape: question}}, judge: {base}}}
"""


def test_a_judge_compares_what_came_out_unless_it_labelled_the_pairs(types: Types, tiny_base_folder: Path) -> None:
    rows: list[dict[str, Any]] = list(pairs(8, random.Random(2)))
    Path("asked.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    Path("judged.yaml").write_text(JUDGED.format(base=tiny_base_folder))
    told = {"kind": "judge", "labelled_by": [{"model": str(tiny_base_folder), "content": ""}]}
    Path("judged.jsonl").write_text("".join(json.dumps({**row, "provenance": told}) + "\n" for row in rows))
    said = types("pipeline", "judged.yaml")
    assert said.exit_code != 0 and "labelled the preferences" in said.output, said.output
    assert not Path("runs/judged").exists()

    Path("judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = types("pipeline", "judged.yaml")
    assert said.exit_code == 0 and "judge rating" in said.output and "not held against human labels" in said.output, said.output

    alone = types(
        "evaluate", "runs/judged/one", "asked.jsonl", "data.columns={}", "data.shape=question", f"evaluate.judge={tiny_base_folder}"
    )
    assert alone.exit_code == 0 and "judge_rating" in alone.output, alone.output
    refused = types("evaluate", "runs/judged/one", "asked.jsonl", "data.columns={}", "data.shape=question", "evaluate.judge=nowhere")
    assert refused.exit_code != 0 and "nowhere" in refused.output


def test_an_override_of_one_stage_leaves_the_others_as_they_are(types: Types) -> None:
    from tunesmith.pipeline import load_pipeline

    stages = load_pipeline("align.yaml", ["sft.train.lr=0.5", "train.steps=3"]).stages
    assert (stages["sft"].train.lr, stages["dpo"].train.lr) == (0.5, 0.01)
    assert {stage.train.steps for stage in stages.values()} == {3}
    assert load_pipeline("align.yaml", ["name=other"]).stages["dpo"].name == "other/dpo"
    assert load_pipeline("align.yaml", ["name=other"]).stages["dpo"].base.model == "runs/other/sft"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('stages: {dpo: {base: "@sft", objective: dpo}}', "'@sft' is no stage that comes before"),
        ("stages: {sft: {lr: 1}}", "stage sft"),
        ("stages: []", "stages is a mapping"),
        ("objective: sft", "holds no stages"),
        ("stages: {sft: {}}\ncompare: {systems: [a]}", "compare names systems and questions"),
    ],
)
def test_mistakes_are_told_before_anything_runs(types: Types, text: str, told: str) -> None:
    Path("bad.yaml").write_text(f"base: nowhere\n{text}\n")
    said = types("pipeline", "bad.yaml")
    assert said.exit_code != 0 and told in said.output, said.output
    assert not Path("runs/bad").exists()


def test_train_says_what_a_file_of_stages_is_run_by(types: Types) -> None:
    said = types("train", "align.yaml")
    assert said.exit_code != 0 and "tunesmith pipeline align.yaml" in said.output
