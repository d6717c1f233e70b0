"""Fine-tune one complete model on labelled texts; stages, folds and rivals all go through here."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from octavo import tiny
from octavo.errors import ConfigError
from octavo.models import load_config, load_model, load_tokenizer
from octavo.rundir import RunDir
from octavo.runtime import Runtime, seed_everything
from octavo.training import Evaluate, Loss, TrainOptions, check, fit, last_checkpoint
from torch.nn.functional import cross_entropy

from cascadebert.config import FitConfig
from cascadebert.data import Examples, ordered_fingerprint
from cascadebert.stage import longest, make_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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

#: What a batch holds that the model itself does not take.
EXTRAS = ("labels", "difficulty", "teacher")


def fine_tune(
    name: str,
    source: str,
    examples: Examples,
    labels: Sequence[str],
    options: TrainOptions,
    config: FitConfig,
    run: RunDir,
    runtime: Runtime = Runtime(),
    *,
    loss: Loss | None = None,
    extras: Mapping[str, Sequence[Any]] | None = None,
    model: "PreTrainedModel | None" = None,
    dev: Examples | None = None,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Train a sequence classifier; a killed run goes on where it stopped.

    Args:
        name: of this training within the run.
        source: hub id, local folder, or scratch:LAYERSxWIDTH.
        examples: labelled rows.
        labels: all label names, in the order of the classes.
        options: the optimisation.
        config: lengths, smoothing and, from scratch, the tokenizer.
        run: gets metrics and, while training, checkpoints.
        runtime: seed, device and precision.
        loss: of the model and a batch; cross-entropy by default.
        extras: further columns a row that the loss takes: `difficulty`, `teacher`.
        model: one to train further, instead of loading `source`.
        dev: labelled rows; the epoch that is most often right on them is kept instead of the last.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ConfigError: a setting is out of range.
        ModelError: the model cannot be had, or the loss became NaN.
    """
    folder = source_folder(source, examples, config, runtime)
    tokenizer = load_tokenizer(folder)
    if model is None:
        seed_everything(runtime.seed)  # the new classifier's weights
        model = new_classifier(folder, labels)
    if tokenizer.pad_token_id is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    length = min(config.max_length, longest(model, tokenizer))
    rows = encode_rows(examples, tokenizer, labels, length, extras or {})
    fit(
        model,
        rows,
        collator(tokenizer),
        run,
        name,
        options=options,
        runtime=runtime,
        loss=loss or classification_loss(config.label_smoothing),
        evaluate=None if dev is None else _accuracy(dev, tokenizer, labels, length, runtime),
    )
    return model, tokenizer


def _accuracy(
    dev: Examples, tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str], max_length: int,
    runtime: Runtime,
) -> Evaluate:  # fmt: skip
    """Gives the share of rows that a model in training answers rightly, from 0 to 1."""
    truth = torch.tensor([labels.index(label) for label in dev.labels or []])

    def evaluate(model: "PreTrainedModel") -> float:
        stage = make_stage("dev rows", model, tokenizer, labels, max_length, runtime)
        answers = stage.run(stage.encode(dev), 8192).argmax(dim=-1)
        return float((answers == truth).double().mean())

    return evaluate


def refuse_other_rows(
    run: RunDir, examples: Examples, kind: Literal["training", "dev"] = "training"
) -> None:
    """Make sure that a resumed run sees the rows that it began with.

    Raises:
        ConfigError: they have changed.
    """
    name = "rows.json" if kind == "training" else f"{kind}-rows.json"
    file, now = run.path / name, ordered_fingerprint(examples)
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))["hash"]
        if before != now:
            raise ConfigError(
                f"{run.path}: was begun with other {kind} rows; use another --out, or --overwrite"
            )
    else:
        run.write_json(name, {"rows": len(examples), "hash": now})


