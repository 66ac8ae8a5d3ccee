// CachedAttention and CachedAttentionOfRows as ONNX Runtime sees them: attributes, the host check, threads. Float on the
// CPU alone; everywhere else their function runs.
#include <algorithm>
#include <atomic>
#include <climits>
#include <memory>
#include <new>

#include "attention.h"
#include "tensor.h"
#include "isa.h"

namespace actuary {
namespace {

struct Op : ort::CustomOp {
  ort::Api api;
  bool of_rows;
};

struct Kernel {
  const Op* op;
  int64_t heads, kv_heads, layer;
  float eps;
};

// Where each input stands after the first ones: qkv, or q, kv and asked.
enum Shared : size_t { kLengths, kPast, kPastSlots, kPastLengths, kCos, kSin, kQGain, kKGain, kSharedCount };

constexpr int64_t kMostHeads = 1 << 16;  // so that sizes made of a file's attributes do not overflow

const Op& op_of(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }
const char* name_of(const ort::CustomOp* op) {
  return op_of(op).of_rows ? "CachedAttentionOfRows" : "CachedAttention";
}
size_t first_count(const ort::CustomOp* op) { return op_of(op).of_rows ? 3 : 1; }

ort::Status* create_kernel(const ort::CustomOp* op, ort::Api api, const ort::KernelInfo* info, void** out) {
  auto kernel = std::make_unique<Kernel>();
  kernel->op = &op_of(op);
  if (auto* error = ort::attribute_int(api, info, static_cast<const char*>("heads"), &kernel->heads)) return error;
  if (auto* error = ort::attribute_int(api, info, static_cast<const char*>("kv_heads"), &kernel->kv_heads)) return error;
  if (auto* error = ort::attribute_int(api, info, static_cast<const char*>("layer"), &kernel->layer)) return error;
  if (auto* error = ort::attribute_float(api, info, static_cast<const char*>("eps"), &kernel->eps)) return error;
  if (kernel->heads < 1 || kernel->heads > kMostHeads || kernel->kv_heads < 1 || kernel->heads % kernel->kv_heads ||
      kernel->layer < 0) {
    return refuse(api, "%s: heads %lld, kv_heads %lld, layer %lld; heads must be a multiple of kv_heads", name_of(op),
                  static_cast<long long>(kernel->heads), static_cast<long long>(kernel->kv_heads),
                  static_cast<long long>(kernel->layer));
  }
  *out = kernel.release();
  return nullptr;
}

// One call with what its pointers point into.
struct Call : Attention {
  std::vector<int64_t> positions, tokens, rows;
  std::vector<Prompt> each;
  std::unique_ptr<float[]> q_turned;
};

ort::Status* read_all(ort::Api api, ort::Context* context, const Kernel& kernel, Call* call) {
  const char* op = name_of(kernel.op);
  const size_t first = first_count(kernel.op);
  const bool of_rows = kernel.op->of_rows;
  char text[96];
  size_t count = 0;
  if (auto* error = ort::input_count(api, context, &count)) return error;
  Tensor q, kv, asked, shared[kSharedCount];
  if (auto* error = read(api, context, 0, op, ort::kFloat, &q)) return error;
  if (of_rows) {
    if (auto* error = read(api, context, 1, op, ort::kFloat, &kv)) return error;
    if (auto* error = read(api, context, 2, op, ort::kInt64, &asked)) return error;
  }
  const size_t given = count - first;
  for (size_t i = 0; i < given; ++i) {
    const ort::ElementType type = i == kPast || i >= kCos ? ort::kFloat : ort::kInt64;
    if (auto* error = read(api, context, first + i, op, type, &shared[i])) return error;
  }
  if (given != kCos && given != kQGain && given != kSharedCount) {
    return refuse(api, "%s: %zu inputs; cos and sin come together, and so do q_gain and k_gain after them", op, count);
  }
  const struct {
    const Tensor& tensor;
    const char* name;
    size_t rank;
  } ranks[] = {{q, of_rows ? "q" : "qkv", 2}, {shared[kLengths], "lengths", 1}, {shared[kPast], "past", 3},
               {shared[kPastSlots], "past_slots", 2}, {shared[kPastLengths], "past_lengths", 1}};
  for (const auto& [tensor, name, rank] : ranks) {
    if (tensor.rank != rank) {
      return refuse(api, "%s: %s has shape %s; it must have %zu dimensions", op, name, shape(tensor, text), rank);
    }
  }
  if (of_rows && (kv.rank != 2 || asked.rank != 1 || asked.dims[0] != q.dims[0])) {
    return refuse(api, "%s: kv must have 2 dimensions, and asked one entry for each of the %lld rows of q", op,
                  static_cast<long long>(q.dims[0]));
  }

  call->heads = kernel.heads;
  call->kv_heads = kernel.kv_heads;
  call->eps = kernel.eps;
  const int64_t parts = kernel.heads + (of_rows ? 0 : 2 * kernel.kv_heads);
  call->D = q.dims[1] / parts;
  const int64_t width = call->width();
  if (q.dims[1] != parts * call->D || (given > kCos && call->D % 2)) {
    return refuse(api, "%s: the first input has %lld columns; it must have as many, and with cos and sin an even number, "
                  "for each of %lld heads", op, static_cast<long long>(q.dims[1]), static_cast<long long>(parts));
  }
  if (of_rows && kv.dims[1] != width) {
    return refuse(api, "%s: kv has %lld columns; it must have %lld", op, static_cast<long long>(kv.dims[1]),
                  static_cast<long long>(width));
  }
  call->R = q.dims[0];
  call->N = of_rows ? kv.dims[0] : call->R;
  const int64_t B = shared[kLengths].dims[0], P = shared[kPastSlots].dims[1];
  const Tensor& past = shared[kPast];
  if (past.dims[2] != width || past.dims[0] <= kernel.layer) {
    return refuse(api, "%s: past has shape %s; it must be [more than %lld, slots, %lld]", op, shape(past, text),
                  static_cast<long long>(kernel.layer), static_cast<long long>(width));
  }
  for (const size_t i : {kPastSlots, kPastLengths}) {
    if (shared[i].dims[0] != B && shared[i].dims[0] != 1) {
      return refuse(api, "%s: past_slots and past_lengths must have one entry, or %lld as lengths has; got %lld", op,
                    static_cast<long long>(B), static_cast<long long>(shared[i].dims[0]));
    }
  }
  for (size_t i = kCos; i < given; ++i) {
    const bool gain = i >= kQGain;
    if (shared[i].rank != (gain ? 1u : 2u) || shared[i].dims[shared[i].rank - 1] != (gain ? call->D : call->D / 2)) {
      return refuse(api, "%s: cos and sin must be [context, %lld], the gains [%lld]; input %zu has shape %s", op,
                    static_cast<long long>(call->D / 2), static_cast<long long>(call->D), first + i,
                    shape(shared[i], text));
    }
  }

  const void *first_data = nullptr, *kv_data = nullptr, *asked_data = nullptr, *of[kSharedCount] = {};
  if (auto* error = data(api, q.value, &first_data)) return error;
  if (of_rows) {
    if (auto* error = data(api, kv.value, &kv_data)) return error;
    if (auto* error = data(api, asked.value, &asked_data)) return error;
  }
  for (size_t i = 0; i < given; ++i) {
    if (auto* error = data(api, shared[i].value, &of[i])) return error;
  }
  call->q = static_cast<const float*>(first_data);
  call->q_stride = q.dims[1];
  call->kv = of_rows ? static_cast<const float*>(kv_data) : call->q + kernel.heads * call->D;
  call->kv_stride = of_rows ? width : q.dims[1];
  call->past = static_cast<const float*>(of[kPast]) + kernel.layer * past.dims[1] * width;
  call->cos = static_cast<const float*>(of[kCos]);
  call->sin = static_cast<const float*>(of[kSin]);
  call->q_gain = static_cast<const float*>(of[kQGain]);
  call->k_gain = static_cast<const float*>(of[kKGain]);

  // Whose each token is, and what no pointer may go past.
  const auto* lengths = static_cast<const int64_t*>(of[kLengths]);
  const auto* past_lengths = static_cast<const int64_t*>(of[kPastLengths]);
  const auto* past_slots = static_cast<const int64_t*>(of[kPastSlots]);
  const int64_t context_length = call->cos ? shared[kCos].dims[0] : INT64_MAX;
  if (call->cos && shared[kSin].dims[0] != context_length) {
    return refuse(api, "%s: cos and sin are of different lengths", op);
  }
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = lengths[b], earlier = past_lengths[shared[kPastLengths].dims[0] == 1 ? 0 : b];
    const int64_t* slots = past_slots + (shared[kPastSlots].dims[0] == 1 ? 0 : b * P);
    const auto start = static_cast<int64_t>(call->positions.size());
    if (length < 0 || length > call->N - start || earlier < 0 || earlier > P || length > context_length - earlier) {
      return refuse(api, "%s: prompt %lld has %lld tokens after %lld; all have %lld, past_slots holds %lld, the context "
                    "%lld", op, static_cast<long long>(b), static_cast<long long>(length),
                    static_cast<long long>(earlier), static_cast<long long>(call->N), static_cast<long long>(P),
                    static_cast<long long>(context_length));
    }
    for (int64_t p = 0; p < P; ++p) {
      if (slots[p] < 0 || slots[p] >= past.dims[1]) {
        return refuse(api, "%s: past_slots holds %lld; past has %lld slots", op, static_cast<long long>(slots[p]),
                      static_cast<long long>(past.dims[1]));
      }
    }
    call->each.push_back({start, earlier, slots, nullptr, 0});
    for (int64_t t = 0; t < length; ++t) call->positions.push_back(earlier + t);
  }
  if (static_cast<int64_t>(call->positions.size()) != call->N) {
    return refuse(api, "%s: the lengths add up to %zu, and there are %lld tokens", op, call->positions.size(),
                  static_cast<long long>(call->N));
  }
  const auto* of_asked = static_cast<const int64_t*>(asked_data);
  for (int64_t r = 0; r < call->R; ++r) {
    const int64_t n = of_rows ? of_asked[r] : r;
    if (n < 0 || n >= call->N) {
      return refuse(api, "%s: asked holds %lld; there are %lld tokens", op, static_cast<long long>(n),
                    static_cast<long long>(call->N));
    }
    call->tokens.push_back(n);
  }
  return nullptr;
}

// Each prompt's rows side by side, and the outputs.
ort::Status* prepare(ort::Api api, ort::Context* context, Call* call) {
  std::vector<size_t> prompt_of(static_cast<size_t>(call->N));
  for (size_t b = 0; b < call->each.size(); ++b) {
    const int64_t end = b + 1 < call->each.size() ? call->each[b + 1].start : call->N;
    std::fill(prompt_of.begin() + call->each[b].start, prompt_of.begin() + end, b);
  }
  for (const int64_t n : call->tokens) call->each[prompt_of[static_cast<size_t>(n)]].row_count += 1;
  call->rows.resize(static_cast<size_t>(call->R));
  int64_t used = 0;
  for (Attention::Prompt& prompt : call->each) {
    prompt.rows = call->rows.data() + used;
    used += prompt.row_count;
    prompt.row_count = 0;
  }
  for (int64_t r = 0; r < call->R; ++r) {
    Attention::Prompt& prompt = call->each[prompt_of[static_cast<size_t>(call->tokens[static_cast<size_t>(r)])]];
    const_cast<int64_t*>(prompt.rows)[prompt.row_count++] = r;
  }
  call->position_of = call->positions.data();
  call->token_of = call->tokens.data();
  call->prompts = call->each.data();
  call->q_turned.reset(new float[static_cast<size_t>(call->R * call->heads * call->D)]);
  call->turned = call->q_turned.get();

  const int64_t y_dims[] = {call->R, call->heads * call->D}, present_dims[] = {1, call->N, call->width()};
  ort::Value *y = nullptr, *present = nullptr;
  void *y_data = nullptr, *present_data = nullptr;
  if (auto* error = ort::get_output(api, context, size_t{0}, static_cast<const int64_t*>(y_dims), size_t{2}, &y)) {
    return error;
  }
  if (auto* error = ort::get_output(api, context, size_t{1}, static_cast<const int64_t*>(present_dims), size_t{3},
                                    &present)) {
    return error;
  }
  if (auto* error = ort::mutable_data(api, y, &y_data)) return error;
  if (auto* error = ort::mutable_data(api, present, &present_data)) return error;
  call->y = static_cast<float*>(y_data);
  call->present = static_cast<float*>(present_data);
  return nullptr;
}

struct Work {
  const Call* call;
  const AttentionLoops* loops;
  int64_t block;                  // tokens and rows that one index prepares
  std::atomic<bool> failed{false};  // for want of memory: ONNX Runtime's threads carry no exception
};

void prepare_block(void* pointer, size_t index) {
  const Work& work = *static_cast<const Work*>(pointer);
  const int64_t from = static_cast<int64_t>(index) * work.block;
  for (int64_t i = from; i < std::min(from + work.block, work.call->N); ++i) work.loops->prepare_token(*work.call, i);
  for (int64_t i = from; i < std::min(from + work.block, work.call->R); ++i) work.loops->prepare_row(*work.call, i);
}

void attend_one(void* pointer, size_t index) {
  Work& work = *static_cast<Work*>(pointer);
  const auto i = static_cast<int64_t>(index);
  try {
    work.loops->attend(*work.call, i / work.call->kv_heads, i % work.call->kv_heads);
  } catch (const std::bad_alloc&) {
    work.failed = true;
  }
}

// Below so many products of a query with a key, waking another thread costs more than it saves (10 us).
constexpr int64_t kProductsWorthAThread = 1 << 17;

ort::Status* finished(ort::Api api, const Kernel& kernel, const Work& work) {
  return work.failed ? refuse(api, "%s: no memory for its scores; send smaller batches", name_of(kernel.op)) : nullptr;
}

ort::Status* compute(void* pointer, ort::Context* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(pointer);
  const ort::Api api = kernel.op->api;
  Call call{};
  if (auto* error = read_all(api, context, kernel, &call)) return error;
  if (auto* error = prepare(api, context, &call)) return error;
  if (call.N == 0) return nullptr;
  int64_t products = 0;
  for (const Attention::Prompt& prompt : call.each) {
    for (int64_t i = 0; i < prompt.row_count; ++i) {
      products += (call.position_of[call.token_of[prompt.rows[i]]] + 1) * call.heads * call.D;
    }
  }
  Work work{&call, running().attention, 32};
  const auto blocks = static_cast<size_t>((std::max(call.N, call.R) + work.block - 1) / work.block);
  const auto items = static_cast<size_t>(call.kv_heads) * call.each.size();
  if (products < kProductsWorthAThread) {
    for (size_t i = 0; i < blocks; ++i) prepare_block(&work, i);
    for (size_t i = 0; i < items; ++i) attend_one(&work, i);
    return finished(api, kernel, work);
  }
  auto* shared = static_cast<void*>(&work);
  if (auto* error = ort::parallel_for(api, context, prepare_block, blocks, size_t{0}, shared)) return error;
  if (auto* error = ort::parallel_for(api, context, attend_one, items, size_t{0}, shared)) return error;
  return finished(api, kernel, work);
}

Op make_op(ort::Api api, bool of_rows) {
  Op op{};
  op.version = ort::kCustomOpVersion;
  op.name = name_of;
  op.provider = [](auto*) { return "CPUExecutionProvider"; };
  op.input_count = [](auto* self) { return first_count(self) + kSharedCount; };
  op.output_count = [](auto*) { return size_t{2}; };
  op.input_type = [](auto* self, size_t index) {
    const size_t first = first_count(self);
    if (index < first) return static_cast<int>(index == 2 ? ort::kInt64 : ort::kFloat);
    return static_cast<int>(index - first == kPast || index - first >= kCos ? ort::kFloat : ort::kInt64);
  };
  op.output_type = [](auto*, size_t) { return static_cast<int>(ort::kFloat); };
  op.input_characteristic = [](auto* self, size_t index) { return index >= first_count(self) + kCos ? 1 : 0; };
  op.output_characteristic = op.input_memory = [](auto*, size_t) { return 0; };
  op.start_version = [](auto*) { return 1; };
  op.end_version = [](auto*) { return INT_MAX; };
  op.create_kernel = create_kernel;
  op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.compute = compute;
  op.api = api;
  op.of_rows = of_rows;
  return op;
}

}  // namespace

const std::vector<const ort::CustomOp*>& attention_ops(ort::Api api) {
  static const Op packed = make_op(api, false), of_rows = make_op(api, true);
  static const std::vector<const ort::CustomOp*> all = {&packed, &of_rows};
  return all;
}

}  // namespace actuary
