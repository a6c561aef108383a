# Everything that is made from the shipped weights: `make`, after they have changed.
# docs/building.md tells what each target makes.

PYTHON ?= python
LDM = $(PYTHON) -c "import sys; from ldm.cli.main import main; sys.exit(main())"
SOURCES = weights/horizon/model.safetensors \
	$(wildcard ldm/viz/player/*.* ldm/viz/player/script/*)
RUNS = docs/_build/runs

.PHONY: all pictures attention notebooks runs docs
all: pictures attention notebooks docs

# The README's own command, word for word, and the same prompts with four seeds each.
README_COMMAND = sed -n '/^ldm generate \\$$/,/-o docs\/images\/horizon.png$$/p' README.md
FOUR_EACH = sed 's/--grid --no-captions --seed 100 -o .*/--num-images 4 --grid --no-captions --seed 0 -o docs\/images\/horizon-grid.png/'
pictures:
	( echo 'ldm() { $(LDM) "$$@"; }'; $(README_COMMAND); $(README_COMMAND) | $(FOUR_EACH) ) | sh -e

attention:
	$(LDM) evaluate --attention > docs/measured/attention.md.new
	mv docs/measured/attention.md.new docs/measured/attention.md

notebooks:
	$(PYTHON) -m tests.notebooks

runs: $(RUNS)/red-house.html $(RUNS)/samplers.html

$(RUNS)/red-house.html: $(SOURCES)
	mkdir -p $(RUNS)
	$(LDM) explain "a red house on green grass at night" --seed 1 --compare-guidance-scale 1 -o $@

$(RUNS)/samplers.html: $(SOURCES)
	mkdir -p $(RUNS)
	$(LDM) explain "calm sea at sunset with the sun on the left" --seed 1 --compare-sampler ddpm -o $@

docs: runs
	$(PYTHON) -m sphinx -W --keep-going -b html docs docs/_build/html
