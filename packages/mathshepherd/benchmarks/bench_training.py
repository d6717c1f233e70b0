"""Training a process reward model against TRL's PRMTrainer, on the same tokens.

python packages/mathshepherd/benchmarks/bench_training.py

A Llama of 4 x 128 with random weights and a vocabulary of 32,000, labelled solutions of 4 to 10 steps,
one epoch in batches of 16, one thread; medians of interleaved runs in CPU seconds, tokenizing included.
TRL's trainer (last seen in version 1.10, `trl.experimental.prm`) is taken where it is installed, without
gradient checkpoints and half precision; elsewhere it is written anew after its description: a head of
two labels for tokens, each separator's last token labelled, full padded batches, the library's Trainer.
Both write a checkpoint at the end. The third way has the loss at the tags too, but first makes the
logits of the whole vocabulary at every token.
"""

import copy
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_rollouts import RESULTS, medians
from datasets import Dataset
from mathshepherd import shop
from mathshepherd.config import RewardConfig
from mathshepherd.generate import encode
from mathshepherd.records import Solution, StepLabels
from mathshepherd.reward_model import Reading, StepRewardModel
from mathshepherd.shop import FORMAT, Shop
from mathshepherd.train_rm import Target, at_tags, step_targets, tag_loss, train_reward
from octavo.rundir import RunDir, environment, write_json
from octavo.training import TrainOptions
from transformers import (
    DataCollatorForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    Trainer,
    TrainingArguments,
)


def make_case(
    layers: int, width: int, vocabulary: int, count: int, events: tuple[int, int]
) -> tuple[StepRewardModel, list[Solution]]:
    """A reward model, and solutions with labels drawn by lot."""
    world = shop.make_world(Shop(events=events, highest=60), 0, count, 0, 0, 0)
    draw = random.Random(0)
    solutions = []
    for one in world.pool:
        steps = shop.solve(world.shop, world.tales[one.id])
        labels = StepLabels(tuple(draw.randrange(2) for _ in steps))
        solutions.append(Solution(one.id, 0, one.question, steps, one.answer, labels=labels))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=max(1, width // 32), bos_token_id=1,
        eos_token_id=1, pad_token_id=0, max_position_embeddings=1024,
    )  # fmt: skip
    tokenizer = shop.make_tokenizer(world.shop)
    return StepRewardModel(LlamaForCausalLM(config), tokenizer, Reading(form=FORMAT)), solutions


def rows_of(solutions: Sequence[Solution]) -> Dataset:
    """The solutions as TRL takes them; the blank before a word belongs to its token."""
    return Dataset.from_list(
        [{"prompt": one.question, "completions": [f" {step}" for step in one.steps],
          "labels": [bool(label) for label in one.labels.hard] if one.labels else []}
         for one in solutions]
    )  # fmt: skip


def two_labels(reward: StepRewardModel) -> Any:
    """The same model with a head of two labels for tokens: bad and good, the words' own rows."""
    config = copy.deepcopy(reward.model.config)
    config.num_labels, config.classifier_dropout = 2, 0.0
    model = LlamaForTokenClassification(config)
    model.model.load_state_dict(reward.model.get_decoder().state_dict())
    output: Any = reward.model.get_output_embeddings()
    rows = output.weight[[reward.words.bad, reward.words.good]]
    with torch.no_grad():
        model.score.weight.copy_(rows)
        model.score.bias.zero_()
    return model


