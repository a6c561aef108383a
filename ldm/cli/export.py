"""`ldm export`: a model for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import options

FORMATS = ("onnx",)
EXAMPLES = """examples:
  ldm export onnx --out horizon-onnx
  ldm export onnx --weights runs/mine --out mine-onnx --float32
"""


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser("export", help="a model for other programs", epilog=EXAMPLES)
    p.add_argument("format", choices=FORMATS, help="onnx: a graph per stage")
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new folder for the files"
    )
    p.add_argument("--float32", action="store_true", help="weights as they are (default: int8)")
    options.add_weights_option(p)
    options.add_model_options(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the folder."""
    import torch

    from ldm.export import export_onnx
    from ldm.export.writing import check_target
    from ldm.pipeline import TextToImage

    check_target(args.out)
    sources, _ = options.open_asked(args)
    plans, tokenizer = options.plan_asked(sources, args.ema)
    pipe = TextToImage.from_plans(plans, tokenizer, device=torch.device("cpu"), dtype=torch.float32)
    export_onnx(pipe, args.out, int8=not args.float32)
    options.tell(args.out)
    return 0
