"""svg1: a band along the frames for some heads, a band along the places for others, told by trial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_accel.arrangement import Arrangement
from dit_accel.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from dit_accel.layout import TokenLayout
    from dit_accel.plan import BlockPlan
    from dit_accel.trajectory import Call

# Probabilities held at once when heads are tried, in fp32 4 MB and 128 MB.
PROBABILITIES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 25}
KINDS = ("spatial", "temporal")
COMPENSATIONS = ("auto", "all", "none")
# Blocks that a frame must hold for "auto" to let means stand in. Measured with 8, where they bring 1.5 to 4 dB, and
# with 2, where they cost 2 to 3: a mean of half a frame says little (docs/methods.md).
BLOCKS_A_FRAME = 4


@dataclass(frozen=True)
class Method:
    """Each head reads a band of tokens around its own, frame after frame (spatial) or place after place (temporal).

    Spatial heads have their tokens in the order frame, row, column, temporal ones in the order row, column, frame, and
    both read the blocks that hold a token at most w positions from one of the block's own. So a spatial head sees its
    frame and parts of its neighbours, a temporal head every frame at nearly the same place. With `first_frame` all read
    the first frame too: it stands first among the keys, and the rest of a temporal head's keys follow place by place.

    Which kind a head is, is told at every call and for every batch row: attention of `rows` query tokens, spread over
    the whole video, is computed in full, and the kind whose blocks cover more of it wins. The paper compares outputs
    instead (their mean squared error), for which values would be needed; how much attention is lost says the same, as
    far as values do not differ in how much their loss matters. Nothing waits for the device: the choice stays there.

    w is the one for which a video token reads nearest to `keep` of the video's keys, whole blocks and first frame
    included. The published formula, w = S (1 - sqrt(1 - keep)), leaves both out: more is read than asked for. Text is
    read beside the budget and reads everything.

    The published code samples its rows from the first 10,000 tokens only, tries masks of a fixed width of about two
    frames whatever is executed, and takes as many positions as a frame has for the first frame in both orders, which
    in a temporal head are the top rows of every frame. Here rows are drawn from all tokens, the masks tried are the
    ones executed, and the first frame is the first frame.

    Source: Sparse VideoGen, arXiv:2502.01776. Published keep: 0.3 for Wan at 720p with its first frame, 0.25 (720p)
    and 0.2 (480p) for HunyuanVideo; 64 rows. `compensation` is ours: a band leaves out the same places at every step,
    and what is lost there adds up. "none" is as published.
    """

    arrangement: ClassVar[Arrangement] = Arrangement("raster", 128)
    needs_grid: ClassVar[bool] = True

    keep: float  # share of the video's keys that a video token reads, first frame included
    first_frame: bool = False  # also read every token of the first frame
    rows: int = 64  # query tokens by which a head is told
    compensation: str = "auto"  # "all": means of blocks stand in for those not read; "none"; "auto": by frame size

    def __post_init__(self) -> None:
        if not isinstance(self.rows, int) or isinstance(self.rows, bool) or self.rows < 1:
            raise UsageError(f"rows={self.rows!r} is not possible: rows is a whole number from 1.")
        if not isinstance(self.first_frame, bool):
            raise UsageError(
                f"first_frame={self.first_frame!r} is not possible: first_frame is true or false."
            )
        if self.compensation not in COMPENSATIONS:
            raise unknown_name("compensation", self.compensation, COMPENSATIONS)

    def predict(self, query: Tensor, key: Tensor, layout: TokenLayout, call: Call, state: Any) -> BlockPlan:
        """Tell the heads' kinds and give each its order and band.

        Args:
            query: `[B, S, H, D]`, post-RoPE, in the layout's order; as is `key`.

        Returns:
            A plan with orders for every batch row and head; one list for all, or with `first_frame` one for each. With
            `coarse` weights, if means stand in.
        """
        import torch

        from dit_accel.methods.parts.compensation import with_means
        from dit_accel.methods.parts.runs import plan_of_runs

        parts = self._parts(layout)
        temporal = self._is_temporal(query, key, layout, parts["gain"])

        def of_kind(name: str) -> Tensor:
            spatial_, temporal_ = (x.to(query.device) for x in parts[name])
            return torch.where(temporal.view(*temporal.shape, *[1] * spatial_.dim()), temporal_, spatial_)

        if self.first_frame:
            chosen = of_kind("counts"), of_kind("indices")
        else:  # both kinds read the same of their positions
            chosen = (parts[name][:1, None].to(query.device) for name in ("counts", "indices"))
        plan = plan_of_runs(*chosen, layout, of_kind("q_order"), of_kind("k_order"))
        if not self._means_stand_in(layout):
            return plan
        return with_means(plan, ~plan.to_mask(), (query.shape[0], query.shape[2]))

    def _means_stand_in(self, layout: TokenLayout) -> bool:
        if self.compensation == "auto":
            _, rows, columns = layout.grid
            return rows * columns >= BLOCKS_A_FRAME * layout.block
        return self.compensation == "all"

    def _is_temporal(self, query: Tensor, key: Tensor, layout: TokenLayout, gain: Tensor) -> Tensor:
        """Whether the temporal blocks cover more of the sampled rows' attention, bool `[B, H]`; a tie is spatial."""
        import torch

        from dit_accel.methods.parts.cluster import spread_tokens

        sampled = layout.video_tokens.start + spread_tokens(layout.n_video_tokens, len(gain), query.device)
        rows = query.index_select(1, sampled).transpose(1, 2) * query.shape[3] ** -0.5
        keys = key.transpose(1, 2)
        gain = gain.to(query.device, torch.float32)
        limit = PROBABILITIES_AT_ONCE.get(query.device.type, min(PROBABILITIES_AT_ONCE.values()))
        heads = max(1, limit // (query.shape[0] * gain.numel()))
        gains = []
        for some_rows, some_keys in zip(rows.split(heads, 1), keys.split(heads, 1), strict=True):
            logits = (some_rows @ some_keys.transpose(2, 3)).float()
            gains.append((logits.softmax(dim=-1) * gain).sum((2, 3)))
        return torch.cat(gains, dim=1) > 0

    def _parts(self, layout: TokenLayout) -> dict[str, Tensor]:
        """What follows from the layout alone, spatial and temporal stacked; the layout remembers it.

        q_order, k_order: int32 `[2, S]`.
        counts, indices: int32 `[2, N]` and `[2, N, N]`.
        gain: int8 `[rows, S]`, 1 where only the temporal blocks have the sampled row read the key, -1 where only the
            spatial ones do.
        """
        names = ("q_order", "k_order", "counts", "indices", "gain")
        keys = {name: ("svg1", self.keep, self.first_frame, self.rows, name) for name in names}
        if keys["gain"] not in layout.memo:
            for name, part in zip(names, self._build(layout), strict=True):
                layout.memo[keys[name]] = part
        return {name: layout.memo[key] for name, key in keys.items()}

    def _build(self, layout: TokenLayout) -> tuple[Tensor, ...]:
        import torch

        from dit_accel.kernels.selection import select_blocks
        from dit_accel.methods.parts.cluster import spread_tokens
        from dit_accel.methods.parts.runs import with_text

        sampled = spread_tokens(layout.n_video_tokens, self.rows, layout.starts.device)
        sampled = sampled + layout.video_tokens.start
        stacks: tuple[list[Tensor], ...] = ([], [], [], [])
        reads = []
        for kind in KINDS:
            q_order = band_order(layout, kind)
            k_order = first_frame_first(q_order, layout) if self.first_frame else q_order
            pairs = band_pairs(layout, q_order, k_order, self.keep, self.first_frame)
            q_order, k_order = (with_text(order.to(torch.int32), layout) for order in (q_order, k_order))
            # every pair is forced, so that the lists are of the pairs alone: each block reads itself at least
            counts, indices = select_blocks(pairs.float()[None, None], pairs, 1)
            for stack, part in zip(stacks, (q_order, k_order, counts[0, 0], indices[0, 0]), strict=True):
                stack.append(part)
            rows = run_of_tokens(q_order, layout)[sampled]
            reads.append(pairs[rows][:, run_of_tokens(k_order, layout)])
        gain = reads[1].to(torch.int8) - reads[0].to(torch.int8)
        return *map(torch.stack, stacks), gain


def band_order(layout: TokenLayout, kind: str) -> Tensor:
    """The video's tokens by frame, row, column ("spatial") or by row, column, frame ("temporal"), int64 `[V]`."""
    frame, row, column = layout.coordinates().unbind(1)
    frames, rows, columns = layout.grid
    if kind == "spatial":
        return ((frame * rows + row) * columns + column).argsort()
    return ((row * columns + column) * frames + frame).argsort()


def first_frame_first(order: Tensor, layout: TokenLayout) -> Tensor:
    """The same order with the first frame's tokens before all others."""
    later = layout.coordinates()[:, 0][order] > 0
    return order[later.to(order.dtype).argsort(stable=True)]


def band_pairs(
    layout: TokenLayout, q_order: Tensor, k_order: Tensor, keep: float, first_frame: bool
) -> Tensor:
    """Which runs of keys each run of queries reads, bool `[N, N]`, text included.

    Two runs are as far apart as their nearest tokens are in `q_order`. All pairs up to some distance are taken: the
    one for which the share of the video's keys that its tokens read, in the mean, comes nearest to `keep`.

    Args:
        q_order: int64 `[V]`; k_order: the same tokens, perhaps those of the first frame before all others.
        first_frame: all runs of keys that hold tokens of the first frame, which are the first, are read.
    """
    import torch

    from dit_accel.methods.parts.runs import count_runs, run_starts

    video, text = count_runs(layout)
    sizes = run_starts(layout)[0, 0].diff().double()
    position = torch.empty_like(q_order)
    position[q_order] = torch.arange(len(q_order), device=q_order.device)
    ends = []
    for order in (q_order, k_order):
        places = position[order]
        # the last run is filled up with its own last token
        more = places[-1:].expand(video * layout.block - len(places))
        ends.append(torch.cat([places, more]).view(video, layout.block).aminmax(dim=1))
    (q_low, q_high), (k_low, k_high) = ends
    apart = (k_low - q_high[:, None]).maximum(q_low[:, None] - k_high).clamp_min(0)
    if first_frame:
        of_first = torch.arange(video, device=apart.device) * layout.block < layout.grid[1] * layout.grid[2]
        apart = apart.masked_fill(of_first, -1)  # nearer than any

    distances, by_distance = apart.flatten().sort(stable=True)
    read = (sizes[:video, None] * sizes[:video]).flatten()[by_distance].cumsum(0)
    share = read / layout.n_video_tokens**2
    # only where a distance ends, and a block's own distance, 0, is within
    whole = torch.cat([distances[1:] != distances[:-1], distances.new_ones(1, dtype=torch.bool)])
    off = (share - keep).abs().masked_fill(~whole | (distances < 0), torch.inf)
    pairs = torch.ones(video + text, video + text, dtype=torch.bool, device=apart.device)
    pairs[:video, :video] = apart <= distances.gather(0, off.argmin()[None])
    return pairs


def run_of_tokens(order: Tensor, layout: TokenLayout) -> Tensor:
    """The run in which each token stands, int64 `[S]`. order: int32 `[S]`, with the text."""
    import torch

    from dit_accel.methods.parts.runs import run_starts

    starts = run_starts(layout)[0, 0]
    positions = torch.arange(layout.n_tokens, dtype=torch.int32, device=order.device)
    runs = torch.empty(layout.n_tokens, dtype=torch.int64, device=order.device)
    runs[order.long()] = torch.searchsorted(starts[1:].contiguous(), positions, right=True)
    return runs
