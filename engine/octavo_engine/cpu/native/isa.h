// The few things that differ between instruction sets; all else in this library is written over them.
//
// One source, several libraries: each is compiled whole with its own -m flags (cpu/variants.py), and library.py loads
// the best that the processor runs. Vectors are GCC vector types, so +, *, <, ?: and shifts need no wrappers here.
// OCTAVO_EMULATE_512 computes the 512-bit code with 256-bit instructions: on a machine without AVX-512 the tests run
// the layout and the logic of the wide library that way; only the wrappers of `#ifdef __AVX512F__` stay unseen.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace octavo {

#if defined(OCTAVO_EMULATE_512) || defined(__AVX512F__)
constexpr int kLanes = 16;  // float32 in a vector
#else
constexpr int kLanes = 8;
#endif

#if defined(OCTAVO_EMULATE_512) || defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kHasVnni = true;  // dot products of bytes that are summed in 32 bits
#else
constexpr bool kHasVnni = false;
#endif

#if defined(OCTAVO_EMULATE_512) || defined(__AVX512BF16__)
constexpr bool kHasBf16 = true;  // dot products of pairs of bfloat16
#else
constexpr bool kHasBf16 = false;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef int16_t Shorts __attribute__((vector_size(kLanes * 4)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes * 4)));

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
inline void store(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

inline Floats broadcast(float value) { return value - Floats{}; }
inline Ints broadcast(int32_t value) { return value - Ints{}; }

// Four neighbouring bytes in every 32-bit lane.
inline Bytes broadcast_4_bytes(const void* from) {
  int32_t value;
  std::memcpy(&value, from, 4);
  return (Bytes)broadcast(value);
}

inline Floats to_floats(Ints values) { return __builtin_convertvector(values, Floats); }

#if defined(OCTAVO_EMULATE_512)

template <class Vector>
inline __m256i half(Vector vector, int which) {
  __m256i halves[2];
  std::memcpy(halves, &vector, 64);
  return halves[which];
}
template <class Vector>
inline Vector join(__m256i low, __m256i high) {
  const __m256i halves[2] = {low, high};
  return load<Vector>(halves);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  __m256i out[2];
  for (int i = 0; i < 2; i++)
    out[i] = (__m256i)_mm256_fmadd_ps((__m256)half(a, i), (__m256)half(b, i), (__m256)half(c, i));
  return join<Floats>(out[0], out[1]);
}
inline Ints dot_bytes(Ints sum, Bytes unsigned_bytes, Bytes signed_bytes) {
  int8_t b[64];
  uint8_t a[64];
  store(a, unsigned_bytes), store(b, signed_bytes);
  for (int lane = 0; lane < 16; lane++)
    for (int i = 0; i < 4; i++) sum[lane] += a[4 * lane + i] * b[4 * lane + i];
  return sum;
}
inline Floats dot_bf16(Floats sum, Ints a, Ints b) {
  const Ints high = broadcast((int32_t)0xffff0000);
  sum = multiply_add((Floats)(a << 16), (Floats)(b << 16), sum);
  return multiply_add((Floats)(a & high), (Floats)(b & high), sum);
}
inline Floats load_half(const uint16_t* from) {
  return join<Floats>((__m256i)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)),
                      (__m256i)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 8))));
}
inline void store_half(uint16_t* to, Floats values) {
  for (int i = 0; i < 2; i++)
    _mm_storeu_si128((__m128i*)(to + 8 * i), _mm256_cvtps_ph((__m256)half(values, i), _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__AVX512F__)

inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Ints dot_bytes(Ints sum, Bytes unsigned_bytes, Bytes signed_bytes) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
}
#ifdef __AVX512BF16__
inline Floats dot_bf16(Floats sum, Ints a, Ints b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#endif
inline Floats load_half(const uint16_t* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
inline void store_half(uint16_t* to, Floats values) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

#else  // AVX2, FMA and F16C

inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#ifdef __AVXVNNI__
inline Ints dot_bytes(Ints sum, Bytes unsigned_bytes, Bytes signed_bytes) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)unsigned_bytes, (__m256i)signed_bytes);
}
#else
// Unsigned times signed bytes, neighbours added to 16 bits. With unsigned ones below 16, eight of these add up without
// overflow: 8 * 2 * 15 * 127 < 2^15.
inline Shorts dot_byte_pairs(Bytes unsigned_bytes, Bytes signed_bytes) {
  return (Shorts)_mm256_maddubs_epi16((__m256i)unsigned_bytes, (__m256i)signed_bytes);
}
// Neighbouring 16-bit numbers added to 32 bits, times `factor`.
inline Ints add_pairs(Shorts values, int16_t factor) {
  return (Ints)_mm256_madd_epi16((__m256i)values, _mm256_set1_epi16(factor));
}
#endif
inline Floats load_half(const uint16_t* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
inline void store_half(uint16_t* to, Floats values) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

#endif

inline Floats load_floats(const float* from) { return load<Floats>(from); }
inline float half_to_float(uint16_t value) { return _cvtsh_ss(value); }
inline uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

// Rounds to nearest even. NaN stays NaN.
inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float bf16_to_float(uint16_t value) {
  const uint32_t bits = (uint32_t)value << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// The sum and the maximum of the lanes, in a fixed order.
inline float sum_lanes(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}
inline float max_lanes(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// e^x within 2 units in the last place; exactly 0 below -87; NaN stays NaN. Cephes' polynomial (expf.c).
inline Floats exponential(Floats x) {
  const Floats high = broadcast(88.0f), low = broadcast(-87.0f);
  const Ints tiny = x < low;
  Floats t = x > high ? high : (tiny ? low : x);  // the comparisons are false for NaN, which so passes
  const Floats magic = broadcast(12582912.0f);    // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = multiply_add(t, broadcast(1.44269504088896341f), magic);
  const Floats n = shifted - magic;
  t = multiply_add(n, broadcast(-0.693359375f), t);
  t = multiply_add(n, broadcast(2.12194440e-4f), t);
  Floats p = broadcast(1.9875691500e-4f);
  p = multiply_add(p, t, broadcast(1.3981999507e-3f));
  p = multiply_add(p, t, broadcast(8.3334519073e-3f));
  p = multiply_add(p, t, broadcast(4.1665795894e-2f));
  p = multiply_add(p, t, broadcast(1.6666665459e-1f));
  p = multiply_add(p, t, broadcast(5.0000001201e-1f));
  p = multiply_add(p * t, t, t) + 1.0f;
  const Ints exponent = ((Ints)shifted - (Ints)magic) << 23;
  return tiny ? Floats{} : (Floats)((Ints)p + exponent);
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }
inline Floats tanh(Floats x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

}  // namespace octavo
