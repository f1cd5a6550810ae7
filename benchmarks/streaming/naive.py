"""Task arithmetic as it is usually written: three models loaded, a loop over the state dict, save.

    python benchmarks/streaming/naive.py BASE ALIGNED FINETUNED OUT GAMMA

The contender that most people have in a notebook; nothing of realign is imported. Differences are
taken in float32, which is what a careful author would do.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    base_path, aligned_path, finetuned_path, out, gamma = sys.argv[1:]
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.bfloat16)
    aligned = AutoModelForCausalLM.from_pretrained(aligned_path, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(finetuned_path, dtype=torch.bfloat16)
    base_weights, aligned_weights = base.state_dict(), aligned.state_dict()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            safety = aligned_weights[name].float() - base_weights[name].float()
            weight.copy_(weight.float() + float(gamma) * safety)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(finetuned_path).save_pretrained(out)


if __name__ == "__main__":
    main()
