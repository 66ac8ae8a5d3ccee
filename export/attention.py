"""Causal attention over packed prompts with a cache of keys and values: the two operators that stand in the blocks.

    qkv [N, (heads + 2 kv_heads) D] --QK-norm, RoPE--> q, k, v        N tokens of B prompts, one prompt after another
    keys and values of each prompt's earlier tokens                   rows `past_slots` of past [L, S, 2 kv_heads D]
    softmax(q k^T, causal, each prompt by itself) v                   -> y [N, heads D]
    k and v of these N tokens                                         -> present [1, N, 2 kv_heads D]

`CachedAttention` answers every token; `CachedAttentionOfRows` the rows `asked` [R] alone, of q [R, heads D] and
kv [N, 2 kv_heads D] apart, which is what the last block needs. The scores' scale stands in the weights that make q.

Both are operators of our domain whose meaning travels in the file as a function of standard operators, printed here;
their kernel is native/attention.cpp. The function pads the prompts to [B, T], the kernel takes them as they are.
"""

from __future__ import annotations

import onnx
import onnx.parser

from export.bundle import ATTENTION, DOMAIN, OPSET

PACKED, OF_ROWS = ATTENTION
ATTRIBUTES = ("heads", "kv_heads", "layer", "eps")  # eps: of QK-norm
# int64 [B]; float [L, S, 2 kv_heads D], all of it finite; int64 [B or 1, P]; int64 [B or 1]
SHARED = ("lengths", "past", "past_slots", "past_lengths")
ROPE = ("cos", "sin")  # float [context, D / 2] each
GAINS = ("q_gain", "k_gain")  # float [D] each


def functions(heads: int, kv_heads: int, head_dim: int, rope: bool, normed: bool) -> list[onnx.FunctionProto]:
    """The meaning of both for one model; `normed`: q and k are, which are turned then too."""
    shared = ", ".join((*SHARED, *(ROPE if rope else ()), *(GAINS if normed else ())))
    head = f'<opset_import: ["": {OPSET}, "{DOMAIN}": 1], domain: "{DOMAIN}">'
    attributes = ", ".join(ATTRIBUTES)
    body = _packed(heads, kv_heads, head_dim, rope, normed)
    texts = (
        f"{PACKED} <{attributes}> (qkv, {shared}) => (y, present) {{{body}}}",
        f"{OF_ROWS} <{attributes}> (q, kv, asked, {shared}) => (y, present) {{{_of_rows(shared)}}}",
    )
    made = [onnx.parser.parse_function(f"{head} {text}") for text in texts]
    for function in made:
        for node in function.node:  # once inlined, a node is known by its name alone (export/audit.py)
            node.name = f"{function.name}:{node.output[0]}"
    return made


def _norm(x: str, y: str, gain: str) -> str:
    """y = x / sqrt(mean(x^2) + eps) * gain over the last axis."""
    return f"""
        {y}_square = Mul ({x}, {x})
        {y}_mean = ReduceMean <keepdims: int = 1> ({y}_square, ax_last)
        {y}_sum = Add ({y}_mean, eps)
        {y}_root = Sqrt ({y}_sum)
        {y}_unit = Div ({x}, {y}_root)
        {y} = Mul ({y}_unit, {gain})
    """


def _turn(x: str, y: str) -> str:
    """RoPE: channel i of x [N, ., ., D] with channel i + D / 2."""
    return f"""
        {y}_a, {y}_b = Split <axis: int = -1, num_outputs: int = 2> ({x})
        {y}_ac = Mul ({y}_a, cos_n)
        {y}_bs = Mul ({y}_b, sin_n)
        {y}_bc = Mul ({y}_b, cos_n)
        {y}_as = Mul ({y}_a, sin_n)
        {y}_first = Sub ({y}_ac, {y}_bs)
        {y}_second = Add ({y}_bc, {y}_as)
        {y} = Concat <axis: int = -1> ({y}_first, {y}_second)
    """


