// The formulas of arithmetic.py as loops over one group at a time, which stays in the first cache.
//
// The bytes are those of arithmetic.py, for the reasons that stand there: a butterfly adds the same
// pairs, rows are added from the first to the last, and the build contracts no multiply-adds.
// float16 does not come here: cpu_codec.py converts it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

constexpr int MAX_AXES = 4;

// Fields in the order of cpu_codec.py's Format.
struct Format {
  int64_t group;  // elements a group, E
  int32_t bits, low_width, high_width;  // high_width 0: one plane
  int32_t is_mid_rise, is_stochastic, saturates;
  int32_t smallest_scale, largest_scale;
  float clip_over_half_range, zero_offset;
  uint32_t seed;  // multiplied as bitmath.noise does
  int32_t num_axes;
  int64_t axis_size[MAX_AXES], axis_step[MAX_AXES];  // elements from one of an axis to the next
  uint32_t axis_signs[MAX_AXES];  // bit i: sign i is negative
};

constexpr int32_t EXPONENT = 0x7F800000, MAGNITUDE = 0x7FFFFFFF, NAN_SCALE = 0x7FC00000;

int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- values ----------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};

float to_float(float x) { return x; }
float to_float(BFloat16 x) { return float_of(static_cast<int32_t>(uint32_t{x.bits} << 16)); }

void store(float value, float& out) { out = value; }
void store(float value, BFloat16& out) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(value));
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = static_cast<int32_t>(bits & MAGNITUDE) > EXPONENT;
  out.bits = static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded);
}

template <typename T>
void store_all(const float* __restrict values, int64_t count, T* __restrict out) {
  for (int64_t i = 0; i < count; ++i) store(values[i], out[i]);
}

template <typename T>
void load(const T* __restrict x, int64_t count, int64_t E, float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i]);
  for (int64_t i = count; i < E; ++i) out[i] = 0.0f;
}

void clamp_to_finite(float* x, int64_t E) {
  int32_t peak = 0;
  for (int64_t i = 0; i < E; ++i) {
    const int32_t magnitude = bits_of(x[i]) & MAGNITUDE;
    peak = std::max(peak, magnitude == EXPONENT ? 0 : magnitude);
  }
  if (peak == 0 || peak > EXPONENT) return;  // its step is not finite, whatever its Inf becomes
  for (int64_t i = 0; i < E; ++i) {
    const int32_t bits = bits_of(x[i]);
    x[i] = (bits & MAGNITUDE) == EXPONENT ? float_of((bits & ~MAGNITUDE) | peak) : x[i];
  }
}

// ---- rotation --------------------------------------------------------------------------------

using Vector __attribute__((vector_size(32))) = float;

// Sums and differences of the elements APART (1, 2 or 4) from one another, eight at a time.
template <int APART>
void mix_neighbours(float* x, int64_t E) {
  constexpr int A = APART;
  Vector sign;
  for (int i = 0; i < 8; ++i) sign[i] = i & A ? -1.0f : 1.0f;
  for (int64_t i = 0; i < E; i += 8) {
    Vector v;
    std::memcpy(&v, x + i, sizeof v);
    v = __builtin_shufflevector(v, v, A, 1 ^ A, 2 ^ A, 3 ^ A, 4 ^ A, 5 ^ A, 6 ^ A, 7 ^ A) + v * sign;
    std::memcpy(x + i, &v, sizeof v);
  }
}

void mix(float* x, int64_t E, int64_t apart) {
  if (apart == 1) return mix_neighbours<1>(x, E);
  if (apart == 2) return mix_neighbours<2>(x, E);
  if (apart == 4) return mix_neighbours<4>(x, E);
  for (int64_t block = 0; block < E; block += 2 * apart) {
    float *first = x + block, *second = first + apart;
    for (int64_t i = 0; i < apart; ++i) {
      const float a = first[i], b = second[i];
      first[i] = a + b;
      second[i] = a - b;
    }
  }
}

