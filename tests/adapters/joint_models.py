"""For tests of families of joint attention: a forward, a SparseProcessor, and every method told to read everything."""

import torch

from dit_accel import SparseProcessor
from dit_accel.methods import load_method

ORDERS = ("raster", "tiles", "packed", "gilbert")
# everything, through each method that says how to read it
FULL = {
    "pooled": {"keep": 1.0},
    "rectified": {"keep": 1.0},
    "sparge": {"keep": 1.0},
    "lite": {"threshold": -1e4},
    "svg1": {"keep": 1.0},
    "svg2": {"keep": 1.0},
    "nabla": {"top_p": 1.0, "keep": 1.0},
    "neighborhood": {"window": [1.0, 1.0, 1.0]},
    "clear": {"radius": 100},
    "radial": {"decay_factor": 100, "vote": 0},
}


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def sparse(transformer, method="pooled", **options):
    """Set a strict SparseProcessor that reads everything, unless `keep` is given, and return it."""
    options = {"block": 16, "min_tokens": 0, "strict": True, **options}
    made = load_method(method, **FULL[method]) if "keep" not in options else method
    if made == "sparge":
        options["similarity"] = -1.0  # tokens of random weights are unlike one another
    processor = SparseProcessor(transformer, made, **options)
    transformer.set_attn_processor(processor)
    return processor
