"""`python -m tests.gpu`: is `ldm` right on this GPU, how fast, and in how much memory?

- `report.py`: what was found: checks that hold or do not, rows of figures; tables and JSON.
- `models.py`: random models of full size on the device, and their inputs.
- `right.py`: what must be so. `fast.py`: how fast it is.

No download, no pytest, and of other packages those that `ldm` itself needs; diffusers has a row
where it is installed. `--device cpu --small` runs the same code at toy size: it shows that the code
runs, no more, and is what the tests do.
"""
