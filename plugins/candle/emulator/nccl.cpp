// An emulated NCCL: the functions that the CUDA variant calls, between processes or threads of one machine, over a file in
// shared memory. Like the emulated GPU it is synchronous: a call returns when all ranks have arrived. Tests run the
// unmodified plugin on it; only tests may depend on it.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace {

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, REMOTE_ERROR = 6 };

constexpr int FLOAT32 = 7, SUM = 0, MOST = 8;
// Values that are exchanged at a time.
constexpr size_t CHUNK = 1 << 16;
// Seconds after which a rank that does not come is gone.
constexpr int PATIENCE = 30;

struct Shared {
    std::atomic<uint32_t> arrived, generation;
    float values[MOST][CHUNK];
};

struct Communicator {
    int rank, size;
    Shared* shared;
    char name[128];
    std::atomic<bool> aborted;
};

double seconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

// Whether all have come.
bool meet(Communicator& own) {
    Shared& all = *own.shared;
    uint32_t now = all.generation.load();
    if (all.arrived.fetch_add(1) + 1 == (uint32_t)own.size) {
        all.arrived.store(0);
        all.generation.fetch_add(1);
        return true;
    }
    double until = seconds() + PATIENCE;
    while (all.generation.load() == now) {
        if (own.aborted || seconds() > until) return false;
        usleep(20);
    }
    return true;
}

// Exchanges piece by piece: each rank shows what it has, and makes of all of them what it gets.
template <class Make> int exchange(Communicator& own, const float* from, float* to, size_t count, Make make) {
    for (size_t at = 0; at < count; at += CHUNK) {
        size_t piece = count - at < CHUNK ? count - at : CHUNK;
        memcpy(own.shared->values[own.rank], from + at, piece * sizeof(float));
        if (!meet(own)) return REMOTE_ERROR;
        for (size_t i = 0; i < piece; ++i) to[at + i] = make(i);
        if (!meet(own)) return REMOTE_ERROR;
    }
    return SUCCESS;
}

}  // namespace

extern "C" {

struct UniqueId {
    char name[128];
};

int ncclGetUniqueId(UniqueId* id) {
    static std::atomic<unsigned> number;
    memset(id, 0, sizeof *id);
    snprintf(id->name, sizeof id->name, "/retort-emulated-nccl-%d-%u", (int)getpid(), number++);
    return SUCCESS;
}

int ncclCommInitRank(Communicator** out, int size, UniqueId id, int rank) {
    if (size < 1 || size > MOST || rank < 0 || rank >= size) return INVALID_ARGUMENT;
    int file = shm_open(id.name, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof(Shared))) return SYSTEM_ERROR;
    void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return SYSTEM_ERROR;
    auto* own = new Communicator{rank, size, (Shared*)memory, {}, {false}};
    memcpy(own->name, id.name, sizeof own->name);
    if (!meet(*own)) return REMOTE_ERROR;
    // All have it open: it goes with the last of them.
    if (rank == 0) shm_unlink(id.name);
    *out = own;
    return SUCCESS;
}

int ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, Communicator* own, void*) {
    if (type != FLOAT32 || operation != SUM) return INVALID_ARGUMENT;
    return exchange(*own, (const float*)from, (float*)to, count, [own](size_t i) {
        float sum = own->shared->values[0][i];
        for (int rank = 1; rank < own->size; ++rank) sum += own->shared->values[rank][i];
        return sum;
    });
}

int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, Communicator* own, void*) {
    if (type != FLOAT32 || root < 0 || root >= own->size) return INVALID_ARGUMENT;
    return exchange(*own, (const float*)from, (float*)to, count, [=](size_t i) { return own->shared->values[root][i]; });
}

int ncclCommGetAsyncError(Communicator*, int* state) { return *state = SUCCESS, SUCCESS; }
int ncclCommAbort(Communicator* own) { return own->aborted = true, SUCCESS; }
int ncclCommDestroy(Communicator* own) {
    munmap(own->shared, sizeof(Shared));
    return delete own, SUCCESS;
}
const char* ncclGetErrorString(int error) { return error == REMOTE_ERROR ? "remote process exited" : "emulated error"; }

}  // extern "C"
