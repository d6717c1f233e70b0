"""Rewards of tokens and advantages by hand, the loss by hand and by finite differences, alarms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mathshepherd.config import PPOConfig, Shaping
from mathshepherd.monitor import Alarm, alarm
from mathshepherd.ppo import ppo_loss
from mathshepherd.rewards import (
    final_rewards,
    gae,
    grpo,
    reward_places,
    rewards_to_go,
    rloo,
    step_rewards,
    whiten,
)
from octavo.errors import ConfigError

SHAPINGS = ("raw", "center", "delta", "clip", "min", "last")
SCORES = torch.tensor([[0.9, 0.4, 0.6], [0.2, 0.0, 0.0]])
ENDS = torch.tensor([[1, 2, 5], [3, -1, -1]])


def close(found, wanted):
    wanted = torch.as_tensor(wanted)
    assert found.shape == wanted.shape
    assert found.flatten().tolist() == pytest.approx(wanted.flatten().tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("shaping", "first", "second"),
    [
        ("raw", [0.9, 0.4, 0.6], 0.2),
        ("center", [0.4, -0.1, 0.1], -0.3),
        ("delta", [0.4, -0.5, 0.2], -0.3),
        ("clip", [0, -0.4, -0.2], -0.6),
        ("min", [0.4 * 0.00590, -0.1 * 0.87558, 0.1 * 0.11850], -0.3),  # exp(-4), exp(1), exp(-1)
        ("last", [0, 0, 0.6], 0.2),
    ],
)
def test_shapings_by_hand(shaping, first, second):
    found = step_rewards(SCORES, ENDS, 7, Shaping(shaping=shaping))
    close(found[0], [0, first[0], first[1], 0, 0, first[2], 0])  # at each step's last token
    close(found[1], [0, 0, 0, second, 0, 0, 0])


def test_options_of_shapings():
    def of(**options):
        return step_rewards(SCORES[:1], ENDS[:1], 6, Shaping(**options))[0, [1, 2, 5]]

    close(of(shaping="delta", prior=0.8), [0.1, -0.5, 0.2])
    close(of(shaping="center", offset=0.4), [0.5, 0, 0.2])
    close(of(shaping="clip", eta=0.5), [0, -0.1, 0])
    close(of(shaping="min", tau=1e-3, offset=0.0), [0, 0.4, 0])  # the worst step's alone
    with pytest.raises(ConfigError, match="--tau 0: must be above 0"):
        Shaping(tau=0)


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_responses_without_steps_earn_nothing(shaping):
    found = step_rewards(
        SCORES, torch.tensor([[1, 2, 5], [-1, -1, -1]]), 6, Shaping(shaping=shaping)
    )
    assert found.isfinite().all()
    assert found[0].abs().sum() > 0
    assert found[1].abs().sum() == 0
    none = step_rewards(torch.zeros(2, 0), torch.zeros(2, 0).long(), 3, Shaping(shaping=shaping))
    assert none.tolist() == [[0, 0, 0]] * 2


probabilities = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6)


@given(probabilities, st.floats(0, 1))
def test_delta_telescopes(scores, prior):
    ends = torch.arange(len(scores))[None]
    found = step_rewards(torch.tensor([scores]), ends, len(scores), Shaping(prior=prior))
    assert float(found.sum()) == pytest.approx(scores[-1] - prior, abs=1e-5)


@given(probabilities, st.integers(1, 5))
def test_a_repeated_step_is_paid_by_raw_and_not_by_delta(scores, times):
    def total(values, shaping):
        ends = torch.arange(len(values))[None]
        return float(step_rewards(torch.tensor([values]), ends, 20, Shaping(shaping=shaping)).sum())

    longer = scores + scores[-1:] * times
    gain = {name: total(longer, name) - total(scores, name) for name in ("raw", "delta", "last")}
    assert gain["raw"] == pytest.approx(times * scores[-1], abs=1e-5)
    assert gain["delta"] == pytest.approx(0, abs=1e-5)
    assert gain["last"] == 0
    assert total(longer, "min") <= max(0.5, max(scores))  # a weighted mean


def test_rewards_of_whole_responses_stand_at_their_last_tokens():
    shaping = Shaping(answer_weight=2.0, missing_penalty=0.5)
    found = final_rewards(
        torch.full((4, 3), 0.25), torch.tensor([3, 1, 2, 3]), [True, False, None, True],
        [True, True, False, False], shaping,
    )  # fmt: skip
    close(found - 0.25, [[0, 0, 2], [0, 0, 0], [0, -0.5, 0], [0, 0, 1.5]])


def slow_gae(rewards, values, gamma, lam, behind=0.0):
    """The sum of the definition."""
    ahead = [*values[1:], behind]
    deltas = [r + gamma * after - now for r, now, after in zip(rewards, values, ahead, strict=True)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


numbers = st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=6)


@given(st.lists(numbers, min_size=1, max_size=3), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_its_definition(rows, gamma, lam):
    length = max(map(len, rows))
    # what is behind the end does not count
    rewards, values = torch.full((len(rows), length), 9.0), torch.full((len(rows), length), 2.0)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for n, row in enumerate(rows):
        rewards[n, : len(row)], values[n, : len(row)] = torch.tensor(row).T
        mask[n, : len(row)] = True
    found = gae(rewards, values, mask, gamma, lam)
    togo = rewards_to_go(rewards * mask, gamma)
    for n, row in enumerate(rows):
        size = len(row)
        rs, vs = zip(*row, strict=True)
        close(found[n, :size], slow_gae(rs, vs, gamma, lam))
        further = gae(rewards, values, mask, gamma, lam, torch.arange(float(len(rows))))
        close(further[n, :size], slow_gae(rs, vs, gamma, lam, n))
        assert further[n, size:].abs().sum() == 0
        assert found[n, size:].abs().sum() == 0
        everything = gae(rewards, values, mask, gamma, 1.0)[n, :size]
        close(everything, togo[n, :size] - values[n, :size])
        one = gae(rewards, values, mask, gamma, 0.0)[n, :size]
        close(one, rewards[n, :size] + gamma * torch.tensor([*vs[1:], 0.0]) - values[n, :size])


def test_gae_goes_on_behind_what_was_cut_off():
    rewards, values = (
        torch.tensor([[1.0, 0], [2, 0], [1, 3]]),
        torch.tensor([[0.5, 9], [1, 9], [2, 1]]),
    )
    mask = torch.tensor([[1, 0], [1, 0], [1, 1]]).bool()
    found = gae(rewards, values, mask, 0.5, 0.5, torch.tensor([0.0, 4, 6]))
    # 1 - 0.5; 2 + 4 / 2 - 1; 3 + 6 / 2 - 1 = 5, and 1 + 1 / 2 - 2 + 5 / 4
    close(found, [[0.5, 0], [3, 0], [0.75, 5]])


def test_rloo_by_hand():
    rewards = torch.tensor([[1.0, 0, 2], [0, 1, 0], [4, 0, 0], [1, 1, 1], [0, 0, 0], [0, 3, 0]])
    found = rloo(rewards, 3)
    # returns 3 1 4 and 3 0 3
    close(found, [[0.5, -0.5, -0.5], [-2.5, -2.5, -3.5], [2, -2, -2],
                  [1.5, 0.5, -0.5], [-3, -3, -3], [1.5, 1.5, -1.5]])  # fmt: skip
    close(rloo(rewards[:2], 2, gamma=0.5), [[1, 0.5, 1.5], [-1, -0.5, -1.5]])


def test_grpo_by_hand():
    rewards = torch.tensor([[1.0, 0, 2], [0, 3, 0], [5, 7, 0], [5, 7, 0]])
    places = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 0], [1, 0, 0]]).bool()
    found = grpo(rewards, places, 2)
    unit = (3 / 2) ** 0.5  # of 1 2 3
    close(found, [[-unit, 0, 0], [unit, unit, 0], [0, 0, 0], [0, 0, 0]])


@given(st.permutations(range(4)))
def test_groups_do_not_depend_on_their_order(order):
    torch.manual_seed(0)
    rewards = torch.randn(4, 5)
    places = torch.rand(4, 5) > 0.4
    for make in (
        lambda rows: rloo(rewards[rows], 4),
        lambda rows: grpo(rewards[rows], places[rows], 4),
    ):
        close(make(order), make(list(range(4)))[order])


def test_places_of_rewards():
    lengths = torch.tensor([7, 4])

    def places(answered=(True, True), **options):
        return reward_places(ENDS, lengths, 7, answered, Shaping(**options)).int().tolist()

    assert places() == [[0, 1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0]]
    assert places(shaping="last") == [[0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0]]
    assert places(answered=[False, True])[0] == [0, 1, 1, 0, 0, 1, 1]
    assert places(answered=[False, True], missing_penalty=0.0) == places()
    assert places(answer_weight=1.0)[0] == [0, 1, 1, 0, 0, 1, 1]
    none = torch.zeros(2, 0).long()
    for ends, scored in ((ENDS, False), (none, True)):
        found = reward_places(ends, lengths, 7, [False, True], Shaping(shaping="last"), scored)
        assert found.int().tolist() == [[0, 0, 0, 0, 0, 0, 1], [0] * 7]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(-100, 100))
def test_whitening_ignores_padding(values, rest):
    row = torch.tensor([[*values, rest, rest]])
    mask = torch.arange(len(values) + 2)[None] < len(values)
    found = whiten(row, mask)
    assert found[0, -2:].tolist() == [0, 0]
    assert torch.equal(found[0, :-2], whiten(row[:, :-2], mask[:, :-2])[0])
    assert float(found.sum()) == pytest.approx(0, abs=1e-3)
    if max(values) - min(values) > 0.1:
        assert float(found[mask].std(correction=0)) == pytest.approx(1, abs=1e-3)


# The loss


def two(first, second):
    return torch.tensor([[first, second]], dtype=torch.float64)


KNOWN = {"old": two(-1.0, -2.0), "reference": two(-1.5, -2.0), "values": two(0.0, 0.5),
         "returns": two(1.0, 0.5)}  # fmt: skip
MASK = torch.tensor([[True, True]])


def losses(ratios, advantages, values=None, **options):
    new = KNOWN["old"] + two(*ratios).log()
    known = KNOWN | {"advantages": two(*advantages)}
    loss, sums = ppo_loss(new, two(0.25, 0.5), values, known, MASK, PPOConfig(**options))
    return float(loss), sums.tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "wanted"),
    [(1.1, 2, -2.2), (1.5, 2, -2.4), (0.5, 2, -1.0),  # a gain is clipped above
     (0.9, -2, 1.8), (0.5, -2, 1.6), (1.5, -2, 3.0)],  # a loss below
)  # fmt: skip
def test_the_surrogate_is_clipped_where_it_would_gain(ratio, advantage, wanted):
    loss, (policy, value, entropy, moved) = losses((ratio, 1.0), (advantage, 3.0))
    assert loss == policy == pytest.approx(wanted - 3)
    assert (value, entropy) == (0, 0.75)
    log = float(torch.tensor(ratio).log())
    assert moved == pytest.approx(1 / ratio - 1 + log, abs=1e-6)  # k3 of the old against the new
    assert losses((ratio, 1.0), (advantage, 3.0), clip=10)[0] == pytest.approx(
        -ratio * advantage - 3
    )


@pytest.mark.parametrize(
    ("values", "wanted"),
    [((0.1, 0.5), 0.81), ((0.7, 0.5), 0.64), ((1.5, 0.5), 0.64), ((0.0, 0.9), 1 + 0.16),
     ((0.0, 0.0), 1 + 0.25)],
)  # fmt: skip
def test_a_value_gains_by_no_more_than_the_clip(values, wanted):
    loss, (policy, value, _, _) = losses((1, 1), (0, 0), two(*values), value_weight=0.3)
    assert (policy, value) == pytest.approx((0, wanted / 2))
    assert loss == pytest.approx(0.3 * wanted / 2)


@pytest.mark.parametrize(
    ("options", "weight"),
    [({"kl_in": "loss"}, 0.04), ({"kl_in": "loss", "kl": 0.0}, 0), ({}, 0),
     ({"advantage": "grpo", "group": 2, "kl": 1.0}, 1)],
)  # fmt: skip
def test_the_divergence_in_the_loss(options, weight):
    # k3 of the policy now against the reference: exp(d) - 1 - d with d = -0.5 and 0
    wanted = weight * (2.718281828**-0.5 - 1 + 0.5)
    assert losses((1, 1), (0, 0), **options)[0] == pytest.approx(wanted)


def test_tokens_that_are_not_there_do_not_count():
    mask = torch.tensor([[True, False]])
    known = KNOWN | {"advantages": two(1.0, 5.0)}
    far = (two(-1.0, -500.0), two(0.25, 7.0), two(0.5, 70.0))
    near = (two(-1.0, -2.0), two(0.25, 0.0), two(0.5, 0.0))
    config = PPOConfig(kl_in="loss")
    for one, other in zip(
        ppo_loss(*far, known, mask, config), ppo_loss(*near, known, mask, config), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_the_gradient_of_the_loss(kl_in):
    torch.manual_seed(3)
    known = {name: torch.randn(3, 4, dtype=torch.float64) for name in (*KNOWN, "advantages")}
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    new = (known["old"] + 0.3 * torch.randn(3, 4)).requires_grad_()
    values = (known["values"] + 0.3 * torch.randn(3, 4)).requires_grad_()
    config = PPOConfig(kl_in=kl_in, kl=0.5)

    def of(new, values):
        return ppo_loss(new, torch.zeros_like(new), values, known, mask, config)[0]

    assert torch.autograd.gradcheck(of, (new, values))
    of(new, values).backward()
    assert new.grad is not None
    assert (new.grad[~mask] == 0).all()
    assert new.grad[mask].abs().sum() > 0


# Alarms


def check(
    accuracy: float | None,
    reward: float | None = 1.0,
    steps=4.0,
    no_answer=0.0,
    **known: float | None,
) -> dict[str, float | None]:
    return {"accuracy": accuracy, "reward": reward, "steps": steps, "no answer": no_answer} | known


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([check(0.5), check(0.5, steps=6.1)], "responses grew from 4.0 to 6.1 steps"),
        ([check(0.5, steps=0.0), check(0.5, steps=1.6)], "grew from 0.0"),
        ([check(None), check(None, no_answer=0.2)], "20% of the responses have no answer, 0% at first"),
        ([check(0.5), check(0.5, **{"kl a token": 0.6})], "is 0.60 nats a token away"),
        ([check(0.5, entropy=None), check(0.5, entropy=0.4), check(0.5, entropy=0.007)],
         "entropy fell from 0.4 to 0.007"),
        ([check(None, entropy=0.4), check(None, entropy=0.0)], "entropy fell from 0.4 to 0"),
        ([check(0.6, 1), check(0.55, 1), check(0.5, 2)],
         "accuracy fell from 0.600 to 0.500 while the reward rose from 1.000 to 2.000"),
        ([check(0.1, None), check(0.6, 1), check(0.5, 2), check(0.4, 3)], "fell from 0.600 to 0.400"),
    ],
)  # fmt: skip
def test_alarms(history, words):
    assert words in alarm(history)
    assert alarm(history[:-1]) == ""


@pytest.mark.parametrize(
    "history",
    [
        [check(0.5)],
        [check(0.5), check(0.5, steps=6.0)],
        [check(0.5, entropy=None), check(0.5, entropy=0.4), check(0.5, entropy=0.009)],
        [check(0.5, entropy=0.4), check(0.6, entropy=0.0)],  # it is sure, and right
        [check(0.5), check(0.5, **{"kl a token": 0.4})],
        [check(0.5, entropy=None), check(0.5, entropy=None)],  # nothing was sampled in between
        [check(0.5, no_answer=0.3), check(0.5, no_answer=0.44)],
        [check(0.6, 1), check(0.55, 1), check(0.5, 0.9)],  # the reward falls too
        [check(0.6, 1), check(0.595, 2), check(0.5, 3)],  # too little
        [check(0.6, None), check(0.5, 1), check(0.4, 2)],  # it is not known whether the reward rose
        [check(0.6, 1), check(0.5, 2), check(0.55, 3), check(0.5, 4)],  # not in a row
        [check(None, 1), check(None, 2), check(None, 3)],
    ],
)
def test_no_alarm(history):
    assert alarm(history) == ""


def test_limits_of_alarms():
    falling = [check(0.6, 1), check(0.5, 2), check(0.4, 3)]
    assert alarm(falling[:2], Alarm(checks=1))
    assert not alarm(falling, Alarm(checks=3))
    assert not alarm(falling, Alarm(fall=0.2))
    assert not alarm([check(0.5), check(0.5, steps=9.0)], Alarm(steps=3.0))
    assert alarm([check(0.5), check(0.5, **{"kl a token": 0.4})], Alarm(kl=0.3))
    assert alarm([check(0.5, entropy=0.4), check(0.5, entropy=0.1)], Alarm(entropy=0.3))
    assert not alarm([check(0.5), check(0.5, no_answer=0.4)], Alarm(no_answer=0.5))
