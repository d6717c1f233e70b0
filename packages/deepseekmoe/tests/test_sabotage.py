"""With a key step taken out, the claims must fail: they measure the method and not the task."""

import dataclasses
import shutil

import pytest
import torch
from deepseekmoe import demo, layer
from deepseekmoe.corpus import Tokens
from deepseekmoe.demo import EMBEDDED, Profile, judge
from deepseekmoe.routing import Routing
from octavo.rundir import RunDir
from octavo.runtime import Runtime

pytestmark = pytest.mark.untraced

SMALL = Profile(60, ("gshard",), 4000, rows=4)

#: After so few steps a token's best experts are worth little, and more than nothing; and domains are
#: told apart by GShard's experts as well as by ours.
MARGINS = dataclasses.replace(EMBEDDED["quick"], disabled=0.005, specialization=0.8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Tokenizer and tokens of the embedded domains, made once."""
    return demo._texts(RunDir(tmp_path_factory.mktemp("prepared")), SMALL, None)


@pytest.fixture(scope="module")
def verdicts(prepared):
    """Train what is not yet in a folder, and give the verdict of each claim on it."""
    tokenizer, train, dev = prepared
    runtime = Runtime(device="cpu", seed=3)

    def run(folder):
        found = demo._run_seed(SMALL, tokenizer, train, dev, 3, RunDir(folder), runtime)
        return {claim.claim: claim.passed for claim in judge([found.numbers], MARGINS)}

    return run


@pytest.fixture(scope="module")
def whole(verdicts, tmp_path_factory):
    """Models trained as they should be, and the verdicts on them."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, verdicts(folder)


@pytest.fixture
def models(whole, tmp_path):
    """A copy of these models."""
    return shutil.copytree(whole[0], tmp_path / "models")


@pytest.fixture
def rivals(models):
    """The same without ours, which is trained anew; no claim here is about the rivals' training."""
    shutil.rmtree(models / "seed-3" / "cells" / "deepseekmoe")
    return models


SWAP = "A routed expert cannot replace the shared one"
LOAD = "The balance loss keeps the load even"
TOP = "Without its best sixteenth of experts it suffers"
DOMAINS = "Its experts are more specialised in domains than GShard's"


def test_unharmed_the_claims_hold_even_at_this_size(whole):
    _, found = whole
    assert {claim: found[claim] for claim in (SWAP, LOAD, TOP, DOMAINS)} == dict.fromkeys(
        (SWAP, LOAD, TOP, DOMAINS), True
    )


def test_random_routing_fails(verdicts, rivals, monkeypatch):
    """Of experts drawn at random none is best, and any can be disabled."""

    def drawn(logits, top_k, **options):
        draw = torch.Generator().manual_seed(int(logits.shape[0]))
        scores = logits.float().softmax(-1)
        noise = torch.rand(logits.shape, generator=draw)
        if masked := options.get("disable_top", 0):
            noise = noise.scatter(-1, scores.topk(masked, dim=-1).indices, -1.0)
        ids = noise.topk(top_k, dim=-1).indices
        return Routing(ids, scores.gather(-1, ids), scores)

    monkeypatch.setattr(layer, "route", drawn)
    assert verdicts(rivals)[TOP] is False


def test_domains_that_are_none_fail(verdicts, models, monkeypatch):
    """Where every domain is the same text, no expert is specialised in one."""
    monkeypatch.setattr(Tokens, "of_domain", lambda self, domain: self)
    assert verdicts(models)[DOMAINS] is False


def test_a_balance_loss_of_weight_zero_fails(verdicts, rivals, monkeypatch):
    monkeypatch.setattr(
        layer, "expert_balance_loss", lambda scores, ids, **options: 0.0 * scores.sum()
    )
    assert verdicts(rivals)[LOAD] is False


def test_a_shared_expert_that_is_never_used_fails(verdicts, rivals, monkeypatch):
    from deepseekmoe.layer import DeepseekMoeMLP

    monkeypatch.setattr(DeepseekMoeMLP, "forward", lambda self, x: 0.0 * x)
    assert verdicts(rivals)[SWAP] is False
