"""Load a checkpoint in the released layout, look at its routing, and save it back under the same names.

python checkpoint.py deepseek-moe-16b-base copy/
"""

import sys
from pathlib import Path

import torch
from deepseekmoe import load, record_routing
from deepseekmoe.hub import check_folder


def main(source: str, out: Path) -> None:
    """Check, load, route three tokens, save."""
    config = check_folder(Path(source))
    print(f"{config.n_routed_experts} routed experts in {len(config.moe_layers)} layers")  # noqa: T201
    model, _ = load(source, tokenizer=False, dtype="auto")
    with record_routing(model) as layers, torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    for number, (routing,) in zip(config.moe_layers, layers, strict=True):
        print(f"layer {number}: token 0 goes to {sorted(routing.ids[0].tolist())}")  # noqa: T201
    model.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
