"""Labels by rollouts: against a loop without sharing or early exit, after cuts, by shards, by hand."""

import json
import math
import os
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mathshepherd.annotate import (
    RolloutStore,
    annotate,
    labelable,
    linear_labels,
    prefixes,
    shard,
)
from mathshepherd.config import AnnotateConfig
from mathshepherd.generate import Completion, seed_of
from mathshepherd.quality import agreeing, label_quality, quality_by_rollouts
from mathshepherd.records import Solution, StepLabels
from mathshepherd.steps import StepFormat
from octavo.errors import ConfigError, DataError

FORM = StepFormat()
ENDS = ("The answer is: x + 1 ки", "The answer is: 8 ки", "so what ки")


def complete(text, seed):
    """What a completer says is decided by the text, which has a chance of its own, and the seed."""
    lucky = seed_of("outcome", text, seed) % 7 < seed_of("chance", text) % 6
    end = ENDS[0] if lucky else ENDS[seed % 3]
    # right answers of texts without an end do not count
    return Completion(f" so on. {end}", lucky or seed % 3 > 0, 5)


def is_hit(text, seed):
    made = complete(text, seed)
    return made.finished and "x + 1" in made.text


class Completer:
    """A generator that remembers what it was asked for."""

    def __init__(self, complete=complete):
        self.complete, self.asked = complete, []

    def __call__(self, requests):
        self.asked += [(one.text, seed) for one in requests for seed in one.seeds]
        return [[self.complete(one.text, seed) for seed in one.seeds] for one in requests]


def solution(problem, steps, correct, sample=0, **more: Any):
    more = {"predicted": "x + 1" if correct else "8", "answer": "x+1"} | more
    return Solution(
        str(problem), sample, f"Question {problem}?", tuple(steps), correct=correct, **more
    )


def labels_of(one) -> Any:
    return one.labels


def pool_of(rows):
    return [solution(*row, sample=n) for n, row in enumerate(rows)]


steps = st.lists(st.sampled_from("abc"), min_size=1, max_size=4)
pools = st.lists(st.tuples(st.integers(0, 1), steps, st.booleans()), min_size=1, max_size=6)
schedules = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)


def outcomes(one, count, seed=0):
    """For each inner step all its completions, made for it alone."""
    return [
        [is_hit(FORM.to_continue(prefix.question, prefix.steps), seed_of("rollout", seed, prefix.key, n))
         for n in range(count)]
        for prefix in prefixes(one)
    ]  # fmt: skip


@settings(max_examples=60)
@given(pools, schedules, st.sampled_from(["hard", "soft", "both"]), st.integers(1, 3))
def test_labels_are_those_of_a_plain_loop(rows, schedule, estimation, chunk):
    pool = pool_of(rows)
    count = sum(schedule)
    config = AnnotateConfig(rollouts=count, estimation=estimation, schedule=schedule)
    generator = Completer()
    labelled, cost = annotate(pool, generator, config, chunk=chunk)
    different = {(one.problem, one.steps): one for one in reversed(pool)}
    assert [(one.problem, one.sample) for one in labelled] == sorted(
        ((one.problem, one.sample) for one in different.values()), key=lambda key: key[1]
    )
    for one in labelled:
        found, plain = labels_of(one), outcomes(one, count)
        assert found.hard == (*(int(any(some)) for some in plain), int(bool(one.correct)))
        if estimation == "hard":  # tried until the round of the first hit
            rounds = [
                next((made for made in accumulate(schedule) if any(some[:made])), count)
                for some in plain
            ]
            assert found.soft is None
            assert found.tried == (*rounds, 1)
            assert found.hits == (
                *(sum(some[:made]) for some, made in zip(plain, rounds, strict=True)), one.correct
            )  # fmt: skip
        else:
            assert found.soft == (*(sum(some) / count for some in plain), one.correct)
            assert found.tried == (count,) * len(plain) + (1,)
    inner = {(one.question, prefix.steps) for one in labelled for prefix in prefixes(one)}
    assert {text for text, _ in generator.asked} == {FORM.to_continue(*one) for one in inner}
    assert len(set(generator.asked)) == len(generator.asked) == cost.rollouts
    assert (cost.prefixes, cost.tokens) == (len(inner), 5 * cost.rollouts)
    assert cost.left_out["doubles"] == len(pool) - len(labelled)


