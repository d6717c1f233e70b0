"""The cascade: complete models of rising size, each seeing only what those before it deferred.

Every stage keeps its own configuration, tokenizer, width and family; nothing is shared but the label
names. Survivors are pooled: a stage sees all items deferred to it at once, sorted by length, so that
the large model's batches are as full as the small one's.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from octavo.errors import ConfigError, DataError, ModelError
from octavo.rundir import atomic, refuse_existing, write_json
from octavo.runtime import Runtime
from torch import Tensor

from cascadebert.config import Backend, CalibrateConfig, CostKind
from cascadebert.cost import StageCost
from cascadebert.data import OVERLAP, Examples, encoded_hashes, seen_before
from cascadebert.metrics import fit_temperature
from cascadebert.policy import Policy, fit_policy, superfluous_stages
from cascadebert.scores import fit_head, log_odds
from cascadebert.stage import Encoded, Stage, load_stage

log = logging.getLogger(__name__)

MANIFEST = "cascade.json"

#: Calibration rows below which a warning is due.
FEW = 100


@dataclass
class Predictions:
    """The answers of a cascade.

    Attributes:
        labels: label names, one an item.
        stages: the stage that answered, from 0, [items] of int64.
        scores: log-odds of its answer, [items] of float64.
        logits: its logits over its temperature, in the order of the cascade's labels,
            [items, classes] of float32.
        truncated: whether the text was longer than the stage takes, [items] of bool.
    """

    labels: list[str]
    stages: Tensor
    scores: Tensor
    logits: Tensor
    truncated: Tensor

    @property
    def confidence(self) -> Tensor:
        """Softmax probability of each answer."""
        return torch.sigmoid(self.scores)

    @property
    def probabilities(self) -> Tensor:
        """Softmax probabilities of all classes, [items, classes]."""
        return self.logits.softmax(dim=-1)


class Cascade:
    """Complete classifiers from small to large over the same labels.

    Args:
        stages: smallest first.
        labels: their common label names, in the cascade's order.
        batch_tokens: tokens in a batch, padding included.
        pairs: whether it was trained on pairs of texts; None where that is unknown.
        dev_hashes: of the rows on which its stages' best epochs were chosen, as `encoded_hashes`
            gives them; empty where there were none or that is unknown.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        labels: Sequence[str],
        batch_tokens: int = 8192,
        pairs: bool | None = None,
        dev_hashes: str = "",
    ) -> None:
        self.stages = list(stages)
        self.labels = list(labels)
        self.batch_tokens = batch_tokens
        self.pairs = pairs
        self.dev_hashes = dev_hashes

    @classmethod
    def from_pretrained(
        cls,
        models: Sequence[str | Path] | str | Path,
        *,
        max_length: int | None = None,
        batch_tokens: int = 8192,
        backend: Backend = "torch",
        allow_partial: bool = False,
        runtime: Runtime = Runtime(),
    ) -> "Cascade":
        """Load a trained cascade's folder, or fine-tuned classifiers from small to large.

        Args:
            models: one folder that `cascadebert train` made, or two models or more (hub ids or
                local folders).
            max_length: tokens after which a text is cut; each model's own limit, or what it was
                trained with, where that is None.
            batch_tokens: tokens in a batch, padding included.
            backend: what runs the models: torch, compile, onnx or onnx-int8.
            allow_partial: load checkpoints although weights are missing or unused.
            runtime: device and precision.

        Raises:
            ConfigError: a length is too small, or a backend is not installed.
            ModelError: a model cannot be had, its checkpoint lacks a weight or has one too many, or
                the models' label names differ.
        """
        if batch_tokens < 1:
            raise ConfigError(f"--batch-tokens {batch_tokens}: must be 1 or more")
        if max_length is not None and max_length < 4:
            raise ConfigError(f"--max-length {max_length}: must be 4 or more")
        given = [models] if isinstance(models, str | Path) else list(models)
        sources, labels, pairs = [str(model) for model in given], None, None
        dev_hashes = ""
        if len(sources) == 1:
            folder = Path(sources[0]).expanduser()
            manifest = folder / MANIFEST
            if not manifest.is_file():
                raise ModelError(
                    f"{folder}: no cascade there ({MANIFEST} is missing); give a folder that "
                    "`cascadebert train` finished, or two fine-tuned models or more"
                )
            try:
                content = json.loads(manifest.read_text(encoding="utf-8"))
                sources = [str(folder / stage) for stage in content["stages"]]
                labels = [str(label) for label in content["labels"]]
                max_length = max_length or int(content["max_length"])
                pairs = bool(content["pairs"]) if "pairs" in content else None
                dev_hashes = str(content.get("dev_hashes", ""))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{manifest}: not a cascade's description ({error})") from None
        stages: list[Stage] = []
        for source in sources:
            stage = load_stage(source, labels, max_length, backend, allow_partial, runtime)
            labels = labels or stage.labels
            stages.append(stage)
        return cls(stages, labels or [], batch_tokens, pairs, dev_hashes)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all stages into one folder, each as the ecosystem does, and what joins them.

        Raises:
            ConfigError: something is there already.
        """
        out = Path(folder)
        refuse_existing(out, overwrite=False)
        names = [f"stage-{number + 1}" for number in range(len(self.stages))]
        longest = max(stage.max_length for stage in self.stages)
        with atomic(out) as temporary:
            temporary.mkdir()
            for name, stage in zip(names, self.stages, strict=True):
                stage.model.save_pretrained(temporary / name)
                stage.tokenizer.save_pretrained(temporary / name)
            manifest = {"stages": names, "labels": self.labels, "max_length": longest}
            known = {} if self.pairs is None else {"pairs": self.pairs}
            known |= {"dev_hashes": self.dev_hashes} if self.dev_hashes else {}
            write_json(temporary / MANIFEST, manifest | known)

    @property
    def hashes(self) -> list[str]:
        """Hash of each stage, by which a policy knows its models; see `Stage.identity`."""
        return [stage.identity for stage in self.stages]

    @property
    def backend(self) -> str:
        """What computes the logits, with its precision, by which a policy knows its confidences."""
        return self.stages[0].backend

    def lengths(self, examples: Examples, sample: int = 2000) -> list[int]:
        """Tokens of a typical example at each stage, special ones included."""
        some = examples.at(range(min(sample, len(examples))))
        means = [np.mean(stage.encode(some).lengths) for stage in self.stages]
        return [max(1, round(float(mean))) for mean in means]

    def costs(self, lengths: Sequence[int], measured: bool = False) -> list[StageCost]:
        """What an item of so many tokens costs at each stage; with its latency where `measured`."""
        return [
            stage.cost(length, self.batch_tokens if measured else 0)
            for stage, length in zip(self.stages, lengths, strict=True)
        ]

    def class_numbers(self, examples: Examples) -> list[int]:
        """The examples' labels as numbers in the cascade's order.

        Raises:
            DataError: a label is not one of the cascade's.
        """
        numbers = {label: number for number, label in enumerate(self.labels)}
        try:
            return [numbers[label] for label in examples.labels or []]
        except KeyError as error:
            known = ", ".join(self.labels)
            raise DataError(f"label {error} is not one of the model's: {known}") from None

    def check(self, examples: Examples) -> None:
        """Refuse single texts for a pair task, and pairs for one of single texts.

        Raises:
            DataError: they do not fit.
        """
        if self.pairs is True and examples.pairs is None:
            raise DataError("these models were trained on pairs of texts; name the --pair-column")
        if self.pairs is False and examples.pairs is not None:
            raise DataError("these models were trained on single texts; leave --pair-column away")

    def logits(self, number: int, examples: Examples) -> Tensor:
        """One stage's logits on all examples.

        Args:
            number: of the stage, from 0.
            examples: any number of them; sorted by length into batches inside, order restored.

        Returns:
            [items, classes] of float32 on the CPU, in the order of the cascade's labels.
        """
        self.check(examples)
        return self._run(number, self.stages[number].encode(examples))

    def _run(self, number: int, rows: Encoded) -> Tensor:
        name = f"stage {number + 1} of {len(self.stages)}"
        return self.stages[number].run(rows, self.batch_tokens, name)

    def predict(self, examples: Examples, policy: Policy, pool: int = 0) -> Predictions:
        """Answer each example at the first stage that is certain enough.

        Args:
            examples: any number of them.
            policy: the thresholds.
            pool: how many items are pooled at a time, so that survivors of all of them share the
                large model's batches; 0 for all. The answers are the same.

        Raises:
            ConfigError: the policy is of another number of stages, or holds what is no number.
            DataError: pairs are given to models of single texts, or the other way round.
        """
        self.check(examples)
        policy.check(len(self.stages))
        if pool and len(examples) > pool:
            starts = range(0, len(examples), pool)
            parts = [
                self.predict(examples.at(range(i, min(i + pool, len(examples)))), policy)
                for i in starts
            ]
            return _joined(parts)
        alive = torch.arange(len(examples))
        logits = torch.zeros(len(examples), len(self.labels))
        stages = torch.zeros(len(examples), dtype=torch.long)
        truncated = torch.zeros(len(examples), dtype=torch.bool)
        rows: Encoded | None = None
        for number, stage in enumerate(self.stages):
            if len(alive) == 0:
                break
            same = rows is not None and number > 0 and stage.reads_like(self.stages[number - 1])
            if rows is None or not same:
                rows = stage.encode(examples.at(alive.tolist()))
            here = self._run(number, rows)
            leave = policy.leaves(number, here)
            gone = alive[leave]
            logits[gone] = here[leave] / policy.temperature(number)
            stages[gone] = number
            truncated[gone] = torch.tensor(rows.truncated, dtype=torch.bool)[leave]
            rows = rows.at((~leave).nonzero()[:, 0].tolist())
            alive = alive[~leave]
        return _predictions(self.labels, stages, logits, truncated)

    def run_all(self, examples: Examples, policy: Policy) -> Predictions:
        """The same answers by running every stage on everything, as the authors' code does."""
        everything = [self.logits(number, examples) for number in range(len(self.stages))]
        return self.decide(everything, policy)

    def decide(self, everything: Sequence[Tensor], policy: Policy) -> Predictions:
        """The answers that given logits of all stages on all items lead to.

        Args:
            everything: of each stage, [items, classes].
            policy: the thresholds.
        """
        leave = torch.stack([policy.leaves(i, here) for i, here in enumerate(everything)])
        stages = leave.int().argmax(dim=0)
        scaled = [here / policy.temperature(i) for i, here in enumerate(everything)]
        logits = torch.stack(scaled)[stages, torch.arange(len(stages))]
        nothing_known = torch.zeros(len(stages), dtype=torch.bool)
        return _predictions(self.labels, stages, logits, nothing_known)

    def calibrate(
        self,
        examples: Examples,
        target_speedup: float | None = None,
        *,
        config: CalibrateConfig | None = None,
        cost: CostKind = "flops",
    ) -> Policy:
        """Choose thresholds for a wanted speed-up, or what else `config` names, on held-out examples.

        The learned score, and temperatures under a guarantee, are fitted on every second example and
        the thresholds on the others.

        Args:
            examples: labelled; without labels for a speed-up, a budget or the risk of disagreement.
            target_speedup: over the last stage alone.
            config: all other targets, the score, temperatures, the unit of cost.
            cost: the unit of the target, where no `config` names it.

        Raises:
            ConfigError: the target is out of reach, or needs labels, or a guarantee is asked of
                rows on which the stages' epochs were chosen; the message says which.
        """
        config = config or CalibrateConfig(cost=cost)
        if target_speedup is not None:
            config = replace(config, target_speedup=target_speedup)
        if len(examples) == 0:
            raise DataError("calibration needs rows, and there are none")
        if len(examples) < FEW:
            log.warning(
                "%d calibration rows tell little: expect other results on new ones", len(examples)
            )
        self._warn_of_dev_rows(examples, config)
        lengths = self.lengths(examples)
        costs = self.costs(lengths, measured=True)
        everything = [self.logits(number, examples) for number in range(len(self.stages))]
        labels = self.class_numbers(examples) if examples.labels is not None else None
        if labels is None and (config.temperature or config.score == "learned"):
            what = "--temperature" if config.temperature else "--score learned"
            raise ConfigError(f"{what}: needs labels")
        form = Policy([], config.score)
        choosing, fitting = slice(None), slice(None)
        if config.score == "learned" or (config.temperature and config.max_risk is not None):
            choosing, fitting = slice(0, None, 2), slice(1, None, 2)  # thresholds need unseen rows
        if config.temperature and labels is not None:
            fitted = [fit_temperature(here[fitting], labels[fitting]) for here in everything]
            form = replace(form, temperatures=fitted)
        if config.score == "learned" and labels is not None:
            truth = torch.tensor(labels[fitting])
            half = [here[fitting] / form.temperature(i) for i, here in enumerate(everything[:-1])]
            right = [(here.argmax(dim=-1) == truth).tolist() for here in half]
            heads = [dict(fit_head(*pair)) for pair in zip(half, right, strict=True)]
            form = replace(form, heads=heads)
        targets = (config.target_speedup, config.min_accuracy, config.max_cost, config.max_risk)
        nothing_asked = all(target is None for target in targets)
        policy = fit_policy(
            [here[choosing] for here in everything],
            None if labels is None else labels[choosing],
            [price.of(config.cost) for price in costs],
            3.0 if nothing_asked else config.target_speedup,
            min_accuracy=config.min_accuracy,
            max_cost=config.max_cost,
            max_risk=config.max_risk,
            risk=config.risk,
            method=config.method,
            delta=config.delta,
            separate=config.separate,
            form=form,
            cost=config.cost,
        )
        first = policy.score_of(0, everything[0]).double()
        deciles = first.quantile(torch.linspace(0.1, 0.9, 9, dtype=torch.float64)).tolist()
        calibration: dict[str, Any] = {
            "rows": len(examples),
            "chosen_on": len(everything[0][choosing]),
            "labelled": labels is not None,
            "lengths": lengths,
            "deciles": deciles,
            "hash": examples.fingerprint(),
            "row_hashes": encoded_hashes(examples),
            "dev_hashes": self.dev_hashes,
        }
        plain = config.score == "max_probability" and not config.separate and not policy.guarantee
        if labels is not None and len(self.stages) > 2 and plain and policy.achieved["speedup"] > 1:
            prices = [price.of(config.cost) for price in costs]
            speed = policy.achieved["speedup"]
            calibration["superfluous"] = superfluous_stages(everything, labels, prices, speed)
        return replace(
            policy,
            costs={unit: [price.of(unit) for price in costs] for unit in get_args(CostKind)},
            models=self.hashes,
            backend=self.backend,
            calibration=calibration,
        )

    def _warn_of_dev_rows(self, examples: Examples, config: CalibrateConfig) -> None:
        """The rows that chose the best epochs flatter the stages, and can show no guarantee."""
        again = seen_before(examples, self.dev_hashes)
        if again <= OVERLAP * len(examples):
            return
        what = f"{again} of these {len(examples)} rows are rows the best epochs were chosen on"
        if config.max_risk is not None and config.method != "empirical":
            raise ConfigError(
                f"{what}: they can show no guarantee; calibrate on others, or --method empirical"
            )
        log.warning("%s: expect a little less on new ones", what)


def _predictions(
    labels: list[str], stages: Tensor, logits: Tensor, truncated: Tensor
) -> Predictions:
    names = [labels[number] for number in logits.argmax(dim=-1).tolist()]
    return Predictions(names, stages, log_odds(logits), logits, truncated)


def _joined(parts: Sequence[Predictions]) -> Predictions:
    return Predictions(
        [label for part in parts for label in part.labels],
        torch.cat([part.stages for part in parts]),
        torch.cat([part.scores for part in parts]),
        torch.cat([part.logits for part in parts]),
        torch.cat([part.truncated for part in parts]),
    )


def single(cascade: Cascade, number: int) -> Cascade:
    """One stage of a cascade as a cascade of its own, for comparison.

    Raises:
        ConfigError: there is no such stage.
    """
    if not 0 <= number < len(cascade.stages):
        raise ConfigError(f"there is no stage {number + 1} of {len(cascade.stages)}")
    return Cascade([cascade.stages[number]], cascade.labels, cascade.batch_tokens, cascade.pairs)
