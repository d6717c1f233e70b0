"""A dictionary of one's own, without training data: a model's answers beside a rule's, and the doubtful.

python own_inventory.py MODEL SENSES.tsv SENTENCES.txt

SENSES.tsv has columns `word` and `gloss` (and `pos`, `formation`, `sense_id` where they are known);
SENTENCES.txt has sentences with the word between `#`.
"""

import sys
from pathlib import Path

from formbert import Disambiguator, Inventory
from formbert.baselines import lesk_tfidf
from formbert.check import check_data
from formbert.data import locate


def main(model: str | Path, senses: Path, sentences: Path) -> None:
    """Check the dictionary, ask both of each sentence, and list what a person should look at."""
    for problem in check_data(senses):
        print(f"row {problem['row']}: {problem['problem']}; {problem['todo']}")  # noqa: T201
    inventory = Inventory.load(senses)
    instances = [locate(line) for line in sentences.read_text(encoding="utf-8").splitlines()]

    answers = Disambiguator.from_pretrained(model, inventory).batch(instances)
    rules = lesk_tfidf(instances, inventory, [])
    for one, answer, rule in zip(instances, answers, rules, strict=True):
        print(f"{one.text} {answer.sense_id} {answer.probability:.2f} {rule.sense_id}")  # noqa: T201

    pairs = zip(instances, answers, rules, strict=True)
    doubtful = [
        one.text for one, answer, rule in pairs
        if answer.probability < 0.6 or answer.sense_id != rule.sense_id
    ]  # fmt: skip
    print(f"to be looked at: {len(doubtful)} of {len(instances)}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
