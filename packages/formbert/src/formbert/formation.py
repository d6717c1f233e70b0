"""How a word is formed, told from its characters and from what else is known of it, without an encoder.

A formation is mostly a property of the word: a lexicon's own annotation is asked first. For other words
a small model reads hashed features of up to four sources - the word, its gloss, its part of speech and
the characters around it in a text - as one bag of embeddings each. In training all sources but the word
are dropped at random, so that any of them may be missing later.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float, Int
from octavo.errors import DataError, ModelError
from octavo.models import load_model, quiet_library
from octavo.rundir import RunDir, atomic, write_json
from octavo.runtime import Runtime, is_main
from octavo.training import TrainOptions, fit
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from formbert.data import Instance, locate
from formbert.formations import NAMES, Formation
from formbert.inventory import Inventory, Sense

#: What a word's features come from; the first is always there.
SOURCES = ("word", "gloss", "pos", "context")

#: What `train_predictor` does unless told otherwise; chosen on words that are in no test.
OPTIONS = TrainOptions(learning_rate=5e-3, epochs=12, batch_size=128, weight_decay=0.01)

LEXICON = "lexicon.json"
PUNCTUATION = "。，；：、！？.,;:!?"

Shares = Mapping[Formation, float]
Context = Instance | str | None


@dataclass(frozen=True)
class FormationPrediction:
    """How a word is formed.

    Attributes:
        word: the word.
        ranked: formations with their probabilities, the most probable first.
        source: `lexicon` where the word is annotated there, else `model`.
    """

    word: str
    ranked: tuple[tuple[Formation, float], ...]
    source: str

    @property
    def formation(self) -> Formation:
        """The most probable one."""
        return self.ranked[0][0]

    @property
    def probability(self) -> float:
        """Of the most probable one."""
        return self.ranked[0][1]


class FormationConfig(PreTrainedConfig):
    """The size of a formation model.

    Attributes:
        buckets: rows of the table that features are hashed into.
        width: of a row.
        hidden_size: of the layer between.
        dropout: of the bags and of that layer.
        source_dropout: share of the words in training of which a source is hidden, each by itself; the
            word never is.
    """

    model_type = "formbert-formation"

    buckets: int = 2**15
    width: int = 64
    hidden_size: int = 256
    dropout: float = 0.5
    source_dropout: float = 0.6

    def __post_init__(self, **kwargs: Any) -> None:
        self.id2label = self.id2label or dict(enumerate(NAMES))
        super().__post_init__(**kwargs)


class FormationModel(PreTrainedModel):
    """One bag of embeddings for each source, and two layers on top."""

    config_class = FormationConfig
    base_model_prefix = "formation"

    def __init__(self, config: FormationConfig) -> None:
        super().__init__(config)
        self.bags = nn.EmbeddingBag(config.buckets, config.width, mode="sum")
        self.layers = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(len(SOURCES) * config.width, config.hidden_size),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_size, len(NAMES)),
        )
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.EmbeddingBag):
            nn.init.zeros_(module.weight)  # what was never seen says nothing

    def forward(
        self,
        features: Int[Tensor, " total"],
        offsets: Int[Tensor, " bags"],
        labels: Int[Tensor, " batch"] | None = None,
    ) -> SequenceClassifierOutput:
        """Logits of formations.

        Args:
            features: buckets of all words' features, one bag of each source after the other.
            offsets: where each bag begins; an empty bag is a source that is not there.
            labels: numbers of the right formations.
        """
        bags = self.bags(features, offsets).view(-1, len(SOURCES), self.config.width)
        if self.training:
            shown = torch.rand(bags.shape[:2], device=bags.device) >= self.config.source_dropout
            shown[:, 0] = True
            bags = bags * shown.unsqueeze(-1)
        logits = self.layers(bags.flatten(1))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)


class FormationPredictor:
    """Formations of words: a lexicon's where it has the word, else a model's.

    Args:
        model: the model.
        lexicon: shares of formations by word, as `Inventory.formation_lexicon` gives them.
    """

    def __init__(self, model: FormationModel, lexicon: Mapping[str, Shares] | None = None) -> None:
        self.model = model.eval()
        self.lexicon = {word: dict(shares) for word, shares in (lexicon or {}).items()
                        if shares}  # fmt: skip

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "FormationPredictor":
        """Load what `save_pretrained` wrote, from a folder or (without a lexicon) a hub id.

        Raises:
            ModelError: there is none, or it is not of this kind.
        """
        model = load_model(FormationModel, source)
        if model.config.id2label != dict(enumerate(NAMES)):
            raise ModelError(f"{source}: its labels are not the 18 formations in official order")
        place = Path(source).expanduser() / LEXICON
        written = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        lexicon = {
            word: {Formation(int(number)): share for number, share in shares.items()}
            for word, shares in written.items()
        }
        return cls(model, lexicon)  # pyright: ignore[reportArgumentType]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, configuration and lexicon into a folder that appears whole (rank 0 alone)."""
        if is_main():
            with atomic(Path(folder)) as temporary, quiet_library():
                self.model.save_pretrained(temporary)
                write_json(temporary / LEXICON, self.lexicon)

    def predict(
        self,
        words: Sequence[str],
        contexts: Sequence[Context] | None = None,
        glosses: Sequence[str] | None = None,
        pos: Sequence[str] | None = None,
        top_k: int = 3,
    ) -> list[FormationPrediction]:
        """How each word is formed; see `probabilities` for the arguments and errors.

        Args:
            words: the words.
            contexts: of each word, a text with its place.
            glosses: of each word.
            pos: of each word.
            top_k: formations to name, of those that are possible at all.
        """
        table = self.probabilities(words, contexts, glosses, pos)
        order = np.argsort(-table, axis=1, kind="stable")[:, :top_k]
        best = np.take_along_axis(table, order, axis=1)
        kinds = tuple(Formation)
        return [
            FormationPrediction(
                word,
                tuple((kinds[n], share) for n, share in zip(numbers, shares, strict=True) if share),
                "lexicon" if word in self.lexicon else "model",
            )
            for word, numbers, shares in zip(words, order.tolist(), best.tolist(), strict=True)
        ]

    def probabilities(
        self,
        words: Sequence[str],
        contexts: Sequence[Context] | None = None,
        glosses: Sequence[str] | None = None,
        pos: Sequence[str] | None = None,
        batch_size: int = 2048,
    ) -> Float[np.ndarray, "words 18"]:
        """Probabilities of all formations.

        A word that the lexicon has gets its shares there; where these are of several formations and
        more than the word is given, they are weighted by the model's probabilities.

        Args:
            words: the words.
            contexts: of each word, an `Instance`, a text that has the word once or marked, or None.
            glosses: of each word; may be empty.
            pos: of each word, in the tag set that was trained on; may be empty.
            batch_size: words at a time.

        Raises:
            DataError: a word is empty, there are not as many of a source as words, or a text has not
                the word, or several times.
        """
        table = np.empty((len(words), len(NAMES)), np.float32)
        rows = _rows(words, contexts, glosses, pos)
        told = np.array([any(row[1:]) for row in rows], bool)
        asked = [
            n for n, word in enumerate(words)
            if word not in self.lexicon or (told[n] and len(self.lexicon[word]) > 1)
        ]  # fmt: skip
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            table[part] = self._model(rows, part)
        for n, word in enumerate(words):
            if shares := self.lexicon.get(word):
                prior = np.zeros(len(NAMES), np.float32)
                prior[list(shares)] = list(shares.values())
                joint = prior * table[n] if told[n] and len(shares) > 1 else prior
                table[n] = joint / joint.sum() if joint.sum() > 0 else prior
        return table

    @torch.inference_mode()
    def _model(self, rows: Sequence[tuple[Any, ...]], part: Sequence[int]) -> np.ndarray:
        buckets = self.model.config.buckets
        batch = _batch([features(*rows[n], buckets=buckets) for n in part])
        logits = self.model(**{k: v.to(self.model.device) for k, v in batch.items()}).logits
        return logits.float().softmax(-1).cpu().numpy()


