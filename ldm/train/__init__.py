"""Training Horizon from nothing, by the recipe of Stable Diffusion at small scale.

Three stages, each frozen before the next: the autoencoder, the CLIP pair, the UNet. Each training
loop is a generator of `Record`s, so that a notebook can watch it and stop it; `run.py` is the thin
command around a loop, with its progress bar, log and checkpoints.
"""
