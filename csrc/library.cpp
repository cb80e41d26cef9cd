// The operators of `mla_cpp` and the Python module that loads them. Nothing is computed here.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "append.h"
#include "checks.h"
#include "decode.h"
#include "rotate.h"

namespace {

using mla::Cache;
using mla::CodecKind;
using mla::DecodeKernels;
using mla::DecodeParams;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// In the order of preference; the index names a set in calls.
const DecodeKernels* kernels_of(int64_t index) {
  switch (index) {
    case 0: return &mla::kDecodePortable;
#if defined(__x86_64__)
    case 1: return &mla::kDecodeAvx2;
    case 2: return &mla::kDecodeAvx512;
    case 3: return &mla::kDecodeAvx512Bf16;
    case 4: return &mla::kDecodeAvx512Vnni;
#endif
    default: return nullptr;
  }
}

// Bit i: this processor has instruction set i.
int64_t instruction_sets() {
  int64_t found = 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  found |= (avx2 ? 2 : 0) | (avx512 ? 4 : 0);
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  found |= bf16 ? 8 : 0;
  found |= bf16 && __builtin_cpu_supports("avx512vnni") ? 16 : 0;
#endif
  return found;
}

int64_t peak(int64_t iterations, bool bf16, int64_t set) {
  const DecodeKernels* kernels = kernels_of(set);
  MLA_CHECK(
      kernels != nullptr && (instruction_sets() >> set & 1), "mla_cpp: instruction set ", set,
      " is not one of this processor");
  return kernels->peak(iterations, bf16);
}

void set_codec(Cache& cache, int64_t kind, int64_t group, int64_t rope_bits, int64_t scales_at,
               int64_t rope_at) {
  MLA_CHECK(kind >= 0 && kind <= 3, "CacheView: codec has kind ", kind, ", expected 0 to 3");
  cache.codec = {static_cast<CodecKind>(kind), group, rope_bits, scales_at, rope_at};
}

const char* query_data(const char* name, const Tensor& query, int64_t (&strides)[3]) {
  const int64_t bytes = static_cast<int64_t>(query.element_size());
  MLA_CHECK(
      query.size(3) <= 1 || query.stride(3) == 1, "mla_decode: ", name, " has last stride ",
      query.stride(3), ", expected 1");
  for (int64_t dim = 0; dim < 3; ++dim) strides[dim] = query.stride(dim) * bytes;
  return static_cast<const char*>(query.data_ptr());
}

void decode(Tensor q_latent, Tensor q_rope, Tensor rows, MaybeTensor page_table, Tensor lengths,
            MaybeTensor starts, MaybeTensor query_lengths, Tensor out, Tensor lse, double scale,
            int64_t shard_index, int64_t shard_count, int64_t kind, int64_t group,
            int64_t rope_bits, int64_t scales_at, int64_t rope_at, int64_t set) {
  constexpr const char* op = "mla_decode";
  const DecodeKernels* kernels = kernels_of(set);
  MLA_CHECK(
      kernels != nullptr && (instruction_sets() >> set & 1), op, ": instruction set ", set,
      " is not one of this processor");
  mla::check_dims(op, "q_latent", q_latent, 4);
  DecodeParams p;
  p.B = q_latent.size(0), p.L = q_latent.size(1), p.H = q_latent.size(2), p.C = q_latent.size(3);
  mla::check_dims(op, "q_rope", q_rope, 4);
  mla::check_dims(op, "out", out, 4);
  mla::check_dims(op, "lse", lse, 3);
  for (int64_t dim = 0; dim < 3; ++dim) {
    mla::check_size(op, "q_rope", q_rope, dim, q_latent.size(dim));
    mla::check_size(op, "out", out, dim, q_latent.size(dim));
    mla::check_size(op, "lse", lse, dim, q_latent.size(dim));
  }
  mla::check_size(op, "out", out, 3, p.C);
  MLA_CHECK(out.is_contiguous() && lse.is_contiguous(), op, ": out or lse is strided");
  p.R = q_rope.size(3);
  p.q_dtype = mla::dtype_of(op, "q_latent", q_latent);
  p.out_dtype = mla::dtype_of(op, "out", out);
  MLA_CHECK(
      p.q_dtype == mla::dtype_of(op, "q_rope", q_rope) && p.q_dtype != mla::Dtype::kUInt8 &&
          p.out_dtype != mla::Dtype::kUInt8 &&
          mla::dtype_of(op, "lse", lse) == mla::Dtype::kFloat32,
      op, ": queries, out and lse have dtypes that do not fit");
  p.q_latent = query_data("q_latent", q_latent, p.q_latent_strides);
  p.q_rope = query_data("q_rope", q_rope, p.q_rope_strides);
  p.query_lengths = mla::int32_data(op, "query_lengths", query_lengths, 1, p.B);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.scale = static_cast<float>(scale);
  p.cache.shard_index = shard_index;
  p.cache.shard_count = shard_count;
  set_codec(p.cache, kind, group, rope_bits, scales_at, rope_at);
  mla::bind_cache("CacheView", p.cache, rows, page_table, lengths, starts, p.B, p.C, p.R);
  if (p.B * p.L * p.H > 0) mla::decode(p, *kernels);
}

mla::TokenRows token_rows(
    const char* op, const char* name, const Tensor& tensor, int64_t B, int64_t L, int64_t width) {
  mla::check_dims(op, name, tensor, 3);
  mla::check_size(op, name, tensor, 0, B);
  mla::check_size(op, name, tensor, 1, L);
  mla::check_size(op, name, tensor, 2, width);
  MLA_CHECK(
      width <= 1 || tensor.stride(2) == 1, op, ": ", name, " has last stride ", tensor.stride(2),
      ", expected 1");
  const mla::Dtype dtype = mla::dtype_of(op, name, tensor);
  MLA_CHECK(dtype != mla::Dtype::kUInt8, op, ": ", name, " has dtype uint8, expected floats");
  const int64_t bytes = mla::bytes_of(dtype);
  return {static_cast<const char*>(tensor.data_ptr()),
          {tensor.stride(0) * bytes, tensor.stride(1) * bytes},
          dtype};
}

void append(Tensor rows, MaybeTensor page_table, Tensor lengths, Tensor latent, Tensor k_rope,
            MaybeTensor new_lengths, int64_t shard_index, int64_t shard_count, int64_t kind,
            int64_t group, int64_t rope_bits, int64_t scales_at, int64_t rope_at) {
  constexpr const char* op = "mla_append";
  mla::check_dims(op, "latent", latent, 3);
  mla::check_dims(op, "k_rope", k_rope, 3);
  mla::AppendParams p;
  p.B = latent.size(0), p.L = latent.size(1), p.C = latent.size(2), p.R = k_rope.size(2);
  p.latent = token_rows(op, "latent", latent, p.B, p.L, p.C);
  p.k_rope = token_rows(op, "k_rope", k_rope, p.B, p.L, p.R);
  p.new_lengths = mla::int32_data(op, "new_lengths", new_lengths, 1, p.B);
  p.cache.shard_index = shard_index;
  p.cache.shard_count = shard_count;
  set_codec(p.cache, kind, group, rope_bits, scales_at, rope_at);
  mla::bind_cache("CacheView", p.cache, rows, page_table, lengths, std::nullopt, p.B, p.C, p.R);
  if (p.B * p.L > 0) mla::append(p);
}

void norm_rope(Tensor kv_a, MaybeTensor weight, MaybeTensor cos, MaybeTensor sin, Tensor latent,
               Tensor k_rope, double eps, double latent_scale, int64_t pairing) {
  constexpr const char* op = "mla_norm_rope_append";
  mla::check_dims(op, "kv_a", kv_a, 3);
  mla::check_dims(op, "latent", latent, 3);
  mla::check_dims(op, "k_rope", k_rope, 3);
  mla::NormRopeParams p;
  p.B = kv_a.size(0), p.L = kv_a.size(1), p.C = latent.size(2), p.R = k_rope.size(2);
  p.kv_a = token_rows(op, "kv_a", kv_a, p.B, p.L, p.C + p.R);
  const auto fresh = token_rows(op, "latent", latent, p.B, p.L, p.C);
  const auto fresh_rope = token_rows(op, "k_rope", k_rope, p.B, p.L, p.R);
  MLA_CHECK(
      latent.is_contiguous() && k_rope.is_contiguous() && fresh.dtype == p.kv_a.dtype &&
          fresh_rope.dtype == p.kv_a.dtype,
      op, ": latent or k_rope is strided or of another dtype");
  p.latent = latent.data_ptr();
  p.k_rope = k_rope.data_ptr();
  if (weight.has_value()) {
    mla::check_dims(op, "norm_weight", *weight, 1);
    mla::check_size(op, "norm_weight", *weight, 0, p.C);
    MLA_CHECK(
        weight->is_contiguous() && mla::dtype_of(op, "norm_weight", *weight) == p.kv_a.dtype, op,
        ": norm_weight is strided or of another dtype");
    p.weight = static_cast<const char*>(weight->data_ptr());
  }
  MLA_CHECK(pairing >= 0 && pairing <= 2, op, ": pairing has value ", pairing);
  p.pairing = static_cast<mla::Pairing>(pairing);
  if (p.pairing != mla::Pairing::kNone) {
    MLA_CHECK(
        cos.has_value() && sin.has_value() && p.R % 2 == 0, op, ": k_rope has ", p.R,
        " numbers, expected an even number and cos and sin");
    p.cos = token_rows(op, "cos", *cos, p.B, p.L, p.R / 2);
    p.sin = token_rows(op, "sin", *sin, p.B, p.L, p.R / 2);
    MLA_CHECK(p.cos.dtype == p.sin.dtype, op, ": sin has another dtype than cos");
  }
  p.eps = static_cast<float>(eps);
  p.latent_scale = static_cast<float>(latent_scale);
  if (p.B * p.L > 0) mla::norm_rope(p);
}

// Rows of `from` to rows of `to`, both contiguous.
void rotate(Tensor from, Tensor to, int64_t size) {
  constexpr const char* op = "mla_rotate";
  mla::check_dims(op, "from", from, 2);
  mla::check_dims(op, "to", to, 2);
  mla::RotateParams p;
  p.rows = from.size(0), p.C = from.size(1), p.size = size;
  mla::check_size(op, "to", to, 0, p.rows);
  mla::check_size(op, "to", to, 1, p.C);
  MLA_CHECK(
      size >= 1 && size <= 128 && (size & (size - 1)) == 0 && p.C % size == 0, op,
      ": size has value ", size, ", expected a power of two up to 128 that divides ", p.C);
  p.from_dtype = mla::dtype_of(op, "from", from);
  p.to_dtype = mla::dtype_of(op, "to", to);
  MLA_CHECK(
      from.is_contiguous() && to.is_contiguous() && p.from_dtype != mla::Dtype::kUInt8 &&
          p.to_dtype != mla::Dtype::kUInt8,
      op, ": from or to is strided or uint8");
  p.from = static_cast<const char*>(from.data_ptr());
  p.to = static_cast<char*>(to.data_ptr());
  mla::rotate(p);
}

}  // namespace

