"""A user's way to heads that tag words, say a number and choose among candidates, on an encoder and on a decoder."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

NAMES, CITIES = ("ada", "bo", "cy", "dee"), (("rome",), ("oslo",), ("new", "york"))
MOODS = {"awful": -2.0, "bad": -1.0, "fine": 1.0, "great": 2.5}
THINGS = ("lamp", "soup", "film", "song")
ANIMALS, TOOLS = ("cat", "dog", "owl"), ("saw", "axe", "pen", "mop")

Types = Callable[..., Result]


def sentences(count: int, rng: random.Random) -> list[tuple[list[str], list[str]]]:
    out = []
    for _ in range(count):
        name, city, other = rng.choice(NAMES), rng.choice(CITIES), rng.choice(THINGS)
        words = [name, "likes", "the", other, "of", *city, "."]
        out.append((words, ["B-PER", "O", "O", "O", "O", *(f"{'I' if n else 'B'}-LOC" for n in range(len(city))), "O"]))
    return out


def rows_of(kind: str, count: int, rng: random.Random) -> list[dict[str, Any]]:
    if kind == "tag":
        return [{"tokens": words, "tags": tags} for words, tags in sentences(count, rng)]
    if kind == "regress":
        chosen = [(rng.choice(list(MOODS)), rng.choice(THINGS)) for _ in range(count)]
        return [{"text": f"the {thing} of {rng.randrange(9)} is {mood}", "score": MOODS[mood] * 10 + 50} for mood, thing in chosen]
    out = []
    for _ in range(count):
        animal, others = rng.choice(ANIMALS), rng.sample(TOOLS, rng.choice((1, 2)))
        choices = rng.sample([animal, *others], len(others) + 1)
        out.append(
            {"question": f"which of {rng.choice(THINGS)} {rng.randrange(9)} lives ?", "choices": choices, "answer": choices.index(animal)}
        )
    return out


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT whose tokenizer knows the words of all tasks."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    rng = random.Random(0)
    text = json.dumps([rows_of(kind, 80, rng) for kind in ("tag", "regress", "choose")])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(re.findall(r"[a-z]+|[0-9]|[.?]", text)))]
    core = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def types(typed_in: Any, tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_base_folder: Path) -> Iterator[Types]:
    """The command, in process, in a folder with samples and a spec for each kind of head and base."""
    folder, rng = tmp_path_factory.mktemp("kinds"), random.Random(1)
    for kind, columns in (("tag", ""), ("regress", ", columns: {value: score}"), ("choose", "")):
        for name, count in (("train", 60), ("test", 24)):
            (folder / f"{kind}-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind, count, rng)))
        for base, where, lr in (("encoder", tiny_bert, "2e-2"), ("decoder", tiny_base_folder, "1e-2")):
            own = " + head(pool=mean)" if base == "encoder" and kind != "tag" else ""
            (folder / f"{kind}-{base}.yaml").write_text(
                f"base: {where}\n"
                f"data: {{train: {kind}-train.jsonl, dev: 8, test: {kind}-test.jsonl, duplicates: drop{columns}}}\n"
                f"adapter: lora(rank=8, sites=all){own}\n"
                f"objective: {kind}\n"
                f"train: {{steps: 40, batch: 16, lr: {lr}, evaluate_every: 20}}\n"
                f"climb: {{rungs: [{kind}]}}\n"
            )
    (folder / "lines.conll").write_text(
        "\n\n".join("\n".join(f"{w}\t{t}" for w, t in zip(*one, strict=True)) for one in sentences(20, rng))
    )
    with typed_in(folder) as run:
        yield run


@pytest.fixture(scope="module")
def trained(types: Types) -> Types:
    for kind in ("tag", "regress", "choose"):
        for base in ("encoder", "decoder"):
            told = types("train", f"{kind}-{base}.yaml")
            assert told.exit_code == 0, told.output
            own = base == "encoder" and kind != "tag"
            assert (f"added since objective {kind} needs one" in told.stderr) != own and "chat" not in told.stdout
    return types


METRICS = {"tag": "span_f1", "regress": "closeness", "choose": "accuracy"}


@pytest.mark.parametrize("base", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["tag", "regress", "choose"])
def test_a_trained_head_answers_what_it_has_not_seen(trained: Types, kind: str, base: str) -> None:
    found = json.loads(trained("evaluate", f"runs/{kind}-{base}", "--json").stdout)
    assert found["metric"] == METRICS[kind]
    assert found["score"] > 0.8 and found["ci_low"] <= found["score"] <= found["ci_high"]
    figures = {one["name"] for one in found["figures"]}
    assert figures == {"tag": {"precision", "recall", "strict_f1"}, "regress": {"mse", "mae", "pearson", "spearman"}, "choose": set()}[kind]
    if kind == "tag":
        assert [one["label"] for one in found["classes"]] == ["LOC", "PER"]


def test_heads_answer_from_python(trained: Types) -> None:
    """Words and their tags, a number in the data's unit, candidates by their probability."""
    import tunesmith as ts
    from tunesmith.core.errors import SpecError

    rng = random.Random(7)
    [one] = rows_of("tag", 1, rng)
    assert ts.tag("runs/tag-encoder", one["tokens"]) == one["tags"] == ts.tag("runs/tag-decoder", " ".join(one["tokens"]))
    assert ts.tag("runs/tag-encoder", [one["tokens"], one["tokens"]]) == [one["tags"]] * 2
    [rated] = rows_of("regress", 1, rng)
    assert ts.rate("runs/regress-encoder", rated["text"]) == pytest.approx(rated["score"], rel=0.3)
    assert ts.rate("runs/regress-encoder", [rated["text"]]) == [ts.rate("runs/regress-encoder", rated["text"])]
    [asked] = rows_of("choose", 1, rng)
    for base in ("encoder", "decoder"):
        said = ts.choose(f"runs/choose-{base}", asked["question"], asked["choices"])
        assert next(iter(said)) == asked["choices"][asked["answer"]] and sum(said.values()) == pytest.approx(1)
    with pytest.raises(SpecError, match="answers otherwise") as told:
        ts.rate("runs/tag-encoder", "a text")
    assert "ts.tag" in " ".join(told.value.hints)


