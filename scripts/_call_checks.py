"""Checks of whole calls on a GPU: random shapes, merging by lse, one CUDA graph, compilations, peak memory."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from _kernel_cases import Case, judge, make
from torch import Tensor

from dit_accel.errors import UsageError
from dit_accel.kernels.block_sparse import block_sparse, block_sparse_feedback, reference, why_not
from dit_accel.kernels.block_sparse.reference import margins
from dit_accel.kernels.compaction import compact_lists
from dit_accel.kernels.pooling import block_means
from dit_accel.kernels.quantize import quantize_blocks
from dit_accel.kernels.selection import select_blocks
from dit_accel.plan import BlockPlan, uniform_starts

FUZZ = 200
VERDICT_BLOCKS = ((128,), (128, 96, 17), (64,), (64, 17))  # tokens of the blocks, which take turns
SKIP_BLOCKS = ((128,), (128, 96, 17), (64,))
OTHERS = ("flash4", "flex")  # other packages' kernels: blocks of one size only, compiled for each shape
SHARE_BEYOND = {
    "full": 0.02,
    "int8_fp8": 0.42,
}  # of inputs, outputs and plan: what a call may hold beside them


def check_calls(impl: str, device: str) -> Iterator[tuple[str, str | None]]:
    """A title and what is wrong (None: nothing) for each check of an implementation."""
    if impl in OTHERS:
        for seed in range(FUZZ // 4 if impl == "flash4" else 40):
            yield from _fuzz(impl, device, seed)
        return
    for seed in range(FUZZ):
        yield from _fuzz(impl, device, seed)
    for precision in ("full", "int8_fp8", "fp8", "int8") if impl == "hopper" else ("full",):
        for head, lengths in itertools.product((64, 128), VERDICT_BLOCKS):
            title = f"{impl}, verdicts, {precision}, D={head}, blocks of {lengths}"
            yield title, _check_verdicts(impl, precision, head, lengths, device)
    if impl == "triton":
        for precision, head, lengths in itertools.product(("full", "int8"), (64, 128), SKIP_BLOCKS):
            title = f"{impl}, what pv_threshold leaves out, {precision}, D={head}, blocks of {lengths}"
            yield title, _check_left_out(impl, precision, head, lengths, device)
        yield f"{impl}, tuning", _check_tuning(device)
    yield f"{impl}, predicting and attending in one CUDA graph", _check_graph(impl)
    yield f"{impl}, other lengths compile nothing", _check_compilations(impl)
    for precision in SHARE_BEYOND if impl == "hopper" else ("full",):
        yield f"{impl}, peak memory, {precision}", _check_memory(impl, precision)


def _fuzz(impl: str, device: str, seed: int) -> Iterator[tuple[str, str | None]]:
    """A random shape and plan: right, deaf to other heads and to what stands behind its lists, and mergeable."""
    pick = random.Random(seed)

    def blocks() -> tuple[int, ...]:
        count, even, longest = pick.randint(1, 9), pick.random() < 0.4, pick.choice((64, 128))
        sizes = [longest if even else pick.choice((longest, longest, 96, 64, 17, 1, 0)) for _ in range(count)]
        sizes = [min(size, longest) for size in sizes]
        sizes[-1] = pick.randint(1, longest)
        return tuple(sizes)

    case = Case(
        dtype=pick.choice((torch.bfloat16, torch.float16)),
        head=pick.choice((64, 128)),
        shape=f"fuzz {seed}",
        batch=pick.randint(1, 2),
        heads=pick.randint(1, 3),
        q_blocks=blocks(),
        k_blocks=blocks(),
        plan=pick.choice(("random", "random", "empty rows", "broadcast", "full", "none")),
        layout=pick.choice(("bshd", "bhsd", "bshd fused")),
    )
    q, k, v, plan = make(case, device, seed)
    bare = [x.transpose(1, 2) if case.layout.startswith("bshd") else x for x in (q, k, v)]
    reason = why_not(impl, *bare, plan)
    if reason is not None and impl in OTHERS:
        return
    if reason is not None:
        yield case.title, reason
        return
    slots = torch.arange(plan.indices.shape[3], device=device)
    behind = torch.where(slots < plan.counts[..., None], plan.indices, 2**30)
    plan = replace(plan, indices=behind)

    def run(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, layout: str) -> tuple[Tensor, Tensor]:
        return block_sparse(q, k, v, plan, layout=layout, impl=impl)

    yield case.title, judge(run, case, q, k, v, plan).problem
    b, h = pick.randrange(case.batch), pick.randrange(case.heads)
    out, lse = block_sparse(*bare, plan, layout="bhsd", impl=impl)
    alone = [torch.full_like(x, torch.nan) for x in bare]
    for poisoned, x in zip(alone, bare, strict=True):
        poisoned[b, h] = x[b, h]
    again, lse_again = block_sparse(*alone, plan, layout="bhsd", impl=impl)
    same = torch.equal(out[b, h], again[b, h]) and torch.equal(lse[b, h], lse_again[b, h])
    yield f"{case.title}, other heads NaN", None if same else "another head or batch row is read"
    between = [x.new_full((2 * case.batch - 1, *x.shape[1:]), torch.nan) for x in bare]
    for poisoned, x in zip(between, bare, strict=True):
        poisoned[::2] = x
    again, lse_again = block_sparse(*(x[::2] for x in between), plan, layout="bhsd", impl=impl)
    same = torch.equal(out, again) and torch.equal(lse, lse_again)
    yield f"{case.title}, every second row of a batch", None if same else "rows between are read"
    if seed % 4 == 0:
        yield f"{case.title}, halves merged by lse", _check_merge(impl, bare, plan, out)


def _check_merge(impl: str, bare: list[Tensor], plan: BlockPlan, whole: Tensor) -> str | None:
    """Attention to two halves of the key blocks, put together with their lse, is attention to all of them."""
    mask = plan.to_mask()
    first = torch.arange(plan.n_k, device=mask.device) < plan.n_k // 2
    known = dict(
        n_q_tokens=plan.n_q_tokens, n_k_tokens=plan.n_k_tokens, max_q_block=plan.max_q_block,
        max_k_block=plan.max_k_block,
    )  # fmt: skip
    parts = [
        block_sparse(
            *bare,
            replace(
                BlockPlan.from_mask(mask & half, plan.q_starts, plan.k_starts, **known),
                even_q=plan.even_q,
                even_k=plan.even_k,
            ),
            layout="bhsd",
            impl=impl,
        )
        for half in (first, ~first)
    ]
    lse = torch.stack([part[1] for part in parts])
    weights = (lse - lse.logsumexp(0)).exp().nan_to_num(0.0)[..., None]
    merged = sum(w * part[0].float() for w, part in zip(weights, parts, strict=True))
    error, size = float((merged - whole.float()).norm()), float(whole.float().norm())
    unit = torch.finfo(whole.dtype).eps
    return None if error <= unit * size + 1e-6 else f"relative error {error / size:.1e}, allowed {unit:.1e}"


def _check_verdicts(
    impl: str, precision: str, head: int, lengths: tuple[int, ...], device: str
) -> str | None:
    """Which entries mattered, against the formula in float64, but for those too close to tell; and the next plan."""
    generator = torch.Generator().manual_seed(head)
    blocks = (lengths * 40)[:37]
    starts = [0, *accumulate(blocks)]
    q, k, v = (torch.randn(2, 3, starts[-1], head, generator=generator) for _ in range(3))
    for first, end in pairwise(starts):  # some blocks matter to all rows, some to none
        k[:, :, first:end] *= 3 * torch.rand(2, 3, 1, 1, generator=generator) ** 2
    q, k, v = (x.to(device, torch.bfloat16) for x in (q, k, v))
    mask = torch.rand(2, 3, len(blocks), len(blocks), generator=generator) < 0.5
    plan = BlockPlan.from_mask(mask.to(device), starts, starts)
    rise, threshold = margins(q.double(), k.double(), plan, head**-0.5), -2.0
    known = dict(layout="bhsd", impl=impl, precision=precision)
    out, lse, needed = block_sparse_feedback(q, k, v, plan, threshold, **known)
    plain, plain_lse = block_sparse(q, k, v, plan, **known)
    if not torch.equal(out, plain) or not torch.equal(lse, plain_lse):
        return "asking changes the result"
    noise = 5e-3 if precision == "full" else 0.4  # of the scores, in powers of two
    eager = 2.0 if precision in ("int8_fp8", "fp8") else 0.0
    slot = torch.arange(needed.shape[3], device=device)
    listed = slot < plan.counts[..., None]
    wrong = needed & (rise < threshold - eager - noise) & ~(rise.isneginf() & listed)
    if bool(wrong.any()) or not bool(needed[rise > threshold + noise].all()):
        return "an entry has the wrong verdict"
    share = float(needed.sum() / listed.sum())
    if not 0.05 < share < 0.95:
        return f"{share:.0%} of the entries mattered: nothing is tested"
    short, right = (compact_lists(plan, needed, impl=name) for name in ("triton", "reference"))
    return None if torch.equal(short.to_mask(), right.to_mask()) else "the next plan is wrong"


def _check_left_out(
    impl: str, precision: str, head: int, lengths: tuple[int, ...], device: str
) -> str | None:
    """`pv_threshold` against the reference with the same tiles. Scores lie about levels, so that no verdict is close;
    values that nobody should multiply are NaN."""
    generator = torch.Generator().manual_seed(head)
    q_blocks, k_blocks = (lengths * 40)[:7], (lengths * 40)[:20]
    q_starts, k_starts = ([0, *accumulate(blocks)] for blocks in (q_blocks, k_blocks))
    n_q, n_k, threshold = q_starts[-1], k_starts[-1], -2.0
    q, k, v = (torch.randn(1, 2, n, head, generator=generator) for n in (n_q, n_k, n_k))
    q, k = 0.5 * q, 0.5 * k
    levels = 4.0 * torch.randint(-3, 1, (1, 2, -(-n_k // 64)), generator=generator)
    levels = levels.repeat_interleave(64, -1)[..., :n_k]
    levels[..., k_starts[-2] :] = 0  # visited first
    q[..., 0], k[..., 0] = head**0.5 / math.log2(math.e), levels
    q, k, v = (x.to(device, torch.bfloat16) for x in (q, k, v))
    mask = torch.rand(1, 2, len(q_blocks), len(k_blocks), generator=generator) < 0.7
    mask[..., -1] = True
    plan, dirty = BlockPlan.from_mask(mask.to(device), q_starts, k_starts), v.clone()
    if precision == "full":
        for h, (first, end) in itertools.product(range(2), pairwise(k_starts)):
            if bool((levels[0, h, first:end] < -2).all()):
                dirty[:, h, first:end] = torch.nan
        if not bool(dirty.isnan().any()):
            return "no block is left out whole: nothing is tested"
    tile = None
    if impl == "triton":
        from dit_accel.kernels.block_sparse.triton import capability_of, config_for

        config = config_for(head, q.dtype, capability_of(q.device), plan.max_k_block)
        tile = config.block_m, config.block_n
    known, scale = dict(layout="bhsd", impl=impl, precision=precision), head**-0.5
    out, lse = block_sparse(q, k, dirty, plan, pv_threshold=threshold, **known)
    if not bool(out.isfinite().all()):
        return "what is left out is multiplied all the same, or a row has nothing"
    asked = dict(pv_threshold=threshold, tile=tile)
    exact, exact_lse = reference.block_sparse(q.double(), k.double(), v.double(), plan, scale, **asked)
    if precision == "full":
        plain, plain_lse = reference.block_sparse(q, k, v, plan, scale, **asked)
    else:
        parts = quantize_blocks(q, k, v, plan, precision, impl="reference")
        plain, plain_lse = reference.block_sparse_quantised(parts, plan, scale, q, **asked)
    whole, _ = block_sparse(q, k, v, plan, **known)
    error, unavoidable, effect = (float((x.double() - exact).norm()) for x in (out, plain, whole))
    if not effect > 4 * unavoidable:
        return f"leaving out changes {effect:.1e}, rounding {unavoidable:.1e}: nothing is tested"
    if not error <= 2 * unavoidable:
        return f"error {error:.1e}, of plain attention {unavoidable:.1e}, of leaving out nothing {effect:.1e}"
    gap, allowed = (float((x - exact_lse).abs().max()) for x in (lse, plain_lse))
    return (
        None if gap <= 2 * allowed + 1e-5 else f"lse is off by {gap:.1e}, plain attention's by {allowed:.1e}"
    )


def _check_tuning(device: str) -> str | None:
    """A few configurations, one of which cannot be compiled; and none while a graph is captured."""
    from dit_accel.kernels.block_sparse.triton import Config
    from dit_accel.kernels.block_sparse.tuning import tune

    q, k, v = (torch.randn(1, 2000, 2, 64, device=device).bfloat16() for _ in range(3))
    starts = uniform_starts(2000, 128)
    plan = BlockPlan.from_mask(torch.rand(1, 2, 16, 16, device=device) < 0.5, starts, starts)
    bad = Config(48, 64, 4, 2)
    found = tune(q, k, v, plan, configs=[bad, Config(128, 64, 4, 3), Config(64, 64, 4, 2)])
    if found.config == bad or found.trials[-1].config != bad or found.trials[1].milliseconds is None:
        return f"tried {found.trials}"
    graph = torch.cuda.CUDAGraph()
    x = torch.zeros(1, device=device)
    try:
        with torch.cuda.graph(graph):
            x += 1
            tune(q, k, v, plan, configs=[bad])
    except UsageError:
        return None
    return "it tunes while a graph is captured"


def _check_graph(impl: str) -> str | None:
    """Captured once, replayed with other tokens, another threshold and a shorter text: the same as run anew."""
    video, text, heads, head = 4096, 200, 3, 128
    generator = torch.Generator("cuda").manual_seed(0)
    starts = torch.cat([torch.arange(0, video, 128), torch.tensor([video, video + 128, video + text])])
    starts = starts.to("cuda", torch.int32)[None, None]
    tokens = video + text
    q, k, v = (
        torch.randn(1, tokens, heads, head, device="cuda", generator=generator).bfloat16() for _ in range(3)
    )
    top_p = torch.tensor(0.5, device="cuda")

    def attend() -> tuple[Tensor, Tensor]:
        scores = block_means(q, starts, 128) @ block_means(k, starts, 128).transpose(2, 3) * head**-0.5
        counts, indices = select_blocks(scores, None, 2, top_p, scores.softmax(-1))
        plan = BlockPlan(counts, indices, starts, starts, tokens, tokens, 128, 128)
        return block_sparse(q, k, v, plan, impl=impl)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            attend()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend()
    for change in range(3):
        with torch.no_grad():
            for x in (q, k, v):
                x.copy_(torch.randn(x.shape, device="cuda", generator=generator))
            top_p.fill_((0.3, 0.9, 0.7)[change])
            end = video + (200, 150, 77)[change]
            starts[..., -2:] = torch.tensor([min(end, video + 128), end], dtype=torch.int32)
        graph.replay()
        expected = attend()
        torch.cuda.synchronize()
        if not torch.equal(found[0][:, :end], expected[0][:, :end]):
            return f"replay {change} differs from running anew"
        if not bool(found[0][:, :end].isfinite().all()):
            return f"replay {change} is not finite"
    return None


def _check_compilations(impl: str) -> str | None:
    import triton

    compiled: list[str] = []

    def note(*_args, fn, **_kwargs) -> None:
        compiled.append(fn.name)

    def attend(tokens: int) -> None:
        q, k, v = (torch.randn(1, tokens, 2, 128, device="cuda").bfloat16() for _ in range(3))
        starts = uniform_starts(tokens, 128)
        known = dict(n_q_tokens=tokens, n_k_tokens=tokens, max_q_block=128, max_k_block=128)
        on_gpu = starts.cuda()
        scores = block_means(q, on_gpu, 128) @ block_means(k, on_gpu, 128).transpose(2, 3)
        counts, indices = select_blocks(scores, None, 2)
        plan = BlockPlan(counts, indices, on_gpu, on_gpu, *known.values(), even_k=True)
        block_sparse(q, k, v, plan, impl=impl)

    attend(4096)  # 32 to 64 blocks: the selection kernel is compiled for each power of two
    attend(4097)
    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        for tokens in (4224, 4225, 5000, 6001, 7777, 8064, 8100):
            attend(tokens)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    return f"compiled again: {', '.join(compiled)}" if compiled else None


def _check_memory(impl: str, precision: str) -> str | None:
    """What a call holds at its peak, inputs and outputs included, on memory that was free."""
    tokens, heads, head = 32768, 12, 128
    q, k, v = (torch.randn(1, heads, tokens, head, device="cuda").bfloat16() for _ in range(3))
    starts = uniform_starts(tokens, 128)
    mask = torch.rand(1, heads, 256, 256, device="cuda") < 0.1
    plan = BlockPlan.from_mask(
        mask, starts, starts, n_q_tokens=tokens, n_k_tokens=tokens, max_q_block=128, max_k_block=128
    )

    def attend() -> tuple[Tensor, Tensor]:
        return block_sparse(q, k, v, plan, layout="bhsd", impl=impl, precision=precision)

    attend()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attend()
    torch.cuda.synchronize()
    spent = torch.cuda.max_memory_allocated() - before
    held = (q, k, v, *out, plan.counts, plan.indices, plan.q_starts, plan.k_starts)
    needed = sum(x.numel() * x.element_size() for x in held)
    beyond = spent - sum(x.numel() * x.element_size() for x in out)
    allowed = SHARE_BEYOND[precision]
    told = f"{beyond / 2**20:.1f} MiB beside {needed / 2**20:.1f} MiB: {beyond / needed:.1%}"
    print(f"peak memory, {impl} {precision}: {told}")
    return None if beyond <= allowed * needed else f"{told}, allowed {allowed:.0%}"
