"""What each verb prints, on a tiny base that nothing sensible comes out of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.report import read_report


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    """Three dialogues of two turns."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {n}."},
                {"role": "assistant", "content": n},
                {"role": "user", "content": "Again."},
                {"role": "assistant", "content": n},
            ]
        }
        for n in ("one", "two", "three")
    ]
    path = tmp_path / "dialogues.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# train, evaluate, compare


def test_training_tells_on_stdout_what_came_of_it_and_on_stderr_how_it_went(tunesmith: Any, spec: Path) -> None:
    shown = tunesmith("train", spec)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("trained   runs/spec · 3 steps in ")
    assert "tunesmith evaluate runs/spec" in shown.stdout
    assert "48 train · 12 test" in shown.stderr


def test_quiet_training_says_nothing_on_stderr(tunesmith: Any, spec: Path) -> None:
    shown = tunesmith("train", spec, "--quiet")
    assert (shown.exit_code, shown.stderr) == (0, "")


def test_overrides_reach_the_run(tunesmith: Any, spec: Path, tmp_path: Path) -> None:
    tunesmith("train", spec, "train.steps=2", "name=other")
    assert json.loads((tmp_path / "runs" / "other" / "result.json").read_text())["steps"] == 2


def test_a_run_is_evaluated_on_its_own_test_split_with_its_own_columns_and_labels(tunesmith: Any, spec: Path, reviews: Path) -> None:
    rows = [json.loads(line) for line in reviews.read_text().splitlines()]
    reviews.write_text("".join(json.dumps({"tweet": row["text"], "mood": row["label"]}) + "\n" for row in rows))
    assert tunesmith("train", spec, "data.columns={text: tweet, label: mood}").exit_code == 0
    found = json.loads(tunesmith("evaluate", "runs/spec", "--json").stdout)
    assert (found["n_questions"], [one["label"] for one in found["classes"]]) == (12, ["negative", "positive"])
    assert found["ci_low"] <= found["score"] <= found["ci_high"]
    assert {"where", "question", "gold", "text", "label", "score"} <= set(found["answers"][0])


def test_a_question_with_a_label_that_the_run_never_saw_is_refused_also_with_another_metric(
    tunesmith: Any, spec: Path, tmp_path: Path
) -> None:
    assert tunesmith("train", spec).exit_code == 0
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": "It is a pen.", "label": "neutral"}) + "\n")
    for words in ([], ["task.scoring=generation"]):
        shown = tunesmith("evaluate", "runs/spec", "new.jsonl", *words)
        assert (shown.exit_code, "new.jsonl, line 1: 'neutral'" in shown.stderr) == (2, True), shown.output


