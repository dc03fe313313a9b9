"""Record which blocks a real model's attention reads, for `bench_kernels.py`: tiny-wan's plans at a large size.

    python scripts/record_plans.py --output scripts/results/plans_tiny_wan.npz

One prompt, from noise to clip with `top_p`, so that lists differ in length as the model's attention does. Plans of the
given steps and layers are kept, as bits: uint8 `[H, Nq, ceil(Nk / 8)]`, numpy's packbits.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

import _source_tree  # noqa: F401  (must come before dit_accel)
import numpy as np
import torch
from _kernel_cases import environment

import dit_accel
from dit_accel.methods import Method
from dit_accel.options import SparseOptions
from dit_accel.preset import load_preset


@dataclass
class Recorder:
    """A method that hands on another's plans and keeps some of them."""

    method: Method
    wanted: set[tuple[int, int]]  # step, layer
    plans: dict[str, np.ndarray]
    shapes: set[tuple[int, int]]  # tokens, head size

    def predict(self, query, key, layout, call, state: Any):
        plan = self.method.predict(query, key, layout, call, state)
        if call.branch == "cond" and (call.step, call.layer) in self.wanted:
            bits = np.packbits(plan.to_mask()[0].cpu().numpy(), axis=-1)
            self.plans[f"step {call.step} layer {call.layer}"] = bits
            self.shapes.add((query.shape[1], query.shape[3]))
        return plan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--model", default="tiny-wan")
    parser.add_argument("--prompt", default="a red star moving left over a striped background")
    parser.add_argument("--top-p", type=float, default=0.6)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--record-steps", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--record-layers", type=int, nargs="+", default=[1, 4, 7])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    from dit_accel.pipelines import wan

    preset = load_preset("tiny-wan-fast")
    pipe = wan.load(
        options.model, device=str(wan.pick_device(options.device)), flow_shift=preset.generate.flow_shift
    )
    sparse = SparseOptions(top_p=options.top_p, order="packed", min_tokens=0)
    with dit_accel.accelerate(pipe, sparse) as handle:
        engine = pipe.transformer.blocks[0].attn1.processor.engine
        wanted = {(step, layer) for step in options.record_steps for layer in options.record_layers}
        recorder = engine.method = Recorder(engine.method, wanted, {}, set())
        pipe(
            prompt=options.prompt,
            negative_prompt=preset.generate.negative_prompt,
            guidance_scale=preset.generate.guidance,
            height=options.size,
            width=options.size,
            num_frames=options.frames,
            num_inference_steps=options.steps,
            generator=torch.Generator("cpu").manual_seed(1),
            output_type="latent",
        )
        print(handle.report())
    ((tokens, head),) = recorder.shapes
    told = {"tokens": tokens, "head": head, "prompt": options.prompt, "top_p": options.top_p, **environment()}
    for name, bits in recorder.plans.items():
        kept = np.unpackbits(bits, axis=-1).sum(-1)
        print(f"{name}: {kept.mean():.1f} blocks of {bits.shape[1]} read, from {kept.min()} to {kept.max()}")
    np.savez_compressed(options.output, told=np.array(json.dumps(told)), **recorder.plans)
    return 0


if __name__ == "__main__":
    sys.exit(main())
