"""A generated world of in-context classification, and a small decoder that learns it.

A text is drawn from a topic, a few words that belong together, with noise. A prompt names some topics
by label words in a mapping of its own, so that only its demonstrations tell the label. Sibling topics
share words. Half the work of the training is two helps, neither a mask: query and key matrices start
equal and value and output matrices start as each other's transpose (after "mimetic initialization"),
and at every position of a demonstration the state after the first layer must tell words of its topic.
Without either help the model stays at chance in runs of up to a minute.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from octavo.rundir import RunDir
    from octavo.runtime import Runtime
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, UNK, END = "[PAD]", "[UNK]", "<|endoftext|>"

#: Task -> its template and label words.
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "review": ("Review: {text} Mood:{label}", (" good", " bad", " fine", " awful")),
    "article": ("Article: {text} Desk:{label}", (" world", " sports", " business", " science")),
}


@dataclass(frozen=True)
class World:
    """The sizes of a world, of the model that lives in it and of its training."""

    topics: int = 8
    """Even: topics 2i and 2i + 1 are siblings."""

    words: int = 5
    """Words of a topic."""

    shared: int = 2
    """Words that siblings share."""

    noise: float = 0.1
    """Share of a text's words that are replaced by words of no topic."""

    noise_words: int = 12
    """How many words of no topic there are."""

    lengths: tuple[int, int] = (2, 4)
    """Fewest and most words of a text."""

    layers: int = 4
    width: int = 64
    heads: int = 4

    shots: int = 8
    """Labelled texts of a training episode, over all its classes."""

    steps: int = 1400
    batch: int = 16
    learning_rate: float = 2e-3
    word_loss: float = 0.2
    """Weight of predicting every other token."""

    topic_loss: float = 1.0
    """Weight of telling the topic's words from the state after the first layer; 0 for none."""


WORLDS = {"quick": World(steps=550), "full": World()}


@dataclass(frozen=True)
class Episode:
    """One prompt: demonstrations, and a text whose label they tell.

    Attributes:
        task: a name in `TASKS`.
        demonstrations: texts and their classes.
        text: the text to label.
        label: its class, an index into `words` and `topics`.
        topics: the topic of each class.
        words: the label word of each class.
    """

    task: str
    demonstrations: tuple[tuple[str, int], ...]
    text: str
    label: int
    topics: tuple[int, ...]
    words: tuple[str, ...]


def topic_words(world: World, topic: int) -> list[str]:
    """The words of a topic, those shared with its sibling first."""
    pair = topic // 2
    common = [f"pair{pair}w{i}" for i in range(world.shared)]
    return common + [f"topic{topic}w{i}" for i in range(world.words - world.shared)]


