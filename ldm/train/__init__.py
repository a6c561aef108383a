"""Training Horizon from nothing, by the recipe of Stable Diffusion at small scale.

Three stages, each frozen before the next: the autoencoder, the CLIP pair, the UNet. Each training
loop is a generator of `Record`s, so that a notebook can watch it and stop it.

- `data.py`: scenes of the Horizon world, drawn as they are needed.
- `state.py`: what every loop shares, a `TrainState`, its `Optimisation` and its `Record`s.
- `autoencoder.py`, `clip.py`, `diffusion.py`: a stage each, its settings and its loop.
- `excess.py`: how far the UNet is above the least error that there can be, told while it learns.
- `run.py`: a stage in a folder, with its progress bar, log and checkpoints (`ldm train`).

A finished model is taught one thing more, from a folder of pictures:

- `adapters.py`: a LoRA, or a word (textual inversion): what is trained, the loops, the files.
- `lessons.py`: pictures with their captions, read and encoded.
- `teach.py`: a run of either in a folder (`ldm train lora`, `ldm train embedding`).

Others take `TrainState` and `Optimisation`, `CLIPPair` and `load_pair`. How good the result is,
`ldm.evaluate` measures: nothing here draws or judges.
"""
