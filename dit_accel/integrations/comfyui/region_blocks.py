"""BlockPatches: stand-ins for a model's blocks, by which they compute some of their tokens.

ComfyUI hands a block to a function that stands in for it, together with what it would have been given. The first one
takes the tokens out, the last one puts them where they were, for the head and all behind it know of a whole grid. What
is put in place of the others says nothing: whoever asks for a part of the tokens has their velocity already.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_accel.region.active import ActiveTokens

# kind of block -> what ComfyUI calls its stand-ins
_NAMES = {"double": "double_block", "single": "single_block", "joint": "double_block"}


class BlockPatches:
    """The stand-ins of one model. They are made once, so that compiled code meets the same ones at every step.

    Args:
        blocks: kinds and numbers, in the order in which they run.
        rotary_axis: along which the blocks' rotary table has its tokens; None: they are given none.
    """

    def __init__(self, blocks: Sequence[tuple[str, int]], rotary_axis: int | None) -> None:
        self._blocks, self._rotary_axis = list(blocks), rotary_axis
        self._patches = {
            (_NAMES[kind], number): partial(self._run, place) for place, (kind, number) in enumerate(self._blocks)
        }
        self._active: ActiveTokens | None = None
        self._text_first, self._alike, self._taken = False, False, {}
        self._n_tokens = 0  # of the image or video, all of them
        self.n_run = 0  # of the forward under way

    def __len__(self) -> int:
        return len(self._blocks)

    def stand_in(
        self, options: dict[str, Any], active: ActiveTokens, text_first: bool, alike: bool
    ) -> dict[str, Any]:
        """ComfyUI's options for a forward of these tokens; nobody else may stand in for a block of it.

        Args:
            text_first: whether text stands before the image's tokens where both are in one sequence.
            alike: whether all rows have the same tokens, as those of one picture and its prompts do.
        """
        self._active, self._text_first, self._alike = active, text_first, alike
        self._taken, self.n_run = {}, 0
        return {**options, "patches_replace": {**options.get("patches_replace", {}), "dit": dict(self._patches)}}

    def clear(self) -> None:
        """Let go of the forward."""
        self._active, self._taken = None, {}

    @torch.compiler.disable  # a compiled graph would keep one step's tokens
    def _run(self, place: int, args: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        active, (kind, number) = self._active, self._blocks[place]
        assert active is not None
        self.n_run += 1
        changed = {}
        if place == 0:
            self._n_tokens = args["img"].shape[1]
            changed["img"] = active.apply(args["img"], 1)
        if self._rotary_axis is not None and args["pe"] is not None:
            changed["pe"] = self._once("pe", args["pe"], self._take_rotary)
        if isinstance(args["vec"], Tensor) and args["vec"].ndim == 4 and args["vec"].shape[1] > 1:
            changed["vec"] = self._once("vec", args["vec"], self._take_modulation)
        options = args.get("transformer_options")
        if options is not None and options.get("block_index") is None:  # SD3, and old cores, say not which block it is
            changed["transformer_options"] = {**options, "block_type": kind, "block_index": number}
        out = more["original_block"]({**args, **changed})
        return {**out, "img": self._put_back(out["img"])} if place == len(self._blocks) - 1 else out

    def _once(self, name: str, given: Any, take: Any) -> Any:
        """What is taken of a thing that every block is given: all are given the same."""
        held = self._taken.get(name)
        if held is None or held[0] is not given:
            held = self._taken[name] = given, take(given)
        return held[1]

    def _take_rotary(self, table: Tensor) -> Tensor:
        """Rows of the active tokens, and of text."""
        axis, active = self._rotary_axis, self._active
        text = table.shape[axis] - self._n_tokens
        first = text if self._text_first else 0
        image = table.narrow(axis, first, self._n_tokens)
        if self._alike:  # one table for all rows, as kernels like it best
            image = image.index_select(axis, active.index[0].to(table.device))
        else:
            image = active.apply(image, axis)
        if not text:
            return image
        words = table.narrow(axis, 0 if self._text_first else self._n_tokens, text)
        words = words.expand(len(image), *words.shape[1:])
        return torch.cat([words, image] if self._text_first else [image, words], dim=axis)

    def _take_modulation(self, rows: Tensor) -> Tensor:
        """Wan's modulation `[B, F, 6, D]` of as many runs of tokens, for each active one: `[B, K, 6, D]`."""
        run = self._n_tokens // rows.shape[1]
        assert run * rows.shape[1] == self._n_tokens
        index = self._active.index.to(rows.device) // run
        return rows.gather(1, index[:, :, None, None].expand(-1, -1, *rows.shape[2:]))

    def _put_back(self, part: Tensor) -> Tensor:
        """`[B, K, D]` in a whole sequence, `[B, S, D]`, with zeros between; text that comes along keeps its place."""
        index = self._active.index.to(part.device)
        text = part.shape[1] - index.shape[1]
        first = text if self._text_first else 0
        whole = part.new_zeros(len(part), self._n_tokens + text, part.shape[2])
        image = part[:, first : first + index.shape[1]]
        whole.scatter_(1, (index + first)[..., None].expand_as(image), image)
        if text:
            words = slice(0, text) if self._text_first else slice(-text, None)
            whole[:, words] = part[:, words]
        return whole
