"""Instances a second: the authors' evaluation, a GlossBERT demo's loop, and ours, with equal answers.

    python packages/formbert/benchmarks/bench_speed.py [--data DIR]

One BERT over characters with random weights, one thread, all ways in turns in one process; medians of
CPU seconds and of wall seconds, from texts to answers. DIR holds MiCLS as COOLPKU/MorBERT has it,
imported (instances.jsonl.gz, inventory.jsonl.gz); of its test part so many instances are drawn,
monosemous words among them. Without it the bundled lexicon's sentences are put together to texts of like
length, and half of its words are left one sense.

The rivals are written anew after their description, on the same weights:
- the authors' loop: every pair of text and gloss, monosemous words too, in the file's order, 32 a batch,
  padded to 128 tokens; the formation predicted from the embeddings of the text alone, padded likewise;
- the GlossBERT demo's loop: one text at a time, its pairs padded to 512 tokens. The demo also reads the
  model and the dictionary again for each text; that is left out, in its favour.

What must be equal: our engine under `authors` gives the authors' scores to 1e-4, and so does our own
model without it, given the authors' formations; and the answers are the same wherever the whole pair
fits into 128 tokens (elsewhere the authors may cut away the very word) and the two best senses do not
lie within 1e-4. ONNX in float32 gives PyTorch's probabilities to 1e-4. A bi-encoder and int8 are other
computations; how far int8 agrees is told, for random weights, whose scores lie closer than a trained
model's.
"""

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formbert.config import AnswerOptions, ModelOptions
from formbert.data import Instance, read_instances
from formbert.disambiguator import Disambiguator
from formbert.encode import Encoding, by_tokens, marked
from formbert.export import compare_answers, export_model, load_export
from formbert.formations import NAMES
from formbert.inventory import Inventory
from formbert.lexicon import mini_instances, mini_inventory
from formbert.modeling import FormBert, build, load
from formbert.reader import Reader
from formbert.scoring import score
from formbert.sources import Sources
from formbert.tagger import Tagger
from octavo.models import save_model
from octavo.rundir import environment, write_json
from octavo.tiny import checkpoint, parse_shape
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "speed.json"

#: What is aimed at: how many times faster than the authors' loop a cross-encoder and a warm bi-encoder
#: are, and the latter than the GlossBERT demo's; the share of tagging that is not the model's.
CROSS, BI, DEMO, OVERHEAD = 2.5, 8.0, 100.0, 0.10

#: Ours, tokens a batch: what one CPU's caches hold is fastest.
ANSWER = AnswerOptions(batch_tokens=1024)

LENGTH, BATCH, DEMO_LENGTH, CLOSE = 128, 32, 512, 1e-4

Way = Callable[[], Any]

#: The paper's model, what is best by default, and a bi-encoder.
OPTIONS = {
    "cross": ModelOptions(
        fusion=("pooled_add",), formation_source="predicted", predictor="mean", max_length=LENGTH
    ),
    "cross, default": ModelOptions(max_length=LENGTH),
    "bi": ModelOptions(arch="bi", max_length=LENGTH),
}

EXPORTS = ("cross, onnx", "cross, onnx-int8", "bi, onnx", "bi, onnx-int8")

COMPARED = (
    ("authors", "cross", f"at least {CROSS}"),
    ("authors", "cross, default", "no bar"),
    ("authors", "bi, warm", f"at least {BI}"),
    ("authors", "bi, cold", "no bar"),
    ("GlossBERT demo", "cross", "no bar"),
    ("GlossBERT demo", "bi, warm", f"at least {DEMO}"),
    ("cross", "cross, onnx", "no bar"),
    ("cross", "cross, onnx-int8", "no bar"),
    ("bi, warm", "bi, onnx, warm", "no bar"),
    ("bi, warm", "bi, onnx-int8, warm", "no bar"),
)


