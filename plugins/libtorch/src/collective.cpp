// Ranks meet and add up through libtorch's own c10d, found by a TCPStore: Gloo over TCP in the host's memory, NCCL between
// GPUs. NCCL's group is in the half of libtorch that drives GPUs: its constructors are looked for when they are needed, so
// that the plugin needs neither that half nor NCCL's headers where there is no GPU.
//
// Functions return nullptr, or the message of what was thrown; the message lives until the thread's next call.

#define USE_C10D_GLOO

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <dlfcn.h>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "guarded.h"

namespace {

using Group = c10d::Backend;
using Gloo = c10d::ProcessGroupGloo;
using Store = c10::intrusive_ptr<c10d::Store>;
using Options = c10::intrusive_ptr<Group::Options>;
using std::chrono::milliseconds;

// The store ends after the group, and all that the first rank holds with it.
struct Ranks {
  Store store;
  c10::intrusive_ptr<Group> group;
  // The GPU; none is -1.
  int gpu;
  std::vector<c10::intrusive_ptr<c10d::Work>> begun;
  // What Gloo exchanges. The caller's memory may be gone while Gloo's thread still waits to write into it.
  at::Tensor room;
  // How many milliseconds an exchange may take.
  std::atomic<int64_t> patience{0};
  // Whether Gloo's thread still waits for an exchange that was given up.
  bool waits = false;
};

// Longer than any pause. c10d's own time limits would end ranks that were paused: they read a clock.
constexpr milliseconds NEVER = std::chrono::hours(24 * 365);

[[noreturn]] void give_up(Ranks &ranks, c10d::Work &work, milliseconds patience) {
  if (ranks.gpu >= 0)
    // With a time limit of its own NCCL's group ends what it has begun, and throws.
    work.wait(milliseconds(1));
  else
    ranks.waits = true;
  const double seconds = std::chrono::duration<double>(patience).count();
  TORCH_CHECK(false, "an exchange took longer than ", seconds, " s (a larger RETORT_RANK_TIMEOUT allows more)");
}

// Waits until an exchange is over. What it has waited is counted, not read from a clock: while all ranks are paused (Ctrl-Z)
// none of them comes.
void finish(Ranks &ranks, c10d::Work &work) {
  const milliseconds patience(ranks.patience.load());
  // Gloo's thread wakes this one; NCCL has to be asked.
  const milliseconds slice(ranks.gpu < 0 ? 1000 : 1);
  for (milliseconds waited(0); !work.isCompleted(); waited += slice) {
    if (waited >= patience)
      give_up(ranks, work, patience);
    if (ranks.gpu >= 0) {
      std::this_thread::sleep_for(slice);
      continue;
    }
    try {
      work.wait(std::min(slice, patience - waited));
    } catch (const std::exception &) {
      // It is not over yet, or it has failed: then it throws again below.
    }
  }
  work.wait();
}

// Exchanges values of the host through a copy, on the host or on the GPU, that goes back afterwards.
template <class Exchange> void exchange(Ranks &ranks, float *values, int64_t count, Exchange act) {
  at::Tensor host = at::from_blob(values, {count}, at::kFloat);
  if (ranks.gpu < 0) {
    TORCH_CHECK(!ranks.waits, "an earlier exchange was given up");
    if (!ranks.room.defined() || ranks.room.numel() < count)
      ranks.room = at::empty({count}, at::kFloat);
    std::vector<at::Tensor> tensors{ranks.room.narrow(0, 0, count)};
    tensors[0].copy_(host);
    finish(ranks, *act(tensors));
    host.copy_(tensors[0]);
    return;
  }
  std::vector<at::Tensor> tensors{host.to(at::Device(at::kCUDA, ranks.gpu))};
  finish(ranks, *act(tensors));
  host.copy_(tensors[0]);
}

std::shared_ptr<gloo::transport::Device> device(const std::string &host) {
  if (const char *interface = std::getenv("GLOO_SOCKET_IFNAME"))
    return Gloo::createDeviceForInterface(interface);
  if (host == "127.0.0.1" || host == "localhost")
    return Gloo::createDeviceForHostname("127.0.0.1");
  return Gloo::createDefaultDevice();
}

template <class Function> Function found(const char *name) {
  if (void *function = dlsym(RTLD_DEFAULT, name))
    return reinterpret_cast<Function>(function);
  TORCH_CHECK(false, "this libtorch has no NCCL (", name, "); one with CUDA has: make libtorch CUDA=1");
}

// c10d::ProcessGroupNCCL(store, rank, size, options). Its header needs NCCL's, so its size is not known here: room is more
// than it takes. Both objects end by their own virtual destructors.
c10::intrusive_ptr<Group> nccl(const Store &store, int rank, int size, milliseconds timeout) {
  constexpr size_t ROOM = 64 * 1024;
  // So that a rank that is gone is an error here, and not the end of the process.
  setenv("TORCH_NCCL_BLOCKING_WAIT", "1", 0);
  auto make_options = found<void (*)(void *, bool)>("_ZN4c10d16ProcessGroupNCCL7OptionsC1Eb");
  auto make_group = found<void (*)(void *, Store, int, int, Options)>(
      "_ZN4c10d16ProcessGroupNCCLC1EN3c1013intrusive_ptrINS_5StoreENS1_6detail34intrusive_target_default_null_typeIS3_EEEEii"
      "NS2_INS0_7OptionsENS5_IS8_EEEE");
  void *room = ::operator new(ROOM);
  make_options(room, false);
  auto options = Options::unsafe_steal_from_new(static_cast<Group::Options *>(room));
  options->timeout = timeout;
  room = ::operator new(ROOM);
  make_group(room, store, rank, size, options);
  return c10::intrusive_ptr<Group>::unsafe_steal_from_new(static_cast<Group *>(room));
}

} // namespace