def test_what_is_found_is_told_in_words(trained: Types) -> None:
    tagged = trained("evaluate", "runs/tag-encoder").stdout
    assert "span_f1" in tagged and "strict f1" in tagged and "spans" in tagged and "PER" in tagged
    rated = trained("evaluate", "runs/regress-encoder").stdout
    assert "closeness" in rated and "pearson" in rated


@pytest.mark.parametrize("kind", ["tag", "regress", "choose"])
def test_two_heads_are_compared_question_by_question(trained: Types, kind: str) -> None:
    columns = ["data.columns.value=score"] if kind == "regress" else []
    words = ("compare", f"runs/{kind}-encoder", f"runs/{kind}-decoder", *columns)
    told = trained(*words, "--questions", f"{kind}-test.jsonl", "--report", f"report-{kind}")
    assert told.exit_code == 0, told.output
    report = json.loads(Path(f"report-{kind}/report.json").read_text())
    assert report["metric"] == METRICS[kind] and len(report["rungs"]) == 2 and report["rungs"][1]["versus_previous"]["verdict"]
    assert (report["paired_test"] == "exact McNemar") == (kind == "choose")


def test_a_decoder_without_a_head_chooses_the_likeliest_candidate(types: Types, tiny_base_folder: Path) -> None:
    found = json.loads(types("evaluate", tiny_base_folder, "choose-test.jsonl", "--json").stdout)
    assert (found["task"], found["metric"], found["unparseable"]) == ("multiple choice", "accuracy", 0)
    rows = [json.loads(line) for line in Path("choose-test.jsonl").read_text().splitlines()]
    assert all(answer["label"] in row["choices"] for answer, row in zip(found["answers"], rows, strict=True))


def test_sentences_in_lines_are_evaluated_by_a_run_that_learned_from_json(trained: Types) -> None:
    found = json.loads(trained("evaluate", "runs/tag-encoder", "lines.conll", "--json").stdout)
    assert found["n_questions"] == 20 and found["score"] > 0.8
    assert found["answers"][0]["gold"].split()[0] == "B-PER"


def test_the_ladder_climbs_the_rung_that_trains_a_head(types: Types) -> None:
    told = types("climb", "tag-encoder.yaml", "name=ladder", "train.steps=10")
    assert told.exit_code == 0, told.output
    report = json.loads(Path("runs/ladder/report.json").read_text())
    assert [rung["name"] for rung in report["rungs"]] == ["lora"] and report["labels"] == []
    assert any("strict f1" in note for note in report["notes"])
    assert [one["label"] for one in report["rungs"][0]["classes"]] == ["LOC", "PER"]


def test_a_head_is_trained_further_in_its_own_unit(trained: Types) -> None:
    spec = re.sub(r"base: .*", "base: runs/regress-encoder", Path("regress-encoder.yaml").read_text())
    Path("further.yaml").write_text(re.sub(r"adapter: .*", "adapter: continue", spec))
    told = trained("train", "further.yaml", "train.steps=4", "train.lr=1e-4", "data.limit=20")
    assert told.exit_code == 0, told.output
    assert json.loads(trained("evaluate", "runs/further", "--json").stdout)["score"] > 0.8
    first, second = (json.loads(Path(f"runs/{name}/adapter/tunesmith.json").read_text())["head"] for name in ("regress-encoder", "further"))
    assert first["mean"] == second["mean"] != 0 and first["deviation"] == second["deviation"] != 1


