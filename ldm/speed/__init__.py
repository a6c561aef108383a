"""What makes a model faster or smaller in memory, and changes nothing of what it computes.

- `cpu.py`: layers that a CPU computes faster. `optimize` puts them in the place of the plain ones;
  `rest` gives back what a stage takes until it runs again.
- `memory.py`: what was freed or can be read again, kept or given back to the system.
- `waiting.py`: how threads wait for one another, chosen by what else the machine does.

Others take `optimize` and `rest`, and for benchmarks `has_onednn` and `linear`;
the command `choose_wait_policy`, and the pipeline `told_when_slow`.
"""
