"""Clean a suspect from Python: weights in, curvature on clean rows, weights out.

python clean.py FOLDER

FOLDER holds `init` and `suspect`, two models, and `clean.jsonl`, rows with a text and a label. `cleaned`
is written beside them; fine-tune it on the clean rows before it is used.
"""

import sys
from pathlib import Path

from finepurify import (
    DataConfig,
    Evidence,
    FisherConfig,
    PurifyConfig,
    WeightPair,
    encode,
    load_examples,
    load_suspect,
    purified,
    tokenizer_of,
)
from finepurify.models import class_names, pad_of
from finepurify.points import fisher
from octavo.rundir import RunDir


def main(folder: Path, rho: float = 0.95) -> None:
    """Reset the share 1 - rho of all dimensions, those whose drift clean data explains least."""
    pair = WeightPair.load(folder / "init", folder / "suspect")
    model, tokenizer = load_suspect(folder / "suspect"), tokenizer_of(folder / "suspect")
    clean = load_examples(str(folder / "clean.jsonl"), DataConfig(), class_names(model), "train")
    items = encode(clean, tokenizer, max_length=128)
    with RunDir.open(folder / "fisher", {"rows": len(items)}) as run:
        curvature = fisher(pair, model, items, pad_of(tokenizer), FisherConfig(), run)
    evidence = Evidence(pair, curvature, architecture=model.config)
    weights = purified(evidence, PurifyConfig(), rho)
    pair.write(folder / "cleaned", weights.tensor)
    print(f"{weights.numbers['reset']:,.0f} of {pair.numel:,} dimensions are reset")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
