"""A stand-in for ComfyUI's core: the contract that nodes meet, in as few lines as it takes. Not its code.

What it keeps to: models are clones that share weights, with options that are deep-copied, wrappers and callbacks by
key, and attachments; a sampler wraps its run, and a model each of its calls; prompts come in one batch or one by one,
each time with a fresh copy of the options; attention functions give way to an override, which gets them as its first
argument, and blocks to a function that stands in for them, which gets what they would have been given.
"""
