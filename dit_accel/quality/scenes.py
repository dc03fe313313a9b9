"""Procedural clips and stills with captions: what the small shipped models learn and what the judge is tested on.

A `Scene` says what is in a clip (objects, motions, background); `write_caption` says it in English; `render_scenes`
draws it. Everything that a caption names can be read back from the pixels, so a generated clip can be judged
without a learned model. Lengths are fractions of the frame's shorter side, times run from 0 (first frame) to 1
(last frame): one scene can be drawn at any size and length. A still is a scene whose objects have the motion
`STILL` and whose background does not pan; drawn with one frame it is an image.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.10, 0.12),
    "yellow": (0.98, 0.88, 0.08),
    "green": (0.08, 0.78, 0.16),
    "cyan": (0.05, 0.85, 0.92),
    "blue": (0.12, 0.22, 0.95),
    "purple": (0.78, 0.10, 0.88),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
MOTIONS = ("left", "right", "up", "down", "around", "bounce", "grow", "spin")
STILL = "still"  # of the objects of a still; clips have none of it, and captions no word for it
BACKGROUNDS = ("checkered", "striped", "gradient", "cloudy")
RADII = {"small": 0.105, "medium": 0.14, "large": 0.175}

MOTION_WORDS = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "around": "moving around",
    "bounce": "bouncing",
    "grow": "growing",
    "spin": "spinning",
}
_MARK = 0.06  # brightness of the dark stripe that makes rotation visible on a circle


@dataclass(frozen=True)
class SceneObject:
    """One moving object. `x`, `y` are the centre at rest, `reach` the length of its path, `turn` +1 or -1."""

    colour: str
    shape: str
    size: str
    motion: str
    x: float
    y: float
    reach: float
    turn: int
    phase: float


@dataclass(frozen=True)
class Background:
    """A grey-tinted texture. `pan` is how far it drifts during the clip, as (x, y) fractions of the frame."""

    kind: str
    pan: tuple[float, float]
    dark: tuple[float, float, float]
    light: tuple[float, float, float]
    period: float
    angle: float
    phase: float
    seed: int

    @property
    def panning(self) -> bool:
        return self.pan != (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    background: Background


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether this combination is kept out of training: one motion of the eight for every (colour, shape)."""
    index = list(COLOURS).index(colour) + 2 * SHAPES.index(shape) + 3 * MOTIONS.index(motion)
    return index % len(MOTIONS) == 0


def sample_scene(rng: random.Random, *, held_out: bool = False, n_objects: int | None = None) -> Scene:
    """Draw a scene. With `held_out`, every object is a (colour, shape, motion) that training never shows.

    Objects, and so captions, go from left to right: with two, the order of the words says which is where.
    """
    count = n_objects or (2 if rng.random() < 0.45 else 1)
    background = _sample_background(rng)
    return Scene(
        _place_objects(rng, count, lambda: _sample_object(rng, held_out, smaller=count > 1)), background
    )


def is_held_out_still(colour: str, shape: str) -> bool:
    """Whether stills for training never show this pair: six of the thirty, each colour once and each shape at least."""
    return (list(COLOURS).index(colour) + 2 * SHAPES.index(shape)) % len(SHAPES) == 0


def sample_still(rng: random.Random, *, held_out: bool = False, n_objects: int | None = None) -> Scene:
    """Draw a scene in which nothing moves. With `held_out`, every object is a (colour, shape) that training never
    shows.

    Objects, and so captions, go from left to right, as in clips.
    """
    count = n_objects or (2 if rng.random() < 0.45 else 1)
    background = replace(_sample_background(rng), pan=(0.0, 0.0))
    return Scene(_place_objects(rng, count, lambda: _sample_still_object(rng, held_out)), background)


