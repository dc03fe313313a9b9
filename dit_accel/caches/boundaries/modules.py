"""Boundary "modules": every attention and MLP of the blocks, of which some rows are computed where a step is reused.

A reused step runs the transformer's forward: norms, gates and the MLP of text tokens are computed. Attentions give what
they gave at the step computed last. Modules that treat each token by itself (an MLP, a cross-attention) get the chosen
rows alone, so that their matrix products shrink as the rows do; what comes out takes its place among the rows kept.
FLUX's single blocks shrink in between too: their projection sees the chosen rows of attention and MLP, and the MLP's
wide rows, which nothing else reads, are not kept. Text rows of these are always computed: they are few, and the prompt
must not grow stale.

A branch's memory is taken out of the store while its forward runs, so that no layer's old and new output stand side by
side for longer than the layer. It is put back when the forward has returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_accel.adapters import find_adapter
from dit_accel.adapters.block_modules import BlockModules
from dit_accel.caches import walk
from dit_accel.caches.boundaries.boundary import Boundary, Hooked
from dit_accel.caches.cache import NEVER, Parts, View
from dit_accel.caches.parts.rows import put_rows, take_rows
from dit_accel.errors import UsageError

if TYPE_CHECKING:
    from dit_accel.caches.decider import Verdict
    from dit_accel.caches.engine import CacheEngine
    from dit_accel.trajectory import Call

ATTENTION, ROWS, FEED = "attention", "rows", "feed"


@dataclass(frozen=True)
class Site:
    """A module that is hooked."""

    index: int  # its number in the transformer, which is its key in the memory
    layer: int  # its block
    name: str  # its attribute there
    kind: str
    text: bool  # whether its output holds the text's tokens
    fed: bool  # whether its block has feeds
    judge: int  # number of the site that tells how much a token of this block matters
    judge_text: bool  # whether that one's output begins with the text's tokens


class ModuleBoundary(Boundary):
    """It decides before the forward, and chooses a block's rows at the first of its modules that needs them."""

    lazy = True  # one layer's outputs are fetched at a time: all of them may not fit beside the model

    def __init__(self, engine: CacheEngine) -> None:
        super().__init__(engine)
        self._sites: list[tuple[Site, nn.Module, nn.Module]] = []  # with its block and itself
        self.clear()

    def clear(self) -> None:
        self._memory: dict[str, Any] | None = None  # of the forward under way, where it is kept
        self._reuse = False
        self._chosen: dict[int, Tensor] = {}  # by layer: rows [B, k] of all tokens the block's row modules see
        self._fetched: dict[int, Tensor] = {}  # by site
        self._made: Tensor | None = None  # what a dry run would have given

    def hooks(self, transformer: nn.Module) -> list[Hooked]:
        self._sites = sites_of(transformer, self.engine.cache.name)
        return [(module, walk.ModuleHook(self, site)) for site, _, module in self._sites]

    def is_current(self, transformer: nn.Module) -> bool:
        """Loading or unloading a LoRA puts other modules in the place of some."""
        return all(getattr(block, site.name) is module for site, block, module in self._sites)

    def why_apart(self, given: dict[str, Any]) -> str | None:
        if any(getattr(block, "_chunk_size", None) is not None for _, block, _ in self._sites):
            return "MLPs run in chunks: their tokens are not seen at once"
        return None

    def run(self, call: Call, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        verdict, view = self._decide(call)
        if verdict.entry is None:
            output = original(*args, **kwargs)
            self.engine.settle(verdict, view, None)
            return output
        if self.engine.cache.dry_run and verdict.expected != NEVER:
            self._open(_copied(verdict.memory), True)
            # SD3 takes an IP-Adapter's image out of the dict it is given
            again = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
            self._made = original(*args, **again)[0].detach()
        self._open(verdict.memory, verdict.reuse)
        output = original(*args, **kwargs)
        if verdict.reuse:
            self.engine.commit(verdict, view, None)
        else:
            self.engine.settle(verdict, view, (output[0].detach(), None))
        return output

    @torch.compiler.disable
    def _decide(self, call: Call) -> tuple[Verdict, View]:
        view = View(call, self.engine.given["hidden_states"])
        verdict = self.engine.decide(view)
        if verdict.entry is not None:
            self.engine.memory.release(call.branch, verdict.entry)
        return verdict, view

    @torch.compiler.disable
    def _open(self, memory: dict[str, Any], reuse: bool) -> None:
        if not reuse:
            memory.update(kept={}, ages={})
        self._memory, self._reuse = memory, reuse
        self._chosen, self._fetched = {}, {}

    def compare(self, view: View, parts: Parts, verdict: Verdict) -> tuple[Tensor, Tensor]:
        return self._made, parts[0]

    # -- one module

    @torch.compiler.disable(recursive=False)
    def pass_module(self, site: Site, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """One attention or MLP: computed, computed for some rows, or passed by."""
        if self._memory is None:
            return original(*args, **kwargs)
        if not self._reuse or site.judge not in self._memory["kept"]:  # a block that was left out when it was computed
            output = original(*args, **kwargs)
            if site.kind != FEED:
                self._keep(site, output)
            return output
        if site.kind == ATTENTION:
            kept = self._fetch(site.index, self.engine.given["hidden_states"].device)
            return take_rows(kept, self._rows_of(site, kept)) if site.fed else kept
        x = args[0] if args else kwargs["hidden_states"]
        rows = self._rows_of(site, x)
        if site.kind == FEED:
            return original(take_rows(x, rows)) if rows.shape[1] else x[:, :0]
        kept = self._fetch(site.index, x.device)
        if not rows.shape[1]:
            return kept
        some = x if site.fed else take_rows(x, rows)  # what feeds it gave these rows alone
        new = original(some, *args[1:], **kwargs) if args else original(**{**kwargs, "hidden_states": some})
        kept = put_rows(kept, rows, new)
        self._keep(site, kept)
        return kept

    @torch.compiler.disable
    def _keep(self, site: Site, output: Any) -> None:
        self._fetched.pop(site.index, None)
        self._memory["kept"][site.index] = self.engine.memory.away(_own(output))

    @torch.compiler.disable
    def _fetch(self, index: int, device: torch.device) -> Any:
        if index not in self._fetched:
            return _placed(self._memory["kept"][index], device)
        return self._fetched[index]

    @torch.compiler.disable
    def _rows_of(self, site: Site, x: Tensor) -> Tensor:
        """Rows `[B, k]`, ascending, that this block's row modules compute: all of the text's, some of the image's."""
        if site.layer in self._chosen:
            return self._chosen[site.layer]
        kept = self._fetched[site.judge] = self._fetch(site.judge, x.device)
        text = self.engine.given["encoder_hidden_states"].shape[1] if site.judge_text else 0
        kept, cache, ages = kept[:, text:], self.engine.cache, None
        if cache.counts_age:
            ages = self._memory["ages"].get(site.layer)
            ages = kept.new_zeros(kept.shape[:2], dtype=torch.int16) if ages is None else ages.to(x.device)
            ages = ages + 1
        rows = cache.choose(kept, ages, self.engine.call.step, site.layer)
        if ages is not None:
            self._memory["ages"][site.layer] = self.engine.memory.away(ages.scatter(1, rows, 0))
        if text:
            of_text = torch.arange(text, device=rows.device).expand(len(rows), text)
            rows = torch.cat([of_text, rows + text], dim=1)
        self._chosen[site.layer] = rows
        return rows

    # -- memory

    def bytes_of(self, kind: str, tokens: int, text: int, itemsize: int) -> int | None:
        if kind == "ages":  # of int16
            return 2 * tokens * len({site.layer for site, _, _ in self._sites})
        if kind != "modules":
            return None
        config = self.engine.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        kept = [site for site, _, _ in self._sites if site.kind != FEED]
        return sum(tokens + text * site.text for site in kept) * width * itemsize


def sites_of(transformer: nn.Module, cache: str) -> list[tuple[Site, nn.Module, nn.Module]]:
    """Modules to hook, in order of use, each with its block.

    Raises:
        UsageError: the adapter does not say what the blocks are made of.
    """
    known: dict[str, BlockModules] = getattr(find_adapter(transformer), "MODULES", {})
    found: list[tuple[Site, nn.Module, nn.Module]] = []
    for layer, block in enumerate(walk.blocks_of(transformer)):
        parts = known.get(type(block).__name__)
        if parts is None:
            raise UsageError(
                f"cache {cache!r} computes single rows of the blocks of FLUX.1, Stable Diffusion 3 and Wan, and does "
                f"not know what a {type(block).__name__} is made of. Use one that leaves out whole steps: easy or "
                "latent."
            )
        kinds = [(ATTENTION, parts.attentions), (FEED, parts.feeds), (ROWS, parts.rows)]
        named = [(kind, name) for kind, names in kinds for name in names if getattr(block, name) is not None]
        judge, judge_text = len(found) + len(named) - 1, parts.rows[-1] in parts.with_text
        for kind, name in named:
            site = Site(len(found), layer, name, kind, name in parts.with_text, bool(parts.feeds), judge, judge_text)
            found.append((site, block, getattr(block, name)))
    return found


def _own(output: Any) -> Any:
    """An output to keep: no view that holds on to more than itself."""
    if isinstance(output, Tensor):
        output = output.detach()
        return output if output.untyped_storage().nbytes() == output.nbytes else output.clone()
    return tuple(map(_own, output))


def _placed(kept: Any, device: torch.device) -> Any:
    return kept.to(device) if isinstance(kept, Tensor) else tuple(_placed(x, device) for x in kept)


def _copied(memory: dict[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in memory.items()}
