"""Which sense a word has: for a teacher who asks once, and for a corpus that is tagged whole.

python disambiguate.py MODEL TEXT.txt OUT.jsonl
"""

import json
import sys
from pathlib import Path

from formbert import Disambiguator, Tagger


def main(model: str | Path, texts: Path, out: Path) -> None:
    """Ask for one word, look at all that the model weighed, and tag a file of sentences."""
    wsd = Disambiguator.from_pretrained(model, inventory="mini")
    answer = wsd("他去银行存款。", word="存款")
    print(f"{answer.word}: {answer.gloss} ({answer.formation}, {answer.probability:.0%})")  # noqa: T201
    for one in answer.candidates:
        print(f"  {one.probability:.2f} {one.sense_id} {one.gloss}")  # noqa: T201

    questions = [
        ("这笔存款很大。", "存款"),
        "经理正在为校报#征文#。",
        ("她去存款，存款的人很多。", "存款", 5),
    ]
    for answer in wsd.batch(questions):
        print(f"{answer.word}: {answer.gloss}")  # noqa: T201

    tagger = Tagger(wsd)
    with out.open("w", encoding="utf-8") as file:
        for text in texts.read_text(encoding="utf-8").splitlines():
            known = [token for token in tagger.tag(text) if token.prediction]
            senses = [(one.start, one.text, one.prediction.sense_id) for one in known]  # pyright: ignore
            file.write(json.dumps({"text": text, "senses": senses}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
