// reduce, expand and pack of simd/kernels.h: in pairs of bf16 if the instruction set multiplies them, otherwise in
// fp32.
#pragma once
#include "simd/lora/f32_expand.h"
#include "simd/lora/f32_pack.h"
#include "simd/lora/f32_reduce.h"
#if FP_ISA >= 3
#include "simd/lora/bf16_expand.h"
#include "simd/lora/bf16_pack.h"
#include "simd/lora/bf16_reduce.h"
#endif

namespace {

void reduce(Rows x, int64_t m0, int64_t m1, int64_t width, Bits mask, const float* panel, int64_t ldp, int64_t R,
            float scale, float* s, const float* left, int64_t ldl, float* grad, int64_t ldg, float* sums) {
  if (s) std::memset(s, 0, static_cast<size_t>((m1 - m0) * ldp) * sizeof(float));
#if FP_ISA >= 3
  if (in_pairs(x.type, R))
    return reduce_pairs(x, m0, m1, width, mask, panel, ldp, R, scale, s, left, ldl, grad, ldg, sums);
#endif
  reduce_f32(x, m0, m1, width, mask, panel, ldp, R, scale, s, left, ldl, grad, ldg, sums);
}

void expand(const float* s, int64_t lds, int64_t m0, int64_t m1, int64_t R, const float* panel, int64_t ldp,
            const float* bias, float scale, Bits mask, bool add, void* y, Type type, int64_t stride, int64_t width) {
#if FP_ISA >= 3
  if (in_pairs(type, R)) return expand_pairs(s, lds, m0, m1, R, panel, ldp, bias, scale, mask, add, y, stride, width);
#endif
  expand_f32(s, lds, m0, m1, R, panel, ldp, bias, scale, mask, add, y, type, stride, width);
}

template <Type T>
void pack_as(const Strided& src, int64_t rows, int64_t cols, Use use, Type type, float* out, int64_t ld) {
#if FP_ISA >= 3
  const int64_t R = use == Use::reduce ? cols : rows;
  if (in_pairs(type, R))
    return pack_pairs<T>(src, rows, cols, use == Use::reduce && R <= kFoldRank, reinterpret_cast<uint32_t*>(out), ld);
#endif
  pack_f32<T>(src, rows, cols, out, ld);
}

void pack(Strided src, int64_t rows, int64_t cols, Use use, Type type, float* out, int64_t ld) {
  auto as = src.type == Type::f32    ? pack_as<Type::f32>
            : src.type == Type::bf16 ? pack_as<Type::bf16>
                                     : pack_as<Type::f16>;
  as(src, rows, cols, use, type, out, ld);
}

}  // namespace
