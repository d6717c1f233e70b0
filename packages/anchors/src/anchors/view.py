"""The flow through one prompt as a page that shows it token by token and needs nothing else.

The page is `view.html`, in which the data stands as JSON: each layer's lower triangle in half floats
with a scale of its own, which keeps three significant digits over twelve decades. Its script is named
by its hash in the page's own policy, and texts are only ever set as text, so that no token can do harm.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from octavo.errors import ConfigError, ModelError
from torch import Tensor

from anchors.config import Task
from anchors.data import Example
from anchors.evaluate import predict
from anchors.prompts import Prompt, collate
from anchors.saliency import PARTS, part_edges, saliency_matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from anchors.session import Session

#: Tokens of the longest prompt that is shown: more are neither read nor drawn with ease.
MOST_TOKENS = 600

#: What the largest flow of a layer becomes in half floats, whose largest number is 65504.
TOP = 60000.0

#: Edges of each layer in the table of the strongest.
STRONGEST = 3


def flow_page(
    tokens: Sequence[str],
    flows: Float[np.ndarray, "layers time time"] | Float[Tensor, "layers time time"],
    prompt: Prompt,
    title: str,
    scores: Mapping[str, float],
    note: str = "",
) -> str:
    """A page to explore the flow of a prompt by layer and token; it asks nothing of the network.

    Args:
        tokens: the text of each token.
        flows: I_l(i, j), the flow from token j to token i in each layer; only earlier j are shown.
        prompt: where label words, format words and target are.
        title: of the page.
        scores: label word -> its probability, in the order of the classes.
        note: what the reader should know, above the prompt.

    Raises:
        ConfigError: the prompt is longer than `MOST_TOKENS`, or the parts do not fit together.
        ModelError: a flow is NaN, infinite or negative.
    """
    _refuse_unreadable(len(prompt))
    values = torch.as_tensor(flows).detach().float().cpu()
    if len(tokens) != len(prompt) or values.shape[-1] != len(prompt):
        raise ConfigError(
            f"{len(tokens)} tokens and flows of {values.shape[-1]} for a prompt of {len(prompt)}"
        )
    if not (values.isfinite() & (values >= 0)).all():
        raise ModelError("a flow is NaN, infinite or negative; use --dtype float32 or bfloat16")
    words = list(scores)
    kinds = ["" for _ in tokens]
    kinds[prompt.target] = "target"
    for place in prompt.format:
        kinds[place] = "format"
    for kind, places in zip(prompt.classes, prompt.labels, strict=True):
        for place in places:
            kinds[place] = f"label of {words[kind]}" if kind < len(words) else "label"
    parts = part_means(values, prompt)
    data = {
        "tokens": list(tokens),
        "kinds": kinds,
        "target": prompt.target,
        "scores": [[word, float(f"{value:.3g}")] for word, value in scores.items()],
        "parts": {
            name: [float(f"{one:.3g}") for one in parts[:, i]] for i, name in enumerate(PARTS)
        },
        "flows": [_packed(layer) for layer in values.numpy()],
    }
    return _filled(title, note, json.dumps(data, allow_nan=False))


def part_means(
    flows: Float[Tensor, "layers time time"], prompt: Prompt
) -> Float[np.ndarray, "layers parts"]:
    """S_wp, S_pq and S_ww of each layer, from the flows themselves."""
    edges = part_edges(collate([prompt]))[:, 0].to(flows.dtype)
    sums = torch.einsum("lij,kij->lk", flows, edges)
    return (sums / edges.sum((-1, -2)).clamp(min=1)).numpy()


def _packed(flows: Float[np.ndarray, "time time"]) -> dict[str, Any]:
    """The lower triangle, row by row, as base64 of little-endian half floats, and their unit."""
    lower = flows[np.tril_indices(len(flows), -1)].astype(np.float64)
    unit = float(lower.max(initial=0.0)) / TOP or 1.0
    halves = (lower / unit).astype("<f2")
    return {"unit": unit, "halves": base64.b64encode(halves.tobytes()).decode()}


def _filled(title: str, note: str, data: str) -> str:
    """The page with its parts put in, each once and in one pass."""
    page = files("anchors").joinpath("view.html").read_text(encoding="utf-8")
    script = page[page.index("<script>") + len("<script>") : page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "TITLE": html.escape(title),
        "NOTE": html.escape(note),
        "POLICY": f"'sha256-{digest}'",
        "DATA": data.replace("<", "\\u003c"),
    }
    return re.sub("@(TITLE|NOTE|POLICY|DATA)@", lambda found: parts[found[1]], page)


def _refuse_unreadable(count: int) -> None:
    if count > MOST_TOKENS:
        raise ConfigError(
            f"the prompt has {count} tokens and a page shows {MOST_TOKENS} at most; use fewer --shots "
            "or shorter texts"
        )


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; parts of a character show as the replacement mark."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        now = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        pairs = enumerate(zip(before, now, strict=False))
        same = next((place for place, (old, new) in pairs if old != new), len(before))
        name = "�" if now.endswith("�") else str(tokenizer.convert_ids_to_tokens(ids[end - 1]))
        texts.append(now[same:] or name)
        before = now
    return texts


def chosen_prompt(
    session: "Session", number: int = 0, text: str | None = None
) -> tuple[Prompt, int | None]:
    """The prompt to show, and its true class; that of the user's own text is not known.

    Args:
        session: model, demonstrations and the texts drawn.
        number: which of the texts drawn.
        text: one of the user's own instead.

    Raises:
        ConfigError: there is no text of that number, or the user's own is empty.
        DataError: the prompt is longer than the model takes.
    """
    rows = session.drawn.rows
    if text is None and not 0 <= number < len(rows):
        raise ConfigError(f"--number {number}: the texts drawn have numbers 0 to {len(rows) - 1}")
    if text is not None and not text.strip():
        raise ConfigError("--text: is empty")
    if text is None:
        prompt, label = session.prompts[number], rows[number].label
    else:
        (prompt,) = session.prompts_of(session.drawn, [Example(text.strip(), 0)])
        label = None
    _refuse_unreadable(len(prompt))
    return prompt, label


def view_prompt(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", task: Task, prompt: Prompt,
    label: int | None, about: str,
) -> tuple[dict[str, list[dict[str, Any]]], str]:  # fmt: skip
    """The numbers of one prompt as tables, and its page.

    Args:
        model: any that `instrument` takes.
        tokenizer: of the model.
        task: whose label words are shown.
        prompt: which.
        label: its true class; without one the model's own prediction stands in for it.
        about: where model and text are from.
    """
    words = [word.strip() for word in task.labels]
    predicted = predict(model, [prompt], 1)
    chances = np.exp(predicted.scores[0].astype(float))
    kind = int(predicted.classes[0]) if label is None else label
    flows = saliency_matrices(model, prompt, kind)
    tokens = token_texts(tokenizer, prompt.input_ids)
    which = "model's own prediction" if label is None else "true label"
    note = f"{about} The loss is that of the {which}, {words[kind]}."
    if label is None:
        note += " No true label is known."
    scores = dict(zip(words, map(float, chances), strict=True))
    page = flow_page(tokens, flows, prompt, "The flow through one prompt", scores, note)
    tables = {
        "Saliency": [
            {"layer": layer} | dict(zip(PARTS, map(float, means), strict=True))
            for layer, means in enumerate(part_means(flows, prompt))
        ],
        "Label words": [
            {"label": word, "probability": chance, "loss of the": which if place == kind else ""}
            for place, (word, chance) in enumerate(scores.items())
        ],
        "Strongest edges": strongest_edges(tokens, flows),
    }
    return tables, page


def strongest_edges(
    tokens: Sequence[str], flows: Float[Tensor, "layers time time"], count: int = STRONGEST
) -> list[dict[str, Any]]:
    """The edges of each layer with the largest flow, largest first."""
    rows = []
    for layer, matrix in enumerate(flows):
        lower = matrix.tril(-1).flatten()
        best = lower.topk(min(count, int((lower > 0).sum())))
        for value, edge in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            to, source = divmod(int(edge), len(tokens))
            rows.append(
                {"layer": layer, "from": f"{source}:{_line(tokens[source])}",
                 "to": f"{to}:{_line(tokens[to])}", "saliency": value}
            )  # fmt: skip
    return rows


def _line(token: str) -> str:
    return " " + token.replace("\n", "⏎").strip()
