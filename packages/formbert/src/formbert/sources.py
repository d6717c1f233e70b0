"""Where a sense's formation comes from, before any context is read."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from octavo.data import iter_rows
from octavo.errors import ConfigError, DataError
from torch import Tensor

from formbert.config import ModelOptions
from formbert.formation import FormationPredictor
from formbert.formations import Formation, parse
from formbert.inventory import Sense

Lexicon = Mapping[str, Mapping[Formation, float]]


@dataclass(frozen=True)
class Sources:
    """What is known of formations beside the inventory.

    Attributes:
        lexicon: shares of formations by word.
        predictor: says more from words and glosses.
    """

    lexicon: Lexicon = field(default_factory=dict)
    predictor: FormationPredictor | None = None

    def table(
        self, senses: Sequence[Sense], options: ModelOptions, labels: Sequence[str]
    ) -> tuple[Float[Tensor, "senses labels"], Bool[Tensor, " senses"]]:
        """Formations of senses by the model's source, and of which they are known.

        Args:
            senses: to be looked up.
            options: the model's.
            labels: formations, or parts of speech.

        Returns:
            Shares, zeros where unknown; and whether they are known and to be used. Under `predicted` and
            `soft` annotations are told, for training, and none is to be used.
        """
        shares = torch.zeros(len(senses), len(labels))
        source = options.formation_source
        if options.signal == "pos":
            self._annotated(shares, [labels_of(sense, labels) for sense in senses])
        else:
            if source not in ("lexicon", "gloss"):
                self._annotated(shares, [sense.formation for sense in senses])
            if source in ("auto", "lexicon"):
                self._from_lexicon(shares, senses)
            if source in ("auto", "gloss"):
                self._from_glosses(shares, senses)
        known = shares.sum(1) > 0
        return shares, known & (source not in ("predicted", "soft"))

    @staticmethod
    def _annotated(shares: Tensor, found: Sequence[int | None]) -> None:
        for row, label in enumerate(found):
            if label is not None:
                shares[row, label] = 1.0

    def _from_lexicon(self, shares: Tensor, senses: Sequence[Sense]) -> None:
        for row, sense in enumerate(senses):
            if not shares[row].any():
                for formation, share in self.lexicon.get(sense.word, {}).items():
                    shares[row, formation] = share

    def _from_glosses(self, shares: Tensor, senses: Sequence[Sense]) -> None:
        rows = [row for row in range(len(senses)) if not shares[row].any()]
        if self.predictor is not None and rows:
            some = [senses[row] for row in rows]
            bare = copy(self.predictor)
            bare.lexicon = {}  # the gloss is asked, not what is annotated
            found = bare.probabilities(
                [one.word for one in some],
                glosses=[one.gloss for one in some],
                pos=[one.pos for one in some],
            )
            shares[rows] = torch.from_numpy(found).to(shares.dtype)


def need_source(options: ModelOptions, sources: Sources) -> None:
    """Refuse a source that is not there, which would leave every formation unknown.

    Raises:
        ConfigError: it is not.
    """
    source = options.formation_source
    if options.fusion and source == "lexicon" and not sources.lexicon:
        raise ConfigError("--formation-source lexicon: name its file by --formation-lexicon")
    if options.fusion and source == "gloss" and sources.predictor is None:
        raise ConfigError("--formation-source gloss: name what reads it by --formation-predictor")
    if options.predictor == "none" and source in ("predicted", "soft"):
        raise ConfigError(f"--formation-source {source}: this model reads none off contexts")
    if options.arch == "bi" and source in ("predicted", "soft"):
        raise ConfigError(
            f"--formation-source {source}: a bi-encoder reads glosses without a context; use "
            "annotation, lexicon, gloss or auto"
        )


def labels_of(sense: Sense, labels: Sequence[str]) -> int | None:
    """The number of a sense's part of speech; None where the model knows none such."""
    return labels.index(sense.pos) if sense.pos in labels else None


def annotation(sense: Sense, options: ModelOptions, labels: Sequence[str]) -> int | None:
    """The number of a sense's annotated formation or part of speech; None where it has none."""
    return labels_of(sense, labels) if options.signal == "pos" else sense.formation


def read_lexicon(source: str) -> Lexicon:
    """Formations of words from a file with columns `word` and `formation`.

    A word that stands in several rows has each of its formations by its share of them.

    Raises:
        DataError: a formation is unknown; the message names the row.
    """
    found: dict[str, list[Formation]] = {}
    for number, row in enumerate(iter_rows(source, {"word": str, "formation": str | int}), 1):
        try:
            found.setdefault(row["word"], []).append(parse(row["formation"]))
        except DataError as error:
            raise DataError(f"{source}, row {number}: {error}") from None
    return {
        word: {one: several.count(one) / len(several) for one in sorted(set(several))}
        for word, several in found.items()
    }
