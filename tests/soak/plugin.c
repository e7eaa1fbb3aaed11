/*
 * The plugin of the soak: one stage kind, `tick`, whose result depends on every step that led to it.
 *
 * Its work has three pieces. Each is a number that `steps` steps scramble, `pause` milliseconds apart; it is saved in the
 * work directory every fifth step and when the host asks the stage to stop. Parts compute their pieces and leave them there.
 * The artifact's bytes depend on the pieces and on the input: whatever was killed meanwhile, a correct result has the same
 * bytes. Two environment variables do not affect digests: RETORT_SOAK_LEDGER names a directory where each process records
 * whether it is a part, and the points that it has sent to the host; RETORT_SOAK_HURRY skips the pauses.
 */
#include "../tests/fixtures/calls.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

enum { PIECES = 3, LONGER = PATH + 64 };

static int32_t describe(retort_sink out, retort_sink err) {
    (void)err;
    put(out, "{\"version\":\"1.0.0\",\"name\":\"soak\",\"summary\":\"ticks\",\"license\":\"MIT\","
             "\"devices\":[\"cpu\"],\"dtypes\":[\"f32\"],"
             "\"stages\":[{\"kind\":\"tick\",\"summary\":\"ticks\",\"output\":\"thing\",\"divisible\":true,\"schema\":"
             "{\"type\":\"object\",\"additionalProperties\":false,\"properties\":{"
             "\"text\":{\"type\":\"string\",\"default\":\"\"},"
             "\"steps\":{\"type\":\"integer\",\"default\":10},"
             "\"pause\":{\"type\":\"integer\",\"default\":10},"
             "\"bytes\":{\"type\":\"integer\",\"default\":1000},"
             "\"input\":{\"type\":\"string\",\"x-retort-artifact\":[\"thing\"]}}}}]}");
    return RETORT_OK;
}

static int32_t probe(const retort_host *host, retort_sink out, retort_sink err) {
    (void)host, (void)err;
    put(out, "[{\"name\":\"cpu\",\"model\":\"imaginary\"}]");
    return RETORT_OK;
}

static int32_t validate(const retort_host *host, retort_str stage, retort_sink out, retort_sink err) {
    (void)host, (void)stage, (void)err;
    put(out, "[]");
    return RETORT_OK;
}

