"""A model whose weights are set by hand, so that its true flows are known: a test oracle, no claim.

In one layer, `gather`, label words and the target read the words of their own text and keep the topic
they find. In a later one, `read`, the target reads the label word whose topic is that of its own text,
and says it; where none has it, the latest. Nothing else happens: other tokens rest on the first one,
and other layers look everywhere and write nothing. A second head looks from the target at all label
words in both layers and writes nothing either, so that attention alone tells a wrong story.

Each coordinate of the state means one thing. The last one balances the others, so that their mean is
zero, and the layer norms' epsilon is so large that they leave such a state as it is.
"""

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from anchors.config import Task
from anchors.prompts import Prompt, build_prompt
from anchors.world import END, TASKS, World, make_tokenizer, topic_words
from transformers import GPT2Config, GPT2LMHeadModel

WORLD = World(topics=6, words=2, shared=0, noise_words=6)
TOKENIZER = make_tokenizer(WORLD)
NUMBERS = TOKENIZER.get_vocab()

#: Token -> its topic; labels; tokens that a label follows; tokens of texts.
TOPICS = {NUMBERS[word]: t for t in range(WORLD.topics) for word in topic_words(WORLD, t)}
LABELS = [NUMBERS[label.strip()] for _, labels in TASKS.values() for label in labels]
ASKING = [NUMBERS[template.split()[-1].removesuffix("{label}")] for template, _ in TASKS.values()]
WORDS = [*TOPICS, *(NUMBERS[f"noise{number}"] for number in range(WORLD.noise_words))]

TIME = 64
CIRCLE = 2 * TIME  # places lie on half a circle
BACK = 3  # a gathering token looks best at so many places before it
NEAR = 150.0  # how much it minds the distance: e^-.2, -.7, -1.6, -2.9 at 1, 2, 3, 4 from the best
CONTENT = 12.0  # how much it prefers words of texts to all others
REST = 400.0
LOOK = 20.0  # how much the target prefers label words to all others
MATCH = 20.0  # how much it prefers its own topic
LATE = 0.2  # how much it prefers later ones
GAIN = 6.0  # logit of a label word that has all its attention

KEYS = (
    *(("token", number) for number in range(len(NUMBERS))),
    *(("topic", topic) for topic in range(WORLD.topics)),
    "label", "asking", "word", "rest", "first", "cosine", "sine",
)  # fmt: skip
AT = {key: number for number, key in enumerate(KEYS)}
WIDTH = len(KEYS) + 1 + (len(KEYS) + 1) % 2  # even, for two heads

Part = dict[Any, float]  # by keys of AT


class Head:
    """One head, written slot by slot: each is a product of query and key, or something carried."""

    def __init__(self, layer: Any, number: int):
        self.attention = layer.attn
        self.start = number * WIDTH // 2
        self.matches = self.carries = 0

    def match(self, query: Part, key: Part) -> None:
        for shift, part in ((0, query), (WIDTH, key)):
            for name, value in part.items():
                slot = shift + self.start + self.matches
                self.attention.c_attn.weight[AT[name], slot] = value
        self.matches += 1

    def carry(self, source: Part, to: Any, gain: float = 1.0) -> None:
        slot = self.start + self.carries
        for name, value in source.items():
            self.attention.c_attn.weight[AT[name], 2 * WIDTH + slot] = value
        self.attention.c_proj.weight[slot, AT[to]] = gain
        self.attention.c_proj.weight[slot, -1] = -gain
        self.carries += 1


