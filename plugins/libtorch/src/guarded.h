// What C++ throws, for Rust.
#pragma once

#include <string>

#include <c10/util/Exception.h>

// nullptr, or the message of what was thrown; the message lives until the thread's next call.
template <class Body> inline const char *guarded(Body body) {
  static thread_local std::string message;
  try {
    body();
    return nullptr;
  } catch (const c10::Error &error) {
    message = error.what_without_backtrace();
  } catch (const std::exception &error) {
    message = error.what();
  } catch (...) {
    message = "libtorch threw something that is no exception";
  }
  return message.c_str();
}