// Multiply by factor, or by -factor where bit i of `signs` is set, i the place along the axis.
void multiply_signs(float* x, int64_t E, int64_t n, int64_t step, uint32_t signs, float factor) {
  const auto of = [=](int64_t i) { return (signs >> (i / step % n)) & 1 ? -factor : factor; };
  if (step >= 8) {
    for (int64_t run = 0; run < E; run += step) {
      const float f = of(run);
      for (int64_t i = run; i < run + step; ++i) x[i] *= f;
    }
    return;
  }
  float pattern[128];
  const int64_t period = std::max(int64_t{8}, n * step);
  for (int64_t i = 0; i < period; ++i) pattern[i] = of(i);
  for (int64_t start = 0; start < E; start += period)
    for (int64_t i = 0; i < period; ++i) x[start + i] *= pattern[i];
}

void turn(float* x, const Format& f, int axis, bool back) {
  const int64_t E = f.group, n = f.axis_size[axis], step = f.axis_step[axis];
  const uint32_t signs = f.axis_signs[axis];
  if (E == 0) return;  // one scale for an empty tensor
  if (!back) multiply_signs(x, E, n, step, signs, 1.0f / static_cast<float>(n));
  for (int64_t apart = step; apart < n * step; apart *= 2) mix(x, E, apart);
  if (back) multiply_signs(x, E, n, step, signs, 1.0f);
}

void rotate(float* x, const Format& f) {
  for (int axis = 1; axis < f.num_axes; ++axis) turn(x, f, axis, false);
  if (f.num_axes) turn(x, f, 0, false);
}

void rotate_back(float* x, const Format& f) {
  for (int axis = 0; axis < f.num_axes; ++axis) turn(x, f, axis, true);
}

// ---- codes -----------------------------------------------------------------------------------

// A payload row: where its planes and scales begin.
struct Row {
  uint8_t *low, *high, *scales;
  int64_t groups;
};

Row row_of(uint8_t* payload, int64_t row, int64_t groups, const Format& f) {
  const int64_t codes = groups * f.group * f.bits / 8;
  uint8_t* start = payload + row * (codes + 2 * groups);
  return {start, start + groups * f.group * f.low_width / 8, start + codes, groups};
}

// Codes u of a group, one a byte, to WIDTH of their bits from bit `first` on.
template <int WIDTH>
void pack(const uint8_t* __restrict u, int64_t E, int first, uint8_t* __restrict plane) {
  constexpr int PARTS = 8 / WIDTH;
  constexpr uint8_t MASK = (1 << WIDTH) - 1;
  const int64_t R = E / PARTS;
  for (int64_t j = 0; j < R; ++j) {
    uint8_t byte = 0;
    for (int i = 0; i < PARTS; ++i)
      byte = static_cast<uint8_t>(byte | (((u[i * R + j] >> first) & MASK) << (WIDTH * i)));
    plane[j] = byte;
  }
}

template <int WIDTH>
void unpack(const uint8_t* __restrict plane, int64_t E, int first, uint8_t* __restrict u) {
  constexpr int PARTS = 8 / WIDTH;
  constexpr uint8_t MASK = (1 << WIDTH) - 1;
  const int64_t R = E / PARTS;
  for (int i = 0; i < PARTS; ++i) {
    uint8_t* part = u + i * R;
    if (first)
      for (int64_t j = 0; j < R; ++j)
        part[j] = static_cast<uint8_t>(part[j] | ((plane[j] >> (WIDTH * i)) & MASK) << first);
    else
      for (int64_t j = 0; j < R; ++j)
        part[j] = static_cast<uint8_t>((plane[j] >> (WIDTH * i)) & MASK);
  }
}

// Calls `work` with the width as a constant.
template <typename Work>
void with_width(int width, Work work) {
  switch (width) {
    case 1: return work(std::integral_constant<int, 1>());
    case 2: return work(std::integral_constant<int, 2>());
    case 4: return work(std::integral_constant<int, 4>());
    default: return work(std::integral_constant<int, 8>());
  }
}

void pack_plane(int width, const uint8_t* u, int64_t E, int first, uint8_t* plane) {
  with_width(width, [=](auto constant) { pack<constant.value>(u, E, first, plane); });
}

void unpack_plane(int width, const uint8_t* plane, int64_t E, int first, uint8_t* u) {
  with_width(width, [=](auto constant) { unpack<constant.value>(plane, E, first, u); });
}

uint32_t noise(float x, uint32_t place, uint32_t seed) {
  uint32_t v = seed ^ (place * 0x9E3779B1u) ^ static_cast<uint32_t>(bits_of(x));
  v = (v ^ (v >> 16)) * 0x7FEB352Du;
  v = (v ^ (v >> 15)) * 0x846CA68Bu;
  return v >> 16;
}