def write_caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describe a scene in one sentence; `rng` varies the wording, without it the plainest form is used."""
    form = rng.randrange(3) if rng else 0
    phrases = [describe_object(o) for o in scene.objects]
    ground = f"a {'panning ' if scene.background.panning else ''}{scene.background.kind} background"
    if form == 0:
        return f"{' and '.join(phrases)} over {ground}"
    if form == 1:
        return ", ".join([f"{phrases[0]} over {ground}", *phrases[1:]])
    return f"{ground} with {' and '.join(phrases)}"


def describe_object(thing: SceneObject) -> str:
    """The words of a caption that speak of one object: "a small blue circle spinning"; of a still one no motion."""
    size = "" if thing.size == "medium" else thing.size + " "
    words = f"a {size}{thing.colour} {thing.shape}"
    return words if thing.motion == STILL else f"{words} {MOTION_WORDS[thing.motion]}"


def render_scenes(
    scenes: Sequence[Scene], frames: int, height: int, width: int, device: str | torch.device = "cpu"
) -> Tensor:
    """Draw scenes with anti-aliased edges.

    Returns:
        fp32 `[B, 3, frames, height, width]` in [-1, 1], on `device`.
    """
    short = min(height, width)
    time = torch.linspace(0, 1, frames, device=device) if frames > 1 else torch.zeros(1, device=device)
    ys = (torch.arange(height, device=device) + 0.5) / short
    xs = (torch.arange(width, device=device) + 0.5) / short
    clips = []
    for scene in scenes:
        clip = _draw_background(scene.background, time, xs, ys)
        for thing in scene.objects:
            clip = _paint_object(clip, thing, time, xs, ys, short, (width / short, height / short))
        clips.append(clip)
    return torch.stack(clips).permute(0, 4, 1, 2, 3).mul_(2).sub_(1)


def object_masks(scenes: Sequence[Scene], frames: int, height: int, width: int, device="cpu") -> Tensor:
    """Coverage of the moving objects, fp32 `[B, 1, frames, height, width]` in [0, 1]."""
    short = min(height, width)
    time = torch.linspace(0, 1, frames, device=device) if frames > 1 else torch.zeros(1, device=device)
    ys = (torch.arange(height, device=device) + 0.5) / short
    xs = (torch.arange(width, device=device) + 0.5) / short
    out = torch.zeros(len(scenes), 1, frames, height, width, device=device)
    for mask, scene in zip(out, scenes, strict=True):
        for thing in scene.objects:
            u, v, radius = _local_coordinates(thing, time, xs, ys, (width / short, height / short))
            cover = _cover(signed_distance(thing.shape, u, v), radius, short)
            torch.maximum(mask[0], cover, out=mask[0])
    return out


def signed_distance(shape: str, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance (negative inside) to a shape of circumradius about 1 centred at 0; `v` points down."""
    if shape == "circle":
        return torch.hypot(u, v) - 1.0
    if shape == "ring":
        return (torch.hypot(u, v) - 0.78).abs() - 0.24
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.88
    if shape == "triangle":
        side = u.abs() * math.cos(math.pi / 6) - (v - 0.2) * math.sin(math.pi / 6)
        return torch.maximum(side, v - 0.2) - 0.6
    if shape == "star":
        sector = math.pi / 5
        angle = torch.atan2(u, -v)
        folded = (torch.remainder(angle + sector, 2 * sector) - sector).abs()
        radius = torch.hypot(u, v)
        px, py = radius * torch.sin(folded), radius * torch.cos(folded)
        tip, inner = 1.2, 0.52
        ex, ey = inner * math.sin(sector), inner * math.cos(sector) - tip
        return (px * -ey + (py - tip) * ex) / math.hypot(ex, ey)
    raise ValueError(f"shape is {shape!r}; allowed: {', '.join(SHAPES)}")