def tokens_of(tokenizer: Any, row: Any) -> dict[str, list[int]]:
    """Each step and its separator as tokens, glued together, the label at a separator's last one."""
    ids = list(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"])
    labels = [-100] * len(ids)
    for step, label in zip(row["completions"], row["labels"], strict=True):
        new = [*tokenizer(step, add_special_tokens=False)["input_ids"],
               *tokenizer(f" {FORMAT.tag}", add_special_tokens=False)["input_ids"]]  # fmt: skip
        ids += new
        labels += [-100] * (len(new) - 1) + [int(label)]
    return {"input_ids": ids, "labels": labels}


def rival(
    reward: StepRewardModel, solutions: Sequence[Solution], folder: str, batch_size: int
) -> tuple[str, Any]:
    """TRL's trainer where it is installed, else the one written anew; and which it is."""
    given: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": batch_size, "num_train_epochs": 1,
        "learning_rate": 1e-4, "report_to": "none", "save_strategy": "epoch", "use_cpu": True,
        "logging_steps": 10, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl import __version__  # pyright: ignore[reportMissingImports]
        from trl.experimental.prm import (  # pyright: ignore[reportMissingImports]
            PRMConfig,
            PRMTrainer,
        )
    except ImportError:
        tokenizer = reward.tokenizer
        # not by map, which would take -100 for a bool where the labels are bools
        data: Any = Dataset.from_list([tokens_of(tokenizer, row) for row in rows_of(solutions)])
        return "PRMTrainer, written anew", Trainer(
            two_labels(reward), TrainingArguments(**given), train_dataset=data,
            data_collator=DataCollatorForTokenClassification(tokenizer),
        )  # fmt: skip
    arguments = PRMConfig(
        **given, step_separator=f" {FORMAT.tag}", gradient_checkpointing=False, bf16=False
    )
    return f"PRMTrainer of TRL {__version__}", PRMTrainer(
        two_labels(reward), arguments, processing_class=reward.tokenizer,
        train_dataset=rows_of(solutions),
    )  # fmt: skip


def equal_losses(reward: StepRewardModel, solutions: Sequence[Solution], trainer: Any) -> bool:
    """Whether both have the same tokens, and the same mean loss on the first ones."""
    rows = [encode(reward.tokenizer, FORMAT.prefix(one.question, one.steps)) for one in solutions]
    if [row["input_ids"] for row in trainer.train_dataset] != rows:
        return False
    some = solutions[:4]
    labels = [step_targets(one, RewardConfig()) for one in some]
    targets = [Target(ids, values) for ids, values in zip(rows, labels, strict=False)]
    batch = at_tags(targets, reward.words.tag)
    where = ~batch["labels"].isnan()
    both = trainer.data_collator([trainer.train_dataset[n] for n in range(len(some))])
    with torch.inference_mode():
        logits = reward(batch["input_ids"], batch["attention_mask"], where)
        ours = tag_loss(logits, batch["labels"][where]) / where.sum()
        model = trainer.model.eval()
        theirs = model(**{name: value.to(model.device) for name, value in both.items()}).loss
    return abs(ours.item() - theirs.item()) < 1e-5


def measure(
    layers: int = 4, width: int = 128, vocabulary: int = 32_000, count: int = 192,
    batch_size: int = 16, tries: int = 3, events: tuple[int, int] = (4, 10),
) -> dict[str, Any]:  # fmt: skip
    """Tokens a second of each way, and their ratios; the loss must be equal."""
    reward, solutions = make_case(layers, width, vocabulary, count, events)
    options = TrainOptions(learning_rate=1e-4, epochs=1, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        name, trainer = rival(reward, solutions, folder, batch_size)
        assert equal_losses(reward, solutions, trainer)

        def ours(exact: bool = True) -> None:
            own = copy.deepcopy(reward)
            own.exact = exact
            with tempfile.TemporaryDirectory(dir=folder) as place:
                train_reward(own, solutions, RewardConfig(), RunDir(Path(place)), options)

        seconds = medians(
            {"ours": ours, name: lambda: rival(reward, solutions, folder, batch_size)[1].train(),
             "all logits": lambda: ours(False)}, tries,
        )  # fmt: skip
    tokens = sum(
        len(encode(reward.tokenizer, FORMAT.prefix(one.question, one.steps))) for one in solutions
    )
    ratios = [
        {"what": f"{name} / ours", "ratio": seconds[name] / seconds["ours"], "bar": "1.2 or more"},
        {"what": "all logits / ours", "ratio": seconds["all logits"] / seconds["ours"],
         "bar": "no bar"},
    ]  # fmt: skip
    speed = {name: tokens / value for name, value in seconds.items()}
    return {"ratios": ratios, "seconds": seconds, "tokens/s": speed}


def main() -> None:
    """Measure and keep the result."""
    torch.set_num_threads(1)
    write_json(RESULTS / "training.json", measure() | {"environment": environment()})


if __name__ == "__main__":
    main()