def train_predictor(
    senses: Sequence[Sense],
    run: RunDir,
    contexts: Sequence[Context] | None = None,
    config: FormationConfig | None = None,
    options: TrainOptions = OPTIONS,
    runtime: Runtime = Runtime(),
    name: str = "formation",
) -> FormationPredictor:
    """Train a predictor on annotated senses; a run that was killed goes on from its checkpoint.

    Args:
        senses: those without a formation are passed over.
        run: gets metrics and checkpoints.
        contexts: of each sense, a text with its word in that sense, or None.
        config: the model's size.
        options: the optimisation.
        runtime: seed and device.
        name: of this training within the run.

    Returns:
        The predictor, with the senses' own formations as its lexicon.

    Raises:
        DataError: no sense has a formation, or the contexts do not fit.
    """
    given = contexts or [None] * len(senses)
    if len(given) != len(senses):
        raise DataError(f"{len(senses)} senses and {len(given)} contexts; give one to each")
    pairs = [(sense, context) for sense, context in zip(senses, given, strict=True)
             if sense.formation is not None]  # fmt: skip
    if not pairs:
        raise DataError("no sense has a formation; there is nothing to learn from")
    known = [sense for sense, _ in pairs]
    rows = _rows([sense.word for sense in known], [context for _, context in pairs],
                 [sense.gloss for sense in known], [sense.pos for sense in known])  # fmt: skip
    config = config or FormationConfig()
    items = [
        (features(*row, buckets=config.buckets), int(sense.formation or 0))
        for row, sense in zip(rows, known, strict=True)
    ]
    torch.manual_seed(runtime.seed)

    def collate(batch: list[Any]) -> dict[str, Tensor]:
        """Words and the numbers of their formations."""
        labels = torch.tensor([label for _, label in batch])
        return _batch([bags for bags, _ in batch]) | {"labels": labels}

    model = FormationModel(config)
    fit(model, items, collate, run, name, options=options, runtime=runtime)
    return FormationPredictor(model, Inventory(known).formation_lexicon())