def object_path(thing: SceneObject, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, centre y, radius and rotation (radians) at each `time` in [0, 1]."""
    x = torch.full_like(time, thing.x)
    y = torch.full_like(time, thing.y)
    radius = torch.full_like(time, RADII[thing.size])
    angle = torch.zeros_like(time)
    if thing.motion in ("left", "right"):
        x = x + (time - 0.5) * thing.reach * (1 if thing.motion == "right" else -1)
    elif thing.motion in ("up", "down"):
        y = y + (time - 0.5) * thing.reach * (1 if thing.motion == "down" else -1)
    elif thing.motion == "around":
        turn = 2 * math.pi * (thing.phase + thing.turn * time)
        x = x + 0.5 * thing.reach * torch.cos(turn)
        y = y + 0.5 * thing.reach * torch.sin(turn)
    elif thing.motion == "bounce":
        y = y + thing.reach * (0.5 - torch.sin(2 * math.pi * (time + 0.5 * thing.phase)).abs())
    elif thing.motion == "grow":
        radius = radius * (0.55 + 0.95 * time)
    elif thing.motion == "spin":
        angle = 2 * math.pi * (thing.phase + thing.turn * 1.25 * time)
    return x, y, radius, angle


def _place_objects(
    rng: random.Random, count: int, draw: Callable[[], SceneObject]
) -> tuple[SceneObject, ...]:
    """`count` objects that keep apart, from left to right."""
    while True:
        objects: list[SceneObject] = []
        for _ in range(count):
            for _ in range(40):
                candidate = draw()
                if all(_kept_apart(candidate, other) for other in objects):
                    objects.append(candidate)
                    break
        if len(objects) == count:
            return tuple(sorted(objects, key=lambda thing: thing.x))


def _sample_still_object(rng: random.Random, held_out: bool) -> SceneObject:
    while True:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        if is_held_out_still(colour, shape) == held_out:
            break
    size = rng.choice(tuple(RADII))
    margin = 1.2 * RADII[size]
    x, y = rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin)
    return SceneObject(colour, shape, size, STILL, x, y, reach=0.0, turn=1, phase=0.0)


def _sample_object(rng: random.Random, held_out: bool, smaller: bool) -> SceneObject:
    while True:
        colour, shape, motion = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(MOTIONS)
        if is_held_out(colour, shape, motion) == held_out:
            break
    size = rng.choice(("small", "small", "medium") if smaller else ("small", "medium", "large"))
    radius = RADII[size] * (1.5 if motion == "grow" else 1.2)
    reach = {"around": rng.uniform(0.34, 0.46), "bounce": rng.uniform(0.32, 0.42)}.get(
        motion, rng.uniform(0.42, 0.56)
    )
    half_x = radius + (reach / 2 if motion in ("left", "right", "around") else 0)
    half_y = radius + (reach / 2 if motion in ("up", "down", "around", "bounce") else 0)
    x = rng.uniform(min(half_x, 0.5), max(1 - half_x, 0.5))
    y = rng.uniform(min(half_y, 0.5), max(1 - half_y, 0.5))
    return SceneObject(colour, shape, size, motion, x, y, reach, rng.choice((-1, 1)), rng.random())


def _kept_apart(a: SceneObject, b: SceneObject) -> bool:
    """Two objects differ in colour and never touch: an overlapped object could not be judged."""
    if a.colour == b.colour:
        return False
    time = torch.linspace(0, 1, 17)
    (ax, ay, ar, _), (bx, by, br, _) = object_path(a, time), object_path(b, time)
    return bool((torch.hypot(ax - bx, ay - by) > 1.2 * (ar + br)).all())


def _sample_background(rng: random.Random) -> Background:
    kind = rng.choice(BACKGROUNDS)
    pan = (0.0, 0.0)
    if kind != "gradient" and rng.random() < 0.35:
        direction = rng.choice(((1, 0), (-1, 0), (0, 1), (0, -1)))
        reach = rng.uniform(0.22, 0.32)
        pan = (direction[0] * reach, direction[1] * reach)
    base, contrast = rng.uniform(0.25, 0.4), rng.uniform(0.2, 0.3)
    tint = [rng.uniform(-0.035, 0.035) for _ in range(3)]
    dark = tuple(base + t for t in tint)
    light = tuple(base + contrast + t for t in tint)
    angle = math.atan2(pan[1], pan[0]) if pan != (0.0, 0.0) else rng.choice((0, 1, 2, 3)) * math.pi / 4
    if kind == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
    return Background(
        kind, pan, dark, light, rng.uniform(0.25, 0.36), angle, rng.random(), rng.getrandbits(31)
    )


def _draw_background(ground: Background, time: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Colour of every background pixel, `[F, H, W, 3]` in [0, 1]."""
    x = xs[None, None, :] - ground.pan[0] * time[:, None, None]
    y = ys[None, :, None] - ground.pan[1] * time[:, None, None]
    x, y = torch.broadcast_tensors(x, y)
    wave = 2 * math.pi / ground.period
    shift = 2 * math.pi * ground.phase
    if ground.kind == "checkered":
        level = _soft_square(torch.sin(wave * x + shift) * torch.sin(wave * y + 2.4 * shift))
    elif ground.kind == "striped":
        level = _soft_square(
            torch.sin(wave * (x * math.cos(ground.angle) + y * math.sin(ground.angle)) + shift)
        )
    elif ground.kind == "gradient":
        level = 0.5 + 0.72 * ((x - 0.5) * math.cos(ground.angle) + (y - 0.5) * math.sin(ground.angle))
    elif ground.kind == "cloudy":
        level = _draw_clouds(ground, x, y)
    else:
        raise ValueError(f"background is {ground.kind!r}; allowed: {', '.join(BACKGROUNDS)}")
    dark, light = (torch.tensor(c, device=xs.device) for c in (ground.dark, ground.light))
    return dark + level.clamp(-0.1, 1.1)[..., None] * (light - dark)


def _soft_square(wave: Tensor) -> Tensor:
    """A square wave in [0, 1] with edges about two pixels wide at 128 pixels, so that it stays alias-free."""
    return 0.5 + 0.5 * torch.tanh(6.0 * wave)


def _draw_clouds(ground: Background, x: Tensor, y: Tensor) -> Tensor:
    """Smooth value noise: two octaves of a periodic random lattice, interpolated with a cosine."""
    rng = torch.Generator().manual_seed(ground.seed)
    level = torch.zeros_like(x)
    for cells, weight in ((5, 0.7), (10, 0.45)):
        lattice = torch.rand(cells, cells, generator=rng).to(x.device)
        u, v = x * cells, y * cells
        i, j = u.floor(), v.floor()
        fu, fv = (0.5 - 0.5 * torch.cos(math.pi * f) for f in (u - i, v - j))
        i0, j0 = torch.remainder(i, cells).long(), torch.remainder(j, cells).long()
        i1, j1 = (i0 + 1) % cells, (j0 + 1) % cells
        top = lattice[j0, i0] * (1 - fu) + lattice[j0, i1] * fu
        low = lattice[j1, i0] * (1 - fu) + lattice[j1, i1] * fu
        level += weight * 2 * (top * (1 - fv) + low * fv - 0.5)
    return 0.5 + 0.5 * level


def _local_coordinates(thing, time, xs, ys, extent) -> tuple[Tensor, Tensor, Tensor]:
    x, y, radius, angle = (t[:, None, None] for t in object_path(thing, time))
    dx = (xs[None, None, :] - x * extent[0]) / radius
    dy = (ys[None, :, None] - y * extent[1]) / radius
    cos, sin = torch.cos(angle), torch.sin(angle)
    return dx * cos + dy * sin, dy * cos - dx * sin, radius


def _cover(distance: Tensor, radius: Tensor, short: int) -> Tensor:
    return (0.5 - distance * radius * short).clamp(0, 1)


def _paint_object(clip, thing, time, xs, ys, short, extent) -> Tensor:
    u, v, radius = _local_coordinates(thing, time, xs, ys, extent)
    cover = _cover(signed_distance(thing.shape, u, v), radius, short)[..., None]
    stripe = torch.maximum(u.abs() - 0.13, (v + 0.65).abs() - 0.5)  # from the centre towards the top
    mark = _cover(stripe, radius, short)[..., None]
    colour = torch.tensor(COLOURS[thing.colour], device=xs.device)
    paint = colour * (1 - mark) + _MARK * mark
    return clip * (1 - cover) + paint * cover