def test_a_base_is_evaluated_with_the_columns_of_a_spec(tunesmith: Any, spec: Path, tiny_base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("tweet,mood\nI love this pen.,positive\nI hate this pen.,negative\n")
    columns = "data.columns={text: tweet, label: mood}"
    shown = tunesmith("evaluate", tiny_base_folder, "test.csv", "--spec", spec, columns)
    assert shown.exit_code == 0, shown.output
    assert "2 questions" in shown.stdout
    assert "accuracy 0.500 (95 %:" in shown.stdout
    assert "macro F1" in shown.stdout


def test_a_spec_lends_a_base_its_test_split(tunesmith: Any, spec: Path, tiny_base_folder: Path) -> None:
    assert "12 questions" in tunesmith("evaluate", tiny_base_folder, "--spec", spec).stdout


def test_dialogues_are_scored_under_the_gold_history_and_under_the_models_own(
    tunesmith: Any, tiny_base_folder: Path, dialogues: Path
) -> None:
    words = ("evaluate", tiny_base_folder, dialogues, "task.max_new_tokens=4", "task.metric=chrf")
    shown = tunesmith(*words)
    assert shown.exit_code == 0, shown.output
    assert "under the gold history" in shown.stdout
    assert "under its own history" in shown.stdout
    found = json.loads(tunesmith(*words, "--json").stdout)
    assert (found["history"], found["under_own_history"]["history"]) == ("gold", "own")


def test_a_comparison_shows_scores_verdict_and_the_questions_that_differ(
    tunesmith: Any, spec: Path, reviews: Path, tiny_base_folder: Path, tmp_path: Path
) -> None:
    strong = ["train.steps=200", "train.lr=2e-2", "train.batch=16", "adapter=lora(rank=16, sites=all)", "data.test=2"]
    assert tunesmith("train", spec, *strong).exit_code == 0
    shown = tunesmith("compare", tiny_base_folder, "runs/spec", "--questions", reviews, "--report", "told")
    assert shown.exit_code == 0, shown.output
    assert f"runs/spec against {tiny_base_folder}: better" in shown.stdout
    assert "Where they differ" in shown.stdout
    assert "✓ negative" in shown.stdout
    report = read_report(tmp_path / "told")
    assert report.rungs[1].versus_previous is not None
    assert report.rungs[1].versus_previous.wins > 0
    assert "told/report.html" in shown.stdout


def test_a_comparison_shows_losses_beside_wins(tunesmith: Any, spec: Path, reviews: Path, tiny_base_folder: Path) -> None:
    """Trained to answer one label only, and the base the other: each is right on its half."""
    rows = [json.loads(line) for line in reviews.read_text().splitlines()]
    Path("one.jsonl").write_text("".join(json.dumps(row | {"label": "negative"}) + "\n" for row in rows))
    strong = ["train.steps=100", "train.lr=2e-2", "adapter=lora(rank=16, sites=all)", "task.labels=[negative, positive]"]
    assert tunesmith("train", spec, *strong, "data.train=one.jsonl", "data.test=2").exit_code == 0
    shown = tunesmith("compare", tiny_base_folder, "runs/spec", "--questions", reviews)
    assert (shown.stdout.count("✓ negative"), shown.stdout.count("✓ positive")) == (3, 3), shown.stdout


def test_a_comparison_as_json_is_a_report(tunesmith: Any, spec: Path, reviews: Path, tiny_base_folder: Path, tmp_path: Path) -> None:
    shown = tunesmith("compare", tiny_base_folder, tiny_base_folder, "--questions", reviews, "--json")
    (tmp_path / "report.json").write_text(shown.stdout)
    assert len(read_report(tmp_path / "report.json").rungs) == 2


def test_a_climb_prints_its_table_and_where_the_report_lies(tunesmith: Any, spec: Path, tmp_path: Path) -> None:
    shown = tunesmith("climb", spec, "climb.rungs=[zero_shot, sft]")
    assert shown.exit_code == 0, shown.output
    assert "vs best before" in shown.stdout
    assert "report    runs/spec/report.html" in shown.stdout
    assert (tmp_path / "runs" / "spec" / "report.html").is_file()


def test_the_demo_climbs_its_own_spec_with_the_users_overrides(
    tunesmith: Any, tiny_base_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    small = ["data={train: reviews.jsonl, test: 12, dev: 6}", "task={}", "train={steps: 2, batch: 4}", "climb.rungs=[zero_shot, sft]"]
    shown = tunesmith("demo", f"base={tiny_base_folder}", *small, "name=mini")
    assert shown.exit_code == 0, shown.output
    assert read_report(tmp_path / "runs" / "mini").n_questions == 12


def test_a_run_can_be_the_start_of_the_next(tunesmith: Any, spec: Path) -> None:
    assert tunesmith("train", spec).exit_code == 0
    assert tunesmith("train", spec, "base=runs/spec", "name=second").exit_code == 0
    assert "12 questions" in tunesmith("evaluate", "runs/second").stdout


# generate, chat


def test_answers_come_in_the_order_of_the_prompts_also_from_stdin(tunesmith: Any, tiny_base_folder: Path) -> None:
    shown = tunesmith("generate", tiny_base_folder, "first", "-", "--max-tokens", 3, "--json", stdin="second\n\nthird\n")
    assert shown.exit_code == 0, shown.output
    assert [json.loads(line)["prompt"] for line in shown.stdout.splitlines()] == ["first", "second", "third"]


def test_raw_text_is_continued_without_a_template(tunesmith: Any, tiny_base_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_base_folder), AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    ids = tokenizer("I love this", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids.input_ids.shape[1] :])
    shown = tunesmith("generate", tiny_base_folder, "I love this", "--raw", "--max-tokens", 6, "--json")
    assert json.loads(shown.stdout)["answer"] == expected


def test_the_system_turn_changes_what_the_model_reads(tunesmith: Any, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def listen(model: Any, prompts: list[Any], **options: Any) -> list[str]:
        asked.extend(prompts)
        assert options["stop"] == ("a", "b")
        assert (options["temperature"], options["top_p"], options["seed"]) == (0.5, 0.9, 3)
        return ["" for _ in prompts]

    monkeypatch.setattr("tunesmith.api.generate", listen)
    options = ["--stop", "a", "--stop", "b", "--temperature", "0.5", "--top-p", "0.9", "--seed", "3"]
    assert tunesmith("generate", tiny_base_folder, "hello", "--system", "Be brief.", *options).exit_code == 0
    assert asked == [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]]


def test_a_chat_streams_remembers_and_saves_what_training_can_read(tunesmith: Any, tiny_base_folder: Path, tmp_path: Path) -> None:
    lines = "/system Be brief.\nhello\nand now?\n/save talk.jsonl\n/reset\nhello\n/save talk.jsonl\n/quit\nnever heard\n"
    shown = tunesmith("chat", tiny_base_folder, "--max-tokens", 4, stdin=lines)
    assert shown.exit_code == 0, shown.output
    first, second = [json.loads(line)["messages"] for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert [m["role"] for m in first] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["role"] for m in second] == ["system", "user", "assistant"]
    assert first[:3] == second  # greedy: the same question gets the same answer
    assert shown.stdout == "".join(f"{m['content']}\n" for m in [*first, *second] if m["role"] == "assistant")
    assert tunesmith("data", "show", "talk.jsonl").exit_code == 0


def test_a_chat_drops_its_oldest_turns_when_the_context_is_full_and_says_so(tunesmith: Any, tiny_base_folder: Path) -> None:
    lines = "\n".join("The quick brown fox jumps over the lazy dog. " * 6 for _ in range(6))
    shown = tunesmith("chat", tiny_base_folder, "--max-tokens", 16, stdin=lines)
    assert shown.exit_code == 0, shown.output
    assert "oldest messages dropped: the context is 512 tokens" in shown.stderr


def test_a_mistake_does_not_end_a_chat(tunesmith: Any, tiny_base_folder: Path) -> None:
    too_long = "jumps over " * 600
    shown = tunesmith("chat", tiny_base_folder, "--max-tokens", 4, stdin=f"/svae x\n/save x.jsonl\n{too_long}\nhello\n")
    assert shown.exit_code == 0
    for words in ("unknown command '/svae'", "/save", "there is nothing to save", "the last exchange alone is"):
        assert words in shown.stderr
    assert shown.stdout


# data show, doctor


def test_data_show_marks_in_a_pipe_what_is_trained_on(tunesmith: Any, reviews: Path, tiny_base_folder: Path) -> None:
    shown = tunesmith("data", "show", reviews, "--base", tiny_base_folder, "-n", 2)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("[[positive<|im_end|>]]") == 2
    assert "Text: I love this phone.<|im_end|>" in shown.stdout
    assert "60 rows · " in shown.stdout
    assert "240 trained on (" in shown.stdout


def test_data_show_shows_rows_as_the_spec_trains_on_them(tunesmith: Any, spec: Path, reviews: Path) -> None:
    shown = tunesmith("data", "show", reviews, "--spec", spec, "task.instruction=Good or bad?", "data.max_tokens=30", "-n", 1)
    assert "Good or bad?\n\nI love this phone.<|im_end|>" in shown.stdout
    assert "rows are over data.max_tokens=30" in shown.stdout


def test_data_show_shows_rows_as_a_run_was_trained_on_them(tunesmith: Any, spec: Path, reviews: Path) -> None:
    assert tunesmith("train", spec, "task.instruction=Good or bad?").exit_code == 0
    assert "Good or bad?\n\nI love this phone.<|im_end|>" in tunesmith("data", "show", reviews, "--base", "runs/spec").stdout


def test_data_show_shows_a_specs_rows_in_the_tokens_of_another_base(
    tunesmith: Any, spec: Path, reviews: Path, tiny_base_folder: Path
) -> None:
    spec.write_text(spec.read_text().replace(str(tiny_base_folder), "./not-there"))
    shown = tunesmith("data", "show", reviews, "--spec", spec, "--base", tiny_base_folder)
    assert "[[positive<|im_end|>]]" in shown.stdout


def test_data_show_needs_no_base_to_show_what_is_answered(tunesmith: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("tweet,mood\nI love [b]this.,positive\nI hate this.,negative\n")
    shown = tunesmith("data", "show", "rows.csv", "--columns", "text=tweet", "--columns", "label=mood")
    assert "Text: I love [b]this.\nassistant: positive" in shown.stdout
    assert "--base" in shown.stdout


def test_data_show_shows_every_assistant_turn_of_a_dialogue_as_trained_on(tunesmith: Any, dialogues: Path, tiny_base_folder: Path) -> None:
    shown = tunesmith("data", "show", dialogues, "--base", tiny_base_folder, "-n", 1)
    assert shown.stdout.count("[[one<|im_end|>]]") == 2
    last = tunesmith("data", "show", dialogues, "--base", tiny_base_folder, "-n", 1, "data.supervise=last")
    assert last.stdout.count("[[one<|im_end|>]]") == 1


def test_the_doctor_is_content_with_this_machine_and_calls_absent_extras_absent(tunesmith: Any) -> None:
    shown = tunesmith("doctor")
    assert shown.exit_code == 0, shown.output
    assert any(line.split()[:2] == ["ok", "torch"] for line in shown.stdout.splitlines())
    assert {check["name"] for check in json.loads(tunesmith("doctor", "--json").stdout)} >= {"python", "torch", "dtype"}


def test_the_doctor_fails_where_a_part_is_missing_without_which_nothing_works(tunesmith: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.bases.doctor import Check

    monkeypatch.setattr("tunesmith.bases.doctor.diagnose", lambda: [Check("torch", "missing", "not installed", "pip install tunesmith")])
    shown = tunesmith("doctor")
    assert (shown.exit_code, "pip install tunesmith" in shown.stdout) == (1, True)
    monkeypatch.setattr("tunesmith.bases.doctor.diagnose", lambda: [Check("extra quant", "missing", "not installed", "pip install ...")])
    shown = tunesmith("doctor")
    assert (shown.exit_code, "absent" in shown.stdout) == (0, True)


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["plan", "none.yaml"], 2)])
def test_a_process_that_trained_with_others_is_left_by_its_exit_code(
    words: list[str], code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tunesmith.cli.app import main
    from tunesmith.engine import processes

    left: list[int] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tunesmith", *words])
    monkeypatch.setattr(processes, "_current", processes.Processes(0, 2))
    monkeypatch.setattr(processes.atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(processes.os, "_exit", left.append)
    with pytest.raises(SystemExit):
        main()
    assert left == [code]
