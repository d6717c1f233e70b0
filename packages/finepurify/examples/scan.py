"""Which tokens did a fine-tuning move furthest? A look at the weights alone, without any data.

python scan.py FOLDER

FOLDER holds `init` and `suspect`, two models.
"""

import sys
from pathlib import Path

from finepurify import WeightPair, tokenizer_of
from finepurify.scan import scan


def main(folder: Path) -> None:
    """Print the verdict, and the tokens that drifted most."""
    pair = WeightPair.load(folder / "init", folder / "suspect")
    report = scan(pair, tokenizer_of(folder / "suspect"), top=5)
    print(report.reason)  # noqa: T201
    for row in report.tokens:
        note = " stands out" if row["stands out"] else ""
        print(f"{row['token']}: drift {row['drift']:.3f}{note}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
