"""Whole runs at real sizes: a script and a file of options for each of its commands, to be edited."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError
from octavo.rundir import atomic


@dataclass(frozen=True)
class Stage:
    """One command of a run.

    Attributes:
        run: name of its folder.
        command: of `mathshepherd`.
        words: what follows it; SFT, TRAIN, DEV and TEST are the user's files.
        options: what its file holds.
    """

    run: str
    command: str
    words: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """A run.

    Attributes:
        about: what it is, for its script.
        stages: in their order.
    """

    about: str
    stages: Sequence[Stage]

    @property
    def files(self) -> list[str]:
        """The user's files that it needs."""
        words = {word for stage in self.stages for word in stage.words}
        return [name for name in ("SFT", "TRAIN", "DEV", "TEST") if name in words]


_VERIFY = Stage("verified", "verify", ("--data", "runs/scored"))

#: What is not named here stands as it is by default.
PRESETS: Mapping[str, Preset] = {
    "gsm8k-1.5b": Preset(
        "Qwen2.5-Math-1.5B as generator, completer and reward model, on one GPU of 48 GB.",
        (
            Stage("sft", "sft", ("Qwen/Qwen2.5-Math-1.5B", "--data", "SFT"),
                  {"add-words": True, "batch-size": 4, "accumulate": 8, "learning-rate": 1e-5,
                   "epochs": 3, "gradient-checkpointing": True, "dtype": "bfloat16"}),
            Stage("pool", "sample", ("runs/sft", "--data", "TRAIN"),
                  {"samples": 15, "engine": "vllm", "dtype": "bfloat16"}),
            Stage("labels", "annotate", ("runs/sft", "--data", "runs/pool"),
                  {"rollouts": 8, "engine": "vllm", "dtype": "bfloat16"}),
            Stage("prm", "train-prm", ("runs/sft", "--data", "runs/labels"),
                  {"batch-size": 8, "accumulate": 8, "learning-rate": 2e-6,
                   "gradient-checkpointing": True, "dtype": "bfloat16"}),
            Stage("candidates", "sample", ("runs/sft", "--data", "TEST"),
                  {"samples": 64, "engine": "vllm", "dtype": "bfloat16"}),
            Stage("scored", "score", ("runs/prm", "--data", "runs/candidates"),
                  {"dtype": "bfloat16"}),
            _VERIFY,
            Stage("ppo", "ppo",
                  ("runs/sft", "--reward", "runs/prm", "--data", "TRAIN", "--dev-data", "DEV"),
                  {"lora-rank": 32, "learning-rate": 2e-5, "micro-batch-size": 4,
                   "dtype": "bfloat16"}),
        ),
    ),
    "paper-mistral": Preset(
        "The paper's settings for Mistral-7B: epochs, learning rates, samples, rollouts, candidates and "
        "KL of sections 4.1 and 4.2. It names no batch sizes and no shaping; raw scores are its most "
        "literal reading, and the monitor may stop them. Fine-tuning all weights needs several devices "
        "(accelerate launch); reinforcement trains an adapter, at a rate that suits one, since 1e-7 on "
        "all weights of policy and critic takes some 260 GB on each.",
        (
            Stage("sft", "sft", ("mistralai/Mistral-7B-v0.1", "--data", "SFT"),
                  {"add-words": True, "learning-rate": 5e-6, "epochs": 3, "batch-size": 4,
                   "accumulate": 32, "max-length": 512, "gradient-checkpointing": True,
                   "dtype": "bfloat16"}),
            Stage("pool", "sample", ("runs/sft", "--data", "TRAIN"),
                  {"samples": 15, "engine": "vllm", "dtype": "bfloat16"}),
            Stage("labels", "annotate", ("runs/sft", "--data", "runs/pool"),
                  {"rollouts": 8, "estimation": "hard", "engine": "vllm", "dtype": "bfloat16"}),
            Stage("prm", "train-prm", ("runs/sft", "--data", "runs/labels"),
                  {"learning-rate": 1e-6, "epochs": 1, "labels": "hard", "batch-size": 4,
                   "accumulate": 64, "max-length": 512, "gradient-checkpointing": True,
                   "dtype": "bfloat16"}),
            Stage("orm", "train-orm", ("runs/sft", "--data", "runs/pool"),
                  {"learning-rate": 1e-6, "epochs": 1, "batch-size": 4, "accumulate": 64,
                   "max-length": 512, "gradient-checkpointing": True, "dtype": "bfloat16"}),
            Stage("candidates", "sample", ("runs/sft", "--data", "TEST"),
                  {"samples": 256, "engine": "vllm", "dtype": "bfloat16"}),
            Stage("by-prm", "score", ("runs/prm", "--data", "runs/candidates"),
                  {"dtype": "bfloat16"}),
            Stage("scored", "score", ("runs/orm", "--data", "runs/by-prm"),
                  {"name": "orm", "dtype": "bfloat16"}),
            Stage("verified", "verify", ("--data", "runs/scored"), {"aggregate": ["min", "last"]}),
            Stage("ppo", "ppo",
                  ("runs/sft", "--reward", "runs/prm", "--data", "TRAIN", "--dev-data", "DEV"),
                  {"shaping": "raw", "lora-rank": 64, "learning-rate": 1e-5, "kl": 0.04,
                   "micro-batch-size": 4, "dtype": "bfloat16"}),
        ),
    ),
    "released-prm": Preset(
        "No training: the released generator's candidates, ranked by the released reward model.",
        (
            Stage("candidates", "sample", ("peiyi9979/mistral-7b-sft", "--data", "TEST"),
                  {"samples": 64, "engine": "vllm", "dtype": "bfloat16"}),
            Stage("scored", "score",
                  ("peiyi9979/math-shepherd-mistral-7b-prm", "--data", "runs/candidates"),
                  {"family": "math-shepherd", "dtype": "bfloat16"}),
            _VERIFY,
        ),
    ),
}  # fmt: skip


