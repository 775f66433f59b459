// Number types of the kernels, and loads and stores of several at once. Compiles for the GPU and for the CPU, where
// the tests run the same arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDACC__
#define PIPEX_BOTH __host__ __device__ __forceinline__
#else
#define PIPEX_BOTH inline
#endif
#ifdef __CUDA_ARCH__  // the CPU's compiler would warn of pragmas that it does not know
#define PIPEX_UNROLL _Pragma("unroll")
#define PIPEX_UNROLL_BY_4 _Pragma("unroll 4")  // loads of several rows under way at once
#else
#define PIPEX_UNROLL
#define PIPEX_UNROLL_BY_4
#endif

namespace pipex::cuda {

using Index = std::int64_t;  // a gradient of a large table has more than 2^31 elements

PIPEX_BOTH float to_float(float value) { return value; }
PIPEX_BOTH float to_float(__half value) { return __half2float(value); }
PIPEX_BOTH float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

/// Rounds to nearest, ties to even.
template <typename T>
PIPEX_BOTH T from_float(float value);
template <>
PIPEX_BOTH float from_float<float>(float value) {
  return value;
}
template <>
PIPEX_BOTH __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
PIPEX_BOTH __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

constexpr int kVectorBytes = 16;  // the widest load of one thread

/// `width` neighbouring numbers in fp32.
template <int width>
struct Floats {
  float at[width];

  PIPEX_BOTH void clear() {
    PIPEX_UNROLL
    for (int i = 0; i < width; ++i) at[i] = 0.0F;
  }
  PIPEX_BOTH void add(const Floats& other) {
    PIPEX_UNROLL
    for (int i = 0; i < width; ++i) at[i] += other.at[i];
  }
};

/// `width` neighbouring numbers as they lie in memory, at a multiple of their size or of 16 bytes.
template <typename T, int width>
struct alignas(sizeof(T) * width < kVectorBytes ? sizeof(T) * width : kVectorBytes) Vector {
  T at[width];
};

/// Reads `width` numbers; those from `count` on are beyond the end and read as 0. With `aligned`, `from` is aligned as
/// a Vector and none is beyond the end; the same numbers are read either way.
template <int width, bool aligned, typename T>
PIPEX_BOTH Vector<T, width> read(const T* from, [[maybe_unused]] Index count) {
  if constexpr (aligned) {
    return *reinterpret_cast<const Vector<T, width>*>(from);
  } else {
    Vector<T, width> result;
    PIPEX_UNROLL
    for (int i = 0; i < width; ++i) result.at[i] = i < count ? from[i] : from_float<T>(0.0F);
    return result;
  }
}

template <typename T, int width>
PIPEX_BOTH Floats<width> to_floats(const Vector<T, width>& vector) {
  Floats<width> result;
  PIPEX_UNROLL
  for (int i = 0; i < width; ++i) result.at[i] = to_float(vector.at[i]);
  return result;
}

template <int width, bool aligned, typename T>
PIPEX_BOTH Floats<width> load(const T* from, Index count) {
  return to_floats(read<width, aligned>(from, count));
}

/// Writes the first `count` of `width` numbers, in T's precision. `aligned` as for `read`.
template <bool aligned, typename T, int width>
PIPEX_BOTH void store(const Floats<width>& values, T* to, [[maybe_unused]] Index count) {
  if constexpr (aligned) {
    Vector<T, width> vector;
    PIPEX_UNROLL
    for (int i = 0; i < width; ++i) vector.at[i] = from_float<T>(values.at[i]);
    *reinterpret_cast<Vector<T, width>*>(to) = vector;
  } else {
    PIPEX_UNROLL
    for (int i = 0; i < width; ++i)
      if (i < count) to[i] = from_float<T>(values.at[i]);
  }
}

/// Adds to what is there, in fp32, and rounds once.
template <bool aligned, typename T, int width>
PIPEX_BOTH void accumulate(const Floats<width>& values, T* to, Index count) {
  Floats<width> sum = load<width, aligned>(to, count);
  sum.add(values);
  store<aligned>(sum, to, count);
}

}  // namespace pipex::cuda
