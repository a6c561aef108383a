"""Looking inside: what passes through a model while it runs, and a whole run kept.

    hooks.py      `record` and `edit`: any intermediate by its name. It knows torch alone, and
                  stands below the pipeline
    edits.py      a word struck, weighed, or moved: `edit` of attention, by the papers' arithmetic
    nonfinite.py  which part of a model made the first NaN, where a picture would be black
    maps.py       attention maps as tensors: which tokens make a word, DAAM, prompt-to-prompt
    traces.py     `trace`: one run of the pipeline with all that its steps knew, and its file

`ldm.record`, `ldm.edit`, `ldm.trace` and `ldm.Trace` are their front door. Nothing is imported
here, since traces.py stands above the pipeline.
"""