def classification_loss(smoothing: float = 0.0) -> Loss:
    """Cross-entropy, with some of each label spread over all classes."""

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(**inputs_of(batch)).logits.float()
        return cross_entropy(logits, batch["labels"], label_smoothing=smoothing)

    return loss


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch or a row the model takes."""
    return {key: value for key, value in batch.items() if key not in EXTRAS}


def source_folder(source: str, examples: Examples, config: FitConfig, runtime: Runtime) -> str:
    """Where a model is loaded from; one from scratch is made, or found in the cache."""
    if not source.startswith(SCRATCH):
        return source
    texts = examples.texts + (examples.pairs or [])
    return str(tiny.checkpoint(texts, scratch_shape(source, config), runtime))


def scratch_shape(source: str, config: FitConfig) -> tiny.Shape:
    """The shape that scratch:LAYERSxWIDTH names.

    Raises:
        ConfigError: it names none.
    """
    return tiny.parse_shape(
        source.removeprefix(SCRATCH),
        alphabet=config.alphabet,
        vocabulary=config.vocabulary,
        max_length=config.max_length,
        pretrain_epochs=config.pretrain_epochs,
    )


def new_classifier(folder: str, labels: Sequence[str]) -> "PreTrainedModel":
    """A pre-trained encoder with a classifier for these labels."""
    from transformers import AutoModelForSequenceClassification

    return load_model(
        AutoModelForSequenceClassification,
        folder,
        new=NEW,
        unused=UNUSED,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        problem_type="single_label_classification",
        dtype=torch.float32,  # whatever the checkpoint's: half precision is for the forward pass
    )


def check_fit(config: FitConfig, source: str, out: Path) -> None:
    """Find out before anything is written whether a model can be had and a setting be right.

    Raises:
        ConfigError: a setting is out of range, or the model lies in the folder that is written to.
        ModelError: the model cannot be had.
    """
    if config.max_length < 4:
        raise ConfigError(f"--max-length {config.max_length}: must be 4 or more")
    if not 0 <= config.label_smoothing < 1:
        raise ConfigError(f"--label-smoothing {config.label_smoothing}: must be from 0 up to 1")
    if source.startswith(SCRATCH):
        scratch_shape(source, config)
        return
    if Path(source).resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"--model {source}: lies in --out, which is written to")
    load_config(source)
    load_tokenizer(source)


def check_single(config: FitConfig, source: str, out: Path) -> None:
    """Find out before anything is written whether one model can be trained as configured.

    Raises:
        ConfigError: a setting is out of range, or the model lies in the folder that is written to.
        ModelError: the model cannot be had.
    """
    (options,) = train_options(config)
    check(options)
    check_fit(config, source, out)


def steps_done(run: RunDir, name: str) -> int:
    """From which step a training goes on, 0 where it has not begun."""
    checkpoint = last_checkpoint(run.path / "checkpoints" / name)
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def train_options(config: FitConfig, models: int = 1) -> list[TrainOptions]:
    """The optimisation of each of so many models.

    Raises:
        ConfigError: a setting has neither one value nor one for each model.
    """
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
            _one_each(config.learning_rate, models, "--learning-rate"),
            _one_each(config.epochs, models, "--epochs"),
            strict=True,
        )
    ]


def _one_each(values: Sequence[float], models: int, option: str) -> list[float]:
    if len(values) == 1:
        return list(values) * models
    if len(values) != models:
        raise ConfigError(f"{option}: give one value, or one for each of the {models} models")
    return list(values)


def encode_rows(
    examples: Examples,
    tokenizer: "PreTrainedTokenizerBase",
    labels: Sequence[str],
    max_length: int,
    extras: Mapping[str, Sequence[Any]],
) -> list[dict[str, Any]]:
    """Tokenised rows with their class numbers and the further columns."""
    numbers = {label: number for number, label in enumerate(labels)}
    batch = tokenizer(examples.texts, examples.pairs, truncation=True, max_length=max_length)
    truth = [numbers[label] for label in examples.labels or []]
    columns = {**batch, "labels": truth, **extras}
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def collator(tokenizer: "PreTrainedTokenizerBase"):
    """Makes padded batches of rows; further columns become tensors of their own."""
    from transformers import DataCollatorWithPadding

    pad = DataCollatorWithPadding(tokenizer)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = dict(pad([inputs_of(row) for row in rows]))
        extras = {key: torch.tensor([row[key] for row in rows]) for key in EXTRAS if key in rows[0]}
        return batch | extras

    return collate