def write_preset(name: str, out: Path) -> list[str]:
    """Write a preset's script and files into a folder that appears whole.

    Args:
        name: one of `PRESETS`.
        out: a folder that does not exist.

    Returns:
        The user's files that the script asks for.

    Raises:
        ConfigError: there is no such preset, or the folder exists.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name}: is none of {', '.join(PRESETS)}")
    if out.exists():
        raise ConfigError(f"--out {out}: exists; name another folder")
    preset = PRESETS[name]
    with atomic(out) as folder:
        folder.mkdir(exist_ok=True)
        for stage in preset.stages:
            lines = [f"{option}: {_value(value)}\n" for option, value in stage.options.items()]
            (folder / f"{stage.run}.yaml").write_text("".join(lines) or "{}\n")
        (folder / "run.sh").write_text(script(preset))
    return preset.files


def _value(value: Any) -> str:
    """A value as YAML has it, for which 1e-05 would be a word."""
    return (
        json.dumps(value).replace("e-", ".0e-") if isinstance(value, float) else json.dumps(value)
    )


def script(preset: Preset) -> str:
    """The commands of a preset; one that has run is passed over, one that was killed goes on."""
    about = textwrap.wrap(preset.about, 98, initial_indent="# ", subsequent_indent="# ")
    lines = ["#!/usr/bin/env bash", *about, "set -euo pipefail"]
    for name in preset.files:
        lines += [f"{name}=${{{name}:?the {name} problems: a file or hub id}}",
                  f'[ ! -e "${name}" ] || {name}=$(realpath "${name}")']  # fmt: skip
    lines += ['cd "$(dirname "$0")"']
    for stage in preset.stages:
        words = [f'"${word}"' if word in preset.files else word for word in stage.words]
        lines += [
            "",
            f"[ -e runs/{stage.run}/result.json ] || mathshepherd {stage.command} {' '.join(words)} \\",
            f"  --config {stage.run}.yaml --out runs/{stage.run}",
        ]
    return "\n".join(lines) + "\n"
