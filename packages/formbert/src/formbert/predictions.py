"""What is answered for an instance, and its rows in a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from formbert.formations import parse


@dataclass(frozen=True)
class Candidate:
    """One sense that an instance may have.

    Attributes:
        sense_id: its name.
        gloss: what it means.
        probability: among the word's senses.
        formation: how the word is formed in it, by its name in Chinese; empty where unknown.
        agreement: probability, from the context, that the word is formed so; None where not asked.
    """

    sense_id: str
    gloss: str
    probability: float
    formation: str = ""
    agreement: float | None = None


@dataclass(frozen=True)
class Prediction:
    """The answer for one instance.

    Attributes:
        key: the instance's name.
        word: its word.
        sense_id: the sense chosen; None where the inventory lacks the word.
        candidates: the word's senses, the most probable first.
        abstained: whether the model is too unsure to be followed (`sense_id` is its guess still).
        reason: why there is no sense, or why no model was asked; empty otherwise.
    """

    key: str
    word: str
    sense_id: str | None
    candidates: tuple[Candidate, ...] = ()
    abstained: bool = False
    reason: str = ""

    @property
    def probability(self) -> float:
        """Of the sense chosen; 0 where there is none."""
        return self.candidates[0].probability if self.candidates else 0.0

    @property
    def gloss(self) -> str:
        """Of the sense chosen."""
        return self.candidates[0].gloss if self.candidates else ""

    @property
    def formation(self) -> str:
        """Of the sense chosen, by its name in Chinese."""
        return self.candidates[0].formation if self.candidates else ""

    def row(self) -> dict[str, Any]:
        """As a row of a file."""
        candidates = [
            {"sense_id": one.sense_id, "gloss": one.gloss, "probability": round(one.probability, 6),
             "formation": one.formation}
            | ({} if one.agreement is None else {"agreement": round(one.agreement, 6)})
            for one in self.candidates
        ]  # fmt: skip
        return {"id": self.key, "word": self.word, "sense_id": self.sense_id, "gloss": self.gloss,
                "probability": round(self.probability, 6), "formation": self.formation,
                "abstained": self.abstained, "reason": self.reason,
                "candidates": candidates}  # fmt: skip

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Prediction":
        """From a row that `row` made."""
        candidates = tuple(
            Candidate(one["sense_id"], one["gloss"], one["probability"],
                      parse(one["formation"]).zh if one.get("formation") else "",
                      one.get("agreement"))
            for one in row["candidates"]
        )  # fmt: skip
        return cls(
            str(row["id"]), row["word"], row["sense_id"], candidates, bool(row["abstained"]),
            row.get("reason") or "",
        )  # fmt: skip
