"""Answer a file of any length: chunk by chunk, resumable, the answers under their name only when whole.

While it runs, answers gather in `.<out>.partial`, and `.<out>.partial.json` tells what they belong to
and how far they reach.
"""

import json
import logging
from pathlib import Path

import numpy as np
from octavo.errors import ConfigError
from octavo.rundir import write_json

from cascadebert.cascade import Cascade
from cascadebert.config import DataConfig
from cascadebert.data import stream_examples
from cascadebert.policy import Policy

log = logging.getLogger(__name__)


def predict_file(
    cascade: Cascade,
    policy: Policy,
    source: str,
    out: Path,
    config: DataConfig = DataConfig(),
    chunk: int = 20_000,
) -> list[int]:
    """Answer every row of a source with a line of JSON.

    Args:
        cascade: the models.
        policy: the threshold.
        source: a file, a folder of splits or a hub id.
        out: the answers: label, stage (from 1) and confidence a line, in the rows' order.
        config: which columns hold the texts.
        chunk: rows that are pooled at a time.

    Returns:
        How many items left at each stage.

    Raises:
        DataError: a row cannot be read; the chunks before it stay answered for the next try.
        ConfigError: nothing can be written there.
    """
    if chunk < 1:
        raise ConfigError(f"--chunk {chunk}: must be 1 or more")
    partial = out.with_name(f".{out.name}.partial")
    progress = out.with_name(f".{out.name}.partial.json")
    belongs = {
        "source": source,
        "policy": [policy.threshold, *policy.models],
        "columns": [config.text_column, config.pair_column],
        "chunk": chunk,
    }
    done = _resume(partial, progress, belongs)
    exits = np.array(done["exits"] or [0] * len(cascade.stages))
    for number, examples in enumerate(stream_examples(source, config, chunk)):
        if number < done["chunks"]:
            continue
        answers = cascade.predict(examples, policy.threshold)
        lines = [
            json.dumps({"label": label, "stage": stage + 1, "confidence": round(sure, 6)}) + "\n"
            for label, stage, sure in zip(
                answers.labels, answers.stages.tolist(), answers.confidence.tolist(), strict=True
            )
        ]
        exits = exits + np.bincount(answers.stages.numpy(), minlength=len(cascade.stages))
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            raise ConfigError(f"{out}: {error.strerror}") from None
        done = {
            "chunks": number + 1,
            "bytes": partial.stat().st_size,
            "exits": exits.tolist(),
        }
        write_json(progress, belongs | done)
        log.info("%d texts answered", exits.sum())
    if not partial.exists():
        partial.touch()  # no row at all
    partial.replace(out)
    progress.unlink(missing_ok=True)
    return exits.tolist()


def _resume(partial: Path, progress: Path, belongs: dict) -> dict:
    """How far an earlier run of the same came; what it wrote beyond that is cut off."""
    if progress.exists() and partial.exists():
        earlier = json.loads(progress.read_text(encoding="utf-8"))
        if all(earlier.get(key) == value for key, value in belongs.items()):
            with partial.open("r+b") as file:
                file.truncate(earlier["bytes"])
            log.info("resumed after %d chunks", earlier["chunks"])
            return earlier
    partial.unlink(missing_ok=True)
    progress.unlink(missing_ok=True)
    return {"chunks": 0, "exits": None}
