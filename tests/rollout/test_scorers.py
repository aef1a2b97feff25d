"""Reward models with tokenizers of their own, and scorers at a URL."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.bases import load_base
from tunesmith.core.errors import BaseError, DataError, SpecError, TunesmithError
from tunesmith.engine.model import attach_to
from tunesmith.ladder.job import prepare
from tunesmith.rollout.rewarding import RewardError
from tunesmith.rollout.rewardmodel import RewardModel, read_with_head
from tunesmith.rollout.rewards import Rewards, open_reward
from tunesmith.rollout.sample import Sample
from tunesmith.spec import make_spec

TEMPLATE = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' ' }}{% endfor %}{{ '[end]' }}"
ANSWERS = ["it lasts for days", "no", "what a terrible film I want my two hours back and so on"]


def samples(answers: Sequence[str] = ANSWERS) -> list[Sample]:
    prompt = ({"role": "user", "content": "Is the phone good?"},)
    return [
        Sample(prompt, answer, answer="yes", fields={"level": 2}, where=f"rows.jsonl, line {at + 1}") for at, answer in enumerate(answers)
    ]


def letters(*, pairs: bool = False) -> Any:
    """A tokenizer of single characters, unlike the policy's in every id."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *map(chr, range(32, 127))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if pairs:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    if not pairs:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any, Any]]:
    """Makes (folder, network, tokenizer) of a random sequence classifier."""

    def make(family: str = "llama", labels: int = 1) -> tuple[Path, Any, Any]:
        from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

        size = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        torch.manual_seed(3)
        network: Any
        if family == "bert":
            network = BertForSequenceClassification(BertConfig(**size, max_position_embeddings=128, num_labels=labels))
        else:
            network = LlamaForSequenceClassification(LlamaConfig(**size, max_position_embeddings=128, num_labels=labels, pad_token_id=0))
        folder, tokenizer = tmp_path_factory.mktemp(family), letters(pairs=family == "bert")
        network.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, network, tokenizer

    return make


@torch.no_grad()
def alone(network: Any, encoded: Any) -> float:
    return float(network(**{name: torch.tensor([ids]) for name, ids in encoded.items()}).logits[0, 0])


def test_a_reward_model_reads_the_words_with_its_own_tokenizer_and_template_in_any_company(classifier: Any) -> None:
    folder, network, tokenizer = classifier()
    texts = [f"[user] Is the phone good? [assistant] {answer} [end]" for answer in ANSWERS]
    truth = [alone(network, tokenizer(text)) for text in texts]
    for tokens in (1, 4096):
        found = Rewards([f"model(source={folder}, dtype=fp32, device=cpu, tokens={tokens})"]).score(samples())
        assert found.parts["model"] == pytest.approx(truth, abs=1e-5)
    assert len({round(value, 6) for value in truth}) == 3


def test_an_encoder_reads_a_pair_the_two_joined_or_the_answer_by_itself(classifier: Any) -> None:
    folder, network, tokenizer = classifier("bert")
    prompt = "Is the phone good?"
    wanted = {
        "pair": [tokenizer(prompt, answer) for answer in ANSWERS],
        "dialogue": [tokenizer(prompt + answer) for answer in ANSWERS],
        "answer": [tokenizer(answer) for answer in ANSWERS],
    }
    for reads, encoded in wanted.items():
        found = RewardModel(str(folder), reads, "cpu", "fp32")(samples())
        assert found == pytest.approx([alone(network, each) for each in encoded], abs=1e-5)


def test_a_text_beyond_the_reward_models_context_loses_its_beginning(classifier: Any) -> None:
    folder, network, tokenizer = classifier()
    long = "x" * 300 + " and the end"
    encoded = tokenizer(f"[user] Is the phone good? [assistant] {long} [end]")
    encoded = {name: ids[-128:] for name, ids in encoded.items()}
    assert RewardModel(str(folder), "", "cpu", "fp32")(samples([long])) == pytest.approx([alone(network, encoded)], abs=1e-5)


def test_models_that_say_no_single_number_are_refused(classifier: Any, tiny_base_folder: Path, tmp_path: Path) -> None:
    cases = {
        str(classifier(labels=3)[0]): "3 outputs",
        str(tiny_base_folder): "no sequence classifier",
        str(tmp_path / "none"): "exist|no such|no base",
    }
    for source, what in cases.items():
        with pytest.raises(BaseError, match=what):
            RewardModel(source)(samples())
    with pytest.raises(SpecError, match="Known: dialogue, pair, answer"):
        open_reward("model(source=x, reads=prompt)")