def timed(ways: dict[str, Way], tries: int) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Median CPU and wall seconds of each way, run in turns, and what each gave.

    A first round does not count, in which caches are filled.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    outputs = {name: way() for name, way in ways.items()}
    for _ in range(tries):
        for name, way in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            way()
            found[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    seconds = {
        name: {
            "cpu s": statistics.median(one[0] for one in some),
            "wall s": statistics.median(one[1] for one in some),
        }
        for name, some in found.items()
    }
    return seconds, outputs


def questions(data: Path | None, count: int) -> tuple[Inventory, list[Instance]]:
    """So many instances, and an inventory of their words."""
    if data is not None:
        inventory = Inventory.load(data / "inventory.jsonl.gz")
        instances = read_instances(data / "instances.jsonl.gz", "test", inventory)
    else:
        inventory, instances = _mini()
    chosen = random.Random(0).sample(instances, min(count, len(instances)))
    words = sorted({one.word for one in chosen})
    return Inventory(sense for word in words for sense in inventory[word]), chosen


def _mini() -> tuple[Inventory, list[Instance]]:
    """The bundled lexicon with every second word left one sense, in texts of several sentences."""
    every = mini_inventory()
    kept = {
        sense.sense_id: sense
        for place, word in enumerate(every)
        for sense in (every[word] if place % 2 else every[word][:1])
    }
    plain = [one for part in mini_instances().values() for one in part if one.gold[0] in kept]
    draw = random.Random(0)
    instances = []
    for number, one in enumerate(plain):
        before = "".join(draw.choice(plain).text for _ in range(draw.randrange(4)))
        after = "".join(draw.choice(plain).text for _ in range(draw.randrange(4)))
        shift = len(before)
        instances.append(
            replace(
                one, text=before + one.text + after, start=one.start + shift, end=one.end + shift,
                key=str(number),
            )
        )  # fmt: skip
    return Inventory(kept.values()), instances


def make_model(encoder: Path, options: ModelOptions, folder: Path) -> tuple[FormBert, Any]:
    """A model with random weights, of formations that move its scores, saved and loaded again."""
    torch.manual_seed(0)
    model, tokenizer = build(encoder, options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and ("formation" in name or "classifier" in name):
                weight.normal_(std=0.3)
    save_model(folder, model, tokenizer)
    return load(folder, dtype=torch.float32)


class Authors:
    """The authors' evaluation of one model, after section 1.3 of the method's page.

    Args:
        model: a cross-encoder with `pooled_add` and the predictor `mean`.
        tokenizer: its own.
        inventory: of senses.
    """

    def __init__(self, model: Any, tokenizer: Any, inventory: Inventory) -> None:
        self.model, self.tokenizer, self.inventory = model, tokenizer, inventory

    def pair(self, one: Instance, gloss: str) -> tuple[str, str]:
        """What is read of a text and a gloss."""
        return marked(one, "hash"), f"{one.word}：{gloss}"

    def padded(self, *texts: Sequence[str], length: int = LENGTH) -> dict[str, Tensor]:
        """Token rows of the full length."""
        return dict(
            self.tokenizer(
                *map(list, texts), padding="max_length", truncation=True, max_length=length,
                return_tensors="pt",
            )
        )  # fmt: skip

    def formations(self, contexts: dict[str, Tensor]) -> Tensor:
        """The likeliest formation of each padded text, from its embeddings alone."""
        predictor = self.model.formation_predictor
        states = self.model.encoder.embeddings(contexts["input_ids"])
        return predictor.classifier(predictor.mlp(states).mean(dim=1)).argmax(dim=1)

    def logits(self, pairs: dict[str, Tensor], formations: Tensor) -> Tensor:
        """Of padded pairs: W (pooled + E[f]) + b."""
        pooled = self.model.encoder(**pairs).pooler_output
        return self.model.classifier(pooled + self.model.formation_embedding.weight[formations])

    @torch.inference_mode()
    def evaluate(self, instances: Sequence[Instance]) -> tuple[list[np.ndarray], list[int]]:
        """Scores of every instance's candidates, and the formation predicted for it."""
        pairs = [
            (number, *self.pair(one, sense.gloss))
            for number, one in enumerate(instances)
            for sense in self.inventory[one.word]
        ]
        scores: list[list[float]] = [[] for _ in instances]
        formations = [-1] * len(instances)
        for begin in range(0, len(pairs), BATCH):
            numbers, texts, glosses = zip(*pairs[begin : begin + BATCH], strict=True)
            found = self.formations(self.padded(texts))
            logits = self.logits(self.padded(texts, glosses), found)
            for number, formation, (no, yes) in zip(
                numbers, found.tolist(), logits.tolist(), strict=True
            ):
                scores[number].append(yes - no)
                formations[number] = formation
        return [np.array(some) for some in scores], formations

    @torch.inference_mode()
    def demo(self, instances: Sequence[Instance], formations: Sequence[int]) -> list[np.ndarray]:
        """The GlossBERT demo's loop, with formations given: one text after the other."""
        found = []
        for one, formation in zip(instances, formations, strict=True):
            texts, glosses = zip(
                *(self.pair(one, sense.gloss) for sense in self.inventory[one.word]), strict=True
            )
            rows = self.padded(texts, glosses, length=DEMO_LENGTH)
            logits = self.logits(rows, torch.full((len(texts),), formation))
            found.append((logits[:, 1] - logits[:, 0]).numpy())
        return found


def measure(
    data: Path | None = None,
    count: int = 300,
    shape: str = "bert-4x192",
    tries: int = 3,
    few: int = 12,
    exports: Sequence[str] = EXPORTS,
) -> dict[str, Any]:
    """Times of all ways, their ratios, and what of them is equal."""
    inventory, instances = questions(data, count)
    several = [one for one in instances if len(inventory[one.word]) > 1]
    texts = [one.text for one in instances] + [s.word + s.gloss for s in inventory.senses] + ["#："]
    encoder = checkpoint(texts, parse_shape(shape, alphabet="char", max_length=DEMO_LENGTH))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {
            kind: make_model(encoder, options, folder / kind) for kind, options in OPTIONS.items()
        }
        authors = Authors(models["cross"][0], models["cross"][1], inventory)
        loaded = dict(models)
        for name in exports:
            kind, precision = name.split(", ")
            export_model(folder / kind, precision == "onnx-int8")
            loaded[name] = load_export(folder / kind, precision == "onnx-int8")

        def answer(kind: str, cache: str | None = None) -> Any:
            place = None if cache is None else folder / cache
            if cache == "cold":
                shutil.rmtree(folder / cache, ignore_errors=True)
            return Disambiguator(*loaded[kind], inventory, options=ANSWER, cache=place).batch(
                instances
            )

        _, formations = authors.evaluate(instances[:few])
        ways: dict[str, Way] = {
            "authors": lambda: authors.evaluate(instances),
            "GlossBERT demo": lambda: authors.demo(instances[:few], formations),
            "cross": lambda: answer("cross"),
            "cross, default": lambda: answer("cross, default"),
            "bi, cold": lambda: answer("bi", "cold"),
            "bi, warm": lambda: answer("bi", "cache"),
        }
        for name in exports:
            if name.startswith("bi"):
                ways[f"{name}, warm"] = lambda name=name: answer(name, f"cache of {name}")
            else:
                ways[name] = lambda name=name: answer(name)
        seconds, outputs = timed(ways, tries)
        equal = check_equal(models["cross"], authors, inventory, instances, outputs)
        alike = {}
        for name in ways:
            if "onnx" in name:
                plain = name.replace(", onnx-int8", "").replace(", onnx", "")
                alike[name] = compare_answers(outputs[plain], outputs[name], instances)
                told = alike[name]["difference"]
                assert "int8" in name or told <= CLOSE, (
                    f"{name}: a probability is off by {told:.1e}"
                )
        tagging = [
            measure_tagging(
                kind, Disambiguator(*models[kind], inventory, options=ANSWER), several, tries
            )
            for kind in ("cross", "bi")
        ]
        work = count_work(models["cross"], inventory, instances)
    items = dict.fromkeys(seconds, len(instances)) | {"GlossBERT demo": few}
    for name, took in seconds.items():
        took["instances / cpu s"] = items[name] / took["cpu s"]
        took["instances / wall s"] = items[name] / took["wall s"]
    ratios = [
        {"what": f"{fast} / {slow}", "bar": bar}
        | {
            kind: seconds[fast][f"instances / {kind} s"] / seconds[slow][f"instances / {kind} s"]
            for kind in ("cpu", "wall")
        }
        for slow, fast, bar in COMPARED
        if fast in seconds
    ]
    return {
        "data": "MiCLS" if data else "mini", "model": shape, "threads": torch.get_num_threads(),
        "instances": len(instances), "polysemous": len(several), "few": few,
        "ratios": ratios, "work": work, "equal": equal, "exports": alike, "tagging": tagging,
        "seconds": seconds,
    }  # fmt: skip


def check_equal(
    loaded: tuple[FormBert, Any],
    authors: Authors,
    inventory: Inventory,
    instances: Sequence[Instance],
    outputs: dict[str, Any],
) -> dict[str, Any]:
    """That our scores and answers are the authors'; how many there were, and how far they lie apart."""
    model, tokenizer = loaded
    theirs, formations = outputs["authors"]
    readers = {
        same: Reader(Encoding(tokenizer, options), options, NAMES, inventory, Sources())
        for same in (True, False)
        for options in [replace(model.options, authors=same)]
    }
    plain = model.options
    model.options = readers[True].options
    same = score(model, readers[True], readers[True].read(instances))
    model.options = plain
    far = max(float(abs(a.scores - b).max()) for a, b in zip(same, theirs, strict=True))
    assert far <= CLOSE, f"under `authors` a score is off by {far:.1e}"

    reader = readers[False]
    items = reader.read(instances)
    pairs = [(at, sense) for at, item in enumerate(items) for sense in item.candidates]
    whole = [
        len(items[at].span.ids) + len(reader.gloss_tokens[sense]) + 3 <= LENGTH
        for at, sense in pairs
    ]
    given = torch.nn.functional.one_hot(torch.tensor(formations), len(NAMES)).float()
    rows = reader.pair_rows(items, pairs)
    scores = np.empty(len(pairs))
    with torch.inference_mode():
        for batch in by_tokens([len(row.ids) for row in rows], 4096):
            senses = [pairs[at][1] for at in batch]
            scores[batch] = model(
                reader.batch([rows[at] for at in batch]), torch.tensor([pairs[at][0] for at in batch]),
                reader.formations[senses], reader.known[senses], logits=given,
            ).scores.numpy()  # fmt: skip
    apart = abs(scores - np.concatenate(theirs))[whole]
    assert apart.max() <= CLOSE, f"a score is off by {apart.max():.1e}"

    for one, other in zip(outputs["GlossBERT demo"], theirs, strict=False):
        if len(one):
            np.testing.assert_allclose(one, other, atol=CLOSE)
    asked = agree = 0
    ends = np.cumsum([len(item.candidates) for item in items])
    for item, fits, mine, its in zip(
        items, np.split(np.array(whole), ends[:-1]), outputs["cross"], theirs, strict=True
    ):
        best = np.sort(its)[::-1]
        if fits.all() and (len(its) == 1 or best[0] - best[1] > CLOSE):
            asked += 1
            agree += mine.sense_id == reader.senses[item.candidates[int(its.argmax())]].sense_id
    assert agree == asked, f"{asked - agree} of {asked} answers are not the authors'"
    return {
        "pairs": len(pairs), "pairs that fit": int(sum(whole)), "answers compared": asked,
        "largest difference under authors": far, "largest difference": float(apart.max()),
    }  # fmt: skip


def count_work(
    loaded: tuple[FormBert, Any], inventory: Inventory, instances: Sequence[Instance]
) -> dict[str, float]:
    """Tokens that go through the encoder, padding included."""
    model, tokenizer = loaded
    reader = Reader(Encoding(tokenizer, model.options), model.options, NAMES, inventory, Sources())
    asked = {(one.text, one.start, one.word): one for one in instances}
    items = reader.read([one for one in asked.values() if len(inventory[one.word]) > 1])
    pairs = [(at, sense) for at, item in enumerate(items) for sense in item.candidates]
    ours = {
        "cross": _tokens([len(row.ids) for row in reader.pair_rows(items, pairs)]),
        "bi, warm": _tokens([len(row.ids) for row in reader.context_rows(items)]),
    }
    every = sum(len(inventory[one.word]) for one in instances) * LENGTH
    return {"authors": every} | ours | {f"authors / {name}": every / n for name, n in ours.items()}


def _tokens(lengths: Sequence[int], budget: int = ANSWER.batch_tokens) -> int:
    return sum(
        max(lengths[at] for at in batch) * len(batch) for batch in by_tokens(lengths, budget)
    )


def measure_tagging(
    kind: str, wsd: Disambiguator, instances: Sequence[Instance], tries: int
) -> dict[str, Any]:
    """Share of the time of tagging whole texts that passes outside the model's own computation."""
    texts = list(dict.fromkeys(one.text for one in instances))
    model, inside, depth = wsd.model, [0.0, 0.0], [0]
    tagger = Tagger(wsd)

    def watched(name: str) -> None:
        plain = getattr(model, name)

        def call(*arguments: Any, **options: Any) -> Any:
            cpu, wall = time.process_time(), time.perf_counter()
            depth[0] += 1
            try:
                return plain(*arguments, **options)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    inside[0] += time.process_time() - cpu
                    inside[1] += time.perf_counter() - wall

        setattr(model, name, call)

    names = ("forward", "formation_logits", "embed_contexts", "embed_glosses", "score")
    there = [name for name in names if hasattr(model, name)]
    for name in there:
        watched(name)
    shares, tagged = [], []
    for _ in range(tries):
        inside[:] = 0.0, 0.0
        cpu, wall = time.process_time(), time.perf_counter()
        tagged = tagger.tag_many(texts)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        shares.append((1 - inside[0] / cpu, 1 - inside[1] / wall))
    for name in there:
        delattr(model, name)
    tokens = sum(token.prediction is not None for some in tagged for token in some)
    return {
        "model": kind, "texts": len(texts), "tagged": tokens,
        "outside, cpu": statistics.median(one[0] for one in shares),
        "outside, wall": statistics.median(one[1] for one in shares), "bar": f"at most {OVERHEAD}",
    }  # fmt: skip


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of MiCLS, imported")
    parser.add_argument("--count", type=int, default=300, help="instances drawn")
    parser.add_argument("--shape", default="bert-4x192", help="architecture-LAYERSxWIDTH")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.data, given.count, given.shape)
    write_json(RESULTS, found | {"environment": environment()})


if __name__ == "__main__":
    main()
