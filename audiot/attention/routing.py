"""Routing attention: k-means centroids decide which frames meet."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from audiot.attention.grouped import grouped_attention, has_kernel
from audiot.attention.mechanism import QueryKeyMechanism, at_least_one, check_type, masked_softmax, query_key_scores
from audiot.positions import Positions

try:
    from audiot.kernels import routing as routing_kernels
except ImportError:  # Triton comes with PyTorch's builds for CUDA only
    routing_kernels = None  # type: ignore[assignment]

SCORE_RESOLUTION = 2**10  # steps per unit, so that a score is a 15-bit number
MAX_SCORE = 16
# Score and number of a frame share a 32-bit rank.
MAX_RANKED_FRAMES = 2**17


class Routing(QueryKeyMechanism):
    """Routing Transformer's attention (Roy et al. 2021, arXiv:2003.05997, section 4.1 and algorithm 1).

    Each head of each sequence computes, over its real frames alone:

    1. Queries and keys are two projections of the frame. A LayerNorm without parameters normalises them.
    2. There are C centroids, which are vectors of length 1. Each takes the w queries that have the largest products with it,
       and in the same way w keys. Where a sequence has fewer, it takes all. So clusters are balanced, a query may be in
       several of them or in none, and no sequence depends on its companions in the batch.
    3. The queries of a cluster attend to all of its keys, earlier and later: softmax(QKᵀ/√D)V of the normalised vectors. Rotary
       positions turn these vectors after the choice, which depends on content alone. The bias of other positions is added to the
       scores.
    4. A query gets the mean of its results in the clusters that took it, and zeros where none did. (The residual connection
       carries the frame on.) With C·w = 2T that happens to 13% of the frames (e⁻²) where these form no clusters. It happens
       to less than 1% where they do and the centroids lie there.

    The centroids are state, which no gradient trains. In training, a query or key belongs to the one centroid with which its
    product is largest. `forward` only sums these vectors up. Once per step of the optimiser, `after_step` moves each centroid
    to which any vectors belong, in any batch and on any rank. With m the mean of its queries and keys, scaled to length 1, it
    becomes λ·centroid + (1 − λ)·m, scaled to length 1. The others stay. Evaluation moves none.

    Differs from the paper:

    - Nothing is causal. The paper's causal model uses its queries as keys; here `share_query_key` does that, and each frame then
      counts once for the centroids.
    - All heads route. The paper has heads with local attention beside them.
    - A cluster takes twice the paper's w = T/C by default. The size w does not follow the length, as padding would change it.
    - A centroid moves towards the direction of a mean and keeps its length. The paper adds (1 − λ)/2 times the sum of the
      queries, and as much of the keys.
    - Products are rounded down to a multiple of 2⁻¹⁰ before a cluster takes the largest. Of equal ones it takes the earlier
      frame's. So the choice is the same on every device and with any padding.

    Works at any length.

    Cost: O(C·T·d) time to choose and O(C·w²·d) to attend, hence O(T√T·d) with the defaults at T = `max_frames`. Memory is O(C·T).
    There are C·d numbers of state, and no parameters beside the projections.

    The other arguments are those of `QueryKeyMechanism`.

    Args:
        max_frames: Length that the default sizes are for.
        num_clusters: Number of centroids C; None = √`max_frames`.
        cluster_size: Number w of queries, and of keys, in a cluster; None = 2·`max_frames`/C, up to a multiple of 8.
        ema_decay: Share λ of a centroid that a step leaves as it was.

    Raises:
        ValueError: a size is not positive, `ema_decay` is outside [0, 1], or the head size is above 256.
    """

    rotates_itself = True
    subquadratic = True
    centroids: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_frames: int,
        dropout: float = 0.0,
        share_query_key: bool = False,
        num_clusters: int | None = None,
        cluster_size: int | None = None,
        ema_decay: float = 0.999,
    ) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout, share_query_key)
        sizes = {"num_clusters": num_clusters, "cluster_size": cluster_size}
        at_least_one(**{name: size for name, size in sizes.items() if size is not None})
        check_type(float, ema_decay=ema_decay)
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay is {ema_decay}: set it within 0 and 1")
        if self.head_dim > MAX_SCORE**2:
            raise ValueError(f"routing needs heads of at most 256 elements but embed_dim / num_heads is {self.head_dim}")
        self.num_clusters = num_clusters or round(math.sqrt(max_frames))
        self.cluster_size = cluster_size or -(-2 * max_frames // self.num_clusters // 8) * 8
        self.ema_decay = ema_decay
        centroids = F.normalize(torch.randn(num_heads, self.num_clusters, self.head_dim), dim=-1)
        self.register_buffer("centroids", centroids)
        # What the forwards since the last step have seen. They are no buffers: DistributedDataParallel would overwrite those
        # of the ranks with rank 0's, and a checkpoint has no use for them.
        self._sums = torch.zeros(num_heads, self.num_clusters, self.head_dim)
        self._counts = torch.zeros(num_heads, self.num_clusters)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """Attend inside the clusters.

        On a GPU, sums over clusters may be taken in any order, and the kernels drop a pair of frames in all of its clusters or in
        none.
        """
        query, key = self._normalised(query, key)
        queries, nearest = self._clusters(query, valid)
        keys, nearest_to_keys = (queries, nearest) if key is query else self._clusters(key, valid)
        if self.training:
            self._record(query, nearest, valid)
            if key is not query:
                self._record(key, nearest_to_keys, valid)
        query, key = positions.rotate(query), positions.rotate(key)
        return grouped_attention(query, key, value, queries, keys, dropout=self.dropout_now, positions=positions)

    def dense_weights(self, query: Tensor, key: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """The mean over a query's clusters of the softmax over the cluster's keys, (B, H, T, T)."""
        query, key = self._normalised(query, key)
        queries, keys = self._members(query, valid), self._members(key, valid)  # B, H, C, T
        scores = query_key_scores(positions.rotate(query), positions.rotate(key), positions)
        weights, count = torch.zeros_like(scores), torch.zeros_like(scores[..., :1])
        for cluster in range(self.num_clusters):
            chosen = queries[:, :, cluster, :, None]
            weights = weights + masked_softmax(scores, chosen & keys[:, :, cluster, None, :])
            count = count + chosen
        return weights / count.clamp_min(1)

    def dense_choice(self, query: Tensor, key: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """The keys that share a cluster with the query, bool (B, H, T, T)."""
        query, key = self._normalised(query, key)
        queries, keys = self._members(query, valid).float(), self._members(key, valid).float()
        return queries.transpose(-2, -1) @ keys > 0

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the centroids by what the forwards since the last step have seen, on all ranks together."""
        sums, counts = self._sums, self._counts
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        centroids = self.centroids.float()
        mean = F.normalize(sums, dim=-1)  # its direction: the number of vectors cancels
        moved = F.normalize(self.ema_decay * centroids + (1 - self.ema_decay) * mean, dim=-1)
        # A step of infinite or undefined frames, as mixed precision skips it, must not spoil the centroids for good.
        seen = (counts[..., None] > 0) & sums.isfinite().all(dim=-1, keepdim=True)
        self.centroids.copy_(torch.where(seen, moved, centroids))
        sums.zero_()
        counts.zero_()

    def discard(self, skipped: Tensor) -> None:
        """Empty the sums where the step is skipped."""
        self._sums.masked_fill_(skipped, 0)
        self._counts.masked_fill_(skipped, 0)

    def _normalised(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """LayerNorm without parameters, in the precision of the input."""
        shape = (self.head_dim,)
        normalised = F.layer_norm(query, shape).to(query.dtype)
        return normalised, normalised if key is query else F.layer_norm(key, shape).to(key.dtype)

    @torch.no_grad()
    def _clusters(self, frames: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """The frames that each centroid takes, and each frame's nearest centroid.

        Returns:
            Numbers of frames (B, H, C, min(w, T)), −1 where there are fewer real ones, and numbers of centroids (B, H, T).
        """
        num_frames = frames.shape[-2]
        if num_frames > MAX_RANKED_FRAMES:
            raise ValueError(f"sequence has {num_frames} frames but routing ranks {MAX_RANKED_FRAMES}: take shorter audio")
        size = min(self.cluster_size, num_frames)
        limit = MAX_SCORE * SCORE_RESOLUTION - 1
        if has_kernel(frames) and num_frames <= routing_kernels.MAX_FRAMES:
            steps, nearest = routing_kernels.centroid_scores(frames, self.centroids, SCORE_RESOLUTION, limit)
            return routing_kernels.largest(steps, valid, size, limit), nearest
        scores = self._scores(frames)
        steps = (scores * SCORE_RESOLUTION).floor().clamp(-limit, limit)
        return _largest(steps, valid, size), scores.argmax(dim=-2)

    def _scores(self, frames: Tensor) -> Tensor:
        """Products of the centroids with normalised frames (B, H, T, D): (B, H, C, T), in float32 or better."""
        with torch.autocast(frames.device.type, enabled=False):
            dtype = torch.promote_types(frames.dtype, torch.float32)
            return self.centroids.to(dtype) @ frames.to(dtype).transpose(-2, -1)

    def _members(self, frames: Tensor, valid: Tensor | None) -> Tensor:
        """Which frames each centroid takes, bool (B, H, C, T)."""
        chosen = self._clusters(frames, valid)[0].long()
        members = torch.zeros((*chosen.shape[:3], frames.shape[-2] + 1), dtype=torch.bool, device=frames.device)
        return members.scatter(-1, torch.where(chosen < 0, frames.shape[-2], chosen), True)[..., :-1]

    @torch.no_grad()
    def _record(self, frames: Tensor, nearest: Tensor, valid: Tensor | None) -> None:
        """Add real frames to the sums of their nearest centroids, whose numbers are `nearest` (B, H, T).

        Activation checkpointing computes a step's forward twice. The second adds the same again to sums and counts, which leaves
        their ratio as it is.
        """
        cluster = torch.arange(self.num_clusters, device=frames.device)[:, None]
        member = nearest[:, :, None] == cluster  # B, H, C, T
        if valid is not None:
            member = member & valid[:, None, None, :]
            frames = frames.masked_fill(~valid[:, None, :, None], 0)
        self._counts.add_(member.sum(dim=(0, 3)))
        with torch.autocast(frames.device.type, enabled=False):
            self._sums.add_((member.to(frames.dtype) @ frames).sum(dim=0, dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> Routing:
        super()._apply(fn, recurse)
        # They are emptied, as memory may come without values: when a module that was built on the meta device gets its own, say.
        self._sums = torch.zeros_like(fn(self._sums), dtype=torch.float32)
        self._counts = torch.zeros_like(fn(self._counts), dtype=torch.float32)
        return self


def _largest(steps: Tensor, valid: Tensor | None, size: int) -> Tensor:
    """The `size` real frames with the largest steps (B, H, C, T) per row, of equal ones the earlier; −1 where none is left."""
    number = torch.arange(steps.shape[-1], device=steps.device, dtype=torch.int32)
    # One integer ranks by score, then by number: equal frames (digital silence) fall to the same side everywhere.
    rank = steps.to(torch.int32) * MAX_RANKED_FRAMES + (MAX_RANKED_FRAMES - 1 - number)
    padded = torch.iinfo(torch.int32).min
    if valid is not None:
        rank = rank.masked_fill(~valid[:, None, None, :], padded)
    best, chosen = rank.topk(size, dim=-1, sorted=False)
    return chosen.to(torch.int32) if valid is None else chosen.to(torch.int32).masked_fill(best == padded, -1)
