"""With a key step taken out, the claims must fail: they measure the method and not the task."""

import dataclasses
import json

import pytest
import torch
from deepseekmoe import demo, layer
from deepseekmoe.corpus import Tokens
from deepseekmoe.demo import EMBEDDED, PROFILES, Profile
from deepseekmoe.routing import Routing
from octavo.rundir import RunDir

pytestmark = pytest.mark.untraced

SMALL = Profile(60, ("gshard",), 4000, rows=4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Tokenizer and tokens of the embedded domains, made once."""
    return demo._texts(RunDir(tmp_path_factory.mktemp("prepared")), SMALL, None)


@pytest.fixture
def verdicts(command, tmp_path, monkeypatch, prepared):
    """Run a small demo and give the verdict of each claim by its beginning."""
    monkeypatch.setattr(demo, "_texts", lambda *_: prepared)
    monkeypatch.setitem(PROFILES, "quick", SMALL)
    # after so few steps a token's best experts are worth little, and more than nothing; and domains are
    # told apart by GShard's experts as well as by ours
    margins = dataclasses.replace(EMBEDDED["quick"], disabled=0.005, specialization=0.8)
    monkeypatch.setitem(EMBEDDED, "quick", margins)

    def run(name):
        command("demo", "--out", tmp_path / name, "--device", "cpu", "--quiet")
        claims = json.loads((tmp_path / name / "claims.json").read_text())["claims"]
        return {claim["claim"]: claim["verdict"] for claim in claims}

    return run


SWAP = "A routed expert cannot replace the shared one"
LOAD = "The balance loss keeps the load even"
TOP = "Without its best sixteenth of experts it suffers"
DOMAINS = "Its experts are more specialised in domains than GShard's"


def test_unharmed_the_claims_hold_even_at_this_size(verdicts):
    found = verdicts("whole")
    assert {claim: found[claim] for claim in (SWAP, LOAD, TOP, DOMAINS)} == dict.fromkeys(
        (SWAP, LOAD, TOP, DOMAINS), "PASS"
    )


def test_random_routing_fails(verdicts, monkeypatch):
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
    assert verdicts("random")[TOP] == "FAIL"


def test_domains_that_are_none_fail(verdicts, monkeypatch):
    """Where every domain is the same text, no expert is specialised in one."""
    monkeypatch.setattr(Tokens, "of_domain", lambda self, domain: self)
    assert verdicts("mixed")[DOMAINS] == "FAIL"


def test_a_balance_loss_of_weight_zero_fails(verdicts, monkeypatch):
    monkeypatch.setattr(
        layer, "expert_balance_loss", lambda scores, ids, **options: 0.0 * scores.sum()
    )
    assert verdicts("unbalanced")[LOAD] == "FAIL"


def test_a_shared_expert_that_is_never_used_fails(verdicts, monkeypatch):
    from deepseekmoe.layer import DeepseekMoeMLP

    monkeypatch.setattr(DeepseekMoeMLP, "forward", lambda self, x: 0.0 * x)
    assert verdicts("unshared")[SWAP] == "FAIL"
