// The formulas of arithmetic.py as loops over a few groups at a time: they stay in the first cache.
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

// Sums and differences of the elements APART (1, 2 or 4) from one another.
template <int APART>
Vector mixed(Vector v) {
  constexpr int A = APART;
  Vector sign;
  for (int i = 0; i < 8; ++i) sign[i] = i & A ? -1.0f : 1.0f;
  return __builtin_shufflevector(v, v, A, 1 ^ A, 2 ^ A, 3 ^ A, 4 ^ A, 5 ^ A, 6 ^ A, 7 ^ A) +
         v * sign;
}

Vector vector_at(const float* x) {
  Vector v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

void store_vector(Vector v, float* x) { std::memcpy(x, &v, sizeof v); }

// Those FIRST, 2 FIRST, .. from one another, below END: eight elements at a time.
template <int FIRST, int END>
void mix_neighbours(float* x, int64_t E) {
  for (int64_t i = 0; i < E; i += 8) {
    Vector v = vector_at(x + i);
    if constexpr (FIRST <= 1 && END > 1) v = mixed<1>(v);
    if constexpr (FIRST <= 2 && END > 2) v = mixed<2>(v);
    if constexpr (FIRST <= 4 && END > 4) v = mixed<4>(v);
    store_vector(v, x + i);
  }
}

// Those step, 2 step and 4 step from one another, where step is a multiple of 8: in one go.
void mix_eight(float* x, int64_t E, int64_t step) {
  for (int64_t block = 0; block < E; block += 8 * step)
    for (int64_t i = block; i < block + step; i += 8) {
      Vector v[8];
      for (int k = 0; k < 8; ++k) v[k] = vector_at(x + i + k * step);
      for (int apart = 1; apart < 8; apart *= 2)
        for (int k = 0; k < 8; ++k)
          if (!(k & apart)) {
            const Vector a = v[k], b = v[k + apart];
            v[k] = a + b;
            v[k + apart] = a - b;
          }
      for (int k = 0; k < 8; ++k) store_vector(v[k], x + i + k * step);
    }
}

// Those `apart` from one another.
void mix(float* x, int64_t E, int64_t apart) {
  for (int64_t block = 0; block < E; block += 2 * apart) {
    float *first = x + block, *second = first + apart;
    for (int64_t i = 0; i < apart; ++i) {
      const float a = first[i], b = second[i];
      first[i] = a + b;
      second[i] = a - b;
    }
  }
}

// Sums and differences along an axis of n elements, `step` apart.
void mix_axis(float* x, int64_t E, int64_t n, int64_t step) {
  if (n == 8 && step % 8 == 0) return mix_eight(x, E, step);
  const int64_t end = n * step;
  int64_t apart = step;
  if (apart == 1 && end >= 8) {
    mix_neighbours<1, 8>(x, E);
    apart = 8;
  }
  for (; apart < end; apart *= 2) {
    if (apart == 1)
      mix_neighbours<1, 2>(x, E);
    else if (apart == 2)
      mix_neighbours<2, 4>(x, E);
    else if (apart == 4)
      mix_neighbours<4, 8>(x, E);
    else
      mix(x, E, apart);
  }
}

// What the elements along an axis are multiplied by, once for all groups: a period of it.
std::vector<float> signs_of(const Format& f, int axis, bool back) {
  const int64_t n = f.axis_size[axis], step = f.axis_step[axis];
  if (f.group == 0) return {};  // one scale for an empty tensor
  const float factor = back ? 1.0f : 1.0f / static_cast<float>(n);
  std::vector<float> signs(std::max(int64_t{8}, n * step));
  for (std::size_t i = 0; i < signs.size(); ++i)
    signs[i] = (f.axis_signs[axis] >> (static_cast<int64_t>(i) / step % n)) & 1 ? -factor : factor;
  return signs;
}

void multiply_signs(float* __restrict x, int64_t E, const std::vector<float>& signs) {
  const int64_t period = static_cast<int64_t>(signs.size());
  const float* __restrict sign = signs.data();
  for (int64_t start = 0; start < E; start += period)
    for (int64_t i = 0; i < period; ++i) x[start + i] *= sign[i];
}

// The signs of every axis, in the direction in which a thread turns.
struct Signs {
  std::vector<float> of_axis[MAX_AXES];
  Signs(const Format& f, bool back) {
    for (int axis = 0; axis < f.num_axes; ++axis) of_axis[axis] = signs_of(f, axis, back);
  }
};

void turn(float* x, const Format& f, int axis, const Signs& signs, bool back) {
  const int64_t E = f.group, n = f.axis_size[axis], step = f.axis_step[axis];
  if (E == 0) return;
  if (!back) multiply_signs(x, E, signs.of_axis[axis]);
  mix_axis(x, E, n, step);
  if (back) multiply_signs(x, E, signs.of_axis[axis]);
}

void rotate(float* x, const Format& f, const Signs& signs) {
  for (int axis = 1; axis < f.num_axes; ++axis) turn(x, f, axis, signs, false);
  if (f.num_axes) turn(x, f, 0, signs, false);
}

void rotate_back(float* x, const Format& f, const Signs& signs) {
  for (int axis = 0; axis < f.num_axes; ++axis) turn(x, f, axis, signs, true);
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

// Four codes, one a byte: shifts of bytes have no instruction of their own.
using Word __attribute__((may_alias, aligned(1))) = uint32_t;

// The WIDTH low bits of each byte.
template <int WIDTH, typename W>
constexpr W FIELDS = static_cast<W>(((1u << WIDTH) - 1) * 0x01010101u);

// Codes u of a group, one a byte, to WIDTH of their bits from bit `first` on: `size` W of a plane.
template <int WIDTH, typename W>
void pack(const W* __restrict u, int64_t size, int first, W* __restrict plane) {
  for (int64_t j = 0; j < size; ++j) {
    uint32_t packed = 0;
    for (int i = 0; i < 8 / WIDTH; ++i)
      packed |= ((u[i * size + j] >> first) & FIELDS<WIDTH, W>) << (WIDTH * i);
    plane[j] = static_cast<W>(packed);
  }
}

template <int WIDTH, typename W>
void unpack(const W* __restrict plane, int64_t size, int first, W* __restrict u) {
  for (int i = 0; i < 8 / WIDTH; ++i) {
    W* part = u + i * size;
    for (int64_t j = 0; j < size; ++j) {
      const uint32_t codes = ((plane[j] >> (WIDTH * i)) & FIELDS<WIDTH, W>) << first;
      part[j] = static_cast<W>(first ? part[j] | codes : codes);
    }
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

// Calls `work(from, to, size)` for each of `count` groups, which are so many bytes apart; `size` is
// of its part of a plane, in words where they fit and else in bytes.
template <typename Work>
void for_each_group(
    const uint8_t* from, int64_t from_bytes, uint8_t* to, int64_t to_bytes, int64_t count,
    Work work) {
  const int64_t bytes = std::min(from_bytes, to_bytes);  // codes are a byte each
  for (int64_t g = 0; g < count; ++g, from += from_bytes, to += to_bytes)
    if (bytes % 4)
      work(from, to, bytes);
    else
      work(reinterpret_cast<const Word*>(from), reinterpret_cast<Word*>(to), bytes / 4);
}

// Codes of `count` groups, one a byte, to `width` of their bits from bit `first` on.
void pack_plane(int width, const uint8_t* u, int64_t E, int64_t count, int first, uint8_t* plane) {
  with_width(width, [=](auto constant) {
    constexpr int WIDTH = constant.value;
    for_each_group(u, E, plane, E * WIDTH / 8, count, [=](auto* from, auto* to, int64_t size) {
      pack<WIDTH>(from, size, first, to);
    });
  });
}

void unpack_plane(
    int width, const uint8_t* plane, int64_t E, int64_t count, int first, uint8_t* u) {
  with_width(width, [=](auto constant) {
    constexpr int WIDTH = constant.value;
    for_each_group(plane, E * WIDTH / 8, u, E, count, [=](auto* from, auto* to, int64_t size) {
      unpack<WIDTH>(from, size, first, to);
    });
  });
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

constexpr int64_t MOST_AT_ONCE = 16;

// How many groups are coded at once, so that what is computed once a group stands side by side.
int64_t at_once(const Format& f) {
  return std::clamp(8192 / std::max(f.group, int64_t{1}), int64_t{1}, MOST_AT_ONCE);
}

// Room for the groups coded at once, one a thread.
struct Room {
  std::vector<float> values;
  std::vector<uint8_t> codes;
  int32_t peak[MOST_AT_ONCE], scale[MOST_AT_ONCE];
  float inverse[MOST_AT_ONCE];
  Signs forth, back;
  explicit Room(const Format& f)
      : values(f.group * at_once(f)), codes(values.size()), forth(f, false), back(f, true) {}
};

// Groups of one row that are coded at once.
struct Part {
  int64_t row, group, count;
};

int32_t largest_magnitude(const float* x, int64_t E) {
  int32_t peak = 0;
  for (int64_t i = 0; i < E; ++i) peak = std::max(peak, bits_of(x[i]) & MAGNITUDE);
  return peak;
}

// The stored scales of groups with these peaks, and the inverses of their steps.
void scales_of(const Format& f, int64_t count, Room& room) {
  const int32_t smallest = f.smallest_scale, largest = f.largest_scale;
  const float factor = f.clip_over_half_range;
  for (int64_t g = 0; g < count; ++g) {
    const int32_t bits = bits_of(float_of(room.peak[g]) * factor) & MAGNITUDE;
    const int32_t step = (std::min(std::max(bits, smallest), largest) + 0xFFFF) & -65536;
    const int32_t inverse = bits_of(1.0f / float_of(step));
    room.inverse[g] = float_of((inverse + 0xFF + ((inverse >> 9) & 1)) & -512);
    room.scale[g] = bits >= EXPONENT ? NAN_SCALE : bits == 0 ? 0 : step;
  }
}

// The levels of the values of group g, as codes.
void levels_of(const float* x, const Format& f, int64_t g, uint32_t place, Room& room) {
  const int64_t E = f.group;
  const int half = 1 << (f.bits - 1), low = f.is_mid_rise ? -half : 1 - half, top = half - 1;
  const float inverse = room.inverse[g];
  uint8_t* u = room.codes.data() + g * E;
  if (room.scale[g] == NAN_SCALE)
    std::memset(u, low + half, static_cast<std::size_t>(E));
  else if (f.is_stochastic)
    stochastic_levels(x, f, inverse, low, top, half, place, u);
  else if (f.is_mid_rise)
    levels<true>(x, E, inverse, low, top, half, u);
  else
    levels<false>(x, E, inverse, low, top, half, u);
}

// Codes the values x of a part of the payload's rows.
void encode(const float* x, const Format& f, Part part, const Row& row, Room& room) {
  const int64_t E = f.group, first = part.group * E;
  for (int64_t g = 0; g < part.count; ++g) room.peak[g] = largest_magnitude(x + g * E, E);
  scales_of(f, part.count, room);
  const uint32_t place = static_cast<uint32_t>((part.row * row.groups + part.group) * E);
  for (int64_t g = 0; g < part.count; ++g) {
    const float* next = x + (MOST_AT_ONCE + g) * E;  // it arrives while this part is coded
    for (int64_t i = 0; i < E; i += 16) __builtin_prefetch(next + i);
    levels_of(x + g * E, f, g, place + static_cast<uint32_t>(g * E), room);
  }
  const uint8_t* u = room.codes.data();
  pack_plane(f.low_width, u, E, part.count, 0, row.low + first * f.low_width / 8);
  if (f.high_width)
    pack_plane(f.high_width, u, E, part.count, f.low_width, row.high + first * f.high_width / 8);
  uint8_t* scales = row.scales + part.group;
  for (int64_t g = 0; g < part.count; ++g) {
    scales[g] = static_cast<uint8_t>(room.scale[g] >> 16);
    scales[row.groups + g] = static_cast<uint8_t>(room.scale[g] >> 24);
  }
}

template <bool ADD>
void scale_codes(
    const uint8_t* __restrict u, int64_t E, float scale, float offset, float* __restrict x) {
  for (int64_t i = 0; i < E; ++i) {
    const float value = (static_cast<float>(static_cast<int>(u[i])) - offset) * scale;
    x[i] = ADD ? x[i] + value : value;
  }
}

// Decodes a part of a payload's row into `x`, or adds it.
template <bool ADD>
void decode(const Row& row, const Format& f, Part part, Room& room, float* x) {
  const int64_t E = f.group, first = part.group * E;
  uint8_t* u = room.codes.data();
  unpack_plane(f.low_width, row.low + first * f.low_width / 8, E, part.count, 0, u);
  if (f.high_width)
    unpack_plane(f.high_width, row.high + first * f.high_width / 8, E, part.count, f.low_width, u);
  const uint8_t* scales = row.scales + part.group;
  for (int64_t g = 0; g < part.count; ++g) {
    const uint32_t low = scales[g], high = scales[row.groups + g];
    const float scale = float_of(static_cast<int32_t>(low << 16 | high << 24));
    scale_codes<ADD>(u + g * E, E, scale, f.zero_offset, x + g * E);
  }
}

// ---- operators -------------------------------------------------------------------------------

template <typename Work>
void for_each_part(int64_t rows, int64_t groups, const Format& f, int threads, Work work) {
  const int64_t most = at_once(f), parts = (groups + most - 1) / most;
  const auto call = [&](int64_t i, Room& room) {
    const int64_t group = i % parts * most;
    work(Part{i / parts, group, std::min(most, groups - group)}, room);
  };
  if (threads < 2 || rows * parts < 2) {
    Room room(f);
    for (int64_t i = 0; i < rows * parts; ++i) call(i, room);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    Room room(f);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows * parts; ++i) call(i, room);
  }
}

// What is coded of `left` values at x: x itself, or a copy with zeros after them, as f asks for it.
template <typename T>
const float* prepared(const T* x, int64_t left, const Format& f, Part part, Room& room) {
  const int64_t E = f.group, numel = part.count * E;
  if constexpr (std::is_same_v<T, float>)
    if (left >= numel && !f.saturates && !f.num_axes) return x;
  float* values = room.values.data();
  load(x, std::min(left, numel), numel, values);
  for (int64_t g = 0; g < part.count; ++g) {
    if (f.saturates) clamp_to_finite(values + g * E, E);
    rotate(values + g * E, f, room.forth);
  }
  return values;
}

template <typename T>
void quantize(
    const T* x, int64_t rows, int64_t row_numel, int64_t row_stride, int64_t groups,
    const Format& f, int threads, uint8_t* payload) {
  for_each_part(rows, groups, f, threads, [&](Part part, Room& room) {
    const int64_t first = part.group * f.group;
    const T* source = x + part.row * row_stride + first;
    const float* values = prepared(source, row_numel - first, f, part, room);
    encode(values, f, part, row_of(payload, part.row, groups, f), room);
  });
}

// Adds up a part of `rows` rows of a payload, from part.row on; the sum stays rotated.
void sum_rows(
    uint8_t* payload, int64_t rows, int64_t groups, const Format& f, Part part, Room& room,
    float* sum) {
  decode<false>(row_of(payload, part.row, groups, f), f, part, room, sum);
  for (int64_t row = 1; row < rows; ++row)
    decode<true>(row_of(payload, part.row + row, groups, f), f, part, room, sum);
}

void average(float* sum, int64_t numel, int64_t rows) {
  const float share = static_cast<float>(1.0 / static_cast<double>(rows));
  for (int64_t i = 0; i < numel; ++i) sum[i] *= share;
}

// sum_rows, rotated back, as T.
template <typename T>
void decode_rows(
    uint8_t* payload, int64_t rows, int64_t groups, const Format& f, bool averages, Part part,
    Room& room, T* out) {
  const int64_t E = f.group, numel = part.count * E;
  float* values = room.values.data();
  if constexpr (std::is_same_v<T, float>) values = out;
  sum_rows(payload, rows, groups, f, part, room, values);
  for (int64_t g = 0; g < part.count; ++g) rotate_back(values + g * E, f, room.back);
  if (averages) average(values, numel, rows);
  if constexpr (!std::is_same_v<T, float>) store_all(values, numel, out);
}

template <typename T>
void dequantize(
    uint8_t* payload, int64_t rows, int64_t groups, const Format& f, int threads, T* out) {
  for_each_part(rows, groups, f, threads, [&](Part part, Room& room) {
    T* place = out + (part.row * groups + part.group) * f.group;
    decode_rows(payload, 1, groups, f, false, part, room, place);
  });
}

template <typename T>
void dequantize_sum(
    uint8_t* payload, int64_t rows, int64_t groups, const Format& f, bool averages, int threads,
    T* out) {
  for_each_part(1, groups, f, threads, [&](Part part, Room& room) {
    T* place = out + part.group * f.group;
    decode_rows(payload, rows, groups, f, averages, part, room, place);
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
  for_each_part(1, groups, *f, threads, [&](Part part, Room& room) {
    float* values = room.values.data();
    sum_rows(payload, rows, groups, *f, part, room, values);
    if (averages) average(values, part.count * f->group, rows);
    encode(values, *f, part, row_of(total, 0, groups, *f), room);
  });
}
}