static uint64_t scramble(uint64_t z) {
    z += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint64_t absorb(uint64_t state, const char *bytes, size_t count) {
    for (size_t i = 0; i < count; i++)
        state = scramble(state ^ (unsigned char)bytes[i]);
    return state;
}

/* Replaces a piece atomically. */
static int save(const char *path, long step, uint64_t state) {
    char draft[LONGER + 16];
    snprintf(draft, sizeof draft, "%s.%d", path, (int)getpid());
    FILE *file = fopen(draft, "w");
    if (!file)
        return 0;
    int written = fprintf(file, "%ld %llx\n", step, (unsigned long long)state) > 0;
    written = !fclose(file) && written;
    if (written && !rename(draft, path))
        return 1;
    unlink(draft);
    return 0;
}

/* Sends the host a point, then records it. */
static void tell(const retort_host *host, FILE *ledger, int piece, long step, uint64_t state) {
    char line[128], series[32];
    struct timeval now;
    gettimeofday(&now, NULL);
    snprintf(series, sizeof series, "state/%d", piece);
    host->metric(host->ctx, str(series), (uint64_t)step, (double)(state >> 11));
    if (ledger) {
        snprintf(line, sizeof line, "%s %ld %lld\n", series, step,
                 1000LL * now.tv_sec + now.tv_usec / 1000);
        fputs(line, ledger);
        fflush(ledger);
    }
}

/* Computes a piece, from where an earlier attempt left it. */
static int work(const retort_host *host, const char *job, FILE *ledger, const char *dir, int piece, uint64_t seed,
                uint64_t *result, retort_sink err) {
    char path[LONGER];
    long step = 0, steps = (long)number(job, "steps", 10);
    unsigned long long saved;
    uint64_t state = scramble(seed + (uint64_t)piece);
    snprintf(path, sizeof path, "%s/piece-%d", dir, piece);
    FILE *file = fopen(path, "r");
    if (file) {
        if (fscanf(file, "%ld %llx", &step, &saved) != 2)
            return fail(err, RETORT_FAILED, "bad_data", "a piece is damaged");
        state = saved;
        fclose(file);
    }
    while (step < steps) {
        state = scramble(state ^ (uint64_t)step);
        tell(host, ledger, piece, step, state);
        host->progress(host->ctx, (uint64_t)++step, (uint64_t)steps, str("steps"));
        int stop = host->cancelled(host->ctx) != RETORT_CANCEL_RUN;
        if ((stop || step % 5 == 0 || step == steps) && !save(path, step, state) && step == steps)
            return fail(err, RETORT_FAILED, "io", strerror(errno));
        if (stop)
            return fail(err, RETORT_CANCELLED, "cancelled", "stopped as asked");
        if (!getenv("RETORT_SOAK_HURRY"))
            usleep((useconds_t)(1000 * number(job, "pause", 10)));
    }
    *result = state;
    return RETORT_OK;
}

static int make(const retort_host *host, const char *job, uint64_t state, retort_sink result, retort_sink err) {
    char path[PATH] = "", name[LONGER], answer[64];
    uint64_t id = 0;
    retort_sink path_out = {path, keep};
    int status = host->artifact_begin(host->ctx, str("thing"), str("the thing"), &id, path_out, err);
    if (status != RETORT_OK)
        return status;
    for (int file = 0; file < 2; file++) {
        snprintf(name, sizeof name, "%s/thing-%d", path, file);
        FILE *out = fopen(name, "w");
        int written = out != NULL;
        for (long left = (long)number(job, "bytes", 1000); written && left > 0; left -= (long)sizeof state) {
            state = scramble(state);
            written = fwrite(&state, sizeof state, 1, out) == 1;
        }
        if (out && fclose(out))
            written = 0;
        if (!written)
            return fail(err, RETORT_FAILED, "io", strerror(errno));
    }
    status = host->artifact_commit(host->ctx, id, str("{}"), err);
    if (status != RETORT_OK)
        return status;
    snprintf(answer, sizeof answer, "{\"output\":%llu,\"summary\":{}}", (unsigned long long)id);
    put(result, answer);
    return RETORT_OK;
}

static int32_t run(const retort_host *host, retort_str stage, retort_sink result, retort_sink err) {
    char *job = strndup(stage.data, stage.len);
    char dir[PATH], text[256] = "", input[PATH], name[LONGER];
    FILE *ledger = NULL;
    const char *ledgers = getenv("RETORT_SOAK_LEDGER"), *part = strstr(job, "\"part\":{");
    if (ledgers) {
        snprintf(name, sizeof name, "%s/%d", ledgers, (int)getpid());
        ledger = fopen(name, "a");
        if (ledger && part)
            fputs("part\n", ledger);
    }
    if (!find(job, "work_dir", dir, sizeof dir))
        return fail(err, RETORT_FAILED, "internal", "no work_dir");
    find(job, "text", text, sizeof text);
    uint64_t state = absorb((uint64_t)number(job, "seed", 0), text, strlen(text));
    if (find(job, "path", input, sizeof input)) {
        char bytes[4096];
        size_t count;
        snprintf(name, sizeof name, "%s/thing-1", input);
        FILE *in = fopen(name, "r");
        if (!in)
            return fail(err, RETORT_FAILED, "missing_input", "the input is not there");
        while ((count = fread(bytes, 1, sizeof bytes, in)) > 0)
            state = absorb(state, bytes, count);
        fclose(in);
    }
    uint64_t sum = 0;
    int status = RETORT_OK;
    for (int piece = 0; piece < PIECES && status == RETORT_OK; piece++) {
        uint64_t done = 0;
        if (part && piece % (int)number(part, "of", 1) != (int)number(part, "index", 0))
            continue;
        status = work(host, job, ledger, dir, piece, state, &done, err);
        sum = scramble(sum ^ done);
    }
    if (status == RETORT_OK && part)
        put(result, "{\"output\":0}");
    else if (status == RETORT_OK)
        status = make(host, job, sum, result, err);
    if (ledger)
        fclose(ledger);
    free(job);
    return status;
}

static const retort_plugin table = {sizeof(retort_plugin), RETORT_ABI_MINOR, 0, 0, NULL, describe, probe, validate, run};

RETORT_EXPORT const retort_plugin *retort_plugin_v1(void) {
    return &table;
}
