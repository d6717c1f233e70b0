"""Answer a file of any length: chunk by chunk, resumable, the answers under their name only when whole.

While it runs, answers gather in `.<out>.partial`, and `.<out>.partial.json` tells what they belong to
and how far they reach.
"""

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
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
        ConfigError: nothing can be written there, or it is the file that is read.
    """
    if chunk < 1:
        raise ConfigError(f"--chunk {chunk}: must be 1 or more")
    if out.resolve() == Path(source).resolve():
        raise ConfigError(f"{out}: is the file that is read; name another for the answers")
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(f".{out.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                return _predict(cascade, policy, source, out, config, chunk)
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise ConfigError(f"{out}: another process is writing it; name another file") from None


def _predict(
    cascade: Cascade, policy: Policy, source: str, out: Path, config: DataConfig, chunk: int
) -> list[int]:
    partial = out.with_name(f".{out.name}.partial")
    progress = out.with_name(f".{out.name}.partial.json")
    belongs = {
        "source": str(Path(source).resolve()),
        "policy": [policy.score, policy.thresholds, policy.temperatures, policy.heads],
        "models": policy.models,
        "columns": [config.text_column, config.pair_column, config.split],
        "lengths": [stage.max_length for stage in cascade.stages],
        "backend": cascade.backend,
        "chunk": chunk,
    }
    done = _resume(partial, progress, belongs)
    exits = np.array(done["exits"] or [0] * len(cascade.stages))
    seen, number = hashlib.sha256(), -1
    empty = cut = 0
    for number, examples in enumerate(stream_examples(source, config, chunk)):
        seen.update("\0".join([*examples.texts, *(examples.pairs or [])]).encode())
        if number < done["chunks"]:
            if number == done["chunks"] - 1 and seen.hexdigest() != done["seen"]:
                break
            continue
        answers = cascade.predict(examples, policy)
        empty += sum(not text.strip() for text in examples.texts)
        cut += int(answers.truncated.sum())
        lines = [
            json.dumps({"label": label, "stage": stage + 1, "confidence": round(sure, 6)}) + "\n"
            for label, stage, sure in zip(
                answers.labels, answers.stages.tolist(), answers.confidence.tolist(), strict=True
            )
        ]
        exits = exits + np.bincount(answers.stages.numpy(), minlength=len(cascade.stages))
        try:
            with partial.open("a", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(f"{out}: {error.strerror}") from None
        done = {
            "chunks": number + 1,
            "seen": seen.hexdigest(),
            "bytes": partial.stat().st_size,
            "exits": exits.tolist(),
        }
        write_json(progress, belongs | done)
        log.info("%d texts answered", exits.sum())
    if done["chunks"] and (number + 1 < done["chunks"] or seen.hexdigest() != done["seen"]):
        log.info("the rows answered so far have changed: begun anew")
        partial.unlink()
        return _predict(cascade, policy, source, out, config, chunk)
    if empty:
        log.warning("%d of these texts are empty; they are answered all the same", empty)
    if cut:
        log.warning("%d of these texts were cut to the stage's length; see --max-length", cut)
    partial.touch()  # for a source without rows
    partial.replace(out)
    progress.unlink(missing_ok=True)
    return exits.tolist()


def _resume(partial: Path, progress: Path, belongs: dict) -> dict:
    """How far an earlier run of the same came; what it wrote beyond that is cut off."""
    if progress.exists() and partial.exists():
        try:
            earlier = json.loads(progress.read_text(encoding="utf-8"))
            alike = all(earlier.get(key) == value for key, value in belongs.items())
        except (ValueError, AttributeError):
            earlier, alike = {}, False
        if alike and partial.stat().st_size >= earlier["bytes"]:
            with partial.open("r+b") as file:
                file.truncate(earlier["bytes"])
            log.info("resumed after %d chunks", earlier["chunks"])
            return earlier
    partial.unlink(missing_ok=True)
    progress.unlink(missing_ok=True)
    return {"chunks": 0, "exits": None}
