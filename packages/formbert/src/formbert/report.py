"""Several systems' evaluations on the same instances, in one page."""

from collections.abc import Sequence
from pathlib import Path

from octavo.errors import ConfigError
from octavo.report import Report
from octavo.rundir import RunDir, options_of

from formbert.answers import read_predictions
from formbert.data import need_gold, read_instances
from formbert.figures import (
    POS,
    accuracy_figure,
    coverage_figure,
    reliability_figure,
    subsets_figure,
)
from formbert.inventory import Inventory
from formbert.metrics import aligned, compare, coverage_curve, evaluate, outcomes, summary

SHOWN = {
    "By number of senses": ("senses=2", "senses=3", "senses=4", "senses=5+"),
    "Where formations differ": (
        "formation-differs", "formation-same", "formation-differs, POS-same",
        "formation-same, POS-differs",
    ),
    "By frequency of the sense": ("gold=first", "gold=other"),
}  # fmt: skip


def reported(
    runs: Sequence[Path],
    data: str,
    inventory: Inventory,
    split: str | None,
    out: Path,
    overwrite: bool,
) -> Path:
    """Write the report; the first system is what the others are compared with.

    Args:
        runs: folders of evaluations.
        data: the instances, with right senses.
        inventory: of senses.
        split: part of the file.
        out: folder of the report.
        overwrite: start anew where a report lies.

    Returns:
        The page.

    Raises:
        ConfigError: no run is named, or two have one name.
        DataError: a run lacks an answer.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise ConfigError("name one evaluation or more, each folder of another name")
    instances = read_instances(data, split, inventory)
    need_gold(instances, data)
    answers = {run.name: aligned(read_predictions(run), instances) for run in runs}
    tables = {name: evaluate(told, instances, inventory) for name, told in answers.items()}
    several = [len(inventory.get(one.word, ())) > 1 for one in instances]
    options = options_of({"runs": [str(run) for run in runs], "test-data": data, "split": split})
    with RunDir.open(out, options, overwrite):
        report = Report("Word sense disambiguation")
        report.text(
            f"{len(instances)} instances, {sum(several)} of words of several senses; inventory "
            f"{inventory.fingerprint}. Accuracy over all counts words of one sense."
        )
        bars = [
            {"system": name} | next(row for row in rows if row["subset"] == "polysemous")
            for name, rows in tables.items()
        ]
        report.table(
            "Polysemous words",
            [
                {"system": name} | summary(told, instances, inventory)
                for name, told in answers.items()
            ],
        )
        report.figure("Polysemous words", accuracy_figure(bars, "accuracy", "low", "high"))
        for caption, subsets in SHOWN.items():
            report.figure(caption, subsets_figure(tables, subsets))
        pos = [name for row in tables[names[0]] if (name := str(row["subset"])).startswith("POS=")]
        told = [name for name in pos if name.isascii() or name.removeprefix("POS=") in POS]
        report.figure("By part of speech", subsets_figure(tables, told))
        report.figure(
            "What abstaining buys",
            coverage_figure({name: coverage_curve(told, instances, inventory)
                             for name, told in answers.items()}),
        )  # fmt: skip
        for name, told in answers.items():
            report.heading(name)
            report.table("Accuracy, %", tables[name])
            right = outcomes(told, instances)
            pairs = [[one.probability, bool(ok)]
                     for one, ok, many in zip(told, right, several, strict=True) if many]  # fmt: skip
            report.figure(f"Reliability of {name}", reliability_figure(pairs))
            if name != names[0]:
                first = answers[names[0]]
                report.table(
                    f"Against {names[0]}, points", compare(first, told, instances, inventory)
                )
        return report.save(out)
