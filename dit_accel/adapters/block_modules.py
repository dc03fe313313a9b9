"""What a transformer block is made of, for caches that leave out parts of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockModules:
    """Submodules of one kind of block, by attribute, in order of use.

    What is not named is computed at every step: norms, gates, and a dual block's MLP of text.
    """

    attentions: tuple[str, ...]  # tokens read one another in them; one that is None in a block is passed over
    rows: tuple[str, ...]  # of each token by itself, as an MLP is; the block's last
    # What leads to the only one of `rows`, on the same tokens, beside the attentions. Where some tokens are computed,
    # these and the attentions are asked for those alone, so that nothing needs keeping of what feeds.
    feeds: tuple[str, ...] = ()
    with_text: tuple[str, ...] = ()  # attentions and rows that give the text's tokens too; in rows they come first
