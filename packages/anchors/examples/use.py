"""Use the label words: a compressed prompt to generate from, and re-weighted anchors.

python use.py MODEL ROWS.tsv FOLDER
"""

import sys
from pathlib import Path

from anchors import PromptCache, Reweighter, build_prompt, collate, compress, load_examples, predict
from anchors.config import Task
from octavo.models import load_model, load_tokenizer
from transformers import AutoModelForCausalLM

REVIEWS = Task("Review: {text}\nMood:{label}", (" good", " bad", " middling"))


def main(source: str, rows: str, folder: Path) -> None:
    """Compress the demonstrations, generate on them, and learn how much to read of each label word."""
    model, tokenizer = load_model(AutoModelForCausalLM, source), load_tokenizer(source)
    examples = load_examples(rows, REVIEWS)
    shown = [
        next((one.text, one.label) for one in examples if one.label == kind) for kind in range(3)
    ]
    rest = [one for one in examples if (one.text, one.label) not in shown]
    prompts = [build_prompt(REVIEWS, tokenizer, shown, one.text) for one in rest]
    labels = [one.label for one in rest]

    compress(model, prompts[0]).quantized().save(folder / "cache")
    cache = PromptCache.load(folder / "cache", model)
    print(f"{cache.start} tokens kept as {len(cache)}, {cache.bytes / 1024:.0f} KiB")  # noqa: T201
    loyal = (predict(model, prompts, cache=cache).classes == predict(model, prompts).classes).mean()
    print(f"{loyal:.0%} of the answers are those of the whole prompt")  # noqa: T201
    inputs = cache.inputs(collate([prompts[0].tail()]))
    written = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)  # pyright: ignore
    print("goes on:", repr(tokenizer.decode(written[0, -3:])))  # noqa: T201

    half = len(prompts) // 2
    weighter = Reweighter(model, classes=3)
    losses = weighter.fit(model, prompts[:half], labels[:half], learning_rate=0.05)
    weighter.save(folder / "adapter")
    print(f"loss of re-weighting: {losses[0]:.3f} to {losses[-1]:.3f}")  # noqa: T201
    after = predict(model, prompts[half:], around=weighter.around(model))
    print(f"accuracy on the others {after.accuracy(labels[half:]):.2f}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
