"""The toy shop: its truth, its demonstrator's slips, its tokenizer, and the clock."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mathshepherd import shop
from mathshepherd.answers import equivalent, extract
from mathshepherd.records import Solution
from mathshepherd.shop import FORMAT, SIGNS, Shop, Tale, make_world, solve, truth
from mathshepherd.steps import StepTokens

TALE = Tale("Ann", "pens", 7, (("buys", 4), ("gives", 3), ("triples", 0)))
RIGHT = ("7 + 4 = 11", "11 - 3 = 8", "8 * 3 = 24. The answer is: 24")


def test_a_tale_by_hand():
    assert TALE.question() == "Ann has 7 pens. buys 4. gives 3. triples them. How many?"
    assert solve(Shop(), TALE) == RIGHT
    assert shop.answer_of(RIGHT) == "24"
    assert truth(Shop(), TALE, RIGHT) == (1, 1, 1)


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        (("7 + 4 = 11", "11 + 3 = 14", "14 * 3 = 42. The answer is: 42"), (1, 0, 0)),
        (("7 + 4 = 11", "11 + 3 = 8", RIGHT[2]), (1, 0, 0)),  # right again is wrong still
        (("7 + 4 = 12", *RIGHT[1:]), (0, 0, 0)),
        (RIGHT[1:], (0, 0)),  # a step left out
        ((*RIGHT[:2], "8 * 3 = 24"), (1, 1, 0)),  # no answer
        ((*RIGHT, "24 + 1 = 25"), (1, 1, 1, 0)),
        ((" 7 + 4 = 11 ",), (1,)),
    ],
)
def test_truth_by_hand(steps, wanted):
    assert truth(Shop(), TALE, steps) == wanted


seeds = st.integers(0, 10**6)


def replay(shop_, tale):
    """The states of a tale, worked out anew."""
    state, states = tale.start, []
    for verb, number in tale.events:
        if verb in ("buys", "finds"):
            state += number
        elif verb in ("sells", "eats", "gives"):
            state -= number
        else:
            state *= {"doubles": 2, "triples": 3}[verb]
        state = state % shop_.clock if shop_.clock else state
        states.append(state)
    return states


@given(seeds, st.sampled_from([Shop(), Shop(clock=10), Shop(events=(1, 2), highest=9, operand=3)]))
def test_tales_stay_in_their_world(seed, shop_):
    tale = shop.draw_tale(shop_, random.Random(seed))
    states = replay(shop_, tale)
    least, most = (0, shop_.clock - 1) if shop_.clock else (1, shop_.highest)
    assert all(least <= state <= most for state in (tale.start, *states))
    assert shop_.events[0] <= len(tale.events) <= shop_.events[1]
    assert all(2 <= number <= shop_.operand for verb, number in tale.events if verb in SIGNS)
    steps = solve(shop_, tale)
    assert [int(re.findall(r"= (\d+)", step)[0]) for step in steps] == states
    assert extract(steps[-1]) == shop.answer_of(steps) == str(states[-1])
    assert truth(shop_, tale, steps) == (1,) * len(steps)


def slips(noise, noise_triples, shop_, count=800):
    """How often each verb is done as another one, over demonstrations of many tales."""
    draw = random.Random(1)
    world = replace(shop_, noise=noise, noise_triples=noise_triples)
    done, asked = Counter(), Counter()
    for _ in range(count):
        tale = shop.draw_tale(world, draw)
        state = tale.start
        for (verb, number), step in zip(
            tale.events, shop.demonstrate(world, tale, draw), strict=True
        ):
            asked[verb] += 1
            done[verb] += not step.startswith(shop.step_of(world, state, verb, number)[0])
            state = int(re.findall(r"= (\d+)", step)[0])
    return {verb: done[verb] / asked[verb] for verb in asked}


def test_slips_come_at_the_stated_rates():
    # on a clock no way leads out of the world, so that none is drawn again
    found = slips(0.6, 0.45, Shop(clock=1000))
    assert found["gives"] == pytest.approx(0.6, abs=0.06)
    assert found["triples"] == pytest.approx(0.45, abs=0.06)
    assert {verb for verb, rate in found.items() if rate} == {"gives", "triples"}
    other = slips(0.2, 0.9, Shop(clock=1000))
    assert other["gives"] == pytest.approx(0.2, abs=0.06)
    assert other["triples"] == pytest.approx(0.9, abs=0.06)
    inside = slips(0.6, 0.45, Shop())  # where some lead out, and the whole is drawn again
    assert 0.4 < inside["gives"] < 0.65
    assert 0.4 < inside["triples"] < 0.75
    assert set(slips(0.0, 0.0, Shop(), 200).values()) == {0.0}


def test_a_slip_is_an_addition_or_doubling():
    always = Shop(noise=1.0, noise_triples=1.0)
    assert shop.demonstrate(always, TALE, random.Random(0)) == (
        "7 + 4 = 11", "11 + 3 = 14", "14 * 2 = 28. The answer is: 28"
    )  # fmt: skip
    narrow = replace(always, highest=12)  # from which every slip leads out
    tale = replace(TALE, events=(("buys", 4), ("gives", 3)))
    assert shop.demonstrate(narrow, tale, random.Random(0)) == solve(narrow, tale)


def test_a_world_has_no_question_twice():
    world = make_world(Shop(events=(1, 3), highest=12), 60, 50, 40, 30, seed=3)
    parts = [world.pool, world.test, world.dev]
    assert [len(world.demonstrations), *map(len, parts)] == [60, 50, 40, 30]
    questions = [one.question for part in (world.demonstrations, *parts) for one in part]
    assert len(set(questions)) == 180
    for one in (one for part in parts for one in part):
        steps = solve(world.shop, world.tales[one.id])
        assert equivalent(one.answer, shop.answer_of(steps))
        assert one.question == world.tales[one.id].question()
        assert FORMAT.split(one.solution or "") == steps
    again = make_world(Shop(events=(1, 3), highest=12), 60, 50, 40, 30, seed=3)
    assert again == world
    assert make_world(Shop(events=(1, 3), highest=12), 60, 50, 40, 30, seed=4).pool != world.pool


def test_demonstrations_have_the_true_answer_and_their_own_steps():
    world = make_world(Shop(), 200, 0, 0, 0, seed=0)
    right = [shop.answer_of(one.steps) == one.answer for one in world.demonstrations]
    assert 0.2 < sum(right) / 200 < 0.8
    clean = make_world(Shop(noise=0, noise_triples=0), 50, 0, 0, 0, seed=0)
    assert all(shop.answer_of(one.steps) == one.answer for one in clean.demonstrations)
    found = [world.with_truth(one) for one in world.demonstrations]
    assert all(
        bool(one.truth and one.truth[-1]) <= good for one, good in zip(found, right, strict=True)
    )
    one = replace(found[0], steps=("nonsense", *found[0].steps[1:]))
    assert set(world.with_truth(one).truth or ()) == {0}


def test_a_clock_lets_wrong_ways_hit_the_right_answer():
    clock = make_world(Shop(clock=10), 400, 0, 0, 0, seed=0)
    lucky = [
        one for one in map(clock.with_truth, clock.demonstrations)
        if one.truth and not one.truth[-1] and shop.answer_of(one.steps) == one.answer
    ]  # fmt: skip
    assert len(lucky) > 10
    assert shop.step_of(Shop(clock=10), 8, "triples", 0) == ("8 * 3 = 4", 4)
    assert shop.step_of(Shop(clock=10), 1, "gives", 4) == ("1 - 4 = 7", 7)


@pytest.mark.parametrize("shop_", [Shop(), Shop(clock=50, operand=9)])
def test_the_tokenizer_loses_nothing(shop_):
    tokenizer = shop.make_tokenizer(shop_)
    world = make_world(shop_, 40, 40, 0, 0, seed=1)
    for one in world.demonstrations:
        assert isinstance(one, Solution)
        text = FORMAT.prefix(one.question, one.steps)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert ids.count(StepTokens.of(tokenizer, FORMAT).tag) == len(one.steps)
        # one token a word, number and sign: a beginning's tokens begin the whole's
        begin = tokenizer(FORMAT.to_continue(one.question, one.steps[:2]))["input_ids"]
        assert ids[: len(begin)] == begin
    assert len(tokenizer) < 120


def test_the_model_is_small_and_its_seed_decides():
    tokenizer = shop.make_tokenizer(Shop())
    model = shop.make_model(tokenizer, 0)
    count = sum(weight.numel() for weight in model.parameters())
    assert 100_000 < count < 180_000
    first, again, other = (
        shop.make_model(tokenizer, seed, layers=1, width=16).state_dict()["lm_head.weight"]
        for seed in (0, 0, 1)
    )
    assert first.equal(again)
    assert not first.equal(other)
