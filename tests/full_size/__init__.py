"""Stable Diffusion v1 at its real size, with random weights: what no small model can show.

Needs some 12 GB of free memory, 10 GB of disk and a few minutes; `-m "not full_size"` leaves it
out.
"""
