"""Weights on disk: any file of Stable Diffusion v1 that a user has, read safely, exactly and lean.

    path -> open_archive -> Archive -> recognise -> Weights -> plan -> Plan -> fill -> a stage

Nothing in a file is ever executed, and what is not asked for is not read. In this order:

- `entries.py`: a tensor on disk, and what a file holds; `safetensors_file.py`, `pickles/` and
  `folders.py`: the containers; `opening.py`: from a path to an archive;
- `keys.py`: our names and the official ones; `spellings.py`: what else a key may be called;
  `families.py`: other models, by what they look like; `diffusers/`: its names and configs;
  `config_json.py`: a config as JSON; `noise.py`: what a file says of the noise; `recognise.py`:
  from an archive to official keys and a config;
- `stages.py`: a stage by its name, built; `planning.py`: which tensor becomes which parameter;
  `filling.py`: the tensors, read; `tokenizer_files.py`: a vocabulary's files, and where they lie;
- `loading.py`: all of it, for a stage or a whole model; `saving.py`; `convert.py`;
  `inspection.py`; `download.py`, with `known_files.json`; `shipped.py`: where Horizon is.

Others take `load_unet`, `load_vae`, `load_text_encoder`, `open_model`, `joint_config` and
`plan_stages` of `loading`, `fill`, `save_model`, `inspect`, `convert`, `download`,
`require_tokenizer`, `chosen_tokenizer`, `read_tokenizer` and `write_tokenizer`.
"""
