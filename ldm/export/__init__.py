"""The model for other programs: its stages as ONNX graphs, and what must be known to run them.

from ldm.export import export_onnx
export_onnx(pipe, "folder")

steering.py   the UNet with its insides on the outside: words and blocks weighed by inputs
graphs.py     each stage as an ONNX graph
int8.py       weights in a byte each, and how far that moves them
writing.py    `export_onnx`: the graphs in a folder, with the model's numbers beside them
"""

from ldm.export.writing import export_onnx

__all__ = ["export_onnx"]
