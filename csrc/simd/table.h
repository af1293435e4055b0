// The table of simd/kernels.h for one instruction set; the one file that includes simd/lora/ and simd/fourbit/.
#pragma once
#include "simd/convert.h"
#include "simd/fourbit/decode.h"
#include "simd/fourbit/encode.h"
#include "simd/fourbit/gemv.h"
#include "simd/lora/products.h"
#include "simd/lora/skinny.h"
#ifdef FP_TILES
#include "simd/fourbit/gemm_amx_dx.h"
#elif FP_ISA >= 3
#include "simd/fourbit/gemm_vector_dx.h"
#endif

namespace {

#if FP_ISA >= 3
constexpr const FourBitGemm* kGemmOrNull = &kGemm;
#else
constexpr const FourBitGemm* kGemmOrNull = nullptr;
#endif
constexpr FourBitKernels kFourBit = {encode, decode, absmax, &kGemv, kGemmOrNull};

constexpr Kernels kTable = {FP_TEXT(FP_NAME), pack, draw, drop, reduce, expand, to_float, from_float, dots, &kFourBit};

}  // namespace
