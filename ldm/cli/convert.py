"""`ldm convert`: write weights anew."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import options

EXAMPLES = """examples:
  ldm convert v1-5-pruned.ckpt clean.safetensors --dtype float16
  ldm convert model.safetensors folder
"""


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser(
        "convert", help="write weights anew: one clean file, or a folder", epilog=EXAMPLES
    )
    p.add_argument("source", type=Path, help="a file or a folder of weights")
    p.add_argument("target", type=Path, help="NAME.safetensors, or a new diffusers folder")
    options.add_model_options(p)
    p.add_argument("--dtype", choices=options.DTYPES, help="(default: as they are stored)")
    options.add_lora_option(p, "merge this LoRA into the weights")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the file or the folder."""
    from ldm.checkpoints.convert import convert

    convert(
        args.source,
        args.target,
        ema=options.EMA[args.ema],
        dtype=options.named_dtype(args.dtype) if args.dtype else None,
        config=options.asked_config(args),
        vae=args.vae,
        text=args.text,
        prediction=args.prediction,
        loras=options.asked_loras(args),
    )
    options.tell(args.target)
    return 0