def make_tokenizer(world: World) -> "PreTrainedTokenizerFast":
    """A word-level tokenizer: spaces are dropped, a line's end is a token, a prompt begins with BOS."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = [PAD, UNK, END, "\n"]
    for template, labels in TASKS.values():
        vocabulary += template.format(text="", label="").split()
        vocabulary += [label.strip() for label in labels]
    for topic in range(world.topics):
        vocabulary += topic_words(world, topic)
    vocabulary += [f"noise{i}" for i in range(world.noise_words)]
    numbers = {word: number for number, word in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split(Regex("\n"), "isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{END} $A", special_tokens=[(END, numbers[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNK, bos_token=END, eos_token=END,
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def episodes(
    world: World,
    count: int,
    classes: int,
    shots: int,
    seed: int,
    *,
    siblings: bool = False,
    training: bool = False,
) -> list[Episode]:
    """Draw episodes; no mapping of topics to label words is in both training and evaluation.

    Args:
        world: the sizes.
        count: how many.
        classes: topics in an episode, at most the label words of a task.
        shots: demonstrations a class, in shuffled order.
        seed: the same seed gives the same episodes.
        siblings: whether the first two classes are sibling topics.
        training: whether to draw training mappings (four of five) or evaluation's.
    """
    draw = random.Random(f"{seed}/{classes}/{shots}/{siblings}/{training}")
    found = []
    for _ in range(count):
        order = [kind for kind in range(classes) for _ in range(shots)]
        draw.shuffle(order)
        label = draw.randrange(classes)
        found.append(_episode(world, draw, classes, order, label, siblings, training))
    return found


def is_held_out(task: str, topics: Sequence[int], words: Sequence[str]) -> bool:
    """Whether a mapping belongs to evaluation: one in five, whatever the order of its classes."""
    key = repr((task, sorted(zip(topics, words, strict=True))))
    return hashlib.sha256(key.encode()).digest()[0] % 5 == 0


def _episode(
    world: World,
    draw: random.Random,
    classes: int,
    order: Sequence[int],
    label: int,
    siblings: bool,
    training: bool,
) -> Episode:
    while True:
        task = draw.choice(sorted(TASKS))
        topics = draw.sample(range(world.topics), classes)
        if siblings and topics[0] ^ 1 not in topics[1:]:
            topics[1] = topics[0] ^ 1
        elif siblings:
            other = topics.index(topics[0] ^ 1)
            topics[1], topics[other] = topics[other], topics[1]
        words = draw.sample(TASKS[task][1], classes)
        if is_held_out(task, topics, words) != training:
            break
    return Episode(
        task,
        tuple((_text(world, draw, topics[kind]), kind) for kind in order),
        _text(world, draw, topics[label]),
        label,
        tuple(topics),
        tuple(words),
    )


def asked(world: World, episode: Episode, count: int, draw: random.Random) -> list[Episode]:
    """An episode with other texts to label: every class as often as any, in turn."""
    kinds = [number % len(episode.topics) for number in range(count)]
    return [
        replace(episode, text=_text(world, draw, episode.topics[kind]), label=kind)
        for kind in kinds
    ]


def tempted(
    world: World, found: Sequence[Episode], seed: int, times: int = 4, own: int = 2, others: int = 1
) -> list[Episode]:
    """Episodes in which class 0 is shown several times, each by a text with words of every class.

    Args:
        world: the sizes.
        found: episodes with one demonstration a class.
        seed: of the words and the order.
        times: how often it is shown.
        own: words of class 0 in each of them.
        others: words of each other class.
    """
    draw = random.Random(f"tempted/{seed}")
    changed = []
    for episode in found:
        shown = [one for one in episode.demonstrations if one[1]]
        for _ in range(times):
            words = []
            for topic in episode.topics:
                many = own if topic == episode.topics[0] else others
                words += draw.sample(topic_words(world, topic), many)
            draw.shuffle(words)
            shown.append((" ".join(words), 0))
        draw.shuffle(shown)
        changed.append(replace(episode, demonstrations=tuple(shown)))
    return changed


def _text(world: World, draw: random.Random, topic: int) -> str:
    chosen = draw.sample(topic_words(world, topic), draw.randint(*world.lengths))
    return " ".join(
        f"noise{draw.randrange(world.noise_words)}" if draw.random() < world.noise else word
        for word in chosen
    )


def make_model(world: World, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    """An untrained decoder in which alike tokens attend to each other and attention copies."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    numbers = tokenizer.get_vocab()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=world.width, intermediate_size=2 * world.width,
            num_hidden_layers=world.layers, num_attention_heads=world.heads,
            num_key_value_heads=world.heads, max_position_embeddings=512, initializer_range=0.08,
            tie_word_embeddings=True, pad_token_id=numbers[PAD], bos_token_id=numbers[END],
            eos_token_id=numbers[END],
        )
    )  # fmt: skip
    with torch.no_grad():
        for layer in model.model.layers:
            part: Any = layer.self_attn
            torch.nn.init.normal_(part.q_proj.weight, std=world.width**-0.5)
            part.k_proj.weight.copy_(part.q_proj.weight)
            torch.nn.init.orthogonal_(part.v_proj.weight)
            part.o_proj.weight.copy_(part.v_proj.weight.T)
    return model