@settings(max_examples=30)
@given(pools, schedules)
def test_rounds_change_no_hard_label(rows, schedule):
    pool, count = pool_of(rows), sum(schedule)
    labels = [
        [labels_of(one).hard for one in annotate(pool, Completer(), config)[0] if one.labels]
        for config in (
            AnnotateConfig(rollouts=count, schedule=schedule),
            AnnotateConfig(rollouts=count),
            AnnotateConfig(rollouts=count, schedule=(count,)),
            AnnotateConfig(rollouts=count, estimation="both"),
        )
    ]
    assert labels[1:] == labels[:1] * 3


def test_a_seed_depends_on_prefix_and_number_alone():
    whole = pool_of([(0, "aab", True), (0, "abb", False), (1, "aab", False)])
    alone = Completer()
    annotate(whole[1:2], alone, AnnotateConfig(rollouts=4, estimation="soft"), chunk=1)
    together = Completer()
    annotate(whole[::-1], together, AnnotateConfig(rollouts=4, schedule=(3, 1), estimation="both"))
    assert set(alone.asked) < set(together.asked)
    other = Completer()
    annotate(whole[1:2], other, AnnotateConfig(rollouts=4, estimation="soft"), seed=1)
    assert not set(alone.asked) & set(other.asked)


def test_soft_labels_are_never_of_an_early_exit():
    config = AnnotateConfig(rollouts=8, estimation="both")
    found = linear_labels([[False, True], [False] * 8, [True] * 10], True, config)
    assert found.soft == (None, 0.0, 1.0, 1.0)
    assert found.hard == (1, 0, 1, 1)
    assert found.tried == (2, 8, 8, 1)
    # what an early exit left out is made before a soft label is given
    (one,) = pool_of([(0, "abca", False)])
    store, generator = RolloutStore(), Completer()
    annotate([one], generator, AnnotateConfig(), store=store)
    assert store.made < 8 * 3
    (labelled,), cost = annotate([one], generator, config, store=store)
    assert labels_of(labelled).soft == (*(sum(some) / 8 for some in outcomes(one, 8)), 0)
    assert len(set(generator.asked)) == len(generator.asked) == cost.rollouts == 24