def test_words_that_the_context_cuts_away_count_as_missed_and_are_told(trained: Types) -> None:
    assert trained("train", "tag-encoder.yaml", "name=short", "data.max_tokens=8", "data.overlong=truncate-left-of-prompt").exit_code == 0
    found = json.loads(trained("evaluate", "runs/short", "--json").stdout)
    assert any("words were not read" in note for note in found["notes"])
    cut = [answer for answer in found["answers"] if answer["text"].split()[0] == "O"]
    assert cut and all(len(answer["text"].split()) == len(answer["gold"].split()) for answer in found["answers"])
    recall = {one["label"]: one["recall"] for one in found["classes"]}
    assert recall["PER"] < 0.5 < recall["LOC"]


@pytest.mark.parametrize(
    ("spec", "overrides", "told"),
    [
        ("tag-encoder", ["objective=classify"], "For these samples:  objective: tag"),
        ("tag-decoder", ["objective=sft"], "Nearest that works here:  objective: tag"),
        ("regress-decoder", ["objective=sft"], "Nearest that works here:  objective: regress"),
        ("choose-encoder", ["objective=sft"], "objective: choose"),
        ("tag-encoder", ["adapter=lora(rank=2) + head(pool=mean)"], "reads each word's own state"),
        ("tag-encoder", ["task.instruction=Tag it."], "a head that tags words reads them alone"),
        ("tag-encoder", ["task.metric=exact_match"], "judged by the F1 of spans"),
        ("tag-encoder", ["task.scheme=BIOES"], "breaks BIOES"),
        ("tag-encoder", ["data.stream=true"], "task.labels=\\[O, B-PER, I-PER\\] task.scheme=IOB2"),
        ("regress-encoder", ["data.columns={text: score, value: text}"], "'text' holds .*, not a number"),
        ("regress-encoder", ["data.columns={text: text, value: text}"], "no answer to learn from"),
        ("choose-encoder", ["climb.rungs=[classify]"], r"climb.rungs=\[choose\]"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(types: Types, spec: str, overrides: list[str], told: str) -> None:
    import tunesmith as ts
    from tunesmith.core.errors import TunesmithError
    from tunesmith.spec import load_spec

    verb = ts.climb if "climb" in overrides[0] else ts.train
    with pytest.raises(TunesmithError, match=told):
        verb(load_spec(f"{spec}.yaml", ["name=x", *overrides]))


def test_a_head_answers_no_other_kind_of_question(trained: Types, tiny_base_folder: Path) -> None:
    told = trained("evaluate", "runs/choose-encoder", "tag-test.jsonl")
    assert told.exit_code == 2 or "TunesmithError" in repr(told.exception)
    assert "the head was trained by objective choose" in " ".join(told.stderr.split())
    bare = trained("evaluate", tiny_base_folder, "tag-test.jsonl")
    assert "Train one:  objective: tag" in bare.stderr


def test_the_rows_are_shown_as_each_head_reads_them(types: Types) -> None:
    tags = types("data", "show", "tag-train.jsonl", "--spec", "tag-encoder.yaml", "-n", 1).stdout
    assert "likes [O]" in tags and "[B-PER]" in tags and "tags: O " in tags
    pairs = types("data", "show", "choose-train.jsonl", "--spec", "choose-encoder.yaml", "-n", 1).stdout
    assert pairs.count("[CLS] which of") >= 2 and "right: " in pairs
    assert "number: " in types("data", "show", "regress-train.jsonl", "data.columns.value=score", "--spec", "regress-encoder.yaml").stdout


@pytest.mark.parametrize("kind", ["tag", "choose"])
def test_a_stopped_run_resumes_to_the_same_head(types: Types, kind: str, tmp_path: Path) -> None:
    import torch

    from tunesmith.core.errors import Interrupted
    from tunesmith.engine import train as training
    from tunesmith.ladder.training import train
    from tunesmith.spec import load_spec

    def spec(name: str) -> Any:
        own = ["adapter=lora(rank=4, dropout=0.1) + head(dropout=0.1)", "train.steps=6", "base.dtype=fp32"]
        return load_spec(f"{kind}-encoder.yaml", [f"name={name}", *own])

    whole = train(spec("whole"), root=tmp_path)
    original = training.Trainer._one_step

    def stops(self: training.Trainer) -> dict[str, float]:
        self._stop = self._asked = self.state.step == 3
        return original(self)

    training.Trainer._one_step = stops  # type: ignore[method-assign]
    try:
        with pytest.raises(Interrupted):
            train(spec("stopped"), root=tmp_path)
    finally:
        training.Trainer._one_step = original  # type: ignore[method-assign]
    resumed = train(spec("stopped"), root=tmp_path, resume=True)
    a, b = whole.model.adapter.state(), resumed.model.adapter.state()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