def _training_batch(world: World, draw: random.Random) -> list[Episode]:
    """Episodes of one number of classes, 2 or 3; each shows every class once before any twice."""
    classes, found = draw.choice((2, 3)), []
    for _ in range(world.batch):
        order = draw.sample(range(classes), classes)
        order += [draw.randrange(classes) for _ in range(world.shots - classes)]
        siblings = draw.random() < 0.3
        found.append(_episode(world, draw, classes, order[:-1], order[-1], siblings, training=True))
    return found


def _collate(
    world: World, numbers: dict[str, int], items: Sequence[Episode], draw: random.Random
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Token ids; 1 at label words whose class was seen before; a word of the topic to tell, or -100."""
    import torch

    names = [[numbers[word] for word in topic_words(world, topic)] for topic in range(world.topics)]
    rows: list[tuple[list[int], list[int], list[int]]] = []
    for item in items:
        template, _ = TASKS[item.task]
        before, after = template.format(text="|", label="").split("|")
        head, tail = [[numbers[word] for word in part.split()] for part in (before, after)]
        ids, answers, told, seen = [numbers[END]], [0], [-100], set()
        for text, kind in (*item.demonstrations, (item.text, item.label)):
            start = head if len(ids) == 1 else [numbers["\n"], *head]
            rest = [numbers[word] for word in text.split()] + tail
            rest.append(numbers[item.words[kind].strip()])
            ids += start + rest
            answers += [0] * (len(start) + len(rest) - 1) + [int(kind in seen)]
            told += [-100] * len(start) + draw.choices(names[item.topics[kind]], k=len(rest))
            seen.add(kind)
        rows.append((ids, answers, told))
    longest = max(len(ids) for ids, _, _ in rows)
    fills = (numbers[PAD], 0, -100)
    ids, answers, told = (
        torch.tensor([row[k] + [fills[k]] * (longest - len(row[k])) for row in rows])
        for k in range(3)
    )
    return ids, answers, told


def train(
    world: World, tokenizer: "PreTrainedTokenizerFast", runtime: "Runtime", run: "RunDir"
) -> "PreTrainedModel":
    """Train the decoder from scratch on episodes of two and three classes, in float32.

    The loss is that of label words whose class was seen before, plus, with the world's weights, that
    of all other tokens and that of telling a word of the topic after the first layer.

    Args:
        world: the sizes and the training.
        tokenizer: of `make_tokenizer`.
        runtime: seed and device.
        run: gets the loss, the mean of 20 steps, in `metrics.jsonl`.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: the loss became NaN or infinite.
    """
    import torch
    from octavo import console
    from octavo.errors import ModelError
    from octavo.runtime import seed_everything
    from torch.nn.functional import cross_entropy

    seed_everything(runtime.seed)
    device, draw = runtime.torch_device(), random.Random(f"train/{runtime.seed}")
    numbers = tokenizer.get_vocab()
    bare: Any = make_model(world, tokenizer).to(device)  # pyright: ignore[reportArgumentType]
    # not octavo.training.fit: its second beta, .999, is too slow for a training this short
    optimizer = torch.optim.AdamW(
        bare.parameters(), lr=world.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * max(0.03, 1 - step / world.steps)
    )
    run.forget(lambda line: line.get("training") != "model")
    bare.train()
    recent: list[float] = []
    for step in console.progress(range(1, world.steps + 1), "training model", unit="steps"):
        parts = _collate(world, numbers, _training_batch(world, draw), draw)
        ids, answers, told = (part.to(device) for part in parts)
        out = bare(input_ids=ids, output_hidden_states=bool(world.topic_loss))
        each = cross_entropy(out.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        answer = answers[:, 1:] == 1
        rest = ~answer & (ids[:, 1:] != numbers[PAD])
        loss = each[answer].mean() + world.word_loss * each[rest].mean()
        if world.topic_loss:
            state = bare.model.norm(out.hidden_states[1][told >= 0])
            loss = loss + world.topic_loss * cross_entropy(bare.lm_head(state), told[told >= 0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise ModelError(f"model: the loss became {recent[-1]} at step {step}")
        if step % 20 == 0:
            run.log(training="model", step=step, loss=sum(recent) / len(recent))
            recent.clear()
    return bare.eval()
