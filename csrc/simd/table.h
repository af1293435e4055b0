// The table of simd/kernels.h for one instruction set; the one file that includes simd/lora/ and simd/fourbit/.
#pragma once
#include "simd/convert.h"
#include "simd/fourbit/decode.h"
#include "simd/fourbit/encode.h"
#include "simd/fourbit/gemv_nibbles.h"
#include "simd/lora/products.h"
#include "simd/lora/skinny.h"
#ifdef FP_TILES
#include "simd/fourbit/gemm_amx.h"
#include "simd/fourbit/gemm_amx_dx.h"
#include "simd/fourbit/gemv_bytes.h"
#elif FP_ISA >= 3
#include "simd/fourbit/gemm_vector.h"
#include "simd/fourbit/gemm_vector_dx.h"
#endif

namespace {

#ifdef FP_TILES
constexpr FourBitTiles kFourBitTiles = {arrange_forward, tiles_forward, arrange_backward, tiles_backward};
constexpr const FourBitTiles* kTiles = &kFourBitTiles;
constexpr FourBitBytes kFourBitBytes = {byte_room, arrange_bytes, product_bytes};
constexpr const FourBitBytes* kBytes = &kFourBitBytes;
#else
constexpr const FourBitTiles* kTiles = nullptr;
constexpr const FourBitBytes* kBytes = nullptr;
#endif
#if FP_ISA >= 3 && !defined(FP_TILES)
constexpr FourBitBlocks kFourBitBlocks = {arrange_blocks_forward, blocks_forward, arrange_blocks_backward, blocks_backward};
constexpr const FourBitBlocks* kBlocks = &kFourBitBlocks;
#else
constexpr const FourBitBlocks* kBlocks = nullptr;
#endif

constexpr FourBitKernels kFourBit = {encode, decode, absmax, product_in_pairs, few_rows, arrange, product, kTiles, kBytes, kBlocks};

constexpr Kernels kTable = {FP_TEXT(FP_NAME), pack, draw, drop, reduce, expand, to_float, from_float, dots, &kFourBit};

}  // namespace
