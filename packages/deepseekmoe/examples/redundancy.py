"""The paper's questions to a trained model: what do its best, its shared and its fewest experts matter?

python redundancy.py runs/first/model texts/
"""

import sys
import tempfile
from pathlib import Path

from deepseekmoe import CorpusConfig, disable_top, load, swap_shared, sweep_active
from deepseekmoe.corpus import documents, tokenize


def main(source: str, texts: str, length: int = 128) -> None:
    """Load, tokenise the held-out part, and print the losses."""
    model, tokenizer = load(source)
    with tempfile.TemporaryDirectory() as folder:
        held_out = documents(CorpusConfig(data=texts), "dev")
        tokens = tokenize(held_out, tokenizer, Path(folder) / "tokens")  # pyright: ignore
        for row in disable_top(model, tokens, length):
            print(f"without the best {row['disabled']}: {row['rise']:+.3f} nats")  # noqa: T201
        print(f"shared for routed: {swap_shared(model, tokens, length)[1]['rise']:+.3f}")  # noqa: T201
        for row in sweep_active(model, tokens, length):
            print(f"{row['active']} routed experts: {row['loss']:.3f}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
