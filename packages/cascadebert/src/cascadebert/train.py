"""Fine-tune each stage on its own: independent models, nothing shared but the data.

A stage that is done lies whole in its folder, and a killed run goes on at the stage, epoch and step
where it stopped.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from octavo import tiny
from octavo.errors import ConfigError
from octavo.models import load_config, load_model, load_tokenizer, save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime, seed_everything
from octavo.training import TrainOptions, check, discard_checkpoints, fit

from cascadebert.cascade import MANIFEST, longest
from cascadebert.config import TrainConfig
from cascadebert.data import Examples, label_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SCRATCH = "scratch:"

#: Weights that fine-tuning may begin anew, and heads of pre-training that it may leave aside.
NEW = (r"^(\w+\.)?(classifier|score|pooler|pre_classifier|head)\.", r"\.pooler\.", r"^summary\.")
UNUSED = (
    r"^(cls|lm_head|decoder|mlm_head|qa_outputs|discriminator_predictions)\.",
    r"^(vocab_transform|vocab_layer_norm|vocab_projector|lm_predictions|mask_predictions)\.",
    r"(^|\.)(pooler|position_ids)(\.|$)",
    r"^head\.",
)


def train_cascade(
    examples: Examples, config: TrainConfig, run: RunDir, runtime: Runtime = Runtime()
) -> list[str]:
    """Fine-tune every stage and write the cascade into the run's folder.

    Args:
        examples: labelled training rows.
        config: the models and how they are trained.
        run: the folder; a stage that already lies there whole is left as it is.
        runtime: seed, device and precision.

    Returns:
        The label names.

    Raises:
        ConfigError: fewer than two models, or settings that do not match their number.
        ModelError: a model cannot be had, or is no encoder for classification.
        DataError: fewer than two labels.
    """
    labels = label_names(examples, config.train_data)
    names = [f"stage-{number + 1}" for number in range(len(config.model))]
    runtime.wait_for_everyone()  # before asking what is there already
    for name, source, options in zip(names, config.model, _options(config), strict=True):
        if (run.path / name).is_dir():
            log.info("%s is trained already", name)
            continue
        log.info("%s: fine-tuning %s on %d rows", name, source, len(examples))
        _train_stage(name, source, examples, labels, options, config, run, runtime)
    run.write_json(MANIFEST, {"stages": names, "labels": labels, "max_length": config.max_length})
    return labels


def check_models(config: TrainConfig) -> None:
    """Find out before anything is written whether the models can be had.

    Raises:
        ConfigError: fewer than two models, settings that do not match their number or are out of
            range, or a model that lies in the folder that is written to.
        ModelError: a model cannot be had.
    """
    if len(config.model) < 2:
        raise ConfigError("--model: a cascade needs two models or more, smallest first")
    if config.max_length < 4:
        raise ConfigError(f"--max-length {config.max_length}: must be 4 or more")
    for options in _options(config):
        check(options)
    for source in config.model:
        if source.startswith(SCRATCH):
            _shape(source, config)
            continue
        if Path(source).resolve().is_relative_to(config.out.resolve()):
            raise ConfigError(f"--model {source}: lies in --out, which is written to")
        load_config(source)
        load_tokenizer(source)


def _options(config: TrainConfig) -> list[TrainOptions]:
    """The optimisation of each stage."""
    return [
        TrainOptions(
            learning_rate=rate,
            epochs=epochs,
            batch_size=config.batch_size,
            weight_decay=config.weight_decay,
            warmup=config.warmup,
            save_every=config.save_every,
            report_to=config.report_to,
        )
        for rate, epochs in zip(
            _one_each(config.learning_rate, config.model, "--learning-rate"),
            _one_each(config.epochs, config.model, "--epochs"),
            strict=True,
        )
    ]


def _shape(source: str, config: TrainConfig) -> tiny.Shape:
    return tiny.parse_shape(
        source.removeprefix(SCRATCH),
        alphabet=config.alphabet,
        vocabulary=config.vocabulary,
        max_length=config.max_length,
        pretrain_epochs=config.pretrain_epochs,
    )


def _one_each(values: Sequence[float], models: Sequence[str], option: str) -> list[float]:
    if len(values) == 1:
        return list(values) * len(models)
    if len(values) != len(models):
        raise ConfigError(f"{option}: give one value, or one for each of the {len(models)} models")
    return list(values)


def _train_stage(
    name: str,
    source: str,
    examples: Examples,
    labels: Sequence[str],
    options: TrainOptions,
    config: TrainConfig,
    run: RunDir,
    runtime: Runtime,
) -> None:
    from transformers import AutoModelForSequenceClassification

    if source.startswith(SCRATCH):
        texts = examples.texts + (examples.pairs or [])
        source = str(tiny.checkpoint(texts, _shape(source, config), runtime))
    seed_everything(runtime.seed)  # the new classifier's weights
    tokenizer = load_tokenizer(source)
    model = load_model(
        AutoModelForSequenceClassification,
        source,
        new=NEW,
        unused=UNUSED,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        problem_type="single_label_classification",
        dtype=torch.float32,  # whatever the checkpoint's: half precision is for the forward pass
    )
    if tokenizer.pad_token_id is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    length = min(config.max_length, longest(model, tokenizer))
    rows = _encode(examples, tokenizer, labels, length)
    fit(model, rows, _collator(tokenizer), run, name, options=options, runtime=runtime)
    save_model(run.path / name, model, tokenizer)
    discard_checkpoints(run, name)


def _encode(
    examples: Examples,
    tokenizer: "PreTrainedTokenizerBase",
    labels: Sequence[str],
    max_length: int,
) -> list[dict[str, Any]]:
    numbers = {label: number for number, label in enumerate(labels)}
    batch = tokenizer(examples.texts, examples.pairs, truncation=True, max_length=max_length)
    columns = {**batch, "labels": [numbers[label] for label in examples.labels or []]}
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _collator(tokenizer: "PreTrainedTokenizerBase"):
    from transformers import DataCollatorWithPadding

    pad = DataCollatorWithPadding(tokenizer)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return dict(pad(rows))

    return collate
