"""The backward kernel: gradients of queries, keys and values in one pass over the same tiles as the forward kernel.

Scores are computed transposed, keys in sublanes and rows of queries in lanes: each row's logsumexp is then
one number a lane, and the weights feed the sums over rows without a transposition.

B batch, K key/value heads, G query heads that share one, L queries, M keys, C head dim, R rows of a tile, W
keys of a product, P parts. Flash attention 2, algorithm 2: Dao 2023, arXiv 2307.08691.
"""

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aurora_jax.kernels.flash_attention.tiles import (
    LANES,
    LOG2_E,
    Call,
    Segments,
    alibi_of_places,
    in_lanes,
    in_sublanes,
    products,
    rows_of,
    segment_relation,
    slopes_by_lane,
    visit_chunks,
)


def backward(
    call: Call,
    parts: int,
    q_BKGLC: jax.Array,
    k_BKMC: jax.Array,
    v_BKMC: jax.Array,
    offset_1: jax.Array,
    segments: Segments | None,
    slopes_KG: jax.Array | None,
    d_context_BKGLC: jax.Array,
    logsumexp_BKG1L: jax.Array,
    delta_BKG1L: jax.Array,
    *,
    q_gradient_dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q [B, K, G, L, C] and, as sums over all queries, of k and v [P, B, K, M, C], these in fp32 if P > 1.

    The M keys are all in VMEM at once with the sums of their gradients: `ops.py` cuts longer ones.

    Args:
        parts: P, into how many the query heads are divided for cores that run at the same time; their key
            gradients are to be added.
        logsumexp_BKG1L: base-2, from `forward`.
        delta_BKG1L: sum over C of d_context * context, less the gradient of the logsumexp.
    """
    B, K, G, L, C = q_BKGLC.shape
    M = k_BKMC.shape[2]
    blocks = call.blocks
    groups = G // blocks.heads // parts
    grid = (B, K, parts, groups, L // blocks.queries)
    rows = pl.BlockSpec((1, 1, blocks.heads, blocks.queries, C), lambda b, k, p, g, i, *_: (b, k, p * groups + g, i, 0))
    keys = pl.BlockSpec((1, 1, M, C), lambda b, k, p, g, i, *_: (b, k, 0, 0))
    statistics = pl.BlockSpec(
        (1, 1, blocks.heads, 1, blocks.queries), lambda b, k, p, g, i, *_: (b, k, p * groups + g, 0, i)
    )
    scalars = [offset_1]
    in_specs = [rows, keys, keys, rows, statistics, statistics]
    arguments = [q_BKGLC, k_BKMC, v_BKMC, d_context_BKGLC, logsumexp_BKG1L, delta_BKG1L]
    if segments is not None:
        scalars += segments.spans(blocks)
        in_specs += [
            pl.BlockSpec((1, 1, blocks.queries), lambda b, k, p, g, i, *_: (b, 0, i)),
            pl.BlockSpec((1, M, LANES), lambda b, k, p, g, i, *_: (b, 0, 0)),
        ]
        arguments += [in_lanes(segments.queries_BL), in_sublanes(segments.keys_BM)]
    if slopes_KG is not None:
        in_specs.append(pl.BlockSpec((1, blocks.heads, 1, LANES), lambda b, k, p, g, i, *_: (k, p * groups + g, 0, 0)))
        arguments.append(slopes_by_lane(slopes_KG))
    gradient_dtype = k_BKMC.dtype if parts == 1 else jnp.float32
    key_sums = (C, M) if blocks.wide_matrix_unit else (M, C)
    pairs = L * call.length * (0.5 if call.causal and call.length <= L else 1)
    return pl.pallas_call(
        partial(_kernel, call, B),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=in_specs,
            out_specs=[rows, *[pl.BlockSpec((1, 1, 1, M, C), lambda b, k, p, g, i, *_: (p, b, k, 0, 0))] * 2],
            scratch_shapes=[
                pltpu.VMEM((C, blocks.rows), jnp.float32),
                pltpu.VMEM((C, M), k_BKMC.dtype),
                pltpu.VMEM(key_sums, jnp.float32),
                pltpu.VMEM(key_sums, jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q_BKGLC.shape, q_gradient_dtype),
            *[jax.ShapeDtypeStruct((parts, *k_BKMC.shape), gradient_dtype)] * 2,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3 + ("arbitrary",) * 2, vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(10 * B * K * G * pairs * C),
            transcendentals=int(B * K * G * pairs),
            bytes_accessed=3 * q_BKGLC.nbytes + 2 * (k_BKMC.nbytes + v_BKMC.nbytes) + 8 * B * K * G * L,
        ),
        interpret=call.interpret,
        name=f"flash_attention_backward_h{blocks.heads}_q{blocks.queries}_k{blocks.keys}",
    )(*scalars, *arguments)


def _kernel(call: Call, batches: int, *refs):
    blocks = call.blocks
    given: list[Any] = list(refs)
    offset_ref = given.pop(0)
    spans = [given.pop(0) for _ in range(4)] if call.segments else []
    q_ref, k_ref, v_ref, d_context_ref, logsumexp_ref, delta_ref = (given.pop(0) for _ in range(6))
    q_segments_ref: Any = given.pop(0) if call.segments else None
    k_segments_ref: Any = given.pop(0) if call.segments else None
    slopes_ref: Any = given.pop(0) if call.alibi else None
    d_q_ref, d_k_ref, d_v_ref, d_q_sum_ref, k_transposed_ref, d_k_sum_ref, d_v_sum_ref = given
    batch, group, tile = pl.program_id(0), pl.program_id(3), pl.program_id(4)
    rows_at_once = blocks.rows_at_once
    places = min(rows_at_once, blocks.queries)
    first_query = offset_ref[0] + tile * blocks.queries
    dot = call.dot
    query_dtype = q_ref.dtype

    @pl.when((group == 0) & (tile == 0))
    def _():
        d_k_sum_ref[...] = jnp.zeros_like(d_k_sum_ref)
        d_v_sum_ref[...] = jnp.zeros_like(d_v_sum_ref)
        k_transposed_ref[...] = k_ref[0, 0].T

    def start_sums():
        d_q_sum_ref[...] = jnp.zeros_like(d_q_sum_ref)

    def by_lane(ref, row):
        """The statistics [1, rows_at_once] of those rows, from a block [heads, 1, queries]."""
        heads = range(row // blocks.queries, (row + rows_at_once - 1) // blocks.queries + 1)
        return jnp.concatenate([ref[0, 0, head, :, pl.ds(row % blocks.queries, places)] for head in heads], axis=1)

    def logsumexp_by_lane(row):
        logsumexp_1R = by_lane(logsumexp_ref, row)
        if not call.alibi:
            return logsumexp_1R
        heads = pl.ds(row // blocks.queries, rows_at_once // places)
        correction_HQ = alibi_of_places(slopes_ref[0, heads], blocks.queries)[
            :, :, row % blocks.queries : row % blocks.queries + places
        ]
        return logsumexp_1R + jnp.concatenate([correction_HQ[head] for head in range(rows_at_once // places)], axis=1)

    def chunk(start, width, masked, by_segment, is_first):
        def first_products(row, key, count):
            keys, contract = pl.ds(start + key, count), (((1,), (1,)), ((), ()))
            scores_WR = dot(k_ref[0, 0, keys], rows_of(q_ref, row, rows_at_once), contract) * (call.scale * LOG2_E)
            return scores_WR, dot(v_ref[0, 0, keys], rows_of(d_context_ref, row, rows_at_once), contract)

        def with_bias_and_mask(scores_WR, row, key, count):
            unmasked = 0 if by_segment else min(max(width - masked - key, 0), count)
            if unmasked == count and not call.alibi:
                return scores_WR
            first_place = row % blocks.queries
            distance = start + key - first_query
            conditions = []
            if unmasked < count:
                shape = (count - unmasked, places)
                if width - masked < key + count and call.causal:
                    ahead_WQ = jax.lax.broadcasted_iota(jnp.int32, shape, 0) - jax.lax.broadcasted_iota(
                        jnp.int32, shape, 1
                    )
                    conditions.append(ahead_WQ <= first_place - distance - unmasked)
                if width - masked < key + count and call.length % blocks.queries:
                    conditions.append(
                        jax.lax.broadcasted_iota(jnp.int32, shape, 0) < call.length - start - key - unmasked
                    )
                if by_segment:
                    k_segments_WQ = jnp.tile(k_segments_ref[0, pl.ds(start + key, count)], (1, places // LANES))
                    conditions.append(k_segments_WQ == q_segments_ref[0, :, pl.ds(first_place, places)])
            if call.alibi:
                along_WQ = jax.lax.broadcasted_iota(jnp.int32, (count, LANES), 0) + distance
                along_WQ = jnp.tile(along_WQ.astype(jnp.float32), (1, places // LANES))
            visible_WQ = reduce(jnp.logical_and, conditions) if conditions else None
            pieces = []
            for head in range(rows_at_once // places):
                scores_WQ = scores_WR[:, head * places : (head + 1) * places]
                if call.alibi:
                    slope_1Q = jnp.tile(slopes_ref[0, row // blocks.queries + head], (1, places // LANES))
                    scores_WQ += along_WQ * slope_1Q
                if visible_WQ is not None:
                    hidden_WQ = jnp.where(visible_WQ, scores_WQ[unmasked:], -jnp.inf)
                    scores_WQ = jnp.concatenate([scores_WQ[:unmasked], hidden_WQ], axis=0) if unmasked else hidden_WQ
                pieces.append(scores_WQ)
            return jnp.concatenate(pieces, axis=1)

        def add_to_keys(sum_ref, keys, weights_WR, array_RC):
            if blocks.wide_matrix_unit:
                sum_ref[:, keys] += dot(array_RC, weights_WR, (((0,), (1,)), ((), ())))
            else:
                sum_ref[keys] += dot(weights_WR, array_RC, (((1,), (0,)), ((), ())))

        plan = products(blocks, width)
        ahead = first_products(*plan[0])
        for place, (row, key, count) in enumerate(plan):
            scores_WR, d_weights_WR = ahead
            if place + 1 < len(plan):
                ahead = first_products(*plan[place + 1])
            scores_WR = with_bias_and_mask(scores_WR, row, key, count)
            weights_WR = jnp.exp2(scores_WR - logsumexp_by_lane(row))
            d_scores_WR = (weights_WR * (d_weights_WR - by_lane(delta_ref, row))).astype(query_dtype)
            keys = pl.ds(start + key, count)
            add_to_keys(d_v_sum_ref, keys, weights_WR.astype(query_dtype), rows_of(d_context_ref, row, rows_at_once))
            add_to_keys(d_k_sum_ref, keys, d_scores_WR, rows_of(q_ref, row, rows_at_once))
            rows = pl.ds(row, rows_at_once)
            d_q_sum_CR = dot(k_transposed_ref[:, keys], d_scores_WR, (((1,), (0,)), ((), ())))
            d_q_sum_ref[:, rows] = d_q_sum_CR if is_first and key == 0 else d_q_sum_ref[:, rows] + d_q_sum_CR

    relation = segment_relation(spans, batch, batches, tile, 0) if call.segments else None
    visit_chunks(call, first_query, 0, start_sums, chunk, relation)
    d_q_ref[0, 0] = (d_q_sum_ref[...].T * call.scale).astype(d_q_ref.dtype).reshape(d_q_ref.shape[2:])

    @pl.when((group == pl.num_programs(3) - 1) & (tile == pl.num_programs(4) - 1))
    def _():
        for d_ref, sum_ref, factor in ((d_k_ref, d_k_sum_ref, call.scale), (d_v_ref, d_v_sum_ref, 1.0)):
            sum_MC = sum_ref[...].T if blocks.wide_matrix_unit else sum_ref[...]
            d_ref[0, 0, 0] = (sum_MC * factor).astype(d_ref.dtype)