def _packed(heads: int, kv_heads: int, D: int, rope: bool, normed: bool) -> str:
    group = heads // kv_heads
    q, k = "q_packed", "k_packed"  # [N, kv_heads, group, D], [N, kv_heads, 1, D]
    prepared = ""
    if normed:
        prepared += """
        eps = Constant <value_float: float = @eps> ()
        ax_last = Constant <value_ints: ints = [-1]> ()
        """
        prepared += _norm(q, "q_normed", "q_gain") + _norm(k, "k_normed", "k_gain")
        q, k = "q_normed", "k_normed"
    if rope:
        prepared += """
        at = Add (t, past_column)
        at_inside = Where (inside, at, zero)
        positions = Compress (at_inside, counted)
        ax12 = Constant <value_ints: ints = [1, 2]> ()
        cos_rows = Gather <axis: int = 0> (cos, positions)
        sin_rows = Gather <axis: int = 0> (sin, positions)
        cos_n = Unsqueeze (cos_rows, ax12)
        sin_n = Unsqueeze (sin_rows, ax12)
        """
        prepared += _turn(q, "q_turned") + _turn(k, "k_turned")
        q, k = "q_turned", "k_turned"
    return f"""
        zero = Constant <value_int: int = 0> ()
        one = Constant <value_int: int = 1> ()
        ax0 = Constant <value_ints: ints = [0]> ()
        ax1 = Constant <value_ints: ints = [1]> ()
        flat = Constant <value_ints: ints = [-1]> ()
        T = ReduceMax <keepdims: int = 0> (lengths)
        t = Range (zero, T, one)
        t_column = Unsqueeze (t, ax1)
        lengths_column = Unsqueeze (lengths, ax1)
        past_column = Unsqueeze (past_lengths, ax1)
        inside = Less (t, lengths_column)
        counted = Reshape (inside, flat)
        ends = CumSum (lengths, zero)
        starts = Sub (ends, lengths)
        starts_column = Unsqueeze (starts, ax1)
        row = Add (starts_column, t)
        ends_column = Unsqueeze (ends, ax1)
        last_row = Sub (ends_column, one)
        own_row = Min (row, last_row)
        unpack = Max (own_row, zero)

        widths = Constant <value_ints: ints = [{heads * D}, {kv_heads * D}, {kv_heads * D}]> ()
        q_flat, k_flat, v_flat = Split <axis: int = -1> (qkv, widths)
        q_shape = Constant <value_ints: ints = [0, {kv_heads}, {group}, {D}]> ()
        k_shape = Constant <value_ints: ints = [0, {kv_heads}, 1, {D}]> ()
        q_packed = Reshape (q_flat, q_shape)
        k_packed = Reshape (k_flat, k_shape)
        {prepared}
        row_shape = Constant <value_ints: ints = [0, {kv_heads * D}]> ()
        k_rows = Reshape ({k}, row_shape)
        kv_rows = Concat <axis: int = -1> (k_rows, v_flat)
        present = Unsqueeze (kv_rows, ax0)

        layer = Constant <value_int: int = @layer> ()
        S = Shape <start: int = 1, end: int = 2> (past)
        of_layer = Mul (S, layer)
        slot_rows = Add (past_slots, of_layer)
        B = Shape (lengths)
        B_by_1 = Concat <axis: int = 0> (B, ax1)
        slots = Expand (slot_rows, B_by_1)
        pool_shape = Constant <value_ints: ints = [-1, {2 * kv_heads * D}]> ()
        pool = Reshape (past, pool_shape)
        kv_old = Gather <axis: int = 0> (pool, slots)
        kv_new = Gather <axis: int = 0> (kv_rows, unpack)
        kv_all = Concat <axis: int = 1> (kv_old, kv_new)
        k_all, v_all = Split <axis: int = -1, num_outputs: int = 2> (kv_all)
        heads_shape = Constant <value_ints: ints = [0, 0, {kv_heads}, 1, {D}]> ()
        k_heads = Reshape (k_all, heads_shape)
        v_heads = Reshape (v_all, heads_shape)
        k_last = Transpose <perm: ints = [0, 2, 3, 4, 1]> (k_heads)
        v_last = Transpose <perm: ints = [0, 2, 3, 1, 4]> (v_heads)
        q_padded = Gather <axis: int = 0> ({q}, unpack)
        q_last = Transpose <perm: ints = [0, 2, 3, 1, 4]> (q_padded)
        scores = MatMul (q_last, k_last)

        P = Shape <start: int = 1, end: int = 2> (past_slots)
        P_scalar = Squeeze (P)
        p = Range (zero, P_scalar, one)
        p_counts = Less (p, past_column)
        p_row = Unsqueeze (p_counts, ax1)
        padded_shape = Shape (inside)
        old_shape = Concat <axis: int = 0> (padded_shape, P)
        T_only = Shape (t)
        new_shape = Concat <axis: int = 0> (padded_shape, T_only)
        old_seen = Expand (p_row, old_shape)
        causal = GreaterOrEqual (t_column, t)
        new_seen = Expand (causal, new_shape)
        seen = Concat <axis: int = -1> (old_seen, new_seen)
        ax_heads = Constant <value_ints: ints = [1, 2]> ()
        seen_heads = Unsqueeze (seen, ax_heads)
        never = Constant <value_float: float = -inf> ()
        seen_scores = Where (seen_heads, scores, never)
        weights = Softmax <axis: int = -1> (seen_scores)
        y_last = MatMul (weights, v_last)
        y_padded = Transpose <perm: ints = [0, 3, 1, 2, 4]> (y_last)
        y_shape = Constant <value_ints: ints = [-1, {heads * D}]> ()
        y_rows = Reshape (y_padded, y_shape)
        y = Compress <axis: int = 0> (y_rows, counted)
    """


def _of_rows(shared: str) -> str:
    """The rows that nobody asked for have q = 0, and their answers are left out."""
    same = ", ".join(f"{name}: {'float' if name == 'eps' else 'int'} = @{name}" for name in ATTRIBUTES)
    return f"""
        ax1 = Constant <value_ints: ints = [1]> ()
        N = Shape <start: int = 0, end: int = 1> (kv)
        width = Shape <start: int = 1, end: int = 2> (q)
        shape = Concat <axis: int = 0> (N, width)
        nothing = ConstantOfShape (shape)
        asked_column = Unsqueeze (asked, ax1)
        q_rows = ScatterND (nothing, asked_column, q)
        qkv = Concat <axis: int = -1> (q_rows, kv)
        every, present = {DOMAIN}.{PACKED} <{same}> (qkv, {shared})
        y = Gather <axis: int = 0> (every, asked)
    """
