// hello: a plugin with one kind of stage, which estimates pi from random points.
#include "retort_text.h"
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
static const char *const description = R"({"name": "hello", "version": "0.1.0", "license": "MIT",
    "summary": "estimates pi from random points", "devices": ["cpu"], "dtypes": ["f32"],
    "stages": [{"kind": "hello", "summary": "estimates pi", "output": "number",
        "schema": {"type": "object", "additionalProperties": false, "properties": {"rounds": {"type": "integer",
            "minimum": 1, "default": 100, "description": "rounds of 100000 points each"}}}}]})";
// A number in [0, 1) that depends on seed and index alone (splitmix64): equal seeds give equal results.
static double uniform(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
}

static int32_t estimate(const retort_host *host, retort_str job, retort_sink result, retort_sink err) {
    const uint64_t seed = retort_json_u64(job, "/seed", 0), rounds = retort_json_u64(job, "/options/rounds", 100);
    uint64_t inside = 0, id = 0;
    double pi = 0;
    for (uint64_t round = 0; round < rounds; round++) {
        if (host->cancelled(host->ctx) != RETORT_CANCEL_RUN)
            return retort_fail(err, RETORT_CANCELLED, "cancelled", "stopped as asked");
        for (uint64_t i = round * 100000; i < (round + 1) * 100000; i++) {
            const double x = uniform(seed, 2 * i), y = uniform(seed, 2 * i + 1);
            inside += x * x + y * y < 1;
        }
        pi = 4.0 * static_cast<double>(inside) / (100000.0 * static_cast<double>(round + 1));
        host->metric(host->ctx, retort_string("pi"), round, pi);
        host->progress(host->ctx, round + 1, rounds, retort_string("rounds"));
    }
    retort_buffer dir = {};
    if (host->artifact_begin(host->ctx, retort_string("number"), retort_string("pi"), &id, retort_into(&dir), err))
        return RETORT_FAILED;
    std::ofstream file(std::filesystem::path(dir.text) / "number.json");
    file.precision(17);
    if (!(file << "{\"pi\": " << pi << "}\n").flush()) throw std::runtime_error("number.json cannot be written");
    const std::string meta = R"({"table": {"title": "An estimate", "columns": ["name", "value"], "rows": [["pi", )" +
                             std::to_string(pi) + "]]}}";
    if (host->artifact_commit(host->ctx, id, retort_string(meta.c_str()), err)) return RETORT_FAILED;
    retort_put(result, ("{\"output\": " + std::to_string(id) + "}").c_str());
    return RETORT_OK;
}
// No exception may cross the boundary.
static int32_t run(const retort_host *host, retort_str job, retort_sink result, retort_sink err) try {
    return estimate(host, job, result, err);
} catch (const std::exception &error) { return retort_fail(err, RETORT_FAILED, "internal", error.what()); }
static int32_t describe(retort_sink out, retort_sink) { return retort_put(out, description), RETORT_OK; }
static int32_t probe(const retort_host *, retort_sink out, retort_sink) {
    return retort_put(out, R"([{"name": "cpu"}])"), RETORT_OK;
}
static int32_t validate(const retort_host *, retort_str, retort_sink diagnostics, retort_sink) {
    return retort_put(diagnostics, "[]"), RETORT_OK; // checks that the schema cannot express belong here
}
static const retort_plugin table = {sizeof(retort_plugin), RETORT_ABI_MINOR, 0, 0, nullptr, describe, probe,
                                    validate, run};
const retort_plugin *retort_plugin_v1() { return &table; }
