// Argument checks that reach Python as ValueError with the offending values in the message.
#pragma once

#include <sstream>
#include <stdexcept>

namespace subspace {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace subspace

#define SUBSPACE_CHECK(condition, ...)                 \
  do {                                                 \
    if (!(condition)) ::subspace::refuse(__VA_ARGS__); \
  } while (false)
