"""Worlds to learn: pictures whose distribution is known exactly, so that a model can be judged.

- `distribution.py`: the Horizon world's names and numbers, and how they are drawn.
- `painting.py`: how it looks, from names and numbers to pixels. `captions.py`: how it is told.
- `scenes.py`: `Scene`, one picture of it, which joins the three.
- `batches.py`: `pictures` and `object_masks`, many scenes as tensors.
- `law.py`: `law`, the distribution of the scenes that a caption asks for, by Bayes' rule.
- `reader.py`: `read`, from a picture's pixels back to its names; `count`, how many there are.
- `possible.py`: `fit`, the scene that explains a picture best; `impossible`, if none does.
- `ladder.py`: smaller worlds to begin with (`Checkerboards`, `Sea`, `House`, then `Scenes`).
- `posterior.py`: what a perfect model says, `posterior`, and as such a model, `perfect`; by
  `atoms.py` for finite sets, by `quadrature.py` for worlds of a few numbers.
- `floor.py`: how small a model's error can be. `likelihood.py`: how likely it finds a picture.

Others take `Scene` and `training_scene`, `pictures` and `object_masks`, `ATTRIBUTES` and
`HELD_OUT`, `law`, `read`, `count` and `fit`, the ladder's worlds, `FiniteSet`, `posterior`,
`perfect` and `stating`, `floor`, `compare` and `in_words`, and `log_likelihood`. Nothing here knows
a network: an eps_fn is enough.
"""
