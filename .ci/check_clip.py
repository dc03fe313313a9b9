"""Reopen a clip that a command of the README made: `check_clip.py CLIP [SECONDS]`."""

import json
import sys
from pathlib import Path

from dit_accel.pipelines.video import read_clip
from dit_accel.preset import load_preset

path = Path(sys.argv[1])
frames, fps, comment = read_clip(path)
options = load_preset("tiny-wan-fast").generate
assert frames.shape == (options.frames, options.height, options.width, 3), frames.shape
assert fps == options.fps, fps
assert frames.std() > 10, "the clip is one flat colour"
assert frames[0].astype(int).tolist() != frames[-1].astype(int).tolist(), "nothing moves"
assert json.loads(comment)["prompt"]
(clip,) = json.loads((path.parent / "run.json").read_text())["clips"]
calls = clip["report"]["self_attention_calls"]
assert calls["sparse"] > 0 and not clip["report"]["fallbacks"], clip["report"]
print(f"{path.name}: {frames.shape}, {fps:g} frames/s, {clip['seconds']} s, self-attention {calls}", end="")
print(f", the whole command {sys.argv[2]} s" if len(sys.argv) > 2 else "")
