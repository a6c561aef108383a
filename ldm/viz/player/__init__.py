"""The player: one run as one HTML file, to scrub through, step by step, in any browser.

    from ldm.viz.player import explain
    explain(pipe, "a red house on green grass at night", "run.html", steps=50, seed=0)
    explain(pipe, "a red house", "guidance.html", compare={"guidance_scale": 1.0})

    explaining.py  `explain`: from prompts to a page on the disk
    film.py        a run filmed: its trace, and the pictures that its latents decode to
    story.py       what happens at a step; which steps of two runs stand side by side
    captions.py    what the page says of whole runs
    encoding.py    pictures, maps and numbers as text, as fine as there is room for
    page.py        `player_html`: from films to the page, with what follows
    live.py        a page that holds the model itself, and draws
    runtime.py     what runs it there: ONNX Runtime Web, found or fetched, and checked
    page.html      the template
    page.css       the style
    model/         what a page needs that holds a model, as modules of their own:
                   normals.js   the noise of a seed, as torch has it
                   tokenizer.js a prompt's token ids
                   sampling.js  DDIM: its grid, its step, and what a prediction says
                   engine.js    a run of the exported graphs (`ldm.export`)
                   live.js      the page: what is asked for, and the steps to look at again
    script/        the script, joined in the order that page.py states:
                   data.js      what the page holds, and the one state that changes
                   maps.js      attention: a word's map at a step
                   pictures.js  colours, and the panels of a run
                   words.js     the buttons of the prompt's words, and what is said of one
                   charts.js    the curves, and the marker that runs along them
                   numbers.js   the table of a step's numbers
                   draw.js      shows the state, all of it
                   time.js      the timeline: slider, keys, playing
                   start.js     makes everything, once

Others take `explain`; and `runs_asked`, which checks what `explain` would be asked for before there
is a model, with `explain_runs`, which goes on from there.
"""

from ldm.viz.player.explaining import explain, explain_runs, runs_asked

__all__ = ["explain", "explain_runs", "runs_asked"]
