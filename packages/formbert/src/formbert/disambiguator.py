"""`wsd("他去银行存款。", word="存款")`: senses of words in texts, one by one or by the million."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from octavo.errors import ConfigError, DataError
from octavo.runtime import Runtime

from formbert.cache import GlossCache
from formbert.config import AnswerOptions, Engine, Source
from formbert.data import Instance, instance_of, locate
from formbert.encode import Encoding
from formbert.inventory import Inventory
from formbert.modeling import FormBert, load
from formbert.predictions import Candidate, Prediction
from formbert.reader import Item, Reader
from formbert.scoring import Scored, embed_contexts, embed_glosses, posteriors, score
from formbert.sources import Sources, need_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Question = Instance | Mapping[str, Any] | tuple[str, str] | tuple[str, str, int] | str
MONOSEMOUS, UNKNOWN = "one sense only", "not in the inventory"


@dataclass(frozen=True)
class Second:
    """A slower, better disambiguator that is asked where the first is unsure.

    Attributes:
        wsd: it.
        margin: answers whose two best candidates' probabilities differ by less are asked again.
    """

    wsd: "Disambiguator"
    margin: float


class Disambiguator:
    """A model, an inventory, and how to answer.

    Args:
        model: of `modeling.load`.
        tokenizer: its own.
        inventory: any; the model need not have been trained on its words.
        sources: where formations come from that the inventory lacks.
        options: how to answer.
        cache: folder of glosses' vectors, for a bi-encoder.
        second: asked where this one is unsure.
    """

    def __init__(
        self,
        model: FormBert,
        tokenizer: "PreTrainedTokenizerBase",
        inventory: Inventory,
        sources: Sources = Sources(),
        options: AnswerOptions = AnswerOptions(),
        cache: Path | None = None,
        second: Second | None = None,
    ) -> None:
        self.model, self.inventory, self.options = model.eval(), inventory, options
        self.second = second
        settings = model.options
        encoding = Encoding(tokenizer, settings)
        self.reader = Reader(encoding, settings, model.config.labels or (), inventory, sources)
        need_source(settings, sources)
        if cache is not None and settings.arch != "bi":
            raise ConfigError("--cache: only a bi-encoder's glosses have vectors of their own")
        self.cache = GlossCache(cache, model) if settings.arch == "bi" else None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        inventory: Inventory | str | Path,
        *,
        formation: Source | None = None,
        sources: Sources = Sources(),
        options: AnswerOptions = AnswerOptions(),
        cache: Path | None = None,
        second: Second | None = None,
        engine: Engine = "torch",
        runtime: Runtime = Runtime(),
    ) -> "Disambiguator":
        """A trained model from a folder or hub id.

        Args:
            source: of the model.
            inventory: of senses; or its file; or `mini`, the bundled one.
            formation: where a sense's formation comes from, if not as in training.
            sources: see above.
            options: see above.
            cache: see above.
            second: see above.
            engine: what runs the model, PyTorch or an export that lies beside it.
            runtime: device and precision.

        Raises:
            ModelError: there is no such model.
            ConfigError: it cannot take formations from there.
            DataError: the inventory is wrong.
        """
        if engine == "torch":
            model, tokenizer = load(source)
            model = model.to(runtime.torch_device(), runtime.torch_dtype())  # pyright: ignore
        else:
            from formbert.export import load_export

            model, tokenizer = load_export(Path(source), engine == "onnx-int8", runtime)
        if formation is not None:
            model.options = replace(model.options, formation_source=formation)
        if not isinstance(inventory, Inventory):
            inventory = Inventory.load(inventory)
        return cls(model, tokenizer, inventory, sources, options, cache, second)

    def __call__(self, text: str, word: str | None = None, start: int | None = None) -> Prediction:
        """The sense of one word in one text.

        Args:
            text: it may mark the word: `他去银行#存款#。`.
            word: which.
            start: where it begins, in characters; needed where it stands in several places.

        Raises:
            DataError: the word is not there, or in several places.
        """
        return self.batch([locate(text, word, start)])[0]

    def batch(self, questions: Sequence[Question]) -> list[Prediction]:
        """Answers in the order of the questions; each distinct one is computed once.

        Args:
            questions: instances, rows as `read_instances` has them, (text, word[, start]), or marked
                texts.

        Raises:
            DataError: a word is not where it should be; the message counts from 1.
        """
        instances = [_instance(one, number) for number, one in enumerate(questions, 1)]
        asked: dict[tuple[str, int, int, str], Instance] = {}
        for one in instances:
            if len(self.inventory.get(one.word, ())) > 1:
                asked.setdefault((one.text, one.start, one.end, one.word), one)
        items = self.reader.read(list(asked.values()))
        scored = score(self.model, self.reader, items, self.options.batch_tokens, self.cache)
        answers = {
            place: self._answer(item, one)
            for place, item, one in zip(asked, items, scored, strict=True)
        }
        if self.second:
            self._ask_again(asked, answers)
        found = []
        for one in instances:
            answer = answers.get((one.text, one.start, one.end, one.word)) or self._plain(one)
            found.append(self._told(replace(answer, key=one.key)))
        return found

    def stream(self, questions: Iterable[Question], chunk: int = 2048) -> Iterator[Prediction]:
        """Answers one after the other, so many computed together; memory stays constant."""
        instances = (_instance(one, number) for number, one in enumerate(questions, 1))
        while some := list(islice(instances, chunk)):
            yield from self.batch(some)

    def embed_contexts(self, questions: Sequence[Question]) -> np.ndarray:
        """A vector of each word in its text, [questions, width]: the mean of its states."""
        instances = [_instance(one, number) for number, one in enumerate(questions, 1)]
        spans = self.reader.encoding.spans(instances)
        items = [Item(one, span, ()) for one, span in zip(instances, spans, strict=True)]
        return embed_contexts(self.model, self.reader, items, self.options.batch_tokens)

    def formations(self, questions: Sequence[Question]) -> list[str]:
        """The likeliest formation (or part of speech) of each word as its context has it.

        Raises:
            ConfigError: the model has no predictor.
        """
        if self.model.options.predictor == "none":
            raise ConfigError("this model tells no formations from contexts")
        instances = [_instance(one, number) for number, one in enumerate(questions, 1)]
        spans = self.reader.encoding.spans(instances)
        items = [Item(one, span, ()) for one, span in zip(instances, spans, strict=True)]
        best = posteriors(self.model, self.reader, items, self.options.batch_tokens).argmax(1)
        return [str(self.reader.labels[label]) for label in best]

    def cache_glosses(self) -> int:
        """Compute all glosses' vectors and keep them in the cache; returns how many are there.

        Raises:
            ConfigError: no cache was named.
        """
        from formbert.modeling import FormBertBi

        if self.cache is None or not isinstance(self.model, FormBertBi):
            raise ConfigError("no cache: give a folder, and a bi-encoder")
        import torch

        with torch.inference_mode():
            every = range(len(self.reader.senses))
            embed_glosses(self.model, self.reader, every, self.options.batch_tokens, self.cache)
        return len(self.cache)

    def _answer(self, item: Item, scored: Scored) -> Prediction:
        scores = scored.scores / self.model.config.calibration
        odds = np.exp(scores - scores.max())
        probabilities = odds / odds.sum()
        agreements = self._agreements(item, scored)
        candidates = []
        for place in np.argsort(-probabilities, kind="stable"):
            number = item.candidates[place]
            sense = self.reader.senses[number]
            candidates.append(
                Candidate(
                    sense.sense_id, sense.gloss, float(probabilities[place]),
                    self._formation(number), None if agreements is None else agreements[place],
                )
            )  # fmt: skip
        return Prediction("", item.instance.word, candidates[0].sense_id, tuple(candidates))

    def _agreements(self, item: Item, scored: Scored) -> list[float | None] | None:
        """Probability, from the context, that the word is formed as in each sense."""
        if scored.posterior is None:
            return None
        shares = self.reader.formations[list(item.candidates)].numpy()
        return [float(row @ scored.posterior) if row.any() else None for row in shares]

    def _formation(self, number: int) -> str:
        shares = self.reader.formations[number]
        if self.reader.options.signal == "pos" or not shares.any():
            formation = self.reader.senses[number].formation
            return formation.zh if formation is not None else ""
        return self.reader.labels[int(shares.argmax())]

    def _plain(self, one: Instance) -> Prediction:
        """The answer that needs no model."""
        listed = self.inventory.get(one.word, ())
        if not listed:
            return Prediction("", one.word, None, (), True, UNKNOWN)
        only = listed[0]
        number = self.reader.number[only.sense_id]
        candidate = Candidate(only.sense_id, only.gloss, 1.0, self._formation(number))
        return Prediction("", one.word, only.sense_id, (candidate,), False, MONOSEMOUS)

    def _ask_again(self, asked: Mapping[Any, Instance], answers: dict[Any, Prediction]) -> None:
        assert self.second
        unsure = [
            place for place, answer in answers.items()
            if gap(answer) < self.second.margin
        ]  # fmt: skip
        again = self.second.wsd.batch([asked[place] for place in unsure])
        answers.update(zip(unsure, again, strict=True))

    def _told(self, answer: Prediction) -> Prediction:
        """With so many candidates as are wanted, and abstaining where it is unsure."""
        most = self.options.top_k or len(answer.candidates)
        unsure = answer.probability < self.options.abstain_below
        return replace(
            answer, candidates=answer.candidates[:most], abstained=answer.abstained or unsure
        )


def gap(answer: Prediction) -> float:
    """How much more probable the best candidate is than the next."""
    probabilities = [one.probability for one in answer.candidates]
    return probabilities[0] - probabilities[1] if len(probabilities) > 1 else 1.0


def choose_margin(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    instances: Sequence[Instance],
    loss: float = 0.002,
) -> float:
    """The smallest margin at which asking again costs at most `loss` of the second's accuracy.

    Args:
        first: the fast disambiguator's answers on development data.
        second: the slow one's.
        instances: with right senses.
        loss: of accuracy, against asking the slow one always.
    """
    gaps = np.array([gap(one) for one in first])
    right = np.array(
        [[answer.sense_id in one.gold for answer, one in zip(answers, instances, strict=True)]
         for answers in (first, second)]
    )  # fmt: skip
    wanted = right[1].mean() - loss
    for margin in (0.0, *np.unique(np.nextafter(gaps, 2)).clip(max=1)):
        if np.where(gaps < margin, right[1], right[0]).mean() >= wanted:
            return float(margin)
    return 1.0


def _instance(question: Question, number: int) -> Instance:
    try:
        if isinstance(question, Instance):
            locate(question.text, question.word, question.start)
            return question
        if isinstance(question, str):
            return replace(locate(question), key=str(number))
        if isinstance(question, Mapping):
            return instance_of(question, number)
        text, word, start = (*question, None)[:3]
        return replace(locate(text, word, start), key=str(number))  # pyright: ignore
    except DataError as error:
        raise DataError(f"question {number}: {error}") from None
