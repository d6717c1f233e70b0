"""placeholder"""

from dataclasses import dataclass


@dataclass
class ScanReport:
    tokens: list
    layers: list
    verdict: bool
    reason: str
    warning: str


def scan(pair, tokenizer, frequency=None, fisher=None, indicator_config=None, top=20):
    from finepurify.strategies import row_scores, word_embedding

    name = word_embedding(pair)
    o = row_scores(pair, name, {}).argsort(descending=True)
    return ScanReport(
        [{"token": tokenizer.convert_ids_to_tokens(int(i))} for i in o], [], True, "", ""
    )