// Vectorizes where std::floor does not; the values are far below 2**31.
int floor_to_int(float t) {
  const int whole = static_cast<int>(t);
  return whole - (t < static_cast<float>(whole));
}

template <bool MID_RISE>
void levels(
    const float* __restrict x, int64_t E, float inverse, int low, int top, int offset,
    uint8_t* __restrict u) {
  for (int64_t i = 0; i < E; ++i) {
    const float t = x[i] * inverse;
    const int level = MID_RISE ? floor_to_int(t) : static_cast<int>(std::nearbyint(t));
    u[i] = static_cast<uint8_t>(std::min(std::max(level, low), top) + offset);
  }
}

void stochastic_levels(
    const float* __restrict x, const Format& f, float inverse, int low, int top, int offset,
    uint32_t place, uint8_t* __restrict u) {
  const int64_t E = f.group;
  const int half = f.is_mid_rise ? 32768 : 0;
  const uint32_t seed = f.seed;
  for (int64_t i = 0; i < E; ++i) {
    const int sixteenths = floor_to_int(x[i] * inverse * 65536.0f) - half;
    const int dither = static_cast<int>(noise(x[i], place + static_cast<uint32_t>(i), seed));
    const int level = (sixteenths + dither) >> 16;
    u[i] = static_cast<uint8_t>(std::min(std::max(level, low), top) + offset);
  }
}

// Codes the values of a group; `u` is room for E codes.
void encode(const float* x, const Format& f, uint32_t place, Row row, int64_t group, uint8_t* u) {
  const int64_t E = f.group;
  int32_t peak = 0;
  for (int64_t i = 0; i < E; ++i) peak = std::max(peak, bits_of(x[i]) & MAGNITUDE);
  const int32_t bits = bits_of(float_of(peak) * f.clip_over_half_range) & MAGNITUDE;
  const bool is_finite = bits < EXPONENT;
  int32_t step = std::min(std::max(bits, f.smallest_scale), f.largest_scale);
  step = (step + 0xFFFF) & -65536;
  int32_t inverse = bits_of(1.0f / float_of(step));
  inverse = (inverse + 0xFF + ((inverse >> 9) & 1)) & -512;
  const int half = 1 << (f.bits - 1), low = f.is_mid_rise ? -half : 1 - half, top = half - 1;
  if (!is_finite)
    std::memset(u, low + half, static_cast<std::size_t>(E));
  else if (f.is_stochastic)
    stochastic_levels(x, f, float_of(inverse), low, top, half, place, u);
  else if (f.is_mid_rise)
    levels<true>(x, E, float_of(inverse), low, top, half, u);
  else
    levels<false>(x, E, float_of(inverse), low, top, half, u);
  pack_plane(f.low_width, u, E, 0, row.low + group * E * f.low_width / 8);
  if (f.high_width)
    pack_plane(f.high_width, u, E, f.low_width, row.high + group * E * f.high_width / 8);
  const int32_t stored = !is_finite ? NAN_SCALE : bits == 0 ? 0 : step;
  row.scales[group] = static_cast<uint8_t>(stored >> 16);
  row.scales[row.groups + group] = static_cast<uint8_t>(stored >> 24);
}

// Decodes a group into `x`, or adds it.
template <bool ADD>
void decode(
    const Row& row, const Format& f, int64_t group, uint8_t* __restrict u, float* __restrict x) {
  const int64_t E = f.group;
  unpack_plane(f.low_width, row.low + group * E * f.low_width / 8, E, 0, u);
  if (f.high_width)
    unpack_plane(f.high_width, row.high + group * E * f.high_width / 8, E, f.low_width, u);
  const uint32_t low = row.scales[group], high = row.scales[row.groups + group];
  const float scale = float_of(static_cast<int32_t>(low << 16 | high << 24));
  const float offset = f.zero_offset;
  for (int64_t i = 0; i < E; ++i) {
    const float value = (static_cast<float>(static_cast<int>(u[i])) - offset) * scale;
    x[i] = ADD ? x[i] + value : value;
  }
}

// ---- operators -------------------------------------------------------------------------------

// Room for a group, one a thread.
struct Room {
  std::vector<float> values;
  std::vector<uint8_t> codes;
  explicit Room(const Format& f) : values(f.group), codes(f.group) {}
};

