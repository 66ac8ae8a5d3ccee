// What the host checks share: one tensor of a call as it is read, and refusals in words.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "ort_abi.h"

namespace actuary {

constexpr int kMaxRank = 16;

struct Tensor {
  const ort::Value* value;
  int type;
  const int64_t* dims;
  size_t rank;
};

inline ort::Status* refuse(ort::Api api, const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return ort::create_status(api, ort::kInvalidArgument, static_cast<const char*>(message));
}

// "[2, 3, 5]" into `text`, which holds the first few dimensions of any rank.
inline const char* shape(const Tensor& tensor, char (&text)[96]) {
  int used = snprintf(text, sizeof text, "[");
  for (size_t i = 0; i < tensor.rank && used < 64; ++i) {
    used += snprintf(text + used, sizeof text - used, i ? ", %lld" : "%lld", static_cast<long long>(tensor.dims[i]));
  }
  snprintf(text + used, sizeof text - used, "]");
  return text;
}

inline ort::Status* read(ort::Api api, const ort::Context* context, size_t index, const char* op,
                         ort::ElementType type, Tensor* tensor) {
  if (auto* error = ort::get_input(api, context, index, &tensor->value)) return error;
  if (!tensor->value) return refuse(api, "%s: input %zu is missing", op, index);
  if (auto* error = ort::type_and_shape(api, tensor->value, &tensor->type, &tensor->dims, &tensor->rank)) return error;
  if (tensor->type != type) {
    return refuse(api, "%s: input %zu has element type %d; this kernel takes type %d only", op, index, tensor->type,
                  static_cast<int>(type));
  }
  return nullptr;
}

inline ort::Status* data(ort::Api api, const ort::Value* value, const void** pointer) {
  return ort::mutable_data(api, const_cast<ort::Value*>(value), const_cast<void**>(pointer));
}

}  // namespace actuary
