// The host check: every shape and type of a call, before a kernel sees a pointer.
#include "activation.h"
#include "tensor.h"

namespace actuary {

ort::Status* check(ort::Api api, ort::Context* context, const Activation& activation, bool biased,
                   ort::ElementType type, Call* call) {
  const char* op = biased ? activation.biased_name : activation.name;
  char text[96];
  Tensor x, bias, scalar;
  if (auto* error = read(api, context, 0, op, type, &x)) return error;
  if (x.rank == 0 || x.rank > kMaxRank) {
    return refuse(api, "%s: x has %zu dimensions; it must have 1 to %d, the last of them %s", op, x.rank, kMaxRank,
                  activation.tensors == 2 ? "2H" : "H");
  }
  const int64_t width = x.dims[x.rank - 1];
  if (width % activation.tensors) {
    return refuse(api, "%s: the last dimension of x is odd in %s; it must be 2H, the gate's H and then up's H", op,
                  shape(x, text));
  }
  size_t index = 1;
  call->bias = nullptr;
  if (biased) {
    if (auto* error = read(api, context, index++, op, type, &bias)) return error;
    if (bias.rank != 1 || bias.dims[0] != width) {
      return refuse(api, "%s: bias has shape %s; it must be [%lld], as the last dimension of x", op, shape(bias, text),
                    static_cast<long long>(width));
    }
    if (auto* error = data(api, bias.value, &call->bias)) return error;
  }
  for (int i = 0; i < activation.learned; ++i) {
    if (auto* error = read(api, context, index++, op, type, &scalar)) return error;
    if (scalar.rank > 1 || (scalar.rank == 1 && scalar.dims[0] != 1)) {
      return refuse(api, "%s: learned scalar %d has shape %s; it must be [1]", op, i + 1, shape(scalar, text));
    }
    if (auto* error = data(api, scalar.value, &call->learned[i])) return error;
  }

  int64_t dims[kMaxRank];
  call->rows = 1;
  for (size_t i = 0; i + 1 < x.rank; ++i) call->rows *= dims[i] = x.dims[i];
  call->H = dims[x.rank - 1] = width / activation.tensors;
  ort::Value* y = nullptr;
  if (auto* error = ort::get_output(api, context, size_t{0}, static_cast<const int64_t*>(dims), x.rank, &y)) {
    return error;
  }
  if (auto* error = data(api, x.value, &call->x)) return error;
  return ort::mutable_data(api, y, &call->y);
}

}  // namespace actuary
