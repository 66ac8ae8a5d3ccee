"""A product by int8 weights as an operator of our domain: how its weights lie, and its meaning in standard operators.

    x [..., K] --each row: range, step, zero--> uint8 } -> whole numbers -> * steps -> + bias -> y [..., N]
    W [K, N] -> int8, one step per column, as panels  }

A row's step is its own range over 255, so its answer does not depend on the rows beside it: a batch equals its
singles. The kernel (native/int8_linear.h) reads the panels as they lie in the file, and gives the same numbers to the
last bit, but for the norm's. So does a runtime without it, where its MatMulInteger is exact: ONNX Runtime's is, but
for processors with AVX2 or AVX-512 and no VNNI, where its sums of two products saturate.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray

from export.bundle import DOMAIN, OPSET

INT8_LINEAR = "Int8Linear"
INT8_LINEAR_ADD = "Int8LinearAdd"  # y + residual
RMS_NORM_INT8_LINEAR, LAYER_NORM_INT8_LINEAR = "RmsNormInt8Linear", "LayerNormInt8Linear"  # of a norm of x
PANEL, DEPTH = 64, 4  # kPanel, kDepth of native/int8_linear.h
MOST_ROWS = 1 << 16  # its kMostRows
LEVELS = 255  # steps over the range of a row, with 0 in it
TINY = 1e-35  # kTiny: the step of a row of zeros, whose inverse is a float

_RMS_NORM = """
            squares = Mul (given, given)
            mean_square = ReduceMean (squares, last)
            of_norm = Add (mean_square, epsilon)
            root = Sqrt (of_norm)
            of_size_one = Div (given, root)
            x = Mul (of_size_one, gain)
"""
_LAYER_NORM = """
            mean = ReduceMean (given, last)
            centred = Sub (given, mean)
            squares = Mul (centred, centred)
            mean_square = ReduceMean (squares, last)
            of_norm = Add (mean_square, epsilon)
            root = Sqrt (of_norm)
            of_size_one = Div (centred, root)
            scaled_up = Mul (of_size_one, gain)
            x = Add (scaled_up, shift)
"""
# Name: what x is called when it is given, further inputs, nodes that make x of it, the node that makes y.
FORMS = {
    INT8_LINEAR: ("x", "", "", "y = Add (product, bias)"),
    INT8_LINEAR_ADD: ("x", ", residual", "", "biased = Add (product, bias) y = Add (biased, residual)"),
    RMS_NORM_INT8_LINEAR: ("given", ", gain, epsilon", _RMS_NORM, "y = Add (product, bias)"),
    LAYER_NORM_INT8_LINEAR: ("given", ", gain, epsilon, shift", _LAYER_NORM, "y = Add (product, bias)"),
}


def int8_function(name: str) -> onnx.FunctionProto:
    """The function ai.actuary::NAME, one of Int8Linear's forms.

    Its inputs are x [..., K], weights int8 as `panels` lays them, step [N], sums int32 [N] of W's columns, bias [N];
    then `residual` [..., N], or of a norm gain [K], epsilon [1] and shift [K]. Its output is y [..., N]. K is a
    multiple of DEPTH. What depends on the weights alone a runtime computes when it loads them. A row with NaN or an
    infinity in it comes out as NaN, by `poison`: a minimum may lose it.
    """
    given, inputs, norm, end = FORMS[name]
    text = f"""
        <domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
        {name} ({given}, weights, step, sums, bias{inputs}) => (y)
        {{
            last = Constant <value_ints = [-1]> ()
            nought = Constant <value_float = 0.0> ()
            levels = Constant <value_float = {LEVELS}.0> ()
            tiny = Constant <value_float = {TINY}> ()
            {norm}
            least_of_row = ReduceMin (x, last)
            largest_of_row = ReduceMax (x, last)
            least = Min (least_of_row, nought)
            largest = Max (largest_of_row, nought)
            below = Div (least, levels)
            above = Div (largest, levels)
            range = Sub (above, below)
            finite = Max (range, tiny)
            nothing = Mul (x, nought)
            poison = ReduceSum (nothing, last)
            step_of_row = Add (finite, poison)

            inverse = Reciprocal (step_of_row)
            minus_least = Neg (least)
            scaled_least = Mul (minus_least, inverse)
            zero = Round (scaled_least)
            scaled = Mul (x, inverse)
            rounded = Round (scaled)
            moved = Add (rounded, zero)
            clipped = Min (moved, levels)
            q = Cast <to = {onnx.TensorProto.UINT8}> (clipped)

            by_row = Transpose <perm = [1, 3, 0, 2]> (weights)
            padded = Flatten <axis = 2> (by_row)
            first = Constant <value_ints = [0]> ()
            N = Shape (step)
            columns = Constant <value_ints = [1]> ()
            W = Slice (padded, first, N, columns)
            sum = MatMulInteger (q, W)
            zero_int = Cast <to = {onnx.TensorProto.INT32}> (zero)
            of_zero = Mul (zero_int, sums)
            exact = Sub (sum, of_zero)

            wide = Cast <to = {onnx.TensorProto.FLOAT}> (exact)
            by_column = Mul (wide, step)
            product = Mul (by_column, step_of_row)
            {end}
        }}
    """
    return onnx.parser.parse_function(text)


def panels(W: NDArray[np.int8]) -> NDArray[np.int8]:
    """W [K, N] as [ceil(N / PANEL), K / DEPTH, PANEL, DEPTH]; columns past N are 0."""
    K, N = W.shape
    count = -(-N // PANEL)
    padded = np.pad(W, ((0, 0), (0, count * PANEL - N)))
    return np.ascontiguousarray(padded.reshape(K // DEPTH, DEPTH, count, PANEL).transpose(2, 0, 3, 1))
