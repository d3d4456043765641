// Types and vector helpers that all kernels share.
//
// Everything is written over 32-bit lanes: a lane is one float32, a pair of neighbouring bfloat16, or four
// int8. A kernel is a template on the element type, Bf16 or F32 (or Int8), whose dot() multiplies two lanes
// and adds to an accumulator of 32 bits, so that one source serves all. Vectors are GCC and Clang vector
// extensions of 16 lanes; the compiler splits them where the machine's registers are shorter. Only the
// bfloat16 and int8 dot products have instructions of their own.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include "arm.h"

#define AIO_EXPORT extern "C" __attribute__((visibility("default")))

namespace aio {

constexpr int LANES = 16;

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));

// The same in one register: where inner loops are written over these, sums stay in registers (registers.h).
#if defined(__AVX512F__)
constexpr int WIDTH = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, REGISTERS = 32;
#else
constexpr int WIDTH = 4, REGISTERS = 16;
#endif
constexpr int PER_VECTOR = LANES / WIDTH;  // registers

typedef float rf __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ri __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t ru __attribute__((vector_size(4 * WIDTH)));

// Unaligned loads and stores: memcpy of a known size becomes one instruction.
static inline vu load(const uint32_t* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline vf loadf(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void storef(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline void store(uint32_t* p, vu v) { std::memcpy(p, &v, sizeof v); }

template <class R>
static inline R load_register(const void* p) {
  R v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class R>
static inline void store_register(void* p, R v) {
  std::memcpy(p, &v, sizeof v);
}

#if defined(__ARM_FEATURE_DOTPROD)
// Products of Arm's level for all registers of a vector.
template <class Register, class Sums>
static inline Sums dot_registers(Sums sums, vu a, vu b) {
  Register parts[PER_VECTOR];
  uint32x4_t x[PER_VECTOR], y[PER_VECTOR];
  std::memcpy(parts, &sums, sizeof sums), std::memcpy(x, &a, sizeof a), std::memcpy(y, &b, sizeof b);
  for (int i = 0; i < PER_VECTOR; i++) parts[i] = dot4(parts[i], x[i], y[i]);
  std::memcpy(&sums, parts, sizeof sums);
  return sums;
}
#endif

static inline vu splat(uint32_t x) { return vu{} + x; }
static inline vf splatf(float x) { return vf{} + x; }

// a * b + c, rounded once where the CPU can do that. Compilers may not do it by themselves (-ffp-contract=off in build.py):
// they would here and not there, so that a row's bits depended on how many rows are computed with it.
static inline vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof a), std::memcpy(y, &b, sizeof b), std::memcpy(z, &c, sizeof c);
  for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  std::memcpy(&c, z, sizeof c);
  return c;
#elif defined(__aarch64__)
  float32x4_t x[4], y[4], z[4];
  std::memcpy(x, &a, sizeof a), std::memcpy(y, &b, sizeof b), std::memcpy(z, &c, sizeof c);
  for (int i = 0; i < 4; i++) z[i] = vfmaq_f32(z[i], x[i], y[i]);
  std::memcpy(&c, z, sizeof c);
  return c;
#else
  return a * b + c;
#endif
}

#if !defined(__AVX512F__)
static inline rf multiply_add(rf a, rf b, rf c) {
#if defined(__FMA__)
  return (rf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (rf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
#endif

static inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

#if defined(__AVX512F__)
static inline float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
static inline float max(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
static inline float sum(vf v) {
  float s = 0.0f;
  for (int i = 0; i < 4; i++) s += (v[i] + v[i + 8]) + (v[i + 4] + v[i + 12]);
  return s;
}
static inline float max(vf v) {
  float m = v[0];
  for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
  return m;
}
static inline float max(rf v) {
  float m = v[0];
  for (int i = 1; i < WIDTH; i++) m = v[i] > m ? v[i] : m;
  return m;
}
#endif

// Round to nearest even; NaN stays NaN.
static inline uint16_t to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 64);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

struct Bf16 {
  using elem = uint16_t;
  using acc = vf;
  static constexpr int PER_LANE = 2;

  static inline float widen(elem e) { return bits_to_float(uint32_t(e) << 16); }
  static inline elem narrow(float f) { return to_bf16(f); }

  static inline vf dot(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return dot_registers<float32x4_t>(acc, a, b);
#else
    acc = multiply_add((vf)(a << 16), (vf)(b << 16), acc);
    return multiply_add((vf)(a & 0xffff0000u), (vf)(b & 0xffff0000u), acc);
#endif
  }

  // A register of elements as floats, and back.
  static inline rf load_register(const elem* p) {
#if defined(__AVX512F__)  // GCC makes five instructions of it
    return (rf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
    return (rf)(__builtin_convertvector(aio::load_register<halves>(p), ru) << 16);
#endif
  }
  static inline void store_register(elem* p, rf v) {
#if defined(__AVX512BF16__)
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h, sizeof h);
#else
    typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
    const ru u = (ru)v;
    const ru rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    const ru nan = (u >> 16) | 64;
    const ru is_nan = (ru)((ri)(u & 0x7fffffffu) > 0x7f800000);
    aio::store_register(p, __builtin_convertvector((is_nan & nan) | (~is_nan & rounded), halves));
#endif
  }
  // 16 of them.
  static inline vf load16(const elem* p) {
    vf v;
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += WIDTH) aio::store_register((float*)&v + i, load_register(p + i));
    return v;
  }
  static inline void store16(elem* p, vf v) {
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += WIDTH) store_register(p + i, aio::load_register<rf>((const float*)&v + i));
  }
  // 32 of them, by one store: two would have a cache line of another core's come twice.
  static inline void store32(elem* p, vf first, vf second) {
#if defined(__AVX512BF16__)
    const __m512bh h = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    std::memcpy(p, &h, sizeof h);
#else
    store16(p, first), store16(p + LANES, second);
#endif
  }
  // As if stored and loaded.
  static inline vf round16(vf v) {
    elem stored[LANES];
    store16(stored, v);
    return load16(stored);
  }
};

struct F32 {
  using elem = float;
  using acc = vf;
  static constexpr int PER_LANE = 1;

  static inline float widen(elem e) { return e; }
  static inline elem narrow(float f) { return f; }
  static inline vf dot(vf acc, vu a, vu b) { return multiply_add((vf)a, (vf)b, acc); }
  static inline rf load_register(const elem* p) { return aio::load_register<rf>(p); }
  static inline void store_register(elem* p, rf v) { aio::store_register(p, v); }
  static inline vf load16(const elem* p) { return loadf(p); }
  static inline void store16(elem* p, vf v) { storef(p, v); }
  static inline void store32(elem* p, vf first, vf second) { storef(p, first), storef(p + LANES, second); }
  static inline vf round16(vf v) { return v; }
};

// As many of 16 elements as there are, the others zero.
template <class T>
inline vf load_some(const typename T::elem* p, long count) {
  if (count >= LANES) return T::load16(p);
  typename T::elem some[LANES] = {};
  std::memcpy(some, p, count * sizeof *p);
  return T::load16(some);
}

template <class T>
inline void store_some(typename T::elem* p, vf v, long count) {
  if (count >= LANES) return T::store16(p, v);
  typename T::elem some[LANES];
  T::store16(some, v);
  std::memcpy(p, some, count * sizeof *p);
}

// Four bytes, of which those of the first operand have ZERO added, times four signed ones; whole numbers are added, so nothing
// is rounded. Intel's products take unsigned bytes there, and Arm's signed ones.
struct Int8 {
  using elem = int8_t;
  using acc = vi;
  static constexpr int PER_LANE = 4;
#if defined(__ARM_FEATURE_DOTPROD)
  static constexpr int ZERO = 0;
#else
  static constexpr int ZERO = 128;
#endif

  static inline vi dot(vi acc, vu a, vu b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__ARM_FEATURE_DOTPROD)
    return dot_registers<int32x4_t>(acc, a, b);
#else
    for (int shift = 0; shift < 32; shift += 8) acc += (vi)((a >> shift) & 0xff) * ((vi)(b << (24 - shift)) >> 24);
    return acc;
#endif
  }
};

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

// What exponentials of x <= 0 have in common, for a vector of any length V with whole numbers in W: `x` bounded so that no
// exponent wraps, and 2^n times a polynomial, 0 where x was below `low`: a subnormal number takes a hundred cycles to make.
template <class W, class V>
struct Exponential {
  V x;
#if defined(__AVX512F__)
  __mmask16 there;  // NaN is

  Exponential(V from, float low) : x(from), there(_mm512_cmp_ps_mask((__m512)from, _mm512_set1_ps(low), _CMP_NLT_UQ)) {}

  // `shifted` is n + MAGIC.
  V times_two_to(V shifted, V p) const {
    return (V)_mm512_maskz_scalef_ps(there, (__m512)p, (__m512)(shifted - MAGIC));
  }
#else
  W tiny;

  Exponential(V from, float low) : x(from), tiny((W)(from < low)) {
    x = (V)(((W)x & ~tiny) | ((W)(V{} + low) & tiny));
  }

  V times_two_to(V shifted, V p) const {
    const W exponent = ((W)shifted - (W)(V{} + MAGIC)) << 23;
    return (V)(((W)p + exponent) & ~tiny);
  }
#endif
};

// The polynomial with these factors, the highest first.
template <class V, int N>
static inline V polynomial(V r, float highest, const float (&factors)[N]) {
  V p = V{} + highest;
#pragma GCC unroll 5
  for (const float factor : factors) p = multiply_add(p, r, V{} + factor);
  return p;
}

// e^x for x <= 0: 2^n times a polynomial on [-ln2/2, ln2/2] (relative error below 2e-7); 0 below -87.
template <class W, class V>
static inline V exp_negative_as(V x) {
  const Exponential<W, V> power(x, -87.0f);
  const V shifted = multiply_add(power.x, V{} + 1.44269504f, V{} + MAGIC), n = shifted - MAGIC;
  V r = multiply_add(n, V{} - 0.693359375f, power.x);
  r = multiply_add(n, V{} + 2.12194440e-4f, r);
  const V p = polynomial(
      r, 1.9875691500e-4f, {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f});
  return power.times_two_to(shifted, multiply_add(p * r, r, r) + 1.0f);
}

// 2^x for x <= 0, likewise, with half as many instructions; 0 below -126.
template <class W, class V>
static inline V exp2_negative_as(V x) {
  const Exponential<W, V> power(x, -126.0f);
  const V shifted = power.x + MAGIC, r = power.x - (shifted - MAGIC);
  const V p = polynomial(
      r, 1.3264720328e-3f, {9.6715129912e-3f, 5.5507335812e-2f, 2.4022242427e-1f, 6.9314700365e-1f, 1.0f});
  return power.times_two_to(shifted, p);
}

// From e^-2|x|, which cannot overflow.
template <class W, class V>
static inline V tanh_as(V x) {
  const V e = exp_negative_as<W>((x < 0.0f ? x : -x) * 2.0f);
  const V size = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -size : size;
}
static inline vf tanh(vf x) { return tanh_as<vi>(x); }

// CALL(n) with n as a constant, 8 at most.
#define AIO_SWITCH_ROWS(n, CALL) \
  switch (n) {                   \
    case 1: CALL(1); break;      \
    case 2: CALL(2); break;      \
    case 3: CALL(3); break;      \
    case 4: CALL(4); break;      \
    case 5: CALL(5); break;      \
    case 6: CALL(6); break;      \
    case 7: CALL(7); break;      \
    default: CALL(8); break;     \
  }

// The same with 4 at most.
#define AIO_SWITCH_FEW(n, CALL) \
  switch (n) {                  \
    case 1: CALL(1); break;     \
    case 2: CALL(2); break;     \
    case 3: CALL(3); break;     \
    default: CALL(4); break;    \
  }

struct Range {
  long begin, end;
};

// The part of 0..n-1 that belongs to thread `index` of `count`.
static inline Range share(long n, long index, long count) {
  return {n * index / count, n * (index + 1) / count};
}

}  // namespace aio
