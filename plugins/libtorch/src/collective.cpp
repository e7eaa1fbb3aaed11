// Ranks meet and add up through libtorch's own c10d: Gloo over TCP, found by a TCPStore.
//
// Functions return nullptr, or the message of what was thrown; the message lives until the thread's next call.

#define USE_C10D_GLOO

#include <chrono>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <ATen/ops/from_blob.h>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "guarded.h"

namespace {

using Group = c10d::ProcessGroupGloo;

// The store ends after the group, and all that the first rank holds with it.
struct Ranks {
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<Group> group;
};

std::vector<at::Tensor> over(float *values, int64_t count) {
  return {at::from_blob(values, {count}, at::kFloat)};
}

std::shared_ptr<gloo::transport::Device> device(const std::string &host) {
  if (const char *interface = std::getenv("GLOO_SOCKET_IFNAME"))
    return Group::createDeviceForInterface(interface);
  if (host == "127.0.0.1" || host == "localhost")
    return Group::createDeviceForHostname("127.0.0.1");
  return Group::createDefaultDevice();
}

} // namespace

extern "C" {

// Waits until all ranks are there, `timeout` milliseconds at most; so long each later call may wait.
const char *retort_ranks_meet(const char *host, uint16_t port, int rank, int size, int64_t timeout, void **out) {
  return guarded([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = rank == 0;
    options.waitWorkers = false;
    options.timeout = std::chrono::milliseconds(timeout);
    auto ranks = std::make_unique<Ranks>();
    ranks->store = c10::make_intrusive<c10d::TCPStore>(host, options);
    auto how = Group::Options::create(options.timeout);
    how->devices.push_back(device(host));
    ranks->group = c10::make_intrusive<Group>(ranks->store, rank, size, how);
    *out = ranks.release();
  });
}

const char *retort_ranks_all_reduce(void *ranks, float *values, int64_t count) {
  return guarded([&] {
    auto tensors = over(values, count);
    static_cast<Ranks *>(ranks)->group->allreduce(tensors)->wait();
  });
}

const char *retort_ranks_broadcast(void *ranks, float *values, int64_t count, int root) {
  return guarded([&] {
    auto tensors = over(values, count);
    c10d::BroadcastOptions options;
    options.rootRank = root;
    static_cast<Ranks *>(ranks)->group->broadcast(tensors, options)->wait();
  });
}

const char *retort_ranks_barrier(void *ranks) {
  return guarded([&] { static_cast<Ranks *>(ranks)->group->barrier()->wait(); });
}

void retort_ranks_part(void *ranks) {
  guarded([&] { delete static_cast<Ranks *>(ranks); });
}
}
