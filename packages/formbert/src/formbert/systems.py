"""A trained model, or a rule, with an inventory and what helps it: what commands answer by."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from octavo.errors import ConfigError
from octavo.runtime import Runtime

from formbert.baselines import BASELINES, ORACLES, nearest
from formbert.config import (
    AnswerOptions,
    ModelOptions,
    SystemOptions,
    check_answers,
)
from formbert.data import Instance, need_gold, read_instances
from formbert.disambiguator import Disambiguator, Second, choose_margin, gap
from formbert.formation import FormationPredictor
from formbert.inventory import Inventory
from formbert.metrics import outcomes
from formbert.modeling import build
from formbert.predictions import Prediction
from formbert.sources import Sources, read_lexicon

#: Rules that answer without a model, by name.
RULES = BASELINES | ORACLES


def sources_of(lexicon: str | None, predictor: str | None) -> Sources:
    """What is known of formations beside an inventory."""
    return Sources(
        read_lexicon(lexicon) if lexicon else {},
        FormationPredictor.from_pretrained(predictor) if predictor else None,
    )


def system(
    model: str, options: SystemOptions, answer: AnswerOptions, runtime: Runtime
) -> Disambiguator:
    """A disambiguator as the options describe it.

    Raises:
        ConfigError: an option is out of range.
    """
    check_answers(options, answer)
    inventory = Inventory.load(options.inventory)
    sources = sources_of(options.formation_lexicon, options.formation_predictor)
    common = {"sources": sources, "options": answer, "runtime": runtime}
    second = None
    if options.second:
        slow = Disambiguator.from_pretrained(options.second, inventory, **common)
        second = Second(slow, options.margin)
    return Disambiguator.from_pretrained(
        model,
        inventory,
        formation=options.formation_source,
        engine=options.engine,
        cache=Path(options.cache) if options.cache else None,
        second=second,
        **common,
    )


class Baseline:
    """A rule that answers in a model's stead, by its name.

    Args:
        name: of `baselines.BASELINES` or `ORACLES`, or `knn=ENCODER`: the sense of the nearest training
            instance by the states of a frozen encoder (folder or hub id).
        inventory: of senses.
        train: training instances, for what counts or remembers them.
        runtime: where an encoder runs.

    Raises:
        ConfigError: the rule needs training instances, and there are none.
    """

    def __init__(
        self, name: str, inventory: Inventory, train: Sequence[Instance], runtime: Runtime
    ) -> None:
        self.name, self.inventory, self.train, self.runtime = name, inventory, train, runtime
        if not train and (name.startswith("knn=") or name == "train-mfs"):
            raise ConfigError(f"{name}: name the instances that it remembers by --train-data")

    def batch(self, instances: Sequence[Instance]) -> list[Prediction]:
        """Its answers."""
        if not self.name.startswith("knn="):
            return RULES[self.name](instances, self.inventory, self.train)
        plain = ModelOptions(arch="bi", fusion=(), predictor="none", marking="none")
        encoder, tokenizer = build(self.name.removeprefix("knn="), plain)
        wsd = Disambiguator(encoder.to(self.runtime.torch_device()), tokenizer, self.inventory)  # pyright: ignore
        vectors = wsd.embed_contexts(instances), wsd.embed_contexts(self.train)
        return nearest(instances, self.inventory, self.train, *vectors)


def system_or_baseline(
    model: str,
    train_data: str | None,
    train_split: str,
    options: SystemOptions,
    answer: AnswerOptions,
    runtime: Runtime,
) -> Disambiguator | Baseline:
    """A trained model as `system` makes it, or a rule by its name."""
    if model not in RULES and not model.startswith("knn="):
        return system(model, options, answer, runtime)
    inventory = Inventory.load(options.inventory)
    train = read_instances(train_data, train_split, inventory) if train_data else []
    return Baseline(model, inventory, train, runtime)


def margin_for(
    model: str, options: SystemOptions, data: str, answer: AnswerOptions, runtime: Runtime
) -> list[dict[str, Any]]:
    """The margin at which asking the second model where the first is unsure costs next to nothing."""
    assert options.second
    alone = replace(options, second=None, cache=None)
    answer = replace(answer, top_k=0)  # how sure it is takes all candidates
    first, second = (system(name, alone, answer, runtime) for name in (model, options.second))
    instances = read_instances(data, None, first.inventory)
    need_gold(instances, data)
    fast, slow = first.batch(instances), second.batch(instances)
    several = [at for at, one in enumerate(instances) if len(first.inventory.get(one.word, ())) > 1]
    margin = choose_margin(
        [fast[at] for at in several],
        [slow[at] for at in several],
        [instances[at] for at in several],
    )
    asked = [gap(one) < margin for one in fast]
    both = [b if again else a for a, b, again in zip(fast, slow, asked, strict=True)]
    return [
        {"system": name, "margin": chosen,
         "asked again, %": 100 * float(np.mean([again[at] for at in several])),
         "accuracy, %": 100 * float(outcomes(answers, instances)[several].mean())}
        for name, chosen, again, answers in (
            ("first alone", 0.0, [False] * len(fast), fast),
            ("asking again", margin, asked, both),
            ("second alone", None, [True] * len(fast), slow),
        )
    ]  # fmt: skip
