"""A user's way from labelled texts to a classifier on an encoder, and on a decoder, through the real command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tunesmith.spec import Spec

User = Any


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, reviews: list[dict[str, str]]) -> Path:
    """A random BERT whose tokenizer knows the words of the reviews."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    found = {word for row in reviews for word in re.findall(r"\w+|[^\w\s]", row["text"].lower())}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(found)]
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
def user(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bert: Path,
    tiny_base_folder: Path,
    user_in: Callable[[Path], User],
    reviews: list[dict[str, str]],
) -> User:
    """Has written reviews, and a spec for each kind of base."""
    folder = tmp_path_factory.mktemp("heads")
    for name, rows in (("reviews", reviews[:-18]), ("test", reviews[-18:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bad.jsonl").write_text(json.dumps({"text": "I love it.", "label": "mixed"}) + "\n")
    for name, base, adapter in (
        ("encoder", tiny_bert, "lora(rank=8, sites=all)"),
        ("decoder", tiny_base_folder, "lora(rank=8, sites=all) + head"),
    ):
        (folder / f"{name}.yaml").write_text(
            f"base: {base}\n"
            "data: {train: reviews.jsonl, dev: 6, test: test.jsonl}\n"
            "task: {kind: label}\n"
            f"adapter: {adapter}\n"
            "objective: classify\n"
            "train: {steps: 60, batch: 16, lr: 2e-2, evaluate_every: 20}\n"
            "climb: {rungs: [classify]}\n"
        )
    return user_in(folder)


@pytest.fixture(scope="module")
def trained(user: User) -> User:
    for name in ("encoder", "decoder"):
        told = user.types("train", f"{name}.yaml")
        assert told.returncode == 0, told.stdout + told.stderr
        assert "head      2 labels (negative, positive)" in told.stderr
        assert ("added since objective classify needs one" in told.stderr) == (name == "encoder")
        assert "chat" not in told.stdout
    return user


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_trained_head_answers_questions_it_has_not_seen(trained: User, name: str) -> None:
    found = json.loads(trained.gets("evaluate", f"runs/{name}", "--json"))
    assert (found["n_questions"], found["metric"]) == (18, "accuracy")
    assert found["score"] > 0.8


def test_two_heads_are_compared_on_the_same_questions(trained: User) -> None:
    told = trained.gets("compare", "runs/encoder", "runs/decoder", "--questions", "test.jsonl", "--report", "comparison")
    assert "runs/decoder" in told
    assert (trained.folder / "comparison" / "report.html").read_text().startswith("<!")


def test_a_run_with_a_head_gives_probabilities_from_python(trained: User) -> None:
    import tunesmith as ts

    said = ts.classify(trained.folder / "runs" / "encoder", ["I love this lamp.", "I hate this lamp."])
    assert [next(iter(one)) for one in said] == ["positive", "negative"]
    assert all(sum(one.values()) == pytest.approx(1) for one in said)


def test_the_ladder_climbs_the_rung_that_trains_a_head(user: User) -> None:
    told = user.types("climb", "encoder.yaml", "name=ladder", "train.steps=20")
    assert told.returncode == 0, told.stdout + told.stderr
    report = json.loads((user.folder / "runs" / "ladder" / "report.json").read_text())
    assert [rung["name"] for rung in report["rungs"]] == ["lora"]
    assert json.loads(user.gets("evaluate", "runs/ladder", "--json"))["n_questions"] == 18


def test_a_head_is_trained_further(trained: User, tiny_bert: Path) -> None:
    spec = (
        (trained.folder / "encoder.yaml").read_text().replace(str(tiny_bert), "runs/encoder").replace("lora(rank=8, sites=all)", "continue")
    )
    (trained.folder / "further.yaml").write_text(spec)
    told = trained.types("train", "further.yaml", "train.steps=4", "train.lr=1e-4")
    assert told.returncode == 0, told.stdout + told.stderr
    assert json.loads(trained.gets("evaluate", "runs/further", "--json"))["score"] > 0.8


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("encoder", ["objective=sft"], "Nearest that works here:  objective: classify"),
        ("decoder", ["objective=sft"], "the adapter has a task head"),
        ("encoder", ["task={kind: generate}"], "needs samples with labels"),
        ("encoder", ["task.instruction=Good?"], "its head reads the text alone"),
        ("encoder", ["task.scoring=generation"], "Leave task.scoring out"),
        ("encoder", ["task.labels=[positive, mixed]"], "none of the task's labels"),
        ("encoder", ["task.labels=[positive, negative, mixed]"], "no training sample has the label 'mixed'"),
        ("encoder", ["data={train: reviews.jsonl, test: bad.jsonl}"], "bad.jsonl, line 1"),
        ("encoder", ["adapter=modules(names=[pooler]) + head(pool=first, size=3)"], "size"),
        ("encoder", ["climb.rungs=[zero_shot, classify]"], "is an encoder: it reads texts and answers no prompt"),
        ("decoder", ["climb.rungs=[zero_shot, sft]"], r"climb.rungs=\[zero_shot, classify\]"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(
    user: User, name: str, overrides: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tunesmith as ts
    from tunesmith.core.errors import TunesmithError
    from tunesmith.spec import load_spec

    monkeypatch.chdir(user.folder)
    verb = ts.climb if "climb" in overrides[0] else ts.train
    with pytest.raises(TunesmithError, match=told):
        verb(load_spec(f"{name}.yaml", ["name=x", *overrides]))


def test_the_rows_are_shown_as_a_head_reads_them(user: User) -> None:
    shown = user.gets("data", "show", "reviews.jsonl", "--spec", "encoder.yaml", "-n", 1)
    assert "[CLS] i love this phone . [SEP]\nlabel: positive" in shown
    assert "labels: negative 21, positive 21" in shown


def test_an_encoder_answers_no_prompt(user: User, tiny_bert: Path) -> None:
    done = user.types("evaluate", tiny_bert, "test.jsonl")
    assert done.returncode == 2 and "train a task head on it" in " ".join(done.stderr.split())


def test_a_stopped_run_resumes_to_the_same_head(user: User, tmp_path: Path, tiny_bert: Path) -> None:
    import torch

    from tunesmith.core.errors import Interrupted
    from tunesmith.engine import train as training
    from tunesmith.ladder.training import train
    from tunesmith.spec import load_spec

    def spec(name: str) -> Spec:
        data = f"data={{train: {user.folder / 'reviews.jsonl'}, dev: 6}}"
        return load_spec(
            user.folder / "encoder.yaml",
            [f"name={name}", data, "adapter=lora(rank=4, dropout=0.1) + head(dropout=0.1)", "train.steps=8", "base.dtype=fp32"],
        )

    whole = train(spec("whole"), root=tmp_path)
    original = training.Trainer._one_step

    def stops(self: training.Trainer) -> dict[str, float]:
        self._stop = self._asked = self.state.step == 4
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
