"""A model held against what is known: the truth of its world, or numbers that others published.

- `prompts.py`: does it draw what the prompt says? `evaluate` has its pictures read back.
- `distribution.py`: does it draw what its world holds, as often as its world holds it?
  `evaluate_distribution` holds many pictures of a few prompts against the law that each asks for.
- `distribution_tables.py`: that one's results. `statistics.py`: how far counts and numbers are from
  a law, and how far luck alone would have brought them.
- `budget.py`: where does what is wrong come from? `evaluate_budget` goes from the world to the
  model, link by link.
- `samplers.py`: how few calls of the UNet make a good picture? `evaluate_samplers` asks every one.
- `edits.py`: does an edit change what it should, and nothing else? `evaluate_edits` holds every way
  to edit a picture against the right answer.
- `memorise.py`: is the world learnt, or the training set by heart? `evaluate_memorise` trains small
  networks on few pictures and on many.
- `kept.py`: results that take long, kept in a file as they come.
- `attention.py`: where do words look? `evaluate_attention` holds maps against true masks.
- `attention_tables.py`: that one's results, for programs and for people.
- `verify.py`: are these the official weights, and does our code do with them what others' does?
  `verify` holds a file against what others published for it.
- `verify_published.py`, with `published.json`: their numbers, and who they are. `verify_stages.py`:
  the inputs. `verify_file.py`: what only the file can tell. `verify_tables.py`: the results.

Others take `evaluate`, `evaluate_distribution`, `evaluate_budget`, `evaluate_samplers`,
`evaluate_edits`, `evaluate_memorise`, `evaluate_attention` and `verify`; each returns results with
`as_dict` and `as_markdown`.
"""