def _rows(
    words: Sequence[str],
    contexts: Sequence[Context] | None,
    glosses: Sequence[str] | None,
    pos: Sequence[str] | None,
) -> list[tuple[str, str, str, str]]:
    """Word, gloss, part of speech and surroundings of each word."""
    for what, listed in (("contexts", contexts), ("glosses", glosses), ("pos", pos)):
        if listed is not None and len(listed) != len(words):
            raise DataError(f"{len(words)} words and {len(listed)} {what}; give one to each")
    if not all(words):
        raise DataError(f"word {list(words).index('') + 1} of {len(words)} is empty")
    empty = [""] * len(words)
    around = [
        _around(word, context) for word, context in zip(words, contexts, strict=True)
    ] if contexts else empty  # fmt: skip
    return list(zip(words, glosses or empty, pos or empty, around, strict=True))


def _around(word: str, context: Context) -> str:
    """Two characters before a word and two after it, spaces where the text is not so long."""
    if context is None:
        return ""
    found = locate(context, word) if isinstance(context, str) else context
    if found.word != word:
        raise DataError(f"the context of {word!r} is of {found.word!r}")
    before = found.text[max(0, found.start - 2) : found.start]
    return before.rjust(2) + found.text[found.end : found.end + 2].ljust(2)


def features(
    word: str, gloss: str = "", pos: str = "", around: str = "", *, buckets: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Buckets of the features of each source; those of one that is not there are none.

    Args:
        word: the word.
        gloss: what it means.
        pos: part of speech.
        around: two characters before it and two after it in a text.
        buckets: how many there are, a power of two.
    """
    bucket = partial(_bucket, 32 - int(math.log2(buckets)))
    first, last = ord(word[0]), ord(word[-1])
    found = [
        bucket(1, first), bucket(2, last), bucket(3, first == last, len(word)),
    ]  # fmt: skip
    if len(word) > 2:
        found += [bucket(6, ord(word[1])), bucket(7, ord(word[-2])),
                  bucket(8, ord(word[-2]), last), bucket(9, first, ord(word[1]))]  # fmt: skip
    return (
        found,
        _of_gloss(word, gloss.rstrip(PUNCTUATION), bucket) if gloss else [],
        [bucket(n, crc32(pos.encode()), other) for n, other in ((30, 0), (31, first), (32, last))]
        if pos else [],
        [bucket(40 + n, ord(character)) for n, character in enumerate(around)],
    )  # fmt: skip


def _bucket(shift: int, kind: int, one: int = 0, two: int = 0) -> int:
    """Where a feature of up to two numbers is kept: multiplied, and the highest bits taken."""
    mixed = (one * 0x9E3779B1 + two * 0x85EBCA77 + kind * 0xC2B2AE3D) & 0xFFFFFFFF
    return ((mixed ^ mixed >> 15) * 0x2C1B3C6D & 0xFFFFFFFF) >> shift


def _of_gloss(word: str, gloss: str, bucket: Callable[..., int]) -> list[int]:
    """Its characters and pairs of them, its ends, and where in it the word's own characters stand."""
    codes = [ord(character) for character in gloss]
    found = [bucket(10, code) for code in codes]
    found += [bucket(11, one, two) for one, two in pairwise(codes)]
    if codes:
        found += [bucket(12, codes[0]), bucket(13, codes[-1]), bucket(14, *codes[-2:])]
    places = [gloss.find(word[0]), gloss.rfind(word[-1])]
    spots = [0 if at < 0 else 1 if at == 0 else 3 if at == len(gloss) - 1 else 2 for at in places]
    order = (places[0] > places[1]) - (places[0] < places[1])
    found += [bucket(15, spots[0], spots[1]), bucket(16, order + 1), bucket(17, spots[0]),
              bucket(18, spots[1])]  # fmt: skip
    for n, at in enumerate(places):
        if at >= 0:
            found += [bucket(19 + n, codes[at + 1] if at + 1 < len(codes) else 0),
                      bucket(21 + n, codes[at - 1] if at else 0)]  # fmt: skip
    return found


def _batch(rows: Sequence[Sequence[Sequence[int]]]) -> dict[str, Tensor]:
    """Bags of many rows, one after the other, and where each begins."""
    bags = [bag for row in rows for bag in row]
    lengths = np.fromiter(map(len, bags), np.int64, len(bags))
    flat = [feature for bag in bags for feature in bag]
    return {
        "features": torch.tensor(flat, dtype=torch.long),
        "offsets": torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)[:-1]])),
    }