STABLE_TORCH_LIBRARY(mla_cpp, m) {
  m.def("instruction_sets() -> int");
  m.def("peak(int iterations, bool bf16, int set) -> int");
  m.def(
      "decode(Tensor q_latent, Tensor q_rope, Tensor rows, Tensor? page_table, Tensor lengths, "
      "Tensor? starts, Tensor? query_lengths, Tensor(a!) out, Tensor(b!) lse, float scale, "
      "int shard_index, int shard_count, int kind, int group, int rope_bits, int scales_at, "
      "int rope_at, int set) -> ()");
  m.def(
      "append(Tensor(a!) rows, Tensor? page_table, Tensor lengths, Tensor latent, Tensor k_rope, "
      "Tensor? new_lengths, int shard_index, int shard_count, int kind, int group, "
      "int rope_bits, int scales_at, int rope_at) -> ()");
  m.def(
      "norm_rope(Tensor kv_a, Tensor? weight, Tensor? cos, Tensor? sin, Tensor(a!) latent, "
      "Tensor(b!) k_rope, float eps, float latent_scale, int pairing) -> ()");
  m.def("rotate(Tensor from_, Tensor(a!) to, int size) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mla_cpp, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("append", TORCH_BOX(&append));
  m.impl("norm_rope", TORCH_BOX(&norm_rope));
  m.impl("rotate", TORCH_BOX(&rotate));
}

STABLE_TORCH_LIBRARY_IMPL(mla_cpp, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&instruction_sets));
  m.impl("peak", TORCH_BOX(&peak));
}

// `import mla._C` registers the operators; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
