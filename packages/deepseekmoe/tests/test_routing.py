"""Which experts see a token: hand-worked numbers, brute force, and what later models changed."""

import itertools

import pytest
import torch
from deepseekmoe.routing import Groups, count_experts, hash_route, limit_capacity, route
from hypothesis import given
from hypothesis import strategies as st
from octavo.errors import ConfigError

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 1.0]])


def chosen(routing):
    """Sets of experts and their gates: the order of slots is nobody's business."""
    return [
        dict(zip(i.tolist(), w.tolist(), strict=True)) for i, w in zip(*routing[:2], strict=True)
    ]


def test_gates_are_the_softmax_over_all_experts_and_stay_as_they_are():
    found = chosen(route(LOGITS, 2))
    total = sum(torch.tensor([2.0, 1.0, 0.0, -1.0]).exp())
    assert set(found[0]) == {0, 1}
    assert found[0][0] == pytest.approx(float(torch.tensor(2.0).exp() / total))
    assert sum(found[0].values()) < 0.95  # not renormalised
    assert set(found[1]) == {2, 3}


def test_sigmoid_renormalised_and_scaled_is_that_of_deepseek_v3():
    found = chosen(route(LOGITS, 2, scoring="sigmoid", normalize=True, scale=2.5))
    kept = LOGITS[0, :2].sigmoid()
    assert found[0][0] == pytest.approx(float(2.5 * kept[0] / kept.sum()))
    assert sum(found[1].values()) == pytest.approx(2.5)


def test_the_bias_selects_and_does_not_weigh():
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
    found = chosen(route(LOGITS, 1, bias=bias))
    assert [set(one) for one in found] == [{3}, {3}]
    assert found[0][3] == pytest.approx(float(LOGITS[0].softmax(-1)[3]))


def test_disabled_experts_are_masked_before_selecting():
    found = chosen(route(LOGITS, 2, disable_top=1))
    assert set(found[0]) == {1, 2}
    assert found[0][1] == pytest.approx(float(LOGITS[0].softmax(-1)[1]))  # of the whole softmax


def test_the_most_probable_are_disabled_whatever_the_bias():
    bias = torch.zeros(4)
    bias[int(LOGITS[0].argmin())] = 2.0  # the first choice, and the least probable
    favoured, best = int(LOGITS[0].argmin()), int(LOGITS[0].argmax())
    ids = set(chosen(route(LOGITS, 3, bias=bias, disable_top=1))[0])
    assert favoured in ids
    assert best not in ids


@given(st.integers(0, 3), st.integers(0, 2**31))
def test_disabled_experts_are_never_chosen_in_groups(disable_top, seed):
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
    routing = route(logits, 3, groups=Groups(4, 2), disable_top=disable_top)
    for row, ids in zip(logits.softmax(-1), routing.ids, strict=True):
        banned = set(row.argsort(descending=True)[:disable_top].tolist())
        left = row.clone()
        left[list(banned)] = -1
        best = left.view(4, 3).max(-1).values.argsort(descending=True)[:2].tolist()
        allowed = [3 * g + i for g, i in itertools.product(best, range(3))]
        wanted = sorted(set(allowed) - banned, key=lambda expert: -row[expert])[:3]
        assert set(ids.tolist()) == set(wanted)


def test_too_few_experts_in_the_kept_groups_are_refused():
    with pytest.raises(
        ConfigError, match="3 experts a token of 4 in 2 of 3 groups with 2 disabled"
    ):
        route(torch.zeros(1, 6), 3, groups=Groups(3, 2), disable_top=2)


def test_groups_by_their_best_or_by_their_two_best():
    logits = torch.tensor([[5.0, -9.0, 4.0, 4.0, 0.0, 0.0]])
    assert set(chosen(route(logits, 2, groups=Groups(3, 1, "max")))[0]) == {0, 1}
    assert set(chosen(route(logits, 2, groups=Groups(3, 1, "top2"), scoring="sigmoid"))[0]) == {
        2,
        3,
    }


