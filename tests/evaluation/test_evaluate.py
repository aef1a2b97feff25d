"""Evaluation on a tiny real model: the scores are those that each question gets alone, and nothing is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tunesmith.bases import Base, load_base
from tunesmith.core.errors import DataError, RenderError, RunError
from tunesmith.core.record import Record
from tunesmith.engine import local
from tunesmith.engine.model import Model
from tunesmith.engine.sampler import Completion
from tunesmith.evaluation.evaluate import System, evaluate, evaluate_histories, score_options
from tunesmith.evaluation.prompting import ANSWER, chain_of_thought, few_shot, zero_shot
from tunesmith.evaluation.task import Task

TEXTS = [
    "I love this phone.",
    "What a terrible film.",
    "The parcel arrived on Tuesday.",
    "é ü ß 中文 🙂",
    "It is as it is, and nothing else.",
]
LABELS = ("negative", "very positive", "positive")
TASK = Task("mood", "label", LABELS, system="You are a helpful assistant.")


def label(text: str, name: str = "positive", **more: Any) -> Record:
    return Record("label", text=text, label=name, **more)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


RECORDS = [label(text, LABELS[number % 3], where=f"test, line {number + 1}") for number, text in enumerate(TEXTS)]
TALK = Record("messages", messages=(user("one?"), said("1"), user("two?"), said("2"), user("three?"), said("3")), where="talk, line 1")
SHORT = Record("messages", messages=(user("four?"), said("4")), where="talk, line 2")
WRITE = Task("write", "generate", metric="exact_match", max_new_tokens=8)


@pytest.fixture(scope="module")
def base(tiny_base_folder) -> Base:
    return load_base(tiny_base_folder, dtype="fp32", device="cpu")


@pytest.fixture
def system(base) -> System:
    return System("zero-shot", Model(base), zero_shot(TASK))


@pytest.fixture
def scripted(monkeypatch):
    """Lets the model say what a function makes of the prompt it reads; what it read is kept."""
    read: list[str] = []

    def script(answer: Any, finished: str = "end") -> list[str]:
        def fake(forward, tokenizer, prompts: Sequence[Sequence[int]], sampling, **options: Any) -> list[Completion]:
            texts = [tokenizer.decode(ids) for ids in prompts]
            read.extend(texts)
            return [Completion([1, 2, 3], answer(text) if callable(answer) else answer, finished) for text in texts]

        monkeypatch.setattr(local, "generate", fake)
        return read

    return script


def alone(base: Base, messages: list[dict[str, str]], answer: str) -> float:
    """Log-probability of the answer and its end of turn by the model library's own forward, one row at a time."""
    tokenizer = base.tokenizer
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    after = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    with torch.no_grad():
        logits = base.model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(float(logits[len(before) + at - 1, token]) for at, token in enumerate(after))


# Choosing among labels


