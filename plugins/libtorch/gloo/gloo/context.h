// Names of Gloo's that c10d's header mentions. PyPI's wheel of torch has the library and c10d's header but not Gloo's own;
// where a libtorch has those, they are found first. Nothing that is declared here is made, laid out or called.
#pragma once

#include <chrono>

namespace gloo {
class Context {
public:
  void setTimeout(std::chrono::milliseconds);
};
} // namespace gloo
