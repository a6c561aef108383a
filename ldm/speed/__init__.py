"""What makes a model faster or smaller in memory, and changes nothing of what it computes.

- `cpu.py`: layers that a CPU computes faster. `optimize` puts them in the place of the plain ones;
  `rest` gives back what a stage takes until it runs again.
- `gpu.py`: the UNet's call as a CUDA graph, and float32 that is float32.
- `memory.py`: what was freed or can be read again, kept or given back to the system.
- `waiting.py`: how threads wait for one another, chosen by what else the machine does.
- `workplace.py`: where the stages of a pipeline compute, and how: what `pipe.optimize` arranges of
  all this.

Others take `optimize` and `rest`, and for benchmarks `has_onednn` and `linear`; the pipeline
`Workplace` and `told_when_slow`; the command `choose_wait_policy`.
"""
