"""The command `ldm`, as a user types it; nothing else imports from here but the entry point.

- `main.py`: the parser of all commands; errors in one line, signals, and exit codes.
- `options.py`: what several commands ask for, and how it is read: a run's settings, a model, where
  to compute, where pictures go.
- `sheet.py`: several pictures on one sheet, with captions.
- `generate.py`, `explain.py`, `show.py`, `inspect.py`, `convert.py`, `download.py`, `train.py`,
  `evaluate.py`: a command each, with `add_parser(commands)` and `run(args)`.

A new command is a file here and a name in `main.COMMANDS`. Its `run` imports what it needs: at the
top of these files nothing may import torch, so that help and mistakes are answered at once.
"""