@given(
    st.integers(2, 4), st.integers(1, 2), st.sampled_from(["max", "top2"]), st.integers(0, 2**31)
)
def test_groups_equal_brute_force(count, kept, by, seed):
    each, top_k = 3, 2
    logits = torch.randn(4, count * each, generator=torch.Generator().manual_seed(seed))
    routing = route(logits, top_k, groups=Groups(count, kept, by))
    for row, ids in zip(logits.softmax(-1), routing.ids, strict=True):
        groups = row.view(count, each)
        worth = groups.max(-1).values if by == "max" else groups.sort(-1).values[:, -2:].sum(-1)
        best = worth.argsort(descending=True)[:kept].tolist()
        allowed = [g * each + i for g, i in itertools.product(best, range(each))]
        wanted = sorted(allowed, key=lambda expert: -row[expert])[:top_k]
        assert set(ids.tolist()) == set(wanted)


def test_too_few_experts_are_refused():
    with pytest.raises(ConfigError, match="3 experts a token of 4 with 2 disabled"):
        route(LOGITS, 3, disable_top=2)


def test_gradients_reach_every_logit_through_the_kept_gates():
    logits = LOGITS.clone().requires_grad_()
    route(logits, 1).weights.sum().backward()
    assert (logits.grad != 0).all()


@pytest.mark.parametrize("experts", [7, 16, 63, 64])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_hashing_gives_distinct_experts_evenly(experts, top_k):
    routing = hash_route(torch.arange(6400), top_k, experts, seed=3)
    assert all(len(set(row)) == top_k for row in routing.ids.tolist())
    counts = count_experts(routing.ids, experts).double()
    assert counts.min() > 0.6 * counts.mean()
    assert routing.weights.sum(-1).allclose(torch.ones(6400))


def test_every_layer_has_a_hash_of_its_own():
    found = [hash_route(torch.arange(200), 1, 16, seed=layer).ids for layer in range(62)]
    for one, two in itertools.pairwise(found):
        assert float((one == two).float().mean()) < 0.3


def test_hashing_depends_on_the_token_and_the_seed_alone():
    tokens = torch.tensor([5, 9, 5])
    one = hash_route(tokens, 2, 16, seed=0)
    assert one.ids[0].tolist() == one.ids[2].tolist()
    other = hash_route(torch.arange(200), 1, 16, seed=1).ids
    assert (other != hash_route(torch.arange(200), 1, 16, seed=0).ids).any()


def test_capacity_drops_the_weakest_gates():
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    routing = limit_capacity(route(logits, 1), 1.0)  # 4 slots, 2 experts: 2 each
    assert routing.ids.flatten().tolist() == [2, 0, 0, 1]
    assert routing.weights[0] == 0
    assert limit_capacity(route(logits, 1), 2.0).ids.flatten().tolist() == [0, 0, 0, 1]


def test_padding_takes_no_capacity():
    logits = torch.tensor([[9.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 1.0], [9.0, 0.0]])
    mask = torch.tensor([False, True, True, True, False])
    routing = limit_capacity(route(logits, 1), 1.0, mask)  # 3 slots, 2 experts: 2 each
    assert routing.ids.flatten().tolist() == [2, 0, 0, 1, 2]
    assert routing.weights[[0, 4]].tolist() == [[0.0], [0.0]]


def test_scores_keep_the_precision_of_the_logits_until_they_are_chosen():
    logits = torch.randn(2000, 64).to(torch.bfloat16)
    mimic, exact = route(logits, 6), route(logits.float(), 6)
    assert mimic.scores.dtype == torch.float32
    assert mimic.scores.equal(logits.softmax(-1).float())
    assert not mimic.scores.equal(exact.scores)


def test_padding_and_dropped_slots_are_not_counted():
    ids = torch.tensor([[0, 1], [1, 4], [2, 3]])
    assert count_experts(ids, 4).tolist() == [1, 2, 1, 1]
    assert count_experts(ids, 4, torch.tensor([True, True, False])).tolist() == [1, 2, 0, 0]
