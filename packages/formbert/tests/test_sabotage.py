"""With a key step taken out the gain must go: the claims measure formations, not the task."""

from dataclasses import replace

import numpy as np
import pytest
from formbert.claims import judge
from formbert.demo import FITS, SHAPES, accuracies, of_table, world_of
from formbert.experiment import GLOSS_ONLY, INTERACTING, World, run_system
from formbert.formations import Formation
from formbert.inventory import Inventory
from formbert.metrics import outcomes
from octavo.rundir import RunDir
from octavo.runtime import Runtime

CPU = Runtime(device="cpu", seed=0)
GAIN = "Formations that interact with the context help where senses differ in formation"
REST = {
    "gloss only, known": 95.0, "context predictor": 57.0, "commonest formation": 38.0,
    "added, changed": 0.0, "annotated, changed": 1.0,
}  # fmt: skip


def small(world: World) -> World:
    """A few epochs with a quarter of the sentences."""
    fit = replace(FITS["quick"], epochs=8)
    shape = replace(SHAPES["quick"], width=48)
    return replace(world, train=world.train[::2], held=world.held[::2], fit=fit, shape=shape)


def gain(world: World, folder, system) -> dict:
    """The claim about the gain, of a plain system and this one."""
    run = RunDir(folder)
    table = [{"system": "first sense"} | dict.fromkeys(("new words (all)",), 50.0)]
    for one in (GLOSS_ONLY, system):
        for name, parts in run_system(one, world, run, CPU).items():
            right = np.concatenate(
                [outcomes(parts[part], world.tests[part]) for part in ("test_frames", "test_words")]
            )
            table.append({"system": name} | accuracies(right, world))
    claims = judge([REST | of_table(table)])
    return {claim.claim: claim.verdict for claim in claims}


@pytest.mark.untraced
def test_formations_by_lot_give_nothing(tmp_path):
    """PASS with the true formations, FAIL with as many that were drawn."""
    world = small(world_of("quick"))
    plain = replace(INTERACTING, tested={next(iter(INTERACTING.tested)): "annotation"})
    assert gain(world, tmp_path / "true", plain)[GAIN] == "PASS"
    kinds = [Formation.VERB_OBJECT, Formation.MODIFIER_HEAD]
    lots = np.random.default_rng(1).integers(0, 2, len(world.inventory.senses))
    drawn = Inventory(
        replace(sense, formation=kinds[lot])
        for sense, lot in zip(world.inventory.senses, lots, strict=True)
    )
    (tmp_path / "lots" / "seed-0").mkdir(parents=True)
    for file in (tmp_path / "true" / "seed-0").glob("gloss-only.json"):
        (tmp_path / "lots" / "seed-0" / file.name).write_bytes(file.read_bytes())
    assert gain(replace(world, inventory=drawn), tmp_path / "lots", plain)[GAIN] == "FAIL"