def make_model(layers: int = 2, gather: int = 0, read: int = 1) -> GPT2LMHeadModel:
    """The model, with its two steps in the layers named."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(NUMBERS), n_positions=TIME, n_embd=WIDTH, n_layer=layers, n_head=2,
            n_inner=1, layer_norm_epsilon=1e6, scale_attn_weights=False, tie_word_embeddings=False,
            bos_token_id=NUMBERS[END], eos_token_id=NUMBERS[END],
        )
    ).eval()  # fmt: skip
    body = model.transformer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (one for one in model.modules() if isinstance(one, torch.nn.LayerNorm)):
            norm.weight.fill_(1e3)  # the root of epsilon
        for token in range(len(NUMBERS)):
            kind = {token in LABELS: "label", token in ASKING: "asking"}.get(True)
            model.lm_head.weight[token, AT["token", token]] = 1
            body.wte.weight[token, AT["token", token]] = 1
            body.wte.weight[token, AT[kind or "rest"]] = 1
        body.wte.weight[WORDS, AT["word"]] = 1
        body.wte.weight[NUMBERS[END], AT["first"]] = 1
        angle = torch.arange(TIME) * 2 * math.pi / CIRCLE
        body.wpe.weight[:, AT["cosine"]], body.wpe.weight[:, AT["sine"]] = angle.cos(), angle.sin()
        for table in (body.wte.weight, body.wpe.weight):
            table[:, -1] = -table.sum(1)
        _gather(Head(body.h[gather], 0))
        _read(Head(body.h[read], 0))
        for layer in (gather, read):
            Head(body.h[layer], 1).match({"asking": LOOK}, {"label": 1})
    return model


def _gather(head: Head) -> None:
    turn = BACK * 2 * math.pi / CIRCLE
    cosine, sine = NEAR * math.cos(turn), NEAR * math.sin(turn)
    head.match({"cosine": cosine, "sine": sine}, {"cosine": 1})
    head.match({"sine": cosine, "cosine": -sine}, {"sine": 1})
    head.match({"label": CONTENT, "asking": CONTENT}, {"word": 1})
    head.match({"rest": REST}, {"first": 1})
    for topic in range(WORLD.topics):
        words = {("token", token): 1.0 for token, own in TOPICS.items() if own == topic}
        head.carry(words, ("topic", topic))


def _read(head: Head) -> None:
    for topic in range(WORLD.topics):
        head.match({("topic", topic): MATCH}, {("topic", topic): 1})
    for place in ("cosine", "sine"):
        head.match({place: LATE}, {place: 1})
    head.match({"asking": LOOK}, {"label": 1})
    head.match({"rest": REST, "label": REST}, {"first": 1})
    for label in LABELS:
        head.carry({("token", label): 1}, ("token", label), GAIN)


def make_prompts(count: int, classes: int, seed: int = 0) -> tuple[list[Prompt], list[int]]:
    """Prompts and their labels: any topics under any label words, one demonstration each.

    A text is a word of its topic among one or two words of none.
    """
    draw = random.Random(f"{seed}/{classes}")
    prompts, answers = [], []
    for _ in range(count):
        template, labels = TASKS[draw.choice(sorted(TASKS))]
        topics = draw.sample(range(WORLD.topics), classes)
        task = Task(template, tuple(draw.sample(labels, classes)))
        shown = [(_text(draw, topics[kind]), kind) for kind in draw.sample(range(classes), classes)]
        answers.append(draw.randrange(classes))
        prompts.append(build_prompt(task, TOKENIZER, shown, _text(draw, topics[answers[-1]])))
    return prompts, answers


def _text(draw: random.Random, topic: int) -> str:
    words = [f"noise{draw.randrange(WORLD.noise_words)}" for _ in range(draw.choice((1, 2)))]
    words.insert(draw.randrange(len(words) + 1), draw.choice(topic_words(WORLD, topic)))
    return " ".join(words)


@dataclass(frozen=True)
class Truth:
    """What the model does with one prompt, worked out without it, in double precision.

    Attributes:
        labels: index of each class's label word.
        topics: index of the word of the topic in each class's demonstration.
        own: index of the word of the topic in the text to label.
        gathered: attention of head 0 in the layer that gathers: [time, time].
        read: that of the target in the layer that reads: [time].
        into: saliency of the gathering layer: [time, time].
        out: that of the reading layer, of the edges into the target, which are all it has.
    """

    labels: list[int]
    topics: list[int]
    own: int
    gathered: np.ndarray
    read: np.ndarray
    into: np.ndarray
    out: np.ndarray


def work_out(prompt: Prompt, answer: int) -> Truth:
    """Attention by the formula of its scores, saliency by the chain rule."""
    ids = np.array(prompt.input_ids)
    time, place = len(ids), np.arange(len(ids))
    order = np.argsort(prompt.classes)
    labels = [prompt.labels[k][0] for k in order]
    found = [j for j in range(time) if ids[j] in TOPICS]
    turns = 2 * np.pi / CIRCLE * np.subtract.outer(place, place)
    asking = np.isin(ids, ASKING)
    gathers = asking | np.isin(ids, LABELS)

    scores = NEAR * np.cos(turns - BACK * 2 * np.pi / CIRCLE)
    scores += CONTENT * np.outer(gathers, np.isin(ids, WORDS))
    scores[:, 0] += REST * ~gathers
    gathered = _softmax(np.where(np.tri(time, dtype=bool), scores, -np.inf))
    carried = np.array(
        [[float(TOPICS.get(token) == t) for t in range(WORLD.topics)] for token in ids]
    )
    topic = gathered @ carried

    scores = MATCH * topic @ topic[-1] + LATE * np.cos(turns[-1])
    read = _softmax(scores + LOOK * np.isin(ids, LABELS))
    says = GAIN * np.array([read[p] for p in labels])
    wrong = _softmax(says) - np.eye(len(labels))[answer]  # dL/d(logits)
    slope = np.zeros(time)  # dL/d(read)
    slope[labels] = GAIN * wrong
    lift = read * (slope - read @ slope)  # dL/d(scores)
    back = MATCH * np.outer(lift, topic[-1])  # dL/d(topic)
    back[-1] += MATCH * lift @ topic
    into = np.abs(gathered * (back @ carried.T))
    np.fill_diagonal(into, 0)
    return Truth(
        labels, [found[k] for k in order], found[-1], gathered, read, into, np.abs(read * slope)
    )


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
