"""Worlds to learn: pictures whose distribution is known exactly, so that a model can be judged.

- `distribution.py`: the Horizon world's names and numbers, and how they are drawn.
- `painting.py`: how it looks, from names and numbers to pixels. `captions.py`: how it is told.
- `scenes.py`: `Scene`, one picture of it, which joins the three.
- `reader.py`: `read`, from a picture's pixels back to its names.
- `ladder.py`: smaller worlds to begin with (`Checkerboards`, `Sea`, `House`, then `Scenes`).

Others take `Scene` and `training_scene`, `ATTRIBUTES` and `HELD_OUT`, `read`, and the ladder's
worlds. Nothing here knows a network.
"""
