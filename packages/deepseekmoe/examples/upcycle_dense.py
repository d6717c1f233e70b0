"""Begin a mixture of experts from a dense LLaMA: each network becomes fine-grained experts.

python upcycle_dense.py my-llama moe/
"""

import sys
from pathlib import Path

import torch
from deepseekmoe.hub import save
from deepseekmoe.upcycle import load_dense, upcycle


def main(source: str, out: Path) -> float:
    """Convert, compare the first logits, save; gives the largest difference."""
    dense, tokenizer = load_dense(source)
    model = upcycle(dense, routed=8, shared=0, active=4, granularity=2).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        far = float((model(input_ids=ids).logits - dense(input_ids=ids).logits).abs().max())
    print(f"its first logits are within {far:.2e} of the dense model's")  # noqa: T201
    save(out, model, tokenizer)
    return far


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