def test_what_cannot_reward_is_refused_by_its_files_before_anything_is_loaded(
    classifier: Any, tiny_base_folder: Path, tmp_path: Path, run_folder: Path, words_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.bases.load.check_weights", lambda *_: pytest.fail("a model is loaded"))
    cases = {
        f"model(source={classifier(labels=3)[0]})": "3 outputs",
        f"model(source={tiny_base_folder})": "no sequence classifier",
        f"model(source={tmp_path / 'none'})": "exist|no such|no base",
        f"model(source={words_run})": "has no head that scores answers",
        f"judge(model={run_folder})": "answers by its task head",
        f"judge_rating(model={run_folder})": "answers by its task head",
        f"judge(model={classifier('bert')[0]})": "an encoder: it judges nothing",
    }
    for written, what in cases.items():
        with pytest.raises(TunesmithError, match=what):
            Rewards([written]).check()
    Rewards([f"model(source={run_folder})", f"judge(model={words_run})", "length(target=3)"]).check()


def test_a_run_is_refused_for_such_a_reward_before_its_base_is_loaded(words_run: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    data = {"train": str(tmp_path / "rows.jsonl"), "shape": "question"}
    keys = {"base": "./nowhere", "data": data, "objective": "grpo", "rewards": f"model(source={words_run})"}
    with pytest.raises(SpecError, match="no head that scores"):
        prepare(make_spec(keys))


def test_an_answer_too_long_for_a_reward_model_counts_as_missing_or_stops_the_run_by_its_row(run_folder: Path) -> None:
    asked = samples([*ANSWERS, "word " * 600])
    spec = {"reward": f"model(source={run_folder}, device=cpu, dtype=fp32)"}
    found = Rewards([{**spec, "on_error": "skip"}]).score(asked)
    assert [value == value for value in found.total] == [True, True, True, False]
    assert found.total[:3] == pytest.approx(Rewards([spec]).score(asked[:3]).total, abs=1e-5)
    assert len(found.problems) == 1 and found.problems[0].where == "rows.jsonl, line 4"
    with pytest.raises(DataError, match=r"rows\.jsonl, line 4"):
        Rewards([spec]).score(asked)


def test_an_answer_too_long_for_a_judge_counts_as_missing_or_stops_the_run_by_its_row(
    tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    asked = samples(["yes", "word " * 600, "no"])
    spec = {"reward": f"judge_rating(model={tiny_base_folder}, rubric=R)"}
    found = Rewards([{**spec, "on_error": "skip"}]).score(asked)
    assert [value == value for value in found.total] == [True, False, True]
    assert [problem.where for problem in found.problems] == ["rows.jsonl, line 2"]
    with pytest.raises(DataError, match=r"line 2: the question to the judge takes"):
        Rewards([spec]).score(asked)
    comparing = Rewards([f"judge(model={tiny_base_folder}, rubric=R, no_verdict=skip)"]).score(asked)
    assert all(value == value for value in comparing.total)


@pytest.mark.parametrize("says", ["choice", "value"])
def test_our_own_head_reads_what_it_was_trained_to_read(says: str, tiny_base_folder: Path) -> None:
    from tunesmith.adapters.heads import Way

    base = load_base(tiny_base_folder, dtype="fp32", device="cpu")
    model = attach_to(base, "lora(rank=2) + head")
    model.adapter.give_head(32, ("score",), Way("last", bias=False, says=says, mean=2.0, deviation=3.0), seed=1)  # type: ignore[arg-type]
    assert model.head is not None
    found = read_with_head(model, samples(), 4096)
    texts = {
        "choice": [f"<|im_start|>user\nIs the phone good?<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>" for answer in ANSWERS],
        "value": [f"{answer}<|im_end|>" for answer in ANSWERS],
    }[says]
    with torch.no_grad(), model.active():
        states = [base.model.model(torch.tensor([base.tokenizer(text).input_ids])).last_hidden_state[0, -1] for text in texts]
        truth = [float(model.head(state[None])[0, 0]) * 3.0 + 2.0 for state in states]
    assert found == pytest.approx(truth, abs=1e-5)
    twice = read_with_head(model, samples([ANSWERS[1], "", ANSWERS[1]]), 4096)
    assert [twice[0], twice[2]] == pytest.approx([truth[1]] * 2, abs=1e-5)
    assert (twice[1] is None) == (says == "value")  # a dialogue has its marks even where nothing is said
    model.detach()


@pytest.fixture(scope="module")
def run_folder(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of objective reward."""
    return _trained("reward", 12, tiny_base_folder, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def words_run(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that answers in words."""
    return _trained("dpo", 1, tiny_base_folder, tmp_path_factory.mktemp("words"))


def _trained(objective: str, steps: int, base: Path, folder: Path) -> Path:
    from typer.testing import CliRunner

    from tunesmith.cli.app import app

    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}, gladly.", "rejected": f"No {n}!"} for n in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.yaml").write_text(
        f"base: {{model: {base}, dtype: fp32, device: cpu}}\ndata: {{train: pairs.jsonl}}\n"
        f"adapter: lora(rank=4)\nobjective: {objective}\n"
        f"train: {{steps: {steps}, batch: 12, lr: 1e-2, evaluate_every: {steps}, save_every: {steps}}}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        told = CliRunner().invoke(app, ["train", "judge.yaml"])
    assert told.exit_code == 0, told.output
    return folder / "runs" / "judge"


def test_a_run_that_learned_from_pairs_rewards_as_they_were_preferred_beside_the_policy_or_alone(
    run_folder: Path, tiny_base_folder: Path
) -> None:
    good, bad = (Sample(({"role": "user", "content": "Say 30."},), text) for text in ("It is 30, gladly.", "No 30!"))
    apart = Rewards([f"model(source={run_folder}, device=cpu, dtype=fp32)"])
    said = apart.score([good, bad]).total
    assert said[0] > said[1]
    base = load_base(tiny_base_folder, dtype="fp32", device="cpu")
    policy = attach_to(base, "lora(rank=2)")
    for name, value in policy.adapter.named_parameters():
        torch.nn.init.normal_(value.data) if "b" in name else None
    beside = Rewards([f"model(source={run_folder}, device=cpu, dtype=fp32)"])
    beside.share(base)
    assert beside.score([good, bad]).total == pytest.approx(said, abs=1e-5)
    with pytest.raises(SpecError, match="reads what it was trained on"):
        open_reward(f"model(source={run_folder}, reads=pair)")


# At a URL


class Scorer(BaseHTTPRequestHandler):
    """Answers from a list of (status, body), the last one again and again; keeps what it was sent."""

    said: list[tuple[int, Any]]
    heard: list[Any]

    def do_POST(self) -> None:
        self.heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, body = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, list[Any]]]]:
    servers: list[HTTPServer] = []

    def start(*said: tuple[int, Any]) -> tuple[str, list[Any]]:
        handler = type("Own", (Scorer,), {"said": list(said), "heard": []})
        servers.append(HTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/score", handler.heard  # type: ignore[attr-defined]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_scorer_is_sent_prompts_completions_answers_and_fields_and_its_rewards_are_taken(serve: Any) -> None:
    url, heard = serve((200, {"rewards": [1, None, 0.5]}))
    found = Rewards([f"http(url={url})"]).score(samples()).total
    assert (found[0], found[2]) == (1.0, 0.5) and found[1] != found[1]
    assert heard[0]["completions"] == ANSWERS and heard[0]["answers"] == ["yes"] * 3 and heard[0]["fields"] == [{"level": 2}] * 3
    assert heard[0]["prompts"][0] == [{"role": "user", "content": "Is the phone good?"}]


def test_a_scorer_that_fails_for_a_while_is_asked_again_and_one_that_refuses_is_not(serve: Any) -> None:
    url, heard = serve((503, b""), (200, {"rewards": [1, 2, 3]}))
    assert Rewards([f"http(url={url})"]).score(samples()).total == [1.0, 2.0, 3.0] and len(heard) == 2
    url, heard = serve((400, b"no such thing"))
    with pytest.raises(RewardError, match=r"status 400. no such thing"):
        Rewards([f"http(url={url})"]).score(samples())
    assert len(heard) == 1
    with pytest.raises(RewardError, match="does not answer"):
        Rewards(["http(url=http://127.0.0.1:9/score, retries=1)"]).score(samples())


@pytest.mark.parametrize("body", [b"<html>", {"rewards": [1]}, {"scores": [1, 2, 3]}, [1, 2, 3]])
def test_what_is_no_list_of_rewards_is_shown(serve: Any, body: Any) -> None:
    url, _ = serve((200, body))
    with pytest.raises(RewardError, match="does not return 3 rewards"):
        Rewards([f"http(url={url})"]).score(samples())


def test_nothing_is_sent_on_to_where_a_scorer_points(serve: Any) -> None:
    url, heard = serve((302, b""))
    with pytest.raises(RewardError, match="status 302"):
        Rewards([f"http(url={url}, retries=0)"]).score(samples())
    assert len(heard) == 1


def test_a_scorer_that_cannot_be_reached_counts_as_missing_where_that_is_asked_for(serve: Any) -> None:
    spec = {"reward": "http(url=http://127.0.0.1:9/score, retries=0)", "on_error": "skip"}
    found = Rewards([spec, "regex(pattern=film)"]).score(samples())
    assert found.total == [0.0, 0.0, 2.0] and len(found.problems) == 3


def test_what_is_no_address_is_refused_before_anything_runs() -> None:
    for url in ("ftp://a/b", "'score'", "http:///x"):
        with pytest.raises(SpecError, match="no address"):
            open_reward(f"http(url={url})")
