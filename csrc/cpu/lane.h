// A few numbers that are worked on as one: vector registers where the compiler has types for them (GCC, Clang), arrays
// with the same operators elsewhere (MSVC, or SUBSPACE_PLAIN_LANES for a look at them). Loads need no alignment.
#pragma once

#if defined(__GNUC__) && !defined(SUBSPACE_PLAIN_LANES)

#define SUBSPACE_INLINE inline __attribute__((always_inline))
// Makes Name the type of `count` values.
#define SUBSPACE_LANE(Name, Value, count) \
  typedef Value Name __attribute__((vector_size(count * sizeof(Value)), aligned(sizeof(Value))))

namespace subspace {
namespace {

// Element by element: out is `one` where the mask holds, else `other`.
template <class Mask, class Lane>
SUBSPACE_INLINE void choose(const Mask& mask, const Lane& one, const Lane& other, Lane& out) {
  out = mask ? one : other;
}

}  // namespace
}  // namespace subspace

#else

#ifdef _MSC_VER
#define SUBSPACE_INLINE __forceinline
#else
#define SUBSPACE_INLINE inline
#endif
#define SUBSPACE_LANE(Name, Value, count) using Name = ::subspace::PlainLane<Value, count>

namespace subspace {

template <class Value, int kCount>
struct PlainLane {
  Value at[kCount];

  Value& operator[](int i) { return at[i]; }
  Value operator[](int i) const { return at[i]; }

  template <class Function>
  static SUBSPACE_INLINE PlainLane each(Function function) {
    PlainLane out;
    for (int i = 0; i < kCount; ++i) out.at[i] = function(i);
    return out;
  }

  friend SUBSPACE_INLINE PlainLane operator+(const PlainLane& a, const PlainLane& b) {
    return each([&](int i) { return a[i] + b[i]; });
  }
  friend SUBSPACE_INLINE PlainLane operator-(const PlainLane& a, const PlainLane& b) {
    return each([&](int i) { return a[i] - b[i]; });
  }
  friend SUBSPACE_INLINE PlainLane operator*(const PlainLane& a, const PlainLane& b) {
    return each([&](int i) { return a[i] * b[i]; });
  }
  friend SUBSPACE_INLINE PlainLane operator-(const PlainLane& a) {
    return each([&](int i) { return -a[i]; });
  }
  friend SUBSPACE_INLINE PlainLane operator-(Value a, const PlainLane& b) {
    return each([&](int i) { return a - b[i]; });
  }
  friend SUBSPACE_INLINE PlainLane operator*(Value a, const PlainLane& b) {
    return each([&](int i) { return a * b[i]; });
  }
  friend SUBSPACE_INLINE PlainLane operator*(const PlainLane& a, Value b) { return b * a; }
  friend SUBSPACE_INLINE PlainLane operator/(Value a, const PlainLane& b) {
    return each([&](int i) { return a / b[i]; });
  }
  friend SUBSPACE_INLINE PlainLane<bool, kCount> operator<(const PlainLane& a, const PlainLane& b) {
    return PlainLane<bool, kCount>::each([&](int i) { return a[i] < b[i]; });
  }
  friend SUBSPACE_INLINE PlainLane<bool, kCount> operator>(const PlainLane& a, const PlainLane& b) { return b < a; }
  SUBSPACE_INLINE PlainLane& operator+=(const PlainLane& other) { return *this = *this + other; }
};

namespace {

template <class Lane, int kCount>
SUBSPACE_INLINE void choose(const PlainLane<bool, kCount>& mask, const Lane& one, const Lane& other, Lane& out) {
  out = Lane::each([&](int i) { return mask[i] ? one[i] : other[i]; });
}

}  // namespace
}  // namespace subspace

#endif
