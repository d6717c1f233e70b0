"""Pre-train a small model on a folder of texts, see which experts serve which domain, and go on writing.

python pretrain.py texts/ runs/example
"""

import sys
from pathlib import Path

from deepseekmoe import (
    CorpusConfig,
    ModelConfig,
    PretrainConfig,
    pretrain,
    specialization,
    trace_routing,
)
from deepseekmoe.hub import continue_text
from octavo.rundir import RunDir, options_of


def main(texts: str, out: Path, steps: int = 300) -> None:
    """Train, trace and generate."""
    corpus = CorpusConfig(data=texts)
    config = PretrainConfig(out=out, steps=steps)
    with RunDir.open(out, options_of(corpus, config)) as run:
        trained = pretrain(ModelConfig(), corpus, config, run)
    assert trained.dev is not None
    for row in specialization(trace_routing(trained.model, trained.dev, config.length)):
        print(f"layer {row['layer']}: {row['JS divergence (bits)']:.3f} bits between domains")  # noqa: T201
    print(continue_text(trained.model, trained.tokenizer, "The", 20))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
