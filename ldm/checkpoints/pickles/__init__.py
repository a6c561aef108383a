"""PyTorch checkpoints, read without running them.

A pickle is not data: it is a program for a small stack machine, and some of that machine's
instructions import any function of any module, and call it. `pickle.load` does what the program
says, and so a file of weights can do whatever its author liked.

Here is a machine of our own for the same programs. It imports nothing and calls nothing.

    values.py        what a pickle is made of, as data
    limits.py        what a file may cost us
    calls.py         what is allowed: the short list of what a "call" may be
    instructions.py  the machine
    tree.py          from what it built to tensors by their keys
    zipped.py        the container of PyTorch 1.6 and later
    legacy.py        the one before

What a file can make us hold, and for how long it can make us work, is bounded too. A pickle of nine
bytes may claim a string of a gigabyte: every length is compared with the bytes that are left. A
pickle of a few thousand bytes may stand for a structure of billions: every step of the machine, and
of the walk through what it built, is paid from one `Purse`.

The tensors' bytes are not looked at. The walk only tells where they lie (`Entry`), once it is sure
that they lie inside of the file.

Others take `zipped.read_torch_zip` and `legacy.read_torch_legacy`.
"""
