"""See how a model reads its demonstrations: flows, isolation, reading, and a page of one prompt.

python see.py MODEL ROWS.tsv flow.html
"""

import sys
from pathlib import Path

import numpy as np
from anchors import (
    block,
    build_prompt,
    collate,
    edges_before,
    flow_page,
    load_examples,
    predict,
    reading,
    saliency,
    saliency_matrices,
    target_attention,
)
from anchors.config import Task
from octavo.models import load_model, load_tokenizer
from transformers import AutoModelForCausalLM

REVIEWS = Task("Review: {text}\nMood:{label}", (" good", " bad", " middling"))


def main(source: str, rows: str, page: Path) -> None:
    """Analyse the first rows, shown three others."""
    model, tokenizer = load_model(AutoModelForCausalLM, source), load_tokenizer(source)
    examples = load_examples(rows, REVIEWS)
    shown = [
        next((one.text, one.label) for one in examples if one.label == kind) for kind in range(3)
    ]
    asked = [one for one in examples if (one.text, one.label) not in shown]
    prompts = [build_prompt(REVIEWS, tokenizer, shown, one.text) for one in asked]
    labels = [one.label for one in asked]

    found = predict(model, prompts)
    print(f"accuracy {found.accuracy(labels):.2f}")  # noqa: T201
    for layer, (into, out_of, rest) in enumerate(saliency(model, prompts, labels).mean(0)):
        print(f"layer {layer}: S_wp {into:.2e}, S_pq {out_of:.2e}, S_ww {rest:.2e}")  # noqa: T201
    auc, _ = reading(target_attention(model, prompts, 3).sum(2), found.classes)
    print("AUC by layer:", ", ".join(f"{one:.2f}" for one in auc))  # noqa: T201

    batch = collate(prompts)
    with block(model, edges_before(batch, lambda prompt: prompt.labels), layers=[0]):
        logits = model(**batch.inputs()).logits
    print("cut off in layer 0, the first answer is", logits[0, batch.targets[0]].argmax().item())  # noqa: T201

    tokens = [str(tokenizer.decode(one)) for one in prompts[0].input_ids]
    flows = saliency_matrices(model, prompts[0], labels[0])
    words = {
        word.strip(): float(np.exp(s))
        for word, s in zip(REVIEWS.labels, found.scores[0], strict=True)
    }
    page.write_text(flow_page(tokens, flows, prompts[0], asked[0].text, words), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
