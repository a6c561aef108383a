"""Diffusers folders: the same model in other files, under other names.

    names.py    our layers and keys, and diffusers'
    configs.py  its JSON configs, read as ours
    writing.py  a folder, written

Where the files of a folder lie is told in `ldm.checkpoints.folders`. Others take `save_folder`.
"""
