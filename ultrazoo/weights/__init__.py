"""Weights on disk: read, written and matched one tensor at a time.

- `writer`, `reader`, `pickled`: safetensors out and in, torch files of tensors in; never the whole model in memory.
- `keymaps`: names of other programs' checkpoints as two-way tables. `match`: what fits, or the table of what does not.
- `slots`: the places of a model that hold numbers, and what goes into each. `meaning`: whether a block
  reads them as the block they come from did.
- `disk`: what a disk may refuse. `staging`: a directory that appears whole or not at all. `config`: what stands in its ``config.json``.
"""
