"""Systems compared on equal terms: one encoder, data, epochs and rates, several ways of formations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from octavo.models import save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime, seed_everything
from octavo.tiny import Shape, checkpoint
from octavo.training import discard_checkpoints

from formbert.config import FitOptions, ModelOptions, ObjectiveOptions, Source
from formbert.data import Instance
from formbert.disambiguator import Disambiguator
from formbert.encode import Encoding
from formbert.formation import FormationPredictor, train_predictor
from formbert.formations import NAMES
from formbert.inventory import Inventory
from formbert.modeling import build
from formbert.predictions import Prediction
from formbert.reader import Reader
from formbert.sources import Sources
from formbert.training import train


@dataclass(frozen=True)
class World:
    """What systems are taught and judged on.

    Attributes:
        inventory: of senses.
        train: instances to learn from.
        held: instances to choose the epoch by.
        tests: instances to be judged on, by part.
        shape: of the encoder, made from scratch.
        fit: the optimisation.
    """

    inventory: Inventory
    train: Sequence[Instance]
    held: Sequence[Instance]
    tests: Mapping[str, Sequence[Instance]]
    shape: Shape
    fit: FitOptions

    @property
    def texts(self) -> list[str]:
        """What the encoder's vocabulary, and its pre-training, are made of: training texts and glosses.

        The characters of the test texts stand in rows of one, so that none is unknown; nothing can be
        learnt from such a row.
        """
        characters = {
            character for part in self.tests.values() for one in part for character in one.text
        }
        glosses = [f"{one.word}：{one.gloss}" for one in self.inventory.senses]
        characters |= {sign for one in self.inventory.senses for sign in one.pos} | set("#：，；")
        return [*(one.text for one in self.train), *glosses, *sorted(characters)]


@dataclass(frozen=True)
class System:
    """One way to disambiguate.

    Attributes:
        name: shown in tables.
        model: what the model is.
        objective: what is learnt.
        tested: where formations come from when it is tested, by the name that row gets; with an empty
            name the system's own.
    """

    name: str
    model: ModelOptions
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    tested: Mapping[str, Source] = field(default_factory=dict)


PLAIN = ModelOptions(fusion=(), predictor="none")
NO_FORMATION = ObjectiveOptions(formation_weight=0.0)

GLOSS_ONLY = System("gloss only", PLAIN, NO_FORMATION)
TAUGHT_ALONG = System("gloss only, formations taught along", ModelOptions(fusion=()))
ADDED = System(
    "added (the paper's fusion), annotated",
    ModelOptions(fusion=("pooled_add",), formation_source="annotation", predictor="mean"),
)
INTERACTING = System(
    "token + agreement, annotated",
    ModelOptions(formation_source="annotation"),
    tested={"token + agreement, predicted from the gloss": "gloss"},
)
PARTS_OF_SPEECH = System(
    "token + agreement of parts of speech",
    ModelOptions(formation_source="annotation", signal="pos"),
)
BI_ENCODER = System(
    "bi-encoder, token + agreement, annotated",
    ModelOptions(arch="bi", formation_source="annotation"),
)
BI_PLAIN = System("bi-encoder, gloss only", replace(PLAIN, arch="bi"), NO_FORMATION)


def predictor_of(world: World, run: RunDir, runtime: Runtime) -> FormationPredictor:
    """What tells formations from glosses, taught on the words that are trained on, and on no other."""
    folder = run.path / f"seed-{runtime.seed}" / "formation"
    if not folder.is_dir():
        words = {one.word for one in world.train}
        senses = [one for one in world.inventory.senses if one.word in words]
        place = RunDir(folder.parent)
        folder.parent.mkdir(parents=True, exist_ok=True)
        train_predictor(senses, place, runtime=runtime).save_pretrained(folder)
        discard_checkpoints(place, "formation")
    predictor = FormationPredictor.from_pretrained(folder)
    predictor.lexicon = {}  # what it says is read off the gloss, for words trained on, too
    return predictor


def run_system(
    system: System, world: World, run: RunDir, runtime: Runtime
) -> dict[str, dict[str, list[Prediction]]]:
    """Answers to every part, by the row's name; a system that was run is read from its file.

    Args:
        system: what is trained.
        world: on what.
        run: where it is kept.
        runtime: seed and device.
    """
    place = run.path / f"seed-{runtime.seed}"
    file = place / f"{_file(system.name)}.json"
    if not file.is_file():
        wsd = _trained(system, world, place, runtime)
        answers = {system.name: {part: wsd.batch(rows) for part, rows in world.tests.items()}}
        for name, source in system.tested.items():
            other = _asked(system, source, world, run, runtime)
            answers[name] = {part: other.batch(rows) for part, rows in world.tests.items()}
        rows = {
            name: {part: [one.row() for one in some] for part, some in parts.items()}
            for name, parts in answers.items()
        }
        RunDir(place).write_json(file.name, rows)
    stored = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: {part: [Prediction.of(row) for row in rows] for part, rows in parts.items()}
        for name, parts in stored.items()
    }


def _trained(system: System, world: World, place: Path, runtime: Runtime) -> Disambiguator:
    """Train a system, or take the model that a stopped run has saved."""
    folder = place / _file(system.name)
    if not folder.is_dir():
        options = replace(system.model, max_length=world.shape.max_length)
        labels = world.inventory.pos_tags if options.signal == "pos" else NAMES
        encoder = checkpoint(world.texts, world.shape, runtime)
        seed_everything(runtime.seed)
        model, tokenizer = build(encoder, options, labels)
        reader = Reader(Encoding(tokenizer, options), options, labels, world.inventory, Sources())
        here = RunDir(place)
        place.mkdir(parents=True, exist_ok=True)
        model = train(
            model, reader, world.train, world.held, here,
            objective=system.objective, options=world.fit, runtime=runtime, name=_file(system.name),
        )  # fmt: skip
        save_model(folder, model, tokenizer)
        discard_checkpoints(here, _file(system.name))
    return Disambiguator.from_pretrained(folder, world.inventory, runtime=runtime)


def _asked(
    system: System, source: Source, world: World, run: RunDir, runtime: Runtime
) -> Disambiguator:
    """The trained system with formations from elsewhere."""
    folder = folder_of(system, run, runtime)
    sources = Sources(predictor=predictor_of(world, run, runtime))
    return Disambiguator.from_pretrained(
        folder, world.inventory, formation=source, sources=sources, runtime=runtime
    )


def choices_changed(
    system: System, world: World, part: str, run: RunDir, runtime: Runtime
) -> tuple[int, int]:
    """How many choices of a trained system differ between formations read off the context and none.

    Either way all candidates of an instance have the same.

    Returns:
        Choices that differ, and all of them.
    """
    bare = Inventory(replace(sense, formation=None) for sense in world.inventory.senses)
    folder = folder_of(system, run, runtime)
    sources: tuple[Source, Source] = ("soft", "annotation")
    first, second = (
        Disambiguator.from_pretrained(folder, bare, formation=source, runtime=runtime).batch(
            world.tests[part]
        )
        for source in sources
    )
    differ = sum(a.sense_id != b.sense_id for a, b in zip(first, second, strict=True))
    return differ, len(first)


def folder_of(system: System, run: RunDir, runtime: Runtime) -> Path:
    """Where a system's trained model lies."""
    return run.path / f"seed-{runtime.seed}" / _file(system.name)


def _file(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name).strip("-")