def test_rounds_double_unless_all_are_needed():
    assert AnnotateConfig().rounds() == (1, 1, 2, 4)
    assert AnnotateConfig(rollouts=7).rounds() == (1, 1, 2, 3)
    assert AnnotateConfig(rollouts=1).rounds() == (1,)
    assert AnnotateConfig(estimation="both").rounds() == (8,)
    assert AnnotateConfig(schedule=(5, 3)).rounds() == (5, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rollouts": 0}, "--rollouts 0: must be 1 or more"),
        ({"schedule": (1, 2)}, r"--schedule \[1, 2\]: .* make --rollouts 8"),
        ({"schedule": (9, -1)}, "numbers of 1 or more"),
        ({"strategy": "binary", "estimation": "soft"}, "gives hard labels alone"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        AnnotateConfig(**options)


# Bisection


def reaching(last):
    """A completer that is right where no more than the first `last` steps stand."""

    def complete(text, seed):
        good = text.count("ки") <= last
        return Completion(f"on. {ENDS[0 if good else 1]}", True, 1)

    return Completer(complete)


@pytest.mark.parametrize("last", range(8))
def test_bisection_equals_the_plain_labels_where_they_are_monotone(last):
    pool = [solution(0, "abcabcab", False), solution(0, "cba", True, sample=1)]
    config = AnnotateConfig(rollouts=4)
    plain, searching = reaching(last), reaching(last)
    wanted, _ = annotate(pool[:1], plain, config)
    found, cost = annotate(pool, searching, replace(config, strategy="binary"))
    assert labels_of(found[0]).hard == labels_of(wanted[0]).hard == (1,) * last + (0,) * (8 - last)
    assert labels_of(found[1]).hard == (1, 1, 1)
    assert {labels_of(one).strategy for one in found} == {"binary"}
    assert labels_of(found[0]).tried is labels_of(found[0]).soft is None
    assert len(searching.asked) == cost.rollouts < len(plain.asked)
    assert cost.prefixes == 3  # of seven


@given(pools, st.integers(1, 4))
def test_bisection_ends_between_a_good_and_a_bad_step(rows, count):
    pool = pool_of(rows)
    config = AnnotateConfig(rollouts=count, strategy="binary")
    generator = Completer()
    found, cost = annotate(pool, generator, config)
    assert len(set(generator.asked)) == len(generator.asked) == cost.rollouts
    for one in found:
        hard = labels_of(one).hard
        first = sum(hard)
        assert hard == (1,) * first + (0,) * (len(hard) - first)
        plain = outcomes(one, count)
        if one.correct:
            assert first == len(hard)
        else:
            assert first == 0 or any(plain[first - 1])
            assert first == len(hard) - 1 or not any(plain[first])


def test_bisection_looks_at_the_completions_asked_for():
    (one,) = pool_of([(0, "ab", False)])
    store = RolloutStore()
    store.add({prefixes(one)[0].key: ([False, True], 2)})  # of a run with two
    config = AnnotateConfig(rollouts=1, strategy="binary")
    (found,), _ = annotate([one], Completer(), config, store=store)
    assert labels_of(found).hard == (0, 0)


# The store


POOL = pool_of([(0, "abc", True), (0, "abb", False), (1, "cb", False)])
BOTH = AnnotateConfig(rollouts=3, estimation="both", schedule=(1, 2))


@pytest.mark.parametrize("config", [BOTH, AnnotateConfig(rollouts=3, strategy="binary")])
def test_after_a_cut_at_any_byte_nothing_is_lost_or_made_twice(tmp_path, monkeypatch, config):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a thousand times
    file, whole = tmp_path / "whole.jsonl", Completer()
    wanted, cost = annotate(POOL, whole, config, store=RolloutStore(file), chunk=2)
    content, cut = file.read_bytes(), tmp_path / "cut.jsonl"
    assert len(content.splitlines()) > 3
    for size in range(len(content) + 1):
        cut.write_bytes(content[:size])
        kept = content[: content.rfind(b"\n", 0, size) + 1].splitlines()
        store, generator = RolloutStore(cut), Completer()
        found, again = annotate(POOL, generator, config, store=store, chunk=2)
        assert found == wanted
        assert again == cost
        assert cut.read_bytes() == content
        made = sum(len(json.loads(line)["hits"]) for line in kept)
        assert store.made == len(generator.asked) == cost.rollouts - made
        assert generator.asked == whole.asked[made:]


def test_a_torn_line_is_dropped_and_a_damaged_one_refused(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    line = '{"prefix": "a", "first": 0, "hits": [1, 0], "tokens": 9}\n'
    after = '{"prefix": "a", "first": 2, "hits": [0], "tokens": 1}\n'
    file.write_text(line + after + after[:-1])
    store = RolloutStore(file)
    assert (store.hits, store.tokens, store.made) == ({"a": [True, False, False]}, 10, 0)
    assert file.read_text() == line + after
    for bad in ("\n", "{}\n", "[1]\n", "null\n", after[:20] + "\n", line, '{"prefix": "a"}\n'):
        file.write_text(line + bad + line.replace('"a"', '"b"'))
        with pytest.raises(
            DataError, match=r"rollouts\.jsonl, line 2: is damaged; remove the file"
        ):
            RolloutStore(file)


def test_what_is_added_is_on_the_disk_at_once(tmp_path):
    store = RolloutStore(tmp_path / "new" / "rollouts.jsonl")
    with store.appending():
        store.add({"a": ([True], 3), "b": ([False, False], 5)})
        assert RolloutStore(store.file).hits == {"a": [True], "b": [False, False]}


def test_shards_part_the_problems_and_give_the_same_labels():
    pool = [
        solution(n, word, False, sample=k)
        for n in range(12)
        for k, word in enumerate(["ab", "abc"])
    ]
    whole, _ = annotate(pool, Completer(), BOTH)
    parts = [shard(pool, f"{n}/3") for n in (1, 2, 3)]
    assert all(parts)
    assert sum(map(len, parts)) == len(pool)
    problems = Counter(problem for part in parts for problem in {one.problem for one in part})
    assert set(problems.values()) == {1}
    found = [one for part in parts for one in annotate(part, Completer(), BOTH)[0]]
    assert sorted(found, key=lambda one: (int(one.problem), one.sample)) == whole
    assert shard(pool, "1/1") == pool


@pytest.mark.parametrize("words", ["", "1", "0/4", "5/4", "1/", "/4", "-1/4", "1/0", "a/b", "²/4"])
def test_a_shard_is_written_like_1_4(words):
    with pytest.raises(ConfigError, match="write it like 1/4"):
        shard(POOL, words)


# What it costs, and what is left out


def test_costs_by_hand():
    pool = [
        solution(0, ["a", "b", "c"], True),
        solution(0, ["a", "b", "d"], False, sample=1),
        solution(0, ["a"], False, sample=2),
        solution(0, ["a", "b", "c"], True, sample=3),
        solution(0, ["e", "f"], True, sample=4, finished=False),
        solution(0, ["g", "h"], False, sample=5, predicted=None),
    ]
    hits = {1: [0, 0, 1], 2: [0, 0, 0, 0]}  # by steps in the prefix

    def answer(text, seed):
        good = hits[text.count("ки")].pop(0)
        return Completion(ENDS[0 if good else 1], True, 10)

    generator = Completer(answer)
    found, cost = annotate(pool, generator, AnnotateConfig(rollouts=4, schedule=(1, 1, 1, 1)))
    assert [labels_of(one).hard for one in found] == [(1, 0, 1), (1, 0, 0), (0,)]
    assert [labels_of(one).tried for one in found] == [(3, 4, 1), (3, 4, 1), (1,)]
    assert [labels_of(one).hits for one in found] == [(1, 0, 1), (1, 0, 0), (0,)]
    assert cost.row() == {
        "solutions": 3, "steps": 4, "prefixes": 2, "rollouts": 7, "plain": 16, "tokens": 70,
        "share of plain": 7 / 16, "left out: unfinished": 1, "left out: no answer": 1,
        "left out: doubles": 1,
    }  # fmt: skip
    _, free = annotate(pool[2:3], generator)
    assert free.row()["share of plain"] is None
    assert len(generator.asked) == 7


def test_what_cannot_be_labelled_is_refused():
    (one,) = pool_of([(0, "ab", True)])
    for unknown in (replace(one, answer=None), replace(one, correct=None)):
        with pytest.raises(DataError, match="problem 0, sample 0: the right answer is not known"):
            labelable([one, unknown])
    with pytest.raises(DataError, match=r"none of 1 solutions can be labelled .*'unfinished': 1"):
        annotate([replace(one, finished=False)], Completer())


def test_a_generator_without_tags_continues_lines_and_unfinished_texts_miss():
    plain = StepFormat(plain=True)
    generator = Completer(
        lambda text, seed: Completion("Step 2: The answer is: x+1", seed % 2 == 0, 3)
    )
    (one,) = pool_of([(0, "ab", True)])
    config = AnnotateConfig(rollouts=6, estimation="soft")
    (found,), _ = annotate([one], generator, config, plain)
    assert {text for text, _ in generator.asked} == {"Question 0? Step 1: a\n"}
    assert labels_of(found).soft == (sum(seed % 2 == 0 for _, seed in generator.asked) / 6, 1)
    assert 0 < labels_of(found).soft[0] < 1


# How good labels are


def judged(labels, truth, sample=0, problem=0):
    return solution(problem, [f"{sample}{n}" for n in range(len(labels.hard))], False,
                    sample=sample, labels=labels, truth=truth)  # fmt: skip


def test_quality_by_hand():
    found = label_quality(
        [
            judged(StepLabels((1, 1, 0), (0.5, 0.25, 0.0)), (1, 0, 0)),
            judged(StepLabels((0, 1, None), (1.0, None, 0.5)), (1, 1, 1), sample=1),
            judged(StepLabels((1, 1, 1)), (1, 0), sample=2),  # truth ends at the first error
            judged(StepLabels((1,)), None, sample=3),
        ]
    )
    # truly bad: 1 0 1; truly good: 1 0 1 1
    assert found["steps"] == 7
    assert found["accuracy"] == pytest.approx(4 / 7)
    assert found["false positives"] == pytest.approx(2 / 3)
    assert found["false negatives"] == pytest.approx(1 / 4)
    logs = [math.log(0.5), math.log(0.75), math.log(0.99), math.log(0.99)]  # of 0 and 1: clipped
    assert found["CE of soft"] == pytest.approx(-sum(logs) / 4)
    hard = label_quality([judged(StepLabels((1, 1)), (1, 1))])
    assert (hard["CE of soft"], hard["false positives"], hard["false negatives"]) == (None, None, 0)
    with pytest.raises(DataError, match="no solution has both labels and `truth`"):
        label_quality([judged(StepLabels((1,)), None)])


def test_quality_by_rollouts_by_hand():
    one = judged(StepLabels((0, 0, 0)), (1, 0, 0))
    other = replace(one, sample=1, steps=(one.steps[0], "x", "y"), truth=(1, 1, 0))
    store = RolloutStore()
    keys = [prefixes(one)[0].key, prefixes(one)[1].key, prefixes(other)[1].key]
    outcomes = ([False, True, False, False], [False, False, True, False], [True] * 4)
    store.add({key: (hits, 4) for key, hits in zip(keys, outcomes, strict=True)})
    found = quality_by_rollouts([one, other], store, [1, 2, 4])
    shown = [(row["rollouts"], row["steps"], row["false positives"], row["false negatives"])
             for row in found]  # fmt: skip
    assert shown == [(1, 3, 0, 0.5), (2, 3, 0, 0), (4, 3, 1, 0)]
    assert [row["accuracy"] for row in found] == pytest.approx([2 / 3, 1, 2 / 3])
    wanted = -(math.log(0.25) + math.log(0.75) + math.log(0.99)) / 3
    assert found[-1]["CE of soft"] == pytest.approx(wanted)
    assert quality_by_rollouts([replace(one, steps=("a",))], store, [1]) == []
    with pytest.raises(DataError, match="4 completions of a step, and 8 are needed"):
        quality_by_rollouts([one, other], store, [8])


def test_consensus_keeps_what_has_the_same_first_bad_step():
    def labelled(sample, *hard, steps=("a", "b", "c")):
        return Solution("p", sample, "Q ", steps, "1", labels=StepLabels(hard))

    own = [labelled(0, 1, 0, 1), labelled(1, 1, 1, 1, steps=("x", "y", "z")),
           labelled(2, 0, 1, 1, steps=("d", "e", "f")), labelled(3, 1, steps=("g",))]  # fmt: skip
    judge = [labelled(9, 1, 0, 0), labelled(8, 1, None, 1, steps=("x", "y", "z")),
             labelled(7, 1, 0, 1, steps=("d", "e", "f"))]  # fmt: skip
    kept, counts = agreeing(own, judge)
    assert kept == own[:2]
    assert counts == {"solutions": 4, "not judged": 1, "differ": 1, "kept": 2}