extern "C" {

// Where ranks meet: `held` says that somebody else keeps the store there, `name` tells this place from others in it.
struct RendezvousAddress {
  const char *host;
  uint16_t port;
  bool held;
  const char *name;
};

// Waits until all ranks are there, `timeout` milliseconds at most; so long each later exchange may take, too. `gpu`: by NCCL.
const char *retort_ranks_meet(const RendezvousAddress *address, int rank, int size, int64_t timeout, int gpu, void **out) {
  return guarded([&] {
    const std::string host = address->host;
    c10d::TCPStoreOptions options;
    options.port = address->port;
    options.isServer = rank == 0 && !address->held;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout);
    auto ranks = std::make_unique<Ranks>();
    ranks->gpu = gpu;
    ranks->store = c10::make_intrusive<c10d::TCPStore>(host, options);
    ranks->store = c10::make_intrusive<c10d::PrefixStore>(std::string("retort/") + address->name, ranks->store);
    if (gpu >= 0) {
      ranks->group = nccl(ranks->store, rank, size, options.timeout);
    } else {
      auto how = Gloo::Options::create(options.timeout);
      how->devices.push_back(device(host));
      ranks->group = c10::make_intrusive<Gloo>(ranks->store, rank, size, how);
    }
    ranks->group->setTimeout(NEVER);
    ranks->patience = timeout;
    *out = ranks.release();
  });
}

void retort_ranks_set_patience(void *ranks, int64_t time) { static_cast<Ranks *>(ranks)->patience = time; }

const char *retort_ranks_all_reduce(void *own, float *values, int64_t count) {
  return guarded([&] {
    auto &ranks = *static_cast<Ranks *>(own);
    exchange(ranks, values, count, [&](auto &tensors) { return ranks.group->allreduce(tensors); });
  });
}

const char *retort_ranks_broadcast(void *own, float *values, int64_t count, int root) {
  return guarded([&] {
    auto &ranks = *static_cast<Ranks *>(own);
    c10d::BroadcastOptions options;
    options.rootRank = root;
    exchange(ranks, values, count, [&](auto &tensors) { return ranks.group->broadcast(tensors, options); });
  });
}

const char *retort_ranks_barrier(void *own) {
  return guarded([&] {
    auto &ranks = *static_cast<Ranks *>(own);
    // A sum that is read waits for all, on a GPU too.
    float nothing = 0;
    exchange(ranks, &nothing, 1, [&](auto &tensors) { return ranks.group->allreduce(tensors); });
  });
}

// Begins to sum a tensor of a GPU over all ranks, or with `root` to take it from that one.
const char *retort_ranks_begin(void *own, const void *tensor, int root) {
  return guarded([&] {
    auto &ranks = *static_cast<Ranks *>(own);
    std::vector<at::Tensor> tensors{*static_cast<const at::Tensor *>(tensor)};
    TORCH_CHECK(tensors[0].is_contiguous(), "ranks exchange whole tensors");
    c10d::BroadcastOptions options;
    options.rootRank = root;
    ranks.begun.push_back(root < 0 ? ranks.group->allreduce(tensors) : ranks.group->broadcast(tensors, options));
  });
}

const char *retort_ranks_end(void *own) {
  return guarded([&] {
    auto &ranks = *static_cast<Ranks *>(own);
    auto begun = std::move(ranks.begun);
    ranks.begun.clear();
    for (auto &work : begun)
      finish(ranks, *work);
  });
}

void retort_ranks_part(void *own) {
  guarded([&] {
    auto *ranks = static_cast<Ranks *>(own);
    // The group's end would wait for Gloo's thread, which ends with the process.
    if (!ranks->waits)
      delete ranks;
  });
}
}
