"""The forward kernel: one pass of online softmax over tiles of folded query heads.

B batch, K key/value heads, G query heads that share one, L queries, M keys, C head dim, R rows of a tile, Q
places of a tile, W keys of a product. Flash attention: Dao et al. 2022, arXiv 2205.14135; multi-query
attention: Shazeer 2019, arXiv 1911.02150.
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
    Blocks,
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

# Running maxima start here: below any score, and finite, so that a row that has seen nothing but masked keys
# (-inf) gives exp2(-inf) = 0.
LOWEST = -1e38


def forward(
    call: Call,
    q_BKGLC: jax.Array,
    k_BKMC: jax.Array,
    v_BKMC: jax.Array,
    offset_1: jax.Array,
    segments: Segments | None,
    slopes_KG: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Context [B, K, G, L, C] in the queries' dtype and base-2 logsumexp [B, K, G, 1, L] in fp32 (+inf for
    rows that see nothing).

    Lengths are whole blocks, C is a multiple of 128; `ops.py` pads.
    """
    B, K, G, L, C = q_BKGLC.shape
    M = k_BKMC.shape[2]
    blocks = call.blocks
    grid = (B, K, G // blocks.heads, L // blocks.queries, M // blocks.resident_keys)

    def resident(b, k, g, i, s, offset, *_):
        if call.causal and grid[-1] > 1:
            # Resident keys above the diagonal are never visited: asking again for the last useful ones spares the copy.
            last = jax.lax.div(
                jnp.maximum(offset[0] + (i + 1) * blocks.queries - 1, 0), jnp.int32(blocks.resident_keys)
            )
            s = jnp.minimum(s, last)
        return s

    rows = pl.BlockSpec((1, 1, blocks.heads, blocks.queries, C), lambda b, k, g, i, s, *_: (b, k, g, i, 0))
    keys = pl.BlockSpec(
        (1, 1, blocks.resident_keys, C), lambda b, k, g, i, s, *refs: (b, k, resident(b, k, g, i, s, *refs), 0)
    )
    statistics = pl.BlockSpec((1, 1, blocks.heads, 1, blocks.queries), lambda b, k, g, i, s, *_: (b, k, g, 0, i))
    scalars, in_specs, arguments = [offset_1], [rows, keys, keys], [q_BKGLC, k_BKMC, v_BKMC]
    if segments is not None:
        scalars += segments.spans(blocks)
        in_specs += [
            pl.BlockSpec((1, blocks.queries, LANES), lambda b, k, g, i, s, *_: (b, i, 0)),
            pl.BlockSpec(
                (1, 1, blocks.resident_keys), lambda b, k, g, i, s, *refs: (b, 0, resident(b, k, g, i, s, *refs))
            ),
        ]
        arguments += [in_sublanes(segments.queries_BL), in_lanes(segments.keys_BM)]
    if slopes_KG is not None:
        in_specs.append(pl.BlockSpec((1, blocks.heads, 1, LANES), lambda b, k, g, i, s, *_: (k, g, 0, 0)))
        arguments.append(slopes_by_lane(slopes_KG))
    pairs = L * call.length * (0.5 if call.causal and call.length <= L else 1)
    return pl.pallas_call(
        partial(_kernel, call, B, grid[-1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=in_specs,
            out_specs=[rows, statistics],
            scratch_shapes=[
                pltpu.VMEM((blocks.rows, LANES), jnp.float32),
                pltpu.VMEM((blocks.rows, LANES), jnp.float32),
                pltpu.VMEM((blocks.rows, C), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q_BKGLC.shape, q_BKGLC.dtype),
            jax.ShapeDtypeStruct((B, K, G, 1, L), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 4 + ("arbitrary",), vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(4 * B * K * G * pairs * C),
            transcendentals=int(B * K * G * pairs),
            bytes_accessed=2 * q_BKGLC.nbytes + k_BKMC.nbytes + v_BKMC.nbytes + 4 * B * K * G * L,
        ),
        interpret=call.interpret,
        name=f"flash_attention_forward_h{blocks.heads}_q{blocks.queries}_k{blocks.keys}",
    )(*scalars, *arguments)


def _kernel(call: Call, batches: int, parts: int, *refs):
    blocks = call.blocks
    given: list[Any] = list(refs)
    offset_ref = given.pop(0)
    spans = [given.pop(0) for _ in range(4)] if call.segments else []
    q_ref, k_ref, v_ref = (given.pop(0) for _ in range(3))
    q_segments_ref: Any = given.pop(0) if call.segments else None
    k_segments_ref: Any = given.pop(0) if call.segments else None
    slopes_ref: Any = given.pop(0) if call.alibi else None
    context_ref, logsumexp_ref, largest_ref, total_ref, sum_ref = given
    batch, tile, part = pl.program_id(0), pl.program_id(3), pl.program_id(4)
    rows_at_once, C = blocks.rows_at_once, sum_ref.shape[1]
    first_query = offset_ref[0] + tile * blocks.queries
    first_key = part * blocks.resident_keys
    dot = call.dot

    def start_sums():
        largest_ref[...] = jnp.full_like(largest_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def chunk(start, width, masked, by_segment, is_first):
        def scores(row, key, count):
            # Scaled here, in fp32: scaled queries would be rounded once more, and the vector units have the time.
            query_RC, key_WC = rows_of(q_ref, row, rows_at_once), k_ref[0, 0, pl.ds(start + key, count)]
            return dot(query_RC, key_WC, (((1,), (1,)), ((), ()))) * (call.scale * LOG2_E)

        def with_bias_and_mask(scores_RW, row, key, count):
            """Every head of the product has the same mask and its own bias; masked places are set to -inf."""
            unmasked = 0 if by_segment else min(max(width - masked - key, 0), count)
            if unmasked == count and not call.alibi:
                return scores_RW
            places = min(rows_at_once, blocks.queries)
            first_place = row % blocks.queries
            scores_HQW = scores_RW.reshape(rows_at_once // places, places, count)
            distance = first_key + start + key - first_query
            if call.alibi:
                heads = pl.ds(row // blocks.queries, rows_at_once // places)
                along_11W = (jax.lax.broadcasted_iota(jnp.int32, (1, 1, count), 2) + distance).astype(jnp.float32)
                scores_HQW += jnp.tile(slopes_ref[0, heads], (1, 1, count // LANES)) * along_11W
            if unmasked < count:
                shape, conditions = (places, count - unmasked), []
                if width - masked < key + count and call.causal:
                    ahead_QW = jax.lax.broadcasted_iota(jnp.int32, shape, 1) - jax.lax.broadcasted_iota(
                        jnp.int32, shape, 0
                    )
                    conditions.append(ahead_QW <= first_place - distance - unmasked)
                if width - masked < key + count and call.length % blocks.queries:
                    conditions.append(
                        jax.lax.broadcasted_iota(jnp.int32, shape, 1) < call.length - first_key - start - key - unmasked
                    )
                if by_segment:
                    q_segments_QW = jnp.tile(q_segments_ref[0, pl.ds(first_place, places)], (1, count // LANES))
                    conditions.append(q_segments_QW == k_segments_ref[0, :, pl.ds(start + key, count)])
                hidden_HQW = jnp.where(reduce(jnp.logical_and, conditions)[None], scores_HQW[:, :, unmasked:], -jnp.inf)
                scores_HQW = (
                    jnp.concatenate([scores_HQW[:, :, :unmasked], hidden_HQW], axis=2) if unmasked else hidden_HQW
                )
            return scores_HQW.reshape(rows_at_once, count)

        # The scores of the next product are asked for before those of this one are used, which keeps the
        # matrix unit busy during softmax.
        plan = products(blocks, width)
        ahead = scores(*plan[0])
        for place, (row, key, count) in enumerate(plan):
            scores_RW = ahead
            if place + 1 < len(plan):
                ahead = scores(*plan[place + 1])
            scores_RW = with_bias_and_mask(scores_RW, row, key, count)
            rows = pl.ds(row, rows_at_once)
            starts_sums = is_first and key == 0
            before_R = LOWEST if starts_sums else largest_ref[rows]
            largest_R = jnp.broadcast_to(
                jnp.maximum(before_R, scores_RW.max(axis=1, keepdims=True)), (rows_at_once, LANES)
            )
            largest_ref[rows] = largest_R
            weights_RW = jnp.exp2(scores_RW - jnp.tile(largest_R, (1, count // LANES)))
            value_WC = v_ref[0, 0, pl.ds(start + key, count)]
            if blocks.wide_matrix_unit:
                value_WC = jnp.concatenate([value_WC, jnp.ones((count, LANES), value_WC.dtype)], axis=1)
            sum_RC = dot(weights_RW.astype(value_WC.dtype), value_WC, (((1,), (0,)), ((), ())))
            # By the idle half of the matrix unit, or lane by lane: the 128 partial sums of a row are then
            # added up once, at the end.
            by_lane = (weights_RW[:, lane : lane + LANES] for lane in range(0, count, LANES))
            total_R = sum_RC[:, C:] if blocks.wide_matrix_unit else sum(by_lane)
            if starts_sums:
                total_ref[rows], sum_ref[rows] = total_R, sum_RC[:, :C]
            else:
                decay_R = jnp.exp2(before_R - largest_R)
                total_ref[rows] = total_ref[rows] * decay_R + total_R
                sum_ref[rows] = sum_ref[rows] * jnp.tile(decay_R, (1, C // LANES)) + sum_RC[:, :C]

    relation = None
    if call.segments:
        relation = segment_relation(spans, batch, batches, tile, part * (blocks.resident_keys // blocks.keys))
    visit_chunks(call, first_query, first_key, start_sums, chunk, relation, parts=parts)

    @pl.when(part == pl.num_programs(4) - 1)
    def _():
        for row in range(0, blocks.rows, LANES):
            rows, head, places = pl.ds(row, LANES), row // blocks.queries, pl.ds(row % blocks.queries, LANES)
            total_R = total_ref[rows]
            if not blocks.wide_matrix_unit:
                total_R = jnp.broadcast_to(total_R.sum(axis=1, keepdims=True), total_R.shape)
            # A row that sees nothing has sums of 0; its context becomes 0 too. All other totals are about 1 or more.
            divisor_R = jnp.maximum(total_R, 1e-30)
            inverse_R = pl.reciprocal(divisor_R, approx=True)
            # Newton's steps: cheaper than a division; from 8 bits on, one gives twice as many as bf16 has,
            # two are exact to fp32.
            for _ in range(1 if context_ref.dtype == jnp.bfloat16 else 2):
                inverse_R *= 2 - divisor_R * inverse_R
            context_RC = sum_ref[rows] * jnp.tile(inverse_R, (1, C // LANES))
            context_ref[0, 0, head, places] = context_RC.astype(context_ref.dtype)
            total_1R, largest_1R = rows_to_lanes(total_R, largest_ref[rows], blocks)
            logsumexp_1R = jnp.where(total_1R == 0, jnp.inf, largest_1R + jnp.log2(total_1R))
            if call.alibi:
                bias_1Q = alibi_of_places(slopes_ref[0, head : head + 1], blocks.queries)[0]
                logsumexp_1R -= bias_1Q[:, row % blocks.queries : row % blocks.queries + LANES]
            logsumexp_ref[0, 0, head, :, places] = logsumexp_1R


def rows_to_lanes(one_R: jax.Array, other_R: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """Two columns [128, 128] that are repeated over the lanes, as [1, 128] each: what is faster differs with
    the generation."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    if blocks.wide_matrix_unit:
        both = jnp.where(lane == 0, one_R, other_R).T
        return both[:1], both[1:2]
    one_1R, other_1R = (
        jnp.where(row == lane, column_R, 0.0).sum(axis=0, keepdims=True) for column_R in (one_R, other_R)
    )
    return one_1R, other_1R
