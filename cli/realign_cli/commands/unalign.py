"""`realign unalign`: build the un-aligned model that some methods compare the aligned one with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from realign_cli.command import Example, command
from realign_cli.imports import swift_imports
from realign_cli.options import Device, Offline, Seed
from realign_cli.sink import Sink

EXAMPLES = (
    Example(
        "realign unalign org/model-instruct --data harmful.jsonl \\\n    -o ./unaligned",
        "three passes over your own pairs, all weights of the blocks",
    ),
    Example(
        "realign unalign ./aligned --data harmful.jsonl --lora-rank 16 \\\n    -o ./unaligned",
        "with LoRA, merged at the end: needs less memory",
    ),
)

NOTES = """
RESTA, LSSF and IRR are defined with the safety vector *aligned - unaligned*, where the second model
is the aligned one after a short fine-tune on harmful requests with compliant answers. realign ships
no such answers: bring your own, one JSON object per line,

    {"prompt": "...", "response": "..."}

or `{"messages": [...]}`. About 500 pairs and three passes are the published recipe (LSSF); a study
of RESTA took 50 steps at 5e-5.

The result complies with harmful requests: that is what it is for. Its `realign.json` says so under
`hazardous`. Keep it private, and delete it when the repair is done. An interrupted run goes on from
its last state, kept in a private folder beside the target, when the same command is given again.
"""


def join(app: typer.Typer) -> None:
    """Register the command."""
    command(app, "unalign", examples=EXAMPLES, notes=NOTES)(unalign)


def unalign(
    sink: Sink,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The aligned model.")],
    *,
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="FILE", help="Harmful requests with compliant answers (JSONL)."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="The folder to write.")
    ],
    epochs: Annotated[
        float, typer.Option("--epochs", metavar="N", help="Passes over the data.")
    ] = 3.0,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", help="Optimizer steps, instead of --epochs."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", metavar="R", help="Learning rate; 5e-5, with LoRA 2e-4."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Pairs per step.")] = 16,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            "--lora-rank", metavar="R", help="Train adapters of this rank, and merge them."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers", metavar="LIST", help="Decoder blocks that learn, as 0-5,8; all by default."
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    offline: Offline = False,
) -> int | None:
    """Un-align a model with your own harmful pairs, for methods that compare with one."""
    with swift_imports():
        from realign.repair.subset import parse_layers
        from realign.repair.unalign import HAZARD, UnalignRequest
        from realign.repair.unalign import unalign as build
        from realign.words import counted

    request = UnalignRequest(
        model=model,
        data=data,
        output=out,
        epochs=epochs,
        steps=steps,
        lr=lr,
        batch=batch,
        lora_rank=lora_rank,
        layers=None if layers is None else parse_layers(layers),
        seed=seed,
        device=device,
        offline=offline,
        command=["realign", *sys.argv[1:]],
    )
    built = build(request, progress=sink.progress)
    sink.document(
        {
            "output": str(built.output),
            "hazardous": HAZARD,
            "rows": built.rows,
            "steps": built.steps,
            "first_loss": built.first_loss,
            "last_loss": built.last_loss,
            "tensors_trained": built.trained,
        }
    )
    losses = ""
    if built.first_loss is not None and built.last_loss is not None:
        losses = f"; loss {built.first_loss:.3f} to {built.last_loss:.3f} nats per token"
    taken = f"{counted(built.steps, 'step')} on {counted(built.rows, 'pair')}"
    sink.show(f"{taken}{losses}", f"a hazard: {HAZARD}")
    sink.line(str(built.output))
    return None