def test_each_labels_likelihood_is_the_one_it_gets_alone_and_the_likeliest_is_the_answer(base, system):
    found = evaluate(system, TASK, RECORDS)
    expected = [[alone(base, TASK.ask(record), name) for name in LABELS] for record in RECORDS]
    rows = [system.model.renderer.options(TASK.ask(record), LABELS) for record in RECORDS]
    with torch.no_grad():
        for mine, theirs in zip(score_options(system.model, rows), expected, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
    assert [one.label for one in found.judged] == [LABELS[max(range(3), key=scores.__getitem__)] for scores in expected]
    assert [one.score for one in found.judged] == [float(one.label == one.gold) for one in found.judged]


def test_sharing_prompts_and_packing_change_no_score_whatever_stands_beside_a_question(system):
    rows = [system.model.renderer.options(few_shot(TASK, RECORDS, shots=2)(record), LABELS) for record in RECORDS]
    with torch.no_grad():
        together = score_options(system.model, rows)
        single = [score_options(system.model, [row])[0] for row in rows]
    for mine, theirs in zip(together, single, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_packs_smaller_than_a_shared_tree_change_no_score(system, monkeypatch):
    rows = [system.model.renderer.options(TASK.ask(record), LABELS) for record in RECORDS * 3]
    counted: list[int] = []
    with torch.no_grad():
        whole = score_options(system.model, rows)
        monkeypatch.setattr(local, "PACK_TOKENS", 64)
        parted = score_options(system.model, rows, counted.append)
    assert [value for scores in parted for value in scores] == pytest.approx([value for scores in whole for value in scores], abs=1e-4)
    assert sum(counted) == len(rows) and len(counted) > 1


def test_a_label_that_was_chosen_is_never_parsed_again(system):
    """Labels that the parser could not tell apart, or would not find, are still answers."""
    labels = ("Yes", "yes", "?!")
    task = Task("odd", "label", labels)
    found = evaluate(System("s", system.model, zero_shot(task)), task, [label("x", name) for name in labels])
    assert found.unparseable == 0 and all(one.label == one.text for one in found.judged)


def test_tokens_are_counted_as_a_server_would_bill_them(base, system):
    found = evaluate(system, TASK, RECORDS[:1])
    prompt = base.tokenizer.apply_chat_template(TASK.ask(RECORDS[0]), tokenize=False, add_generation_prompt=True)
    assert found.prompt == prompt
    assert found.prompt_tokens == len(base.tokenizer(prompt, add_special_tokens=False).input_ids)
    assert found.completion_tokens == len(base.tokenizer(found.judged[0].text, add_special_tokens=False).input_ids) + 1
    assert found.seconds > 0 and found.peak_memory_mb > 0 and found.n == 1


def test_a_question_over_the_context_is_refused_with_its_place(system):
    with pytest.raises(DataError, match=r"(?s)test, line 7: the question takes [\d,]+ tokens.*reads 512"):
        evaluate(system, TASK, [label("word " * 600, where="test, line 7")])


# Generating and parsing


def test_answers_are_parsed_and_one_that_names_no_label_is_wrong_and_counted_and_never_dropped(system, scripted):
    scripted(lambda prompt: {"love": "Very positive!", "terrible": "negative or positive?", "parcel": "I would say: positive."}.get(
        next((word for word in ("love", "terrible", "parcel") if word in prompt), ""), "no idea"))  # fmt: skip
    task = Task("mood", "label", LABELS, scoring="generation")
    found = evaluate(System("s", system.model, zero_shot(task)), task, RECORDS)
    assert [one.label for one in found.judged] == ["very positive", None, "positive", None, None]
    assert (found.n, found.unparseable, found.score) == (5, 3, 1 / 5)
    assert found.completion_tokens == 3 and found.judged[1].text == "negative or positive?"


def test_a_system_that_reasons_is_asked_in_words_and_only_its_last_answer_is_judged(system, scripted):
    read = scripted(f"The word negative comes to mind. {ANSWER} positive")
    worked = [label("so so", "negative", reasoning="Hm.")]
    found = evaluate(System("cot", system.model, chain_of_thought(TASK, worked), reasons=True), TASK, RECORDS)
    assert {one.label for one in found.judged} == {"positive"} and found.score == 1 / 5
    assert all("Hm. Answer: negative" in text for text in read)


def test_a_label_at_the_end_of_a_dialogue_is_asked_for_once_with_the_dialogue_before_it(system, scripted):
    read = scripted("yes")
    task = Task("t", "label", ("yes", "no"), scoring="generation")
    talk = Record("messages", messages=(user("a?"), said("hm"), user("b?"), said("yes")))
    found = evaluate(System("s", system.model, zero_shot(task)), task, [talk])
    assert len(read) == 1 and "hm" in read[0] and found.judged[0].label == "yes" and found.score == 1


def test_real_generation_gives_what_the_model_library_generates(base, system):
    records = [Record("prompt", messages=(user(text), said("x"))) for text in TEXTS]
    found = evaluate(System("s", system.model, zero_shot(WRITE)), WRITE, records, batch=2)
    for record, one in zip(records, found.judged, strict=True):
        ids = base.tokenizer.apply_chat_template(
            WRITE.ask(record), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        out = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert one.text == base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_unfinished_answers_are_told(system, scripted):
    scripted("x", finished="length")
    found = evaluate(System("s", system.model, zero_shot(WRITE)), WRITE, [SHORT])
    assert found.notes == ["1 of 1 answers reached the limit of 8 tokens unfinished"]


def test_generated_text_is_scored_by_the_tasks_metric_with_a_bootstrap_interval(system, scripted):
    scripted("the cat sat")
    task = Task("t", "generate", metric="token_f1", max_new_tokens=8)
    records = [Record("prompt", messages=(user(str(n)), said(gold))) for n, gold in enumerate(["cat sat", "cat", "dog", "a cat sat"])]
    found = evaluate(System("s", system.model, zero_shot(task)), task, records)
    assert found.scores == pytest.approx([1, 2 / 3, 0, 1]) and found.score == pytest.approx(2 / 3)
    interval = found.interval()
    assert 0 <= interval.low < found.score < interval.high <= 1
    assert found.unparseable == 0 and found.classes() == [] and found.confusion() is None and found.macro_f1() == found.score


# Histories and room


def test_a_history_that_leaves_no_room_loses_whole_oldest_exchanges_and_says_so(base, system, scripted):
    read = scripted("x")
    turns = [message for n in range(12) for message in (user(f"question number {n} " + "word " * 24), said(f"answer number {n}"))]
    task = Task("t", "generate", max_new_tokens=64, system="Be brief.")
    record = Record("messages", messages=(*turns, user("the last one?"), said("x")))
    found = evaluate(System("s", system.model, zero_shot(task)), task, [record])
    last = read[-1]
    assert "Be brief." in last and "the last one?" in last and "question number 11" in last and "question number 0 " not in last
    assert len(base.tokenizer(last, add_special_tokens=False).input_ids) <= 512 - 64
    assert last.count("<|im_start|>user") == last.count("<|im_start|>assistant")  # whole exchanges went
    assert any("turn 13: 1 of 1 prompts left no room for an answer in 512 tokens" in note for note in found.notes)


def test_a_last_turn_that_leaves_no_room_is_refused_with_its_place_and_so_are_answers_as_long_as_the_context(system, scripted):
    scripted("x")
    long = Record("prompt", messages=(user("word " * 600), said("x")), where="test, line 3")
    with pytest.raises(DataError, match="test, line 3: the last exchange alone"):
        evaluate(System("s", system.model, zero_shot(WRITE)), WRITE, [long])
    endless = Task("t", "generate", max_new_tokens=512)
    with pytest.raises(RunError, match=r"(?s)leave no room.*task.max_new_tokens"):
        evaluate(System("s", system.model, zero_shot(endless)), endless, [SHORT])


def test_a_dialogue_the_template_cannot_render_names_its_place(system):
    tools = ({"type": "function", "function": {"name": "add"}},)
    record = Record("messages", messages=SHORT.messages, tools=tools, where="test, line 5")
    with pytest.raises(RenderError, match=r"test, line 5: .*does not write tools"):
        evaluate(System("s", system.model, zero_shot(WRITE)), WRITE, [record])


# Dialogues


def counting(prompt: str) -> str:
    """Right about what is asked last, as long as the history is right."""
    right = {"one?": "1", "two?": "2", "three?": "wrong", "four?": "4"}
    return right[next(line for line in reversed(prompt.splitlines()) if "?" in line).removesuffix("<|im_end|>")]


def test_every_assistant_turn_is_asked_for_under_the_gold_history(system, scripted):
    read = scripted(counting)
    found = evaluate(System("s", system.model, zero_shot(WRITE)), WRITE, [TALK, SHORT])
    assert [one.score for one in found.judged] == [pytest.approx(2 / 3), 1.0]
    assert (found.judged[0].text, found.judged[0].gold) == ("1\n2\nwrong", "1\n2\n3")
    assert len(read) == 4 and "assistant\n2<|im_end|>" in read[-1] and found.completion_tokens == 4 * 3 / 2


def test_under_its_own_history_a_system_reads_what_it_said_itself(system, scripted):
    read = scripted(lambda prompt: "mine")
    task = Task("t", "generate", history="own", max_new_tokens=8)
    evaluate(System("s", system.model, zero_shot(task)), task, [TALK])
    assert read[-1].count("assistant\nmine<|im_end|>") == 2 and "assistant\n1<|im_end|>" not in read[-1]


def test_both_histories_are_scored_and_each_evaluation_knows_both(system, scripted):
    def answer(prompt: str) -> str:
        return (
            "0"
            if "one?" in prompt and "two?" not in prompt
            else "2"
            if "assistant\n1<|im_end|>" in prompt and "three?" not in prompt
            else "3"
        )

    scripted(answer)
    found = evaluate_histories(System("s", system.model, zero_shot(WRITE)), WRITE, [TALK])
    assert found["gold"].score == pytest.approx(2 / 3) and found["own"].score == pytest.approx(1 / 3)
    assert found["gold"].histories == found["own"].histories == {"gold": pytest.approx(2 / 3), "own": pytest.approx(1 / 3)}
    assert (found["gold"].task.history, found["own"].task.history) == ("gold", "own")


def test_without_dialogues_both_histories_are_one_and_asked_once(system, scripted):
    read = scripted("4")
    found = evaluate_histories(System("s", system.model, zero_shot(WRITE)), WRITE, [SHORT])
    assert len(read) == 1 and found["gold"].score == found["own"].score == 1


def test_a_way_of_asking_holds_for_dialogues_too(system, scripted):
    read = scripted(counting)
    example = Record("messages", messages=(user("zero!"), said("0")))
    evaluate(System("s", system.model, few_shot(WRITE, [example], shots=1)), WRITE, [TALK])
    assert len(read) == 3 and all("zero!" in text for text in read)


def test_a_turn_that_only_calls_a_tool_stays_in_the_history_and_is_not_asked_for(tiny_base_folder, scripted):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + '()' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    model = Model(load_base(tiny_base_folder, dtype="fp32", device="cpu", template=template))
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    record = Record("messages", messages=(user("2+2?"), call, {"role": "tool", "content": "four"}, said("4"), user("sure?"), said("yes")))
    read = scripted(lambda prompt: "yes" if "sure?" in prompt else "4")
    task = Task("t", "generate", history="own", max_new_tokens=8)
    found = evaluate(System("s", model, zero_shot(task)), task, [record])
    assert found.score == 1 and len(read) == 2 and all("add()" in text and "four" in text for text in read)
    assert found.notes == ["1 assistant turns only call tools; they were not asked for and stand in the histories as they are"]


# What cannot be evaluated


def test_no_questions_missing_answers_and_unseen_labels_are_refused(system):
    with pytest.raises(DataError, match="no questions"):
        evaluate(system, TASK, [])
    with pytest.raises(DataError, match="test, line 2: the question has no gold answer"):
        evaluate(system, TASK, [RECORDS[0], Record("label", text="x", where="test, line 2")])
    with pytest.raises(DataError, match="test, line 2: the label 'angry' never occurs"):
        evaluate(system, TASK, [RECORDS[0], label("x", "angry", where="test, line 2")])


# What the spec says about rendering reaches every question


def test_special_tokens_in_a_question_are_text_refused_or_trusted_as_the_base_says(tiny_base_folder):
    record = [label("a <|im_end|> b", where="test, line 1")]
    lengths = {}
    for special in ("text", "trust", "refuse"):
        model = Model(load_base(tiny_base_folder, dtype="fp32", device="cpu", special=special))
        if special == "refuse":
            with pytest.raises(RenderError, match=r"(?s)test, line 1: .*<\|im_end\|>.*base\.special=text"):
                evaluate(System("s", model, zero_shot(TASK)), TASK, record)
        else:
            lengths[special] = evaluate(System("s", model, zero_shot(TASK)), TASK, record).prompt_tokens
    assert lengths["text"] > lengths["trust"]


def test_system_turns_join_the_user_turn_and_templates_get_their_variables_as_the_base_says(tiny_base_folder):
    template = (
        "{{ mark }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    base = load_base(
        tiny_base_folder, dtype="fp32", device="cpu", template=template, system_turn="user", template_variables={"mark": "MARK"}
    )
    prompt = evaluate(System("s", Model(base), zero_shot(TASK)), TASK, RECORDS[:1]).prompt
    assert prompt.startswith("MARK<|im_start|>user\nYou are a helpful assistant.\n\n") and "system" not in prompt


def test_the_plain_template_joins_prompt_and_answer(tiny_base_folder):
    task = Task("t", "label", ("a", "b"), instruction="{text} is")
    base = load_base(tiny_base_folder, dtype="fp32", device="cpu", template="plain")
    assert evaluate(System("s", Model(base), zero_shot(task)), task, [label("this", "a")]).prompt == "this is"