template <typename Work>
void for_each(int64_t count, const Format& f, int threads, Work work) {
  if (threads < 2 || count < 2) {
    Room room(f);
    for (int64_t i = 0; i < count; ++i) work(i, room);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    Room room(f);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) work(i, room);
  }
}

template <typename T>
void quantize(
    const T* x, int64_t rows, int64_t row_numel, int64_t row_stride, int64_t groups,
    const Format& f, int threads, uint8_t* payload) {
  for_each(rows * groups, f, threads, [&](int64_t i, Room& room) {
    const int64_t row = i / groups, group = i % groups, first = group * f.group;
    const int64_t count = std::min(f.group, row_numel - first);
    float* values = room.values.data();
    load(x + row * row_stride + first, count, f.group, values);
    if (f.saturates) clamp_to_finite(values, f.group);
    rotate(values, f);
    const uint32_t place = static_cast<uint32_t>(i * f.group);
    encode(values, f, place, row_of(payload, row, groups, f), group, room.codes.data());
  });
}

template <typename T>
void dequantize(
    uint8_t* payload, int64_t rows, int64_t groups, const Format& f, int threads, T* out) {
  for_each(rows * groups, f, threads, [&](int64_t i, Room& room) {
    float* values = room.values.data();
    decode<false>(row_of(payload, i / groups, groups, f), f, i % groups, room.codes.data(), values);
    rotate_back(values, f);
    store_all(values, f.group, out + i * f.group);
  });
}

void sum_rows(
    uint8_t* payload, int64_t rows, int64_t groups, const Format& f, int64_t group, Room& room) {
  float* values = room.values.data();
  decode<false>(row_of(payload, 0, groups, f), f, group, room.codes.data(), values);
  for (int64_t row = 1; row < rows; ++row)
    decode<true>(row_of(payload, row, groups, f), f, group, room.codes.data(), values);
}

void average(Room& room, int64_t rows) {
  const float share = static_cast<float>(1.0 / static_cast<double>(rows));
  for (float& value : room.values) value *= share;
}

template <typename T>
void dequantize_sum(
    uint8_t* payload, int64_t rows, int64_t groups, const Format& f, bool averages, int threads,
    T* out) {
  for_each(groups, f, threads, [&](int64_t group, Room& room) {
    sum_rows(payload, rows, groups, f, group, room);
    rotate_back(room.values.data(), f);
    if (averages) average(room, rows);
    store_all(room.values.data(), f.group, out + group * f.group);
  });
}

}  // namespace

extern "C" {

void rfcompile_quantize(
    const void* x, int is_bfloat16, int64_t rows, int64_t row_numel, int64_t row_stride,
    int64_t groups, const Format* f, int threads, uint8_t* payload) {
  if (is_bfloat16)
    quantize(static_cast<const BFloat16*>(x), rows, row_numel, row_stride, groups, *f, threads,
             payload);
  else
    quantize(static_cast<const float*>(x), rows, row_numel, row_stride, groups, *f, threads,
             payload);
}

void rfcompile_dequantize(
    uint8_t* payload, int64_t rows, int64_t groups, const Format* f, int threads, int is_bfloat16,
    void* out) {
  if (is_bfloat16)
    dequantize(payload, rows, groups, *f, threads, static_cast<BFloat16*>(out));
  else
    dequantize(payload, rows, groups, *f, threads, static_cast<float*>(out));
}

void rfcompile_dequantize_sum(
    uint8_t* payload, int64_t rows, int64_t groups, const Format* f, int averages, int threads,
    int is_bfloat16, void* out) {
  if (is_bfloat16)
    dequantize_sum(payload, rows, groups, *f, averages, threads, static_cast<BFloat16*>(out));
  else
    dequantize_sum(payload, rows, groups, *f, averages, threads, static_cast<float*>(out));
}

void rfcompile_requantize(
    uint8_t* payload, int64_t rows, int64_t groups, const Format* f, int averages, int threads,
    uint8_t* total) {
  for_each(groups, *f, threads, [&](int64_t group, Room& room) {
    sum_rows(payload, rows, groups, *f, group, room);
    if (averages) average(room, rows);
    const uint32_t place = static_cast<uint32_t>(group * f->group);
    encode(room.values.data(), *f, place, row_of(total, 0, groups, *f), group, room.codes.data());
  });
}
}
