"""Answers held against one another are trees that lose and change no token, with their numbers at every token of an answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tunesmith.core.errors import DataError, RenderError
from tunesmith.core.record import Record
from tunesmith.core.row import ROOT, SECOND, Row
from tunesmith.data.lengths import fit, longest_path
from tunesmith.data.preferences import partners, preference_rows, rated_rows, scored_rows
from tunesmith.data.rendering import renderer_for
from tunesmith.data.rowcache import RowCache
from tunesmith.data.sharing import share_prefix
from tunesmith.data.view import plain

TEXTS = st.text(alphabet="ab .\n你é<|>", min_size=1, max_size=8).filter(lambda text: bool(text.strip()))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def record(*answers: str, prompt: str = "Which?", shape: Any = None, **more: Any) -> Record:
    shape = shape or ("pair" if len(answers) == 2 else "ranking")
    turns = more.pop("messages", (user(prompt),) if prompt else ())
    return Record(shape, messages=turns, answers=tuple((assistant(text),) for text in answers), **more)


def paths(row: Row) -> list[tuple[list[int], list[bool]]]:
    """Ids and mask of every path."""
    out = []
    for leaf in row.leaves():
        parts = [row.segments[index] for index in row.path(leaf)]
        out.append(([int(i) for part in parts for i in part.ids], [bool(s) for part in parts for s in part.supervised]))
    return out


def alone(renderer: Any, one: Record, answer: Any) -> tuple[list[int], list[bool]]:
    """The dialogue as the renderer lays it out by itself, and cut after what is learned."""
    plan = renderer.plans([*one.messages, *answer], supervise="last")[0]
    rendered = renderer.encode([plan])[0]
    return rendered.ids, [False, *rendered.supervised[1:]]


KINDS = [("bytes", "smollm2"), ("bytes", "qwen3"), ("bytes", None), ("sentencepiece-legacy", "chatml"), ("bytes", "mistral")]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(TEXTS, max_size=4), answers=st.lists(TEXTS, min_size=2, max_size=4, unique=True))
@pytest.mark.parametrize(("kind", "template"), KINDS)
def test_every_path_has_the_ids_and_the_mask_of_its_dialogue_rendered_alone(
    tokenizer: Any, kind: str, template: str | None, turns: list[str], answers: list[str]
) -> None:
    renderer = renderer_for(tokenizer(kind, template))
    turns = turns[: len(turns) - (len(turns) + 1) % 2]  # ends with the user's
    messages = tuple(assistant(text) if place % 2 else user(text) for place, text in enumerate(turns))
    one = record(*answers, messages=messages)
    try:
        expected = [alone(renderer, one, answer) for answer in one.answers]
    except RenderError:
        assume(False)  # the template refuses this dialogue, which test_rendering is about
    (row,) = preference_rows(renderer, [one])
    assert paths(row) == expected
    assert [row.segments[leaf].given["rank"][0] for leaf in row.leaves()] == list(range(len(answers)))
    root = row.segments[0]
    assert root.name != "prompt" or not root.supervised.any()
    longer = [ids[len(root) :] for ids, _ in expected]
    assert (
        root.name != "prompt" or len({ids[0] for ids in longer}) > 1 or any(mask[len(root)] for _, mask in expected)
    )  # nothing more is shared


def test_names_and_numbers_stand_at_every_token_of_an_answer(tokenizer: Any) -> None:
    renderer = renderer_for(tokenizer("bytes", "chatml"))
    pair, ranking = preference_rows(renderer, [record("yes", "no way", soft=0.75, margin=1.5, where="a, line 1"), record("a", "b", "c")])
    assert [part.name for part in pair.segments] == ["prompt", "chosen", "rejected"] and pair.where == "a, line 1"
    assert [part.name for part in ranking.segments] == ["prompt", "answer", "answer", "answer"]
    for rank, part in enumerate(pair.segments[1:]):
        assert part.parent == 0 and part.supervised.all()
        told = {name: set(values.tolist()) for name, values in part.given.items()}
        assert told == {"rank": {rank}, "soft": {0.75}, "margin": {1.5}}
        assert all(len(values) == len(part) for values in part.given.values())
    assert [part.given["rank"][0] for part in ranking.segments[1:]] == [0, 1, 2]
    assert ranking.segments[1].given["soft"][0] == 1 and ranking.segments[1].given["margin"][0] == 0
    assert not pair.segments[0].given
    assert "-- chosen --" in plain(renderer.tokenizer, pair) and "[[no way<|im_end|>]]" in plain(renderer.tokenizer, pair)


def test_where_the_prompts_have_nothing_in_common_each_answer_is_a_root_of_its_own(tokenizer: Any) -> None:
    renderer = renderer_for(tokenizer("bytes", None))  # no template: the answer alone, from its first token
    (row,) = preference_rows(renderer, [record("yes", "no way", prompt="")])
    assert [(part.name, part.parent) for part in row.segments] == [("chosen", ROOT), ("rejected", ROOT)]
    assert row.leaves() == [0, 1] and not any(part.supervised[0] for part in row.segments)
    (shared,) = preference_rows(renderer, [record("no way", "no thanks", prompt="")])
    assert (
        shared.segments[0].name == "prompt" and len(shared.segments[0]) == 1
    )  # what nothing stands before is not learned, so it is shared


def test_tied_scores_beyond_two_answers_are_told(tokenizer: Any) -> None:
    renderer = renderer_for(tokenizer("bytes", "chatml"))
    tied, two = preference_rows(
        renderer, [record("a", "b", "c", scores=(2, 1, 1)), record("a", "b", scores=(1, 1), soft=0.5, shape="ranking")]
    )
    assert any("equal scores" in note for note in tied.notes) and two.notes == () and two.segments[1].given["soft"][0] == 0.5


def test_rows_come_from_the_cache_the_second_time_and_are_the_same(tokenizer: Any, tmp_path: Path) -> None:
    renderer, records = renderer_for(tokenizer("bytes", "smollm2")), [record(f"good {n}", f"bad {n}", margin=float(n)) for n in range(5)]
    first = list(preference_rows(renderer, records, cache=RowCache(tmp_path)))
    cache = RowCache(tmp_path)
    second = list(preference_rows(renderer, records, cache=cache))
    assert cache.hits == 1 and cache.misses == 0
    assert [paths(row) for row in first] == [paths(row) for row in second] == [paths(row) for row in preference_rows(renderer, records)]
    assert [row.segments[1].given["margin"][0] for row in second] == [0, 1, 2, 3, 4] and first[0].cuttable == second[0].cuttable != ()


def test_what_cannot_be_compared_or_rendered_names_its_record(tokenizer: Any) -> None:
    renderer = renderer_for(tokenizer("bytes", "gemma"))
    with pytest.raises(DataError, match="no two answers") as caught:
        list(preference_rows(renderer, [record("a", "b"), record("a", shape="rated", good=True, where="x, line 2")]))
    assert caught.value.where == "x, line 2"
    with pytest.raises(RenderError) as refused:
        list(preference_rows(renderer, [record("a", "b", messages=(user("x"), user("y")), where="x, line 3")]))
    assert refused.value.where == "x, line 3"


# --- shared prefixes and lengths -------------------------------------------------------------------------------------


def test_merging_rows_of_one_prompt_keeps_the_numbers_and_the_order_of_every_group(tokenizer: Any) -> None:
    renderer = renderer_for(tokenizer("bytes", "smollm2"))
    records = [record(f"good {n}", f"bad {n}", prompt=f"Question {n % 2}?", soft=0.5 + n / 10, margin=float(n)) for n in range(4)]
    records.append(record("first", "second", "third", prompt="Question 1?"))
    rows = list(preference_rows(renderer, records))
    merged = share_prefix(rows)
    assert len(merged) < len(rows)
    seen = set()
    for shared in merged:
        found = paths(shared.row)
        for member in shared.members:
            seen.add(member.index)
            row = rows[member.index]
            assert list(member.leaves) == list(range(member.leaves[0], member.leaves[0] + len(row.leaves())))  # one after another
            for now, before in zip(member.leaves, row.leaves(), strict=True):
                here, there = shared.row.segments[now], row.segments[before]
                assert {k: v.tolist() for k, v in here.given.items()} == {k: v.tolist()[-len(here) :] for k, v in there.given.items()}
                assert found[shared.row.leaves().index(now)] == paths(row)[row.leaves().index(before)]
        ranks = [shared.row.segments[leaf].given["rank"][0] for leaf in shared.row.leaves()]
        assert all(rank == 0 or rank == before + 1 for before, rank in zip([-1, *ranks], ranks, strict=False))
    assert seen == set(range(5))


def test_a_long_prompt_is_shortened_once_for_all_its_answers_which_stay_whole(tokenizer: Any) -> None:
    tokens = tokenizer("bytes", "chatml")
    (row,) = preference_rows(renderer_for(tokens), [record("yes", "no, not at all", prompt="the quick brown fox " * 20, margin=2.0)])
    kept, report = fit([row], longest_path(row) - 30, "truncate-left-of-prompt", tokens)
    assert report.truncated == 1 and report.tokens_cut >= 30 and longest_path(kept[0]) <= longest_path(row) - 30
    assert [part.ids.tolist() for part in kept[0].segments[1:]] == [part.ids.tolist() for part in row.segments[1:]]
    assert kept[0].segments[2].given["margin"].tolist() == row.segments[2].given["margin"].tolist()
    text = tokens.decode(kept[0].segments[0].ids)
    assert text.startswith("<|im_start|>user\n") and text.endswith("fox <|im_end|>\n<|im_start|>assistant\n")


def test_a_pair_with_one_answer_too_long_is_dropped_whole_or_refused(tokenizer: Any) -> None:
    renderer = renderer_for(tokenizer("bytes", "chatml"))
    rows = list(preference_rows(renderer, [record("yes", "no " * 60, where="a, line 1"), record("yes", "no", where="a, line 2")]))
    kept, report = fit(rows, 40, "drop")
    assert [row.where for row in kept] == ["a, line 2"] and report.dropped == 1 and len(kept[0].segments) == 3
    with pytest.raises(DataError, match="1 of 2 rows are longer than 40 tokens"):
        fit(rows, 40, "error")
    with pytest.raises(DataError, match="cannot bring it to 40"):
        fit(rows, 40, "truncate-left-of-prompt")


@pytest.mark.parametrize("answers", [("yes", "no"), ("a", "b", "c")])
def test_a_prompt_is_never_cut_to_nothing_before_an_answer(tokenizer: Any, answers: tuple[str, ...]) -> None:
    (row,) = preference_rows(renderer_for(tokenizer("bytes", None)), [record(*answers, prompt="the quick brown fox")])
    answer = max(len(part) for part in row.segments[1:])
    assert longest_path(fit([row], answer + 1, "truncate-left-of-prompt")[0][0]) == answer + 1
    with pytest.raises(DataError, match="shortening its prompt cannot bring it"):
        fit([row], answer, "truncate-left-of-prompt")


# --- rated answers ---------------------------------------------------------------------------------------------------


def rated(prompt: str, answer: str, good: bool = True) -> Record:
    return record(answer, prompt=prompt, shape="rated", good=good, where=f"{prompt} {answer}")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("pqrs"), st.sampled_from("abc")), min_size=1, max_size=14), st.integers(0, 3))
def test_a_partner_has_another_prompt_and_another_answer_or_the_error_says_there_is_none(found: list[tuple[str, str]], seed: int) -> None:
    records = [rated(prompt, answer) for prompt, answer in found]
    possible = all(any(a != c and b != d for c, d in found) for a, b in found)
    if not possible:
        with pytest.raises(DataError, match="no other prompt with another answer"):
            partners(records, seed)
        return
    chosen = partners(records, seed)
    assert all(found[own][0] != found[other][0] and found[own][1] != found[other][1] for own, other in enumerate(chosen))
    assert chosen == partners(records, seed)


def test_partners_are_spread_and_drawn_by_the_seed(tokenizer: Any) -> None:
    records = [rated(f"p{n % 10}", f"a{n}") for n in range(50)]
    assert sorted(partners(records)) == list(range(50))  # every answer serves once
    assert partners(records, 0) != partners(records, 1)
    mostly = [rated("p", f"a{n}") for n in range(40)] + [rated(f"q{n}", f"b{n}") for n in range(10)]
    counts = np.bincount(partners(mostly)[:40], minlength=50)
    assert counts[:40].sum() == 0 and counts[40:].max() <= 5


def test_a_rated_row_has_its_own_answer_and_one_that_belongs_elsewhere(tokenizer: Any) -> None:
    renderer = renderer_for(tokenizer("bytes", "chatml"))
    records = [rated("One?", "first", True), rated("Two?", "second", False)]
    one, two = rated_rows(renderer, records)
    for row, own, other, good in ((one, 0, 1, 1), (two, 1, 0, 0)):
        expected = [alone(renderer, records[own], records[place].answers[0]) for place in (own, other)]
        assert paths(row) == expected and [part.name for part in row.segments] == ["prompt", "answer", "answer"]
        assert [set(part.given["other"].tolist()) for part in row.segments[1:]] == [{0.0}, {1.0}]
        assert set(row.segments[1].given["good"].tolist()) == {float(good)}
    with pytest.raises(DataError, match="no other prompt"):
        list(rated_rows(renderer, records[:1]))
    with pytest.raises(DataError, match="reads as 'ranking'"):
        list(rated_rows(renderer, [record("a", "b", "c")]))


def test_a_pair_is_a_good_answer_and_a_bad_one_and_a_tie_is_none(tokenizer: Any) -> None:
    renderer = renderer_for(tokenizer("bytes", "chatml"))
    made = [replace(record("one", "two"), messages=({"role": "user", "content": prompt},)) for prompt in "pqr"]
    answers = [({"role": "assistant", "content": f"{prompt}{n}"},) for prompt in "pqr" for n in (0, 1)]
    made = [replace(each, answers=tuple(answers[2 * n : 2 * n + 2])) for n, each in enumerate(made)]
    tied = replace(made[2], soft=0.5)
    rows = list(rated_rows(renderer, [*made[:2], tied]))
    wanted = [replace(each, shape="rated", answers=each.answers[n : n + 1], good=n == 0) for each in made[:2] for n in (0, 1)]
    assert [paths(row) for row in rows] == [paths(row) for row in rated_rows(renderer, wanted)]
    assert [row.segments[1].given["good"].tolist()[0] for row in rows] == [1, 0, 1, 0]


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert_like() -> Any:
    """A tokenizer that puts [CLS] and [SEP] around a text, and marks the second of two by its type."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    core = Tokenizer(
        models.WordPiece({word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdef"])}, unk_token="[UNK]")
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def test_an_encoder_reads_prompt_and_answer_as_a_pair_of_texts_and_answers_alone_as_texts(bert_like: Any) -> None:
    renderer = renderer_for(bert_like)
    pair, bare = scored_rows("encoder", renderer, [record("b c", "d", prompt="a", margin=0.5), record("e", "f f", prompt="")])
    assert [bert_like.decode(ids) for ids, _ in paths(pair)] == ["[CLS] a [SEP] b c [SEP]", "[CLS] a [SEP] d [SEP]"]
    assert [bert_like.decode(ids) for ids, _ in paths(bare)] == ["[CLS] e [SEP]", "[CLS] f f [SEP]"]
    for row in (pair, bare):
        answers = [row.segments[leaf] for leaf in row.leaves()]
        assert not any(part.supervised.any() for part in row.segments)
        assert [part.asked.tolist() for part in answers] == [[len(part) - 1] for part in answers] and row.asked_tokens == 2
        assert [part.given["rank"][-1] for part in answers] == [0, 1]
    assert pair.segments[1].given["margin"][-1] == 0.5
    second = Row(tuple(labelled_pair(renderer).segments))
    assert [part.name for part in pair.segments[1:]] == [second.segments[1].name] * 2  # as its type ids are told
    with pytest.raises(DataError, match="dialogue of 2 turns"):
        list(scored_rows("encoder", renderer, [record("a", "b", messages=(user("x"), assistant("y")))]))


def labelled_pair(renderer: Any) -> Row:
    from tunesmith.data.labelled import Reading, labelled_rows

    (row,) = labelled_rows(renderer, [Reading(0.0, text="a", others=("b",))])
    assert row.segments[1].name in (SECOND, "")
    return row


def test_a_decoder_scores_the_same_tokens_that_it_would_learn_to_say(tokenizer: Any, tmp_path: Path) -> None:
    renderer = renderer_for(tokenizer("bytes", "smollm2"))
    records = [record("yes", "no"), record("a text", "another", prompt=""), record("x", "y", "z")]
    learned = list(preference_rows(renderer, records))
    scored = list(scored_rows("decoder", renderer, records, RowCache(tmp_path)))
    for place in (0, 2):
        assert [ids for ids, _ in paths(scored[place])] == [ids for ids, _ in paths(learned[place])]
        assert scored[place].cuttable == learned[place].cuttable
    assert [renderer.tokenizer.decode(ids) for ids, _ in paths(scored[1])] == ["a text</s>", "another</s>"]  # a text alone is no dialogue
    assert [row.asked_tokens for row in scored] == [2, 2, 3] and not any(row.supervised_tokens for row in scored)
